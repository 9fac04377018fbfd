"""Crosscoders from configurations: rows standardised place by place, norms, a start from saved weights, a recipe."""
from dataclasses import dataclass

import pytest
import torch
from played_cuda import Played
from short_runs import settings

import sae_engine as se
from sae_engine.losses import AuxK, PreActivation, TanhL0
from sae_engine.training import Architecture, Callback, TrainConfig, Trainer, TrainStep, resume
from sae_engine.training._faults import ConfigError
from sae_kernels.device import _launch, _tuning

SITES, D, F = ["a.x", "b.x", "c.x"], 8, 48


@dataclass(frozen=True, kw_only=True)
class TanhJumpReLUSAE(Architecture):
    """That of cross-layer transcoders (Ameisen et al. 2025): learned thresholds, tanh, latents that are lifted."""

    tanh: float = 0.02
    lift: float = 1e-3

    def build_rule(self, d_sae, steps):
        return se.rules.LogJumpReLU(d_sae, threshold=0.1, bandwidth=1.0)  # which stay above 0

    def losses(self, d_in, d_out):
        return [TanhL0(self.tanh), PreActivation(self.lift)]

    def sparsity_name(self):
        return (TanhL0.name,)


def rows_of(tokens=4096):
    """Sparse codes in random directions; each place has a size and a mean of its own."""
    g = torch.Generator().manual_seed(0)
    codes = torch.rand(tokens, 24, generator=g) * (torch.rand(tokens, 24, generator=g) < 0.1)
    parts = (codes @ torch.randn(24, 3 * D, generator=g)).split(D, 1)
    means = torch.randn(3, D, generator=g)
    return [size * (part + 2 * mean) for size, part, mean in zip((1.0, 20.0, 0.1), parts, means, strict=True)]


def run(folder, updates=100, callbacks=(), **changes):
    entry = {"name": "coder", "hook_name": SITES, "architecture": "topk", "k": 4, "d_sae": F, "lr": 3e-3,
             "b_dec_init": "mean", **changes}  # fmt: skip
    if ":" in entry["architecture"] or entry["architecture"] == "jumprelu":
        del entry["k"]
    config = settings(folder, saes=[entry], data__training_tokens=64 * updates, eval__eval_tokens=0)
    return Trainer(TrainConfig.from_dict(config), dataset=rows_of(), callbacks=[*callbacks]).train()


