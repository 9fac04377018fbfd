"""What a TrainStep is given and says: arguments, reports, dead latents, capacities, 16-bit products, densities."""

import copy

import pytest
import torch
from density import force_dense
from training_cases import F64, B, D, F, assert_parameters_close, make, train_step

import sae_engine as se
from sae_engine.losses import AFA, L1, MultiTopK
from sae_engine.testing import assert_same
from sae_engine.training import TrainStep
from sae_kernels.stock import densified


def test_state_is_checked():
    step = train_step(make(se.TopK(4)), lr=1e-2, accumulate=2)
    step(torch.randn(B, D, dtype=F64))
    with pytest.raises(RuntimeError, match="1 more call"):
        step.state_dict()
    with pytest.raises(ValueError, match="state lacks"):
        step.load_state_dict({"optimizer": {}})


def test_no_gradient_is_left_and_none_may_be_there():
    sae = make(se.TopK(4))
    step = train_step(sae, lr=1e-2)
    x = torch.randn(B, D, dtype=F64)
    step(x)
    assert all(p.grad is None for p in sae.parameters())
    sae(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"W_enc\.grad is not None"):
        step(x)


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


@pytest.mark.parametrize(("scheduler", "named"), [(plateau, "ReduceLROnPlateau.step needs metrics"),
                                                  (lambda optimizer: None, "learning-rate scheduler")])  # fmt: skip
def test_a_scheduler_that_cannot_step_alone_is_refused_before_anything_is_updated(scheduler, named):
    with pytest.raises(TypeError, match=f"scheduler must make .*{named}"):
        train_step(make(se.TopK(4)), lr=1e-2, scheduler=scheduler)


# --- capacity, dead latents, reports ---------------------------------------------------------------------------------


def test_an_overflowing_step_changes_nothing():
    sae = make(se.TopAFA(capacity=20), dtype=torch.float32)
    step = train_step(sae, lr=1e-2, losses=AFA())
    x = torch.randn(B, D)
    before = copy.deepcopy((sae.state_dict(), step.optimizer.state_dict()["state"], step.dead.since_fired))
    assert step(x)["overflow"]
    after = (sae.state_dict(), step.optimizer.state_dict()["state"], step.dead.since_fired)
    for a, b in zip(torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after), strict=True):
        assert torch.equal(a, b)
    fits = make(se.TopAFA(capacity=B * F), dtype=torch.float32)
    free = make(se.TopAFA(), dtype=torch.float32)
    reports = [train_step(s, lr=1e-2, losses=AFA())(x) for s in (fits, free)]
    assert not reports[0].pop("overflow")
    for name, value in reports[1].items():
        torch.testing.assert_close(reports[0][name], value)
    assert_parameters_close(fits, free)


def test_an_overflow_with_stored_gradients_changes_nothing():
    sae = make(se.TopAFA(capacity=20), dtype=torch.float32)
    before = copy.deepcopy(sae.state_dict())
    assert train_step(sae, lr=1e-2, grad_clip=1.0)(torch.randn(B, D))["overflow"]
    assert_same(tuple(sae.state_dict().values()), tuple(before.values()))


def test_dead_latents_are_counted_in_tokens():
    sae = make(se.TopK(2))
    step = train_step(sae, lr=1e-9, dead_after=2 * B)
    x = torch.randn(B, D, dtype=F64)
    fired = torch.zeros(F, dtype=torch.bool)
    fired[sae.encode(x).indices[sae.encode(x).values != 0].long()] = True
    assert 0 < fired.sum() < F
    assert step(x)["dead"] == 0
    assert torch.equal(step.dead.since_fired, torch.where(fired, 0, B))
    torch.testing.assert_close(step(x)["dead"], 1 - fired.float().mean())
    assert torch.equal(step.dead.mask, ~fired)


def test_tokens_are_counted_on_which_each_latent_fires_over_all_calls_of_an_update():
    sae = make(se.TopK(2))
    step = train_step(sae, lr=1e-9, accumulate=2)
    batches = [torch.randn(B, D, dtype=F64) for _ in range(2)]
    expected = sum((sae.encode(x).to_dense() != 0).sum(0) for x in batches)
    step(batches[0])
    assert step.seen is None
    step(batches[1])
    assert step.seen.tokens == 2 * B and torch.equal(step.seen.fired, expected.float()) and expected.max() > 1


def test_report():
    sae = make(se.TopK(4))
    x = torch.randn(B, D, dtype=F64)
    out, codes = sae(x), sae.encode(x)
    report = train_step(sae, lr=1e-2)(x)
    assert not any(t.requires_grad for t in report.values()) and all(t.dim() == 0 for t in report.values())
    torch.testing.assert_close(report["loss"], se.losses.squared_error(out, x).detach())
    torch.testing.assert_close(report["fvu"], se.losses.fvu(out, x).detach())
    assert report["l0"] == codes.l0.double().mean()


