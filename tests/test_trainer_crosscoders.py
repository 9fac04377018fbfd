"""The trainer on several sites: cross-layer transcoders, sets of transcoders, acausal crosscoders; their scales."""

import copy
import re

import pytest
import torch
from short_runs import settings, timeless

import sae_engine as se
from sae_engine.cli import main
from sae_engine.data import read_sites, together
from sae_engine.training import Callback, TrainConfig, Trainer, resume
from sae_engine.training._faults import ConfigError, spread
from sae_engine.training.architectures import BatchTopKSAE, GatedSAE, JumpReLUSAE, TopKSAE
from sae_engine.training.config import SAEConfig

READ, WRITTEN = "blocks.{0..3}.hook_resid_mid", "blocks.{0..3}.hook_mlp_out"
LAYERS = {"hook_name": READ, "hook_name_out": WRITTEN, "architecture": "topk", "k": 4, "d_sae": 64}
BOTH = {"hook_name": ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"], "d_sae": 64}
SAES = [
    {"name": "clt", "wiring": "causal", **LAYERS}, {"name": "set", "wiring": "local", **LAYERS},
    {"name": "acausal", "architecture": "batchtopk", "k": 6, **BOTH},
    {"name": "alone", "hook_name": "blocks.1.hook_resid_post", "architecture": "topk", "k": 4, "d_sae": 64},
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run that trains all of them, and an autoencoder of one site beside them."""
    return se.train(settings(tmp_path_factory.mktemp("runs") / "run", saes=SAES))


def last(run, name):
    found = {}
    for line in run.metrics():
        found |= {key.removeprefix(f"{name}/"): value for key, value in line.items() if key.startswith(f"{name}/")}
    return found


def test_all_wirings_are_trained_in_one_pass_and_measured_as_replacement_models(finished):
    numbers = {name: last(finished, name) for name in ("clt", "set", "acausal", "alone")}
    for name, sites in (("clt", 4), ("set", 4), ("acausal", 2)):
        found = numbers[name]
        assert {f"evaluation/fvu_{site}" for site in range(sites)} <= found.keys()
        assert 0 < found["evaluation/fvu"] < 1.5 and found["evaluation/kl"] > 0
        assert found["evaluation/ce_clean"] < found["evaluation/ce_spliced"]
    assert 2 * 4 < numbers["clt"]["metrics/l0"] <= 4 * 4  # a pre-activation below 0 that is kept is no entry
    assert numbers["clt"]["evaluation/cross_layer"] > 0
    assert numbers["set"]["evaluation/cross_layer"] == 0 and "evaluation/cross_layer" not in numbers["acausal"]
    assert "evaluation/kl" not in numbers["alone"]
    told, report = finished.summary(), (finished.folder / "report.md").read_text()
    assert "clt: FVU" in told and "acausal: FVU" in told
    assert "blocks.0.hook_resid_mid … blocks.3.hook_resid_mid → blocks.0.hook_mlp_out" in report


def test_what_a_run_leaves_is_loaded_with_its_places_and_evaluates_as_it_did(finished):
    saes = finished.saes()
    assert [type(sae).__name__ for sae in saes.values()] == ["Crosscoder"] * 3 + ["SparseAutoencoder"]
    clt, acausal = saes["clt"], saes["acausal"]
    assert clt.provenance.sites == spread(READ) and clt.provenance.target_sites == spread(WRITTEN)
    assert clt.provenance.model == "embedded" and acausal.provenance.target_sites is None
    assert [len(saes[name].sources) for name in ("clt", "set", "acausal")] == [4, 4, 1]
    assert [p.shape[1] for p in clt.W_dec] == [4 * 256, 3 * 256, 2 * 256, 256]


def test_the_lines_of_its_report_load_it(finished, monkeypatch):
    report = (finished.folder / "report.md").read_text()
    monkeypatch.chdir(finished.folder.parent)
    names: dict = {}
    lines = re.search(r"```python\n(.*?)```", report, re.DOTALL)[1]
    exec(lines.replace(str(finished.folder), finished.folder.name), names)
    assert type(names["sae"]) is se.Crosscoder and names["codes"].shape[0] == 4 == names["codes"].batch_shape[0]


def test_each_has_the_bits_that_it_has_alone(finished, tmp_path):
    alone = se.train(settings(tmp_path / "run", saes=SAES[:1])).saes()["clt"]
    for name, tensor in finished.saes()["clt"].state_dict().items():
        assert torch.equal(alone.state_dict()[name], tensor), name


class Stop(Callback):
    def on_checkpoint(self, trainer, folder):
        if trainer.update == 12:
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(finished, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        se.train(settings(tmp_path / "run", saes=SAES), callbacks=[Stop()])
    again = resume(tmp_path / "run")
    for name, sae in finished.saes().items():
        other = again.saes()[name]
        for key, tensor in sae.state_dict().items():
            assert torch.equal(other.state_dict()[key], tensor), (name, key)
    assert timeless(again) == timeless(finished)


def test_rows_are_scaled_site_by_site_and_what_is_saved_takes_them_as_they_are(tmp_path):
    seen = {}

    class Keep(Callback):
        def on_end(self, trainer):
            seen.update(trainer.trainees)

    run = se.train(settings(tmp_path / "run", saes=[SAES[0]]), callbacks=[Keep()])
    clt, trainee = run.saes()["clt"], seen["clt"]
    lm = se.data.load_language_model()
    ids = torch.tensor([[5, 17, 99, 3, 64, 28]])
    x = torch.cat([h[0] for h in read_sites(lm.model, ids, clt.provenance.sites)], 1)
    into, out = ([t for t in side] for side in trainee.scales)
    assert len({*into}) == len({*out}) == 4
    scaled = torch.cat([part * scale for part, scale in zip(x.split(256, 1), into, strict=True)], 1)
    with torch.no_grad():
        trained = trainee.sae.eval()(scaled)
        wanted = torch.cat([part / scale for part, scale in zip(trained.split(256, 1), out, strict=True)], 1)
        torch.testing.assert_close(clt(x), wanted, rtol=1e-4, atol=1e-4)  # weights are rounded to fp32 once more
        assert torch.equal(clt.encode(x).to_dense() != 0, trainee.sae.encode(scaled).to_dense() != 0)


TWO = {"name": "diff", "hook_name": ["blocks.1.hook_resid_post", "blocks.1.hook_resid_post@1"],
       "architecture": "batchtopk", "k": 6, "d_sae": 64}  # fmt: skip


def changed_model(folder):
    """The embedded model with its last MLPs gone, in a folder of its own: the same tokenizer, other activations."""
    lm = se.data.load_language_model()
    model = copy.deepcopy(lm.model)
    for block in model.transformer.h[:2]:
        torch.nn.init.zeros_(block.mlp.c_proj.weight)
    model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_crosscoder_of_two_models(tmp_path, capsys):
    other = changed_model(tmp_path / "other")
    changes = {"saes": [TWO], "other_models": [{"model_name": other}]}
    run = se.train(settings(tmp_path / "run", **changes))
    diff, found = run.saes()["diff"], run.metrics()[-1]
    assert diff.provenance.models == ("embedded", se.data.load_language_model(other).name)
    assert diff.provenance.sites == tuple(TWO["hook_name"])
    assert found["evaluation/fvu_0"] != found["evaluation/fvu_1"] and len(diff.sources) == 1
    with pytest.raises(KeyboardInterrupt):
        se.train(settings(tmp_path / "again", **changes), callbacks=[Stop()])
    again = resume(tmp_path / "again").saes()["diff"]
    assert all(torch.equal(a, b) for a, b in zip(diff.state_dict().values(), again.state_dict().values(), strict=True))

    assert main(["eval", str(tmp_path / "run" / "sae" / "diff"), "--tokens", "64", "--quiet"]) == 0
    assert "0 first model, 1 second" in capsys.readouterr().out

    # From a disk: what both models had for the same tokens.
    both = together(se.data.load_language_model(), se.data.load_language_model(other))
    texts = se.data.evaluation_text()[:2]
    stores = se.data.collect_sites(both, texts, tmp_path / "rows", TWO["hook_name"], progress=False, max_tokens=2048)
    assert [store.path.name for store in stores] == TWO["hook_name"]
    assert [store.manifest["model"] for store in stores] == list(diff.provenance.models)
    assert torch.equal(stores[0].row_tokens().token_ids, stores[1].row_tokens().token_ids)
    assert not torch.equal(stores[0].tensor(), stores[1].tensor())
    stored = settings(tmp_path / "stored", data__store_path=str(tmp_path / "rows"), eval__eval_tokens=0, **changes)
    assert se.train(stored).saes()["diff"].provenance.sites == tuple(TWO["hook_name"])


def test_places_of_models_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"saes\.0\.hook_name: must be a place of model, and other_models names"):
        TrainConfig.from_dict({"saes": [TWO]})
    alone = {"hook_name": "blocks.1.hook_resid_post@1", "architecture": "topk"}
    with pytest.raises(ConfigError, match="only crosscoders read other models"):
        TrainConfig.from_dict({"saes": [alone], "other_models": [{"model_name": "embedded"}]})


@pytest.mark.parametrize("wiring", ["causal", "joint"])
def test_folding_scales_is_exact(wiring):
    coder = se.Crosscoder([3, 5], [3, 5], 8, se.TopK(3), wiring=wiring, skip=True, dtype=torch.float64)
    with torch.no_grad():
        for p in (*coder.W_skip, coder.b_dec, coder.b_enc):
            p.uniform_(-1, 1)
    x, into, out = torch.randn(7, 8, dtype=torch.float64), (2.0, 0.5), (4.0, 0.25)  # powers of two: nothing is rounded
    standards = [se.Standardization((3, 5), torch.zeros(8, dtype=torch.float64), torch.tensor(scales).double())
                 for scales in (into, out)]  # fmt: skip
    folded = se.fold_standardization(coder, *standards)
    scaled = torch.cat([x[:, :3] * 2, x[:, 3:] / 2], 1)
    y = coder(scaled)
    assert torch.equal(folded(x), torch.cat([y[:, :3] / 4, y[:, 3:] * 4], 1))
    assert not torch.equal(coder(x), folded(x))
    ranked = se.Crosscoder([3, 5], [3, 5], 8, se.TopK(3), rescale_acts_by_decoder_norm=True)
    with pytest.raises(ValueError, match="rescale_acts_by_decoder_norm must be False"):
        se.fold_standardization(ranked, *standards)


def test_rows_in_memory(tmp_path):
    """Whatever they are of, as many tensors as there are sites; more latents explain more."""
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(24, 3 * 8, generator=g)
    codes = torch.rand(4096, 24, generator=g) * (torch.rand(4096, 24, generator=g) < 0.1)
    rows = list((codes @ directions).split(8, 1))
    sites = ["a.x", "b.x", "c.x"]
    found = {}
    for wiring in ("joint", "each", "causal", "local"):
        entry = {"name": wiring, "hook_name": sites, "wiring": wiring, "architecture": "topk", "k": 4, "d_sae": 48,
                 "lr": 3e-3, "b_dec_init": "mean"}  # fmt: skip
        changes = {"saes": [entry], "data__training_tokens": 64 * 100, "eval__eval_tokens": 0}
        run = Trainer(TrainConfig.from_dict(settings(tmp_path / wiring, **changes)), dataset=rows).train()
        found[wiring] = 1 - [line["metrics/explained_variance"] for line in run.metrics()][-1]
        assert run.saes()[wiring].provenance.sites == tuple(sites)
    assert all(fvu < 0.5 for fvu in found.values()), found


@pytest.mark.parametrize(("changes", "message"), [
    ({"hook_name_out": "blocks.0.hook_mlp_out"}, r"hook_name_out: must be a list as hook_name is"),
    ({"hook_name": (), "hook_name_out": None}, r"hook_name: must name at least one place"),
    ({"hook_name": ("blocks.0.hook_resid_mid", "resid_mid_layer_0"), "hook_name_out": None}, "each place once"),
    ({"hook_name_out": ("blocks.0.hook_mlp_out",)}, "'causal' needs as many places to write as to read, got 1"),
    ({"normalize_activations": "layer_norm"}, "must not be layer_norm with several places"),
    ({"rescale_acts_by_decoder_norm": True}, "must be none with rescale_acts_by_decoder_norm"),
    ({"decoder_norm": "sum", "hook_name": "a.x", "hook_name_out": None}, "decoder_norm: must be joint for one place"),
    ({"normalize_activations": "standardize", "hook_name": "a.x", "hook_name_out": None}, "not be standardize for one"),
    ({"wiring": "diagonal"}, "wiring: must be one of joint, causal, each, local"),
    ({"hook_name": ("blocks.0.hook_resid_mid", "no site"), "hook_name_out": None}, "hook_name: must be"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_field(changes, message):
    entry = {"hook_name": spread(READ), "hook_name_out": spread(WRITTEN), "wiring": "causal",
             "architecture": TopKSAE(k=4)}  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        SAEConfig(**{**entry, **changes})


def test_an_architecture_that_does_not_fit_is_refused_with_its_name():
    config = SAEConfig(hook_name=("a.x", "b.x"), architecture=GatedSAE(), d_sae=16)
    with pytest.raises(ConfigError, match="architecture: gated does not fit a crosscoder"):
        config.build(8, 8, steps=10, seed=0, widths=([8, 8], [8, 8]))


def test_entries_name_themselves_and_come_back_from_a_file(tmp_path):
    config = TrainConfig(
        saes=[SAEConfig(hook_name=READ, hook_name_out=WRITTEN, wiring="causal", architecture=TopKSAE(k=4))],
        sweep={"wiring": ["causal", "local"]},
    )
    names = [sae.name for sae in config.expanded().saes]
    one = "blocks.0.hook_resid_mid_to_blocks.3.hook_resid_mid-to-blocks.0.hook_mlp_out_to_blocks.3.hook_mlp_out"
    assert names == [f"{one}-causal-topk", f"{one}-local-topk"]
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml())
    assert TrainConfig.from_yaml(file) == config
    file.write_text(f"saes: [{{hook_name: '{READ}', wiring: local, architecture: batchtopk}}]")
    entry = TrainConfig.from_yaml(file).saes[0]
    assert entry.reads == entry.writes == spread(READ) and entry.sources == 4 and not entry.unit_rows


def test_rules_with_a_state_for_each_latent_are_made_for_each_source():
    widths = ([8, 8], [8, 8])
    jump = SAEConfig(hook_name=("a.x", "b.x"), wiring="each", architecture=JumpReLUSAE(), d_sae=16)
    assert isinstance(jump.build(8, 8, steps=10, seed=0, widths=widths).activation, se.rules.PerSource)
    batch = SAEConfig(hook_name=("a.x", "b.x"), wiring="each", architecture=BatchTopKSAE(k=4), d_sae=16)
    one, other, third = (batch.build(8, 8, steps=10, seed=seed, widths=widths) for seed in (0, 0, 1))
    assert isinstance(one.activation, se.BatchTopK)
    assert torch.equal(one.W_dec[1], other.W_dec[1]) and not torch.equal(one.W_dec[1], third.W_dec[1])


def test_the_published_recipe_of_cross_layer_transcoders(tmp_path):
    """A twentieth of the latents of each source fires at first; the price of that rises to the end."""
    changes = [f"output.output_path={tmp_path}/run", "logger.progress=false", "data.training_tokens=8192",
               "data.context_size=64", "data.shuffle_tokens=4096", "saes.0.d_sae=96", "saes.0.l0_coefficient=8",
               "logger.logging_steps=4", "eval.eval_tokens=1024"]  # fmt: skip
    config = se.training.preset("embedded-clt", changes)
    factors = []

    class Watch(Callback):
        def on_update(self, trainer):
            (loss,) = trainer.trainees["clt"].warmed
            factors.append(float(loss.factor))

    run = se.train(config, callbacks=[Watch()])
    assert factors == sorted(factors) and factors[0] < 0.1 and factors[-1] > 0.9
    clt, found = run.saes()["clt"], {name: value for line in run.metrics() for name, value in line.items()}
    assert all(isinstance(rule, se.JumpReLU) for rule in clt.activation) and len(clt.activation) == 4
    assert {"losses/tanh_l0", "losses/pre_activation"} <= found.keys()
    assert 0 < found["evaluation/fvu"] < 1 and found["evaluation/cross_layer"] > 0
    assert run.config.saes[0].architecture.l0_at_start == 4
    first = next(line for line in run.metrics() if "metrics/l0" in line)  # of four updates, so not as it began
    assert 4 * 2 < first["metrics/l0"] < 4 * 12