class Keep(Callback):
    """The trainee as it is at the end, or after one update, where the run is then stopped."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at

    def on_end(self, trainer):
        self.trainee = trainer.trainees["coder"]

    def on_checkpoint(self, trainer, folder):
        if trainer.update == self.stop_at:
            raise KeyboardInterrupt


def explained(run):
    return [line["metrics/explained_variance"] for line in run.metrics()][-1]


@pytest.mark.parametrize("wiring", ["joint", "causal"])
def test_places_are_standardised_and_what_is_saved_takes_rows_as_they_are(wiring, tmp_path):
    keep = Keep()
    done = run(tmp_path / "run", callbacks=[keep], normalize_activations="standardize", wiring=wiring)
    assert explained(done) > 0.5
    trainee, saved, rows = keep.trainee, done.saes()["coder"], rows_of()
    beside = torch.cat(rows, 1)
    read, written = trainee._standards(trainee.sae)
    seen = trainee._seen(lambda site, scale: rows[site] * scale, 0)
    torch.testing.assert_close(seen, read(beside))
    for part in seen.split(D, 1):
        assert float(part.mean(0).abs().max()) < 0.2 and abs(float(part.square().mean()) - 1) < 0.2
    with torch.no_grad():
        trained = written.undo(trainee.sae.eval()(seen))
        for ours, wanted in zip(saved(beside).split(D, 1), trained.split(D, 1), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_means_are_resumed(tmp_path):
    whole = run(tmp_path / "whole", 24, normalize_activations="standardize").saes()["coder"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", 24, callbacks=[Keep(stop_at=12)], normalize_activations="standardize")
    again = resume(tmp_path / "run", dataset=rows_of()).saes()["coder"]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_rule_may_rank_by_the_sum_of_norms(tmp_path):
    changes = {"architecture": "batchtopk", "decoder_norm": "sum", "rescale_acts_by_decoder_norm": True,
               "normalize_activations": "none", "lr": 1e-3}  # fmt: skip
    done = run(tmp_path / "run", 50, **changes)
    coder = done.saes()["coder"]
    assert (coder.decoder_norm, coder.rescale_acts_by_decoder_norm) == ("sum", True)
    assert done.config.saes[0].decoder_norm == "sum"


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in", "standardize"])
def test_a_crosscoder_starts_from_one_that_was_saved(normalize, tmp_path):
    first = run(tmp_path / "first", 30, wiring="causal").saes()["coder"]
    folder = next((tmp_path / "first" / "sae").iterdir()) if (tmp_path / "first" / "sae").exists() else None
    assert folder is not None
    rate = {"lr": 1e-12}  # it stays what it was
    again = run(tmp_path / "again", 1, wiring="causal", from_pretrained=str(folder), normalize_activations=normalize,
                **rate).saes()["coder"]  # fmt: skip
    x = torch.cat(rows_of(32), 1)
    with torch.no_grad():
        for ours, wanted in zip(again(x).split(D, 1), first(x).split(D, 1), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(("changes", "message"), [
    ({"wiring": "local"}, "has wiring = "), ({"d_sae": 32}, "has d_sae = 48, not 32"),
    ({"architecture": "batchtopk"}, "keeps latents by TopK, not BatchTopK"),
    ({"decoder_norm": "sum"}, "has decoder_norm = joint, not sum"),
])  # fmt: skip
def test_another_crosscoder_is_refused(changes, message, tmp_path):
    se.Crosscoder.clt(3, D, F, se.TopK(4)).save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", 1, **{"wiring": "causal", "from_pretrained": str(tmp_path / "saved"), **changes})


def test_thresholds_and_tanh_are_trained_from_a_configuration(tmp_path):
    """Sparser with more of the penalty, and latents fire."""
    tag = f"{__name__}:TanhJumpReLUSAE"
    l0 = {}
    for tanh in (0.001, 0.3):
        done = run(tmp_path / str(tanh), 100, architecture=tag, tanh=tanh, wiring="causal",
                   normalize_activations="standardize")  # fmt: skip
        coder = done.saes()["coder"]
        assert isinstance(coder.activation, se.rules.PerSource) and len(coder.activation) == 3
        x = torch.cat(rows_of(512), 1)
        with torch.no_grad():
            l0[tanh] = float((coder.encode(x).to_dense() != 0).sum() / 512)
            assert all(bool((rule.threshold != 0.1).any()) for rule in coder.activation)
        last = [line for line in done.metrics() if "losses/tanh_l0" in line][-1]
        assert last["losses/tanh_l0"] > 0 and "losses/pre_activation" in last and explained(done) > 0.2
    assert 0 < l0[0.3] < 0.9 * l0[0.001]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is played here")
@pytest.mark.parametrize("tile", [_tuning.PASS_TILE, 8])
def test_a_step_is_captured(tile, monkeypatch):
    """Nothing of it waits for the device, whatever the width of its rows."""
    monkeypatch.setattr(_tuning, "PASS_TILE", tile)
    _launch.forget_plans()
    with Played() as played, torch.device("cuda"):
        clt = se.Crosscoder.clt(3, 12, 32, se.TopK(4))
        step, x = TrainStep(clt, lr=1e-3, losses=AuxK(3), compute_dtype=torch.bfloat16, dense=False), torch.randn(9, 36)
        for _ in range(2):
            step.warm_up(x, x + 1)
        with played.capturing():
            step(x, x + 1)
    _launch.forget_plans()