def test_compute_dtype():
    """bf16 products, fp32 parameters: near the fp32 step, and exactly that of autocast's codes."""
    saes = [make(se.TopK(4), dtype=torch.float32) for _ in range(2)]
    x = torch.randn(B, D)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        codes = saes[0].encode(x)
    step = train_step(saes[1], lr=1e-2, compute_dtype=torch.bfloat16)
    seen = {}
    saes[1].activation.update = lambda kept: seen.update(kept=kept)
    report = step(x)
    assert_same((seen["kept"].values, seen["kept"].indices), (codes.values.detach(), codes.indices))
    assert all(p.dtype == torch.float32 for p in saes[1].parameters())
    error, exact = report["squared_error"], train_step(saes[0], lr=1e-2)(x)["squared_error"]
    assert abs(error - exact) < 2**-6 * exact  # a few roundings of 2⁻⁸
    (copies,) = step._copies.current()
    assert_same(tuple(copies), (saes[1].W_dec.detach().bfloat16(), saes[1].W_enc.detach().T.bfloat16()))
    with torch.no_grad():
        saes[1].W_dec.mul_(2)
    assert torch.equal(step._copies.current()[0].decoder, saes[1].W_dec.detach().bfloat16())


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "error", "name"), [
    ({"lr": 0.0}, ValueError, "lr"), ({"lr": "1"}, TypeError, "lr"), ({"losses": 3}, TypeError, "losses"),
    ({"losses": [AFA(), AFA()]}, ValueError, "losses"), ({"losses": ["auxk"]}, TypeError, "losses"),
    ({"grad_clip": -1.0}, ValueError, "grad_clip"), ({"compute_dtype": torch.int8}, TypeError, "compute_dtype"),
    ({"accumulate": 0}, ValueError, "accumulate"),
    ({"memory_budget": 0}, ValueError, "memory_budget"), ({"density_interval": 0}, ValueError, "density_interval"),
    ({"dead_after": 0}, ValueError, "dead_after"), ({"normalize_decoder": 1}, TypeError, "normalize_decoder"),
    ({"backend": "cuda"}, ValueError, "backend"), ({"betas": (1.0, 0.9)}, ValueError, "beta"),
])  # fmt: skip
def test_arguments_are_checked(options, error, name):
    with pytest.raises(error, match=name):
        TrainStep(make(se.TopK(4)), **{"lr": 1e-3, **options})


def test_inputs_are_checked():
    sae = make(se.TopK(4))
    step = TrainStep(sae, lr=1e-3)
    x = torch.randn(B, D, dtype=F64)
    for bad, error, name in ((x[:, 1:], ValueError, "d_in"), (x[:0], ValueError, "token"), (None, TypeError, "x")):
        with pytest.raises(error, match=name):
            step(bad)
    with pytest.raises(ValueError, match="target"):
        step(x, x[:3])
    with pytest.raises(TypeError, match="attribution"):
        step(x, attribution=x)
    with pytest.raises(ValueError, match="target is needed"):
        TrainStep(make(se.TopK(4), d_out=D + 1), lr=1e-3)(x)
    sae.eval()
    with pytest.raises(RuntimeError, match=r"sae\.train"):
        step(x)
    with pytest.raises(TypeError, match="MultiTopK"):
        TrainStep(make(se.ReLU()), lr=1e-3, losses=[MultiTopK(), L1(1.0)])(x)
    with pytest.raises(RuntimeError, match="TrainStep"):
        step.optimizer.step()


def test_the_density_of_codes_with_a_capacity_is_read_now_and_then(monkeypatch):
    """Room for every entry looks dense; how many there are says whether it is."""
    monkeypatch.setattr(densified, "DENSE_SHARE", force_dense(0.9))
    sae = make(se.TopAFA(capacity=B * F), dtype=torch.float32)
    step = TrainStep(sae, lr=1e-3, density_interval=2)
    decided = []
    for _ in range(4):
        monkeypatch.setattr(densified, "DENSE_SHARE", force_dense(0.9 if len(decided) < 2 else 0.0))
        step(torch.randn(B, D))
        decided.append(step._dense_now)
    assert decided == [False, False, True, True]
    restored = TrainStep(sae, lr=1e-3, density_interval=2)
    restored.load_state_dict(step.state_dict())
    assert restored._dense_now is True
    free = make(se.TopAFA(), dtype=torch.float32)
    assert TrainStep(free, lr=1e-3)._density(free.encode(torch.randn(B, D)).detach()) is None
