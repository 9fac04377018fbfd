"""The comparison of rules at toy sizes: matched L0, rows that resume, claims that are judged, a report from rows."""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import recipes
import reconstruction
import rows
import rules
import rules_report
import torch
from benchmark_rows import rule_row

import sae_engine as se

CPU = torch.device("cpu")
TINY = rules.Setting(
    d_sae=64, batch_tokens=64, train_tokens=64 * 8, eval_tokens=128, loss_tokens=300, l0s=(4, 8), seeds=(0,),
    learning_rate=1e-3,
)  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The main job at a toy size, with its folder."""
    monkeypatch.setattr(reconstruction, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(rules, "QUICK", TINY)
    out = tmp_path / "results"
    arguments = ["--quick", "--device", "cpu", "--out", str(out)]

    def run(*more):
        rules.main([*arguments, *more])
        (folder,) = out.iterdir()
        return folder

    return run


@pytest.mark.parametrize("recipe", [pytest.param(r, id=r.name) for r in recipes.RECIPES])
def test_every_rule_learns_and_reaches_the_l0_that_it_promises(recipe):
    """On sums of a few of 40 directions in 16 dimensions."""
    rng = torch.Generator().manual_seed(0)
    directions, tokens = torch.randn(40, 16, generator=rng), 128 * 150
    weights = torch.rand(tokens, 40, generator=rng) * (torch.rand(tokens, 40, generator=rng) < 0.1)
    rows = reconstruction.normalized(weights @ directions + 0.01 * torch.randn(tokens, 16, generator=rng))
    more = [torch.randn(rows.shape, generator=rng)] if recipe.architecture(6, 64).context else []
    setting = dataclasses.replace(TINY, batch_tokens=128, train_tokens=tokens, learning_rate=3e-3)
    trained = rules.train(recipe, 6, 0, rows, *more, setting=setting, parts=15)
    assert trained.errors[-1] < 0.9 * trained.errors[0]
    assert sum(trained.l0s[-3:]) / 3 == pytest.approx(6, rel=0.15)
    sae = trained.sae
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    if isinstance(sae.activation, recipes.Steered):
        assert sae.activation.strength != 1
    if recipe.calibrated:
        recipes.calibrate(sae, 6, x := rows[:128])
        # within one entry a token where pre-activations tie at the cut in fp32
        assert sae.encode(x).l0.double().mean().item() == pytest.approx(6, abs=1 / 128)


def test_scaling_the_encoder_finds_the_least_error():
    sae = se.SparseAutoencoder(16, 64, se.TopK(20))
    x = torch.randn(200, 16)
    recipes.scale_encoder(sae, x)
    error = (sae(x) - x).square().sum()
    for factor in (0.98, 1.02):
        other = se.SparseAutoencoder(16, 64, se.TopK(20))
        other.load_state_dict(sae.state_dict())
        with torch.no_grad():
            other.W_enc.mul_(factor)
        assert (other(x) - x).square().sum() > error


def test_the_cut_lets_so_many_through():
    drawn = torch.randn(4000, 64)
    assert (drawn > recipes.cut(6, 64)).sum(1).double().mean().item() == pytest.approx(6, abs=0.15)  # 4 std errors


def test_main_job_resumes_and_reports(tiny, capsys):
    folder = tiny("--rules", "TopK", "--l0", "4")
    first = rows.load(folder / "rules.jsonl")
    assert [(r["rule"], r["k"], r["seed"]) for r in first] == [("TopK", 4, 0)]
    assert first[0]["l0"] == 4.0 and 0 < first[0]["fvu"] < 5 and first[0]["loss_tokens"] == 510
    tiny("--rules", "TopK", "ReLU")
    second = rows.load(folder / "rules.jsonl")
    assert [(r["rule"], r["k"]) for r in second] == [("TopK", 4), ("ReLU", 4), ("TopK", 8), ("ReLU", 8)]
    assert second[0] == first[0]  # not measured again
    tiny("--rules", "ReLU", "TopK", "--l0", "4", "--again", "--seconds", "0")
    assert "1 of 2 runs are left; the same command carries on" in capsys.readouterr().err
    tiny("--rules", "TopK", "--l0", "4", "--again")
    again = rows.load(folder / "rules.jsonl")
    assert len(again) == 4
    measured = next(r for r in again if (r["rule"], r["k"]) == ("TopK", 4))
    assert measured["fvu"] == first[0]["fvu"]  # the same seed, the same bits
    shown = capsys.readouterr().out
    assert "### L0 = 4" in shown and "loss recovered" in shown
    text = (folder / "rules.md").read_text()
    assert "GPT-2 architecture" in text and "Beside the published" not in text
    assert sorted(path.suffix for path in folder.iterdir()) in ([".jsonl", ".md", ".png"], [".jsonl", ".md"])


def test_an_interrupted_job_keeps_its_rows(tiny, monkeypatch, capsys):
    evaluate, calls = rules.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(rules, "evaluate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        tiny("--rules", "TopK")
    assert stopped.value.code == 130
    assert "carries on" in capsys.readouterr().err
    folder = tiny("--rules", "TopK")
    assert len(rows.load(folder / "rules.jsonl")) == 2
    assert len(calls) == 3


def test_claims_are_judged_by_the_spread_of_seeds():
    claim = recipes.Claim("BatchTopK", "fvu", "TopK", "source")

    def judged(mine, other, **changes):
        made = [rule_row(rule="BatchTopK", seed=i, fvu=f, **changes) for i, f in enumerate(mine)]
        made += [rule_row(seed=i, fvu=f) for i, f in enumerate(other)]
        summary = rules_report.summarised(made)
        return rules_report.verdict(claim, summary["BatchTopK", 32], summary["TopK", 32])

    assert judged([0.10, 0.11], [0.20, 0.21]) == "**held**"
    assert judged([0.20, 0.21], [0.10, 0.11]) == "**worse than claimed**"
    assert judged([0.10, 0.14], [0.11, 0.14]) == "no difference beyond the seeds'"
    assert judged([0.10], [0.20], l0=20.0) == "not at equal L0"
    assert judged([0.10], [0.20, 0.21]) == "one seed, not judged"
    better = dataclasses.replace(claim, metric="loss_recovered")
    recovered = {"BatchTopK": 0.95, "TopK": 0.9}
    made = [rule_row(rule=rule, seed=i, loss_recovered=r) for rule, r in recovered.items() for i in (0, 1)]
    summary = rules_report.summarised(made)
    assert rules_report.verdict(better, summary["BatchTopK", 32], summary["TopK", 32]) == "**held**"


def test_every_claim_names_rules_that_are_there():
    for claim in recipes.CLAIMS:
        assert recipes.find(claim.rule) and recipes.find(claim.better_than)
        assert claim.metric in rules_report.METRIC_NAMES
    with pytest.raises(ValueError, match="TopK"):
        recipes.find("nothing")


def test_published_numbers_stand_beside_gpt2_only(tmp_path):
    made = [rule_row(mse=0.0824), rule_row(k=64, mse=0.1306), rule_row(rule="BatchTopK", mse=0.0807)]
    assert rules_report.published(made) == ""
    gpt2 = [{**r, "model": "openai-community/gpt2", "d": 768, "layer": 8} for r in made]
    text = rules_report.published(gpt2)
    assert "1.00×" in text and "2.00×" in text and "0.0653" in text and "1/128" in text
    assert "layers 6, 7, 8" in rules_report.published([{**r, "layer": 5} for r in gpt2])
    shown = rules_report.write(gpt2, tmp_path)
    assert "published" in shown and "arXiv:2412.06410" in (tmp_path / "rules.md").read_text()
    assert "*20.0*" in rules_report.write([rule_row(l0=20.0)], tmp_path)  # far from the wanted 32: marked


def test_strength_moves_towards_the_wanted_l0():
    rule = recipes.SteeredReLU(2)
    rule.update(se.SparseCodes.from_dense(torch.ones(1, 8)))
    assert rule.strength.log().item() == pytest.approx(recipes.STEERING_RATE * math.log(8 / 2))
    rule.update(se.SparseCodes.from_dense(torch.zeros(1, 8)))  # nothing kept: still a number
    assert math.isfinite(rule.strength)


def test_bad_arguments_are_explained():
    with pytest.raises(SystemExit, match="no rule is called"):
        rules.main(["--rules", "Nothing"])
    with pytest.raises(SystemExit, match="--l0"):
        rules.main(["--quick", "--l0", "4096"])


def test_the_script_starts_with_a_safe_path():
    done = subprocess.run(
        [sys.executable, rules.__file__, "--help"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--again" in done.stdout
