"""training.TrainStep: its gradients against dense autograd in fp64, its updates against torch.optim.Adam."""
import copy
import io
import subprocess
import sys

import pytest
import torch

import sae_engine as se
from sae_engine.losses import AFA, L1, AuxK, MultiTopK
from sae_engine.testing import assert_same, force_dense
from sae_engine.training import CapturedStep, TrainStep
from sae_kernels import densified

B, D, F = 14, 6, 40
F64 = torch.float64
RULES = {
    "TopK": lambda: se.TopK(4), "AbsTopK": lambda: se.AbsTopK(4), "BatchTopK": lambda: se.BatchTopK(3.5),
    "TopAFA": lambda: se.TopAFA(), "ReLU": lambda: se.ReLU(),
    "JumpReLU": lambda: se.JumpReLU(F, threshold=0.3, bandwidth=0.8),
}  # fmt: skip
AUX = {
    "none": (), "auxk": (AuxK(5),), "auxk-saelens": (AuxK.saelens(),), "multi": (MultiTopK(3),),
    "afa": (AFA(),), "all": (AuxK(30), MultiTopK(2, 0.5), AFA(0.1)),
}  # fmt: skip


def make(rule, *, dtype=F64, seed=0, **options):
    """An autoencoder with random parameters, decoder rows of any norm, and no two alike."""
    torch.manual_seed(seed)
    sae = se.SparseAutoencoder(D, F, rule, dtype=dtype, **options)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if not name.startswith("activation") and p.requires_grad:
                p.copy_(torch.randn(p.shape, dtype=F64) * (0.4 if "W" in name else 0.2))
    return sae


def train_step(sae, *, losses=(), **options):
    """A step of the reconstruction alone also where the rule is not trained without a sparsity loss."""
    losses = [*losses] if isinstance(losses, list | tuple) else [losses]
    return TrainStep(sae, losses=[*losses, L1(0.0)] if sae.activation.needs() else losses, **options)


def some_dead(step):
    """Every third latent counts as dead; returns which."""
    step.dead.since_fired[::3] = step.dead.dead_after
    step.dead.tokens = step.dead.dead_after
    return step.dead.mask


def dense_losses(sae, x, target, dead, aux):
    """The losses written with dense matrices, the whole of them differentiable."""
    x, target = x.reshape(-1, D), target.reshape(-1, sae.d_out)
    skipped, info = x, None
    if sae.normalize_activations == "layer_norm":
        info = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        x = (x - info[0]) / (info[1] + 1e-5)
    centred = x - sae.b_dec if sae.apply_b_dec_to_input else x
    norms = sae.W_dec.norm(dim=1)
    pre = centred @ sae.W_enc + (0 if isinstance(sae.activation, se.TopAFA) else sae.b_enc)
    if sae.rescale_acts_by_decoder_norm:
        pre = pre * norms

    def decoded(f):
        return (f / norms if sae.rescale_acts_by_decoder_norm else f) @ sae.W_dec

    def output(f):
        out = decoded(f) + sae.b_dec
        out = out if info is None else out * info[1] + info[0]
        return out if sae.W_skip is None else out + skipped @ sae.W_skip.T

    rule, context = sae.activation, {}
    if isinstance(rule, se.TopAFA):
        context = {"target_norm": (x - sae.b_dec).norm(dim=1).detach(),
                   "weight_norm": torch.ones(F, dtype=F64) if sae.rescale_acts_by_decoder_norm else norms.detach()}
    f = rule(pre, **context)
    losses = {"mse": (output(f) - target).square().sum() / len(x)}
    for objective in aux:
        if objective.name == "multi_topk":
            wider = copy.deepcopy(rule)
            wider.k = rule.k * objective.factor
            losses["multi_topk"] = objective.coefficient * (output(wider(pre)) - target).square().sum() / len(x)
        elif objective.name == "afa":
            gap = f.square().sum(1).sqrt() - x.norm(dim=1)
            losses["afa"] = objective.coefficient * sae.d_out * gap.square().mean()
        elif not dead.any():
            losses["auxk"] = pre.new_zeros(())
        else:
            k = D // 2 if objective.k is None else objective.k
            left = (target - output(f)).detach()
            left = left if info is None else left / info[1]
            order = torch.where(dead, pre.detach(), -torch.inf).sort(dim=1, descending=True, stable=True).indices
            kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, order[:, :k], True) & dead
            f_aux = torch.where(kept, pre.relu() if objective.relu else pre, 0.0)
            error = (decoded(f_aux) - left).square().sum() / len(x)
            if objective.normalize:
                error = error / ((left - left.mean(0)).square().sum() / len(x))
            if objective.scale_by_dead:
                error = error * min(int(dead.sum()) / k, 1.0)
            losses["auxk"] = objective.coefficient * error
    return losses


def gradients_of(sae, x, target=None, aux=(), *, dead=True, **options):
    """What the step computes: its report, and the gradients by name."""
    step = train_step(sae, lr=1e-3, losses=aux, normalize_decoder=False, grad_clip=1e9, **options)
    if dead:
        some_dead(step)
    gradients = {}

    def keep(stored, skip):
        gradients.update((p, g.clone()) for p, g in stored.items())

    step.optimizer.apply = keep  # what would reach Adam
    report = step(x, target)
    return report, {name: gradients[p] for name, p in sae.named_parameters() if p in gradients}


def check_against_dense(sae, x, aux, target=None, *, dead=True, **options):
    goal = x if target is None else target
    mask = torch.zeros(F, dtype=torch.bool)
    if dead:
        mask[::3] = True
    expected = dense_losses(sae, x, goal, mask, aux)
    learned = {name: p for name, p in sae.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(sum(expected.values()), list(learned.values()), allow_unused=True)
    report, ours = gradients_of(sae, x, target, aux, dead=dead, **options)
    for name, loss in expected.items():
        torch.testing.assert_close(report[name], loss.detach(), msg=lambda m, name=name: f"{name}: {m}")
    for name, grad in zip(learned, grads, strict=True):
        if grad is None:
            assert name not in ours or not ours[name].any()
            continue
        torch.testing.assert_close(ours[name], grad, msg=lambda m, name=name: f"{name}: {m}")
    return ours


@pytest.mark.parametrize("rescale", [False, True], ids=["plain", "rescaled"])
@pytest.mark.parametrize("aux", AUX)
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_every_parameter(rule, aux, rescale):
    if aux in ("multi", "all") and rule in ("TopAFA", "ReLU", "JumpReLU"):
        pytest.skip("these rules have no k")
    sae = make(RULES[rule](), rescale_acts_by_decoder_norm=rescale)
    ours = check_against_dense(sae, torch.randn(B, D, dtype=F64), AUX[aux])
    assert ours["W_enc"].abs().sum() > 0
    if rule == "JumpReLU":
        assert ours["activation.threshold"].abs().sum() > 0


@pytest.mark.parametrize("options", [
    {"normalize_activations": "layer_norm"}, {"apply_b_dec_to_input": False}, {"skip": True},
    {"normalize_activations": "layer_norm", "rescale_acts_by_decoder_norm": True, "skip": True},
    {"contiguous_parameters": True},
], ids=lambda o: "-".join(o))  # fmt: skip
@pytest.mark.parametrize("rule", ["TopK", "BatchTopK", "TopAFA"])
def test_conventions_of_the_autoencoder(rule, options):
    aux = (AuxK(5), AFA(0.1)) if rule == "TopAFA" else (AuxK(5), MultiTopK(2), AFA(0.1))
    check_against_dense(make(RULES[rule](), **options), torch.randn(B, D, dtype=F64), aux)


@pytest.mark.parametrize("rule", RULES)
def test_three_dimensions_and_a_target_of_another_width(rule):
    if rule == "TopAFA":
        pytest.skip("its target norm is the input's, centred by b_dec of the same width")
    sae = make(RULES[rule](), d_out=D + 3)
    check_against_dense(sae, torch.randn(2, 7, D, dtype=F64), (AuxK(5),), torch.randn(2, 7, D + 3, dtype=F64))


@pytest.mark.parametrize("rule", ["TopK", "BatchTopK", "AbsTopK", "JumpReLU"])
def test_ties_and_zeros(rule):
    """Integer parameters and inputs: rows are full of ties, and of zeros that a ReLU makes or keeps."""
    sae = make(RULES[rule]())
    with torch.no_grad():
        for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
            p.copy_(torch.randint(-1, 2, p.shape))
    x = torch.randint(-1, 2, (B, D)).to(F64)
    check_against_dense(sae, x, (AuxK(5), AuxK.saelens())[:1])
    check_against_dense(sae, x, (AuxK.saelens(),))


def test_nothing_is_dead():
    check_against_dense(make(se.TopK(4)), torch.randn(B, D, dtype=F64), (AuxK(5),), dead=False)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("rule", ["TopK", "JumpReLU"])
def test_both_sides_of_the_crossover(rule, dense):
    check_against_dense(make(RULES[rule]()), torch.randn(B, D, dtype=F64), (AuxK(5), AFA()), dense=dense)


class Quadratic(se.Activation):
    """pre² where positive: a rule that does not say how its values follow from the entries."""

    def _select(self, pre, backend):
        return se.SparseCodes.from_dense(pre.relu().square())

    def _dense(self, pre):
        return pre.relu().square()


@pytest.mark.parametrize("rescale", [False, True])
def test_a_rule_whose_gradient_is_dense(rescale):
    sae = make(Quadratic(), rescale_acts_by_decoder_norm=rescale)
    check_against_dense(sae, torch.randn(B, D, dtype=F64), (AuxK(5), AFA(0.1)))


@pytest.mark.parametrize("loss", ["auxk", "multi", "afa"])
def test_each_auxiliary_loss_alone_moves_the_encoder(loss):
    sae = make(se.TopK(4))
    x = torch.randn(B, D, dtype=F64)
    without, with_it = (gradients_of(sae, x, aux=aux)[1]["W_enc"] for aux in ((), AUX[loss]))
    assert (without - with_it).abs().max() > 1e-6


# --- Adam ------------------------------------------------------------------------------------------------------------


def plain_training(sae, batches, *, unit_rows, grad_clip=None, accumulate=1, **options):
    """loss.backward(), the parallel part removed, torch's own Adam, rows rescaled."""
    optimizer = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], **options)
    losses = []
    for number, x in enumerate(batches):
        loss = se.losses.mse(sae(x), x)
        (loss / accumulate).backward()
        losses.append(loss.detach())
        if (number + 1) % accumulate:
            continue
        with torch.no_grad():
            if unit_rows:
                W, g = sae.W_dec, sae.W_dec.grad
                g -= (g * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W
        if grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if unit_rows:
            with torch.no_grad():
                sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return torch.stack(losses)


def assert_parameters_close(a, b, **tolerance):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize("contiguous", [False, True], ids=["latent-contiguous", "row-major"])
@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("rule", ["TopK", "BatchTopK", "TopAFA", "JumpReLU"])
def test_fifty_steps_equal_torch_adam(rule, unit_rows, contiguous):
    options = dict(lr=3e-3, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.01)
    ours, theirs = (make(RULES[rule](), contiguous_parameters=contiguous) for _ in range(2))
    batches = torch.randn(50, B, D, dtype=F64)
    expected = plain_training(theirs, batches, unit_rows=unit_rows, **options)
    step = train_step(ours, normalize_decoder=unit_rows, **options)
    losses = torch.stack([step(x)["loss"] for x in batches])
    # The learning rate is an fp32 number on the device, and Adam's bias corrections are made of it.
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert_parameters_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if rule == "BatchTopK":
        torch.testing.assert_close(ours.activation.threshold, theirs.activation.threshold, rtol=1e-5, atol=1e-6)
    if unit_rows:
        torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(F, dtype=F64))


@pytest.mark.parametrize(
    "options", [{"grad_clip": 0.5}, {"accumulate": 3}, {"grad_clip": 1.0, "accumulate": 2}], ids=str
)
def test_stored_gradients(options):
    ours, theirs = (make(se.TopK(4)) for _ in range(2))
    batches = torch.randn(12, B, D, dtype=F64)
    plain_training(theirs, batches, unit_rows=True, lr=1e-2, **options)
    step = train_step(ours, lr=1e-2, **options)
    for number, x in enumerate(batches):
        report = step(x)
        assert ("grad_norm" in report) == ((number + 1) % options.get("accumulate", 1) == 0)
    assert_parameters_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_fused_and_stored_steps_agree():
    fused, stored = (make(se.TopK(4)) for _ in range(2))
    x = torch.randn(B, D, dtype=F64)
    norms = [train_step(fused, lr=1e-2, losses=AuxK(5))(x)["grad_norm"],
             train_step(stored, lr=1e-2, losses=AuxK(5), grad_clip=1e9)(x)["grad_norm"]]  # fmt: skip
    torch.testing.assert_close(*norms)
    assert_parameters_close(fused, stored)


def test_frozen_parameters_stay():
    for frozen in ("W_enc", "W_dec", "b_dec", "b_enc"):
        sae = make(se.TopK(4))
        sae.get_parameter(frozen).requires_grad_(False)
        before = {name: p.detach().clone() for name, p in sae.named_parameters()}
        train_step(sae, lr=1e-2, normalize_decoder=False)(torch.randn(B, D, dtype=F64))
        for name, p in sae.named_parameters():
            assert torch.equal(p, before[name]) == (name == frozen), name


def test_two_runs_give_the_same_bits():
    runs = []
    for _ in range(2):
        sae = make(se.BatchTopK(3.5), dtype=torch.float32)
        step = train_step(sae, lr=1e-2, losses=[AuxK(5), MultiTopK()], dead_after=30)
        torch.manual_seed(1)
        reports = [step(torch.randn(B, D)) for _ in range(8)]
        runs.append([*sae.state_dict().values(), *reports[-1].values()])
    assert_same(*(tuple(run) for run in runs))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_other_back_ends_train_alike(backend):
    results = []
    for chosen in ("torch", backend):
        sae = make(se.TopK(4), dtype=torch.float32)
        step = train_step(sae, lr=1e-2, losses=[AuxK(5), AFA()], dead_after=20, backend=chosen)
        torch.manual_seed(1)
        losses = [step(torch.randn(B, D))["loss"] for _ in range(4)]
        results.append((torch.stack(losses), sae.W_enc.detach(), sae.W_dec.detach(), sae.b_dec.detach()))
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-4)  # Adam's first steps are lr * sign(gradient)


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_resumes_bit_for_bit(compute_dtype):
    def build():
        sae = make(se.BatchTopK(3.5), dtype=torch.float32)
        return sae, train_step(
            sae, lr=1e-2, losses=[AuxK(5)], dead_after=30, compute_dtype=compute_dtype, weight_decay=0.1,
            scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n)),
        )  # fmt: skip

    batches = torch.randn(8, B, D)
    sae, step = build()
    for x in batches[:4]:
        step(x)
    file = io.BytesIO()
    torch.save({"sae": sae.state_dict(), "step": step.state_dict()}, file)
    file.seek(0)
    for x in batches[4:]:
        expected = step(x)
    saved = torch.load(file, weights_only=True)
    resumed, second = build()
    resumed.load_state_dict(saved["sae"])
    second.load_state_dict(saved["step"])
    for x in batches[4:]:
        report = second(x)
    assert_same(tuple(report.values()), tuple(expected.values()))
    assert_same(tuple(resumed.state_dict().values()), tuple(sae.state_dict().values()))
    assert float(second.optimizer.param_groups[0]["lr"]) == pytest.approx(1e-2 / 9)


def test_the_state_of_torch_adam_can_be_taken_over():
    ours, theirs = (make(se.TopK(4)) for _ in range(2))
    batches = torch.randn(6, B, D, dtype=F64)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for x in batches[:3]:
        se.losses.mse(theirs(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()
    ours.load_state_dict(theirs.state_dict())
    step = train_step(ours, lr=1e-2, normalize_decoder=False)
    step.optimizer.load_state_dict(optimizer.state_dict())
    for x in batches[3:]:
        step(x)
        se.losses.mse(theirs(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_parameters_close(ours, theirs, rtol=1e-5, atol=1e-6)


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


def test_report():
    sae = make(se.TopK(4))
    x = torch.randn(B, D, dtype=F64)
    out, codes = sae(x), sae.encode(x)
    report = train_step(sae, lr=1e-2)(x)
    assert not any(t.requires_grad for t in report.values()) and all(t.dim() == 0 for t in report.values())
    torch.testing.assert_close(report["loss"], se.losses.mse(out, x).detach())
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
    exact = train_step(saes[0], lr=1e-2)(x)
    assert abs(report["mse"] - exact["mse"]) < 2**-6 * exact["mse"]  # a few roundings of 2⁻⁸
    copies = step._copies.current()
    assert_same(tuple(copies), (saes[1].W_dec.detach().bfloat16(), saes[1].W_enc.detach().T.bfloat16()))
    with torch.no_grad():
        saes[1].W_dec.mul_(2)
    assert torch.equal(step._copies.current().decoder, saes[1].W_dec.detach().bfloat16())


# --- chunks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aux", ["none", "all"])
@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("rule", [*RULES, "FeatureChoice", "FeatureChoice, uniform", "FeatureChoice, mutual first"])
def test_chunked_equals_unchunked(rule, kind, aux):
    """Small integers and halves: products are exact, so that pre-activations do not depend on the chunk's size."""
    objectives = AUX[aux] if rule in ("TopK", "AbsTopK", "BatchTopK") or aux == "none" else (AuxK(5), AFA())
    rules = {
        **RULES, "FeatureChoice": lambda: se.FeatureChoice(F, 3.5),
        "FeatureChoice, uniform": lambda: se.FeatureChoice(F, 3.5, budgets="uniform"),
        "FeatureChoice, mutual first": lambda: se.FeatureChoice(F, 3.5, mutual_steps=1),
    }  # fmt: skip
    results = []
    for rows in (B, 1, 4):
        sae = make(rules[rule](), dtype=torch.float32)
        with torch.no_grad():
            for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
                p.copy_(torch.randint(-1 if kind == "ties" else -40, 2 if kind == "ties" else 41, p.shape) / 2)
        torch.manual_seed(2)
        x = torch.randint(-2, 3, (B, D)).float()
        step = train_step(sae, lr=1e-2, losses=objectives, memory_budget=rows * F * 4)
        some_dead(step)
        report = step(x)
        results.append([*report.values(), *sae.state_dict().values()])
    assert_same(tuple(results[0]), tuple(results[1]))
    assert_same(tuple(results[0]), tuple(results[2]))


def test_chunks_with_a_capacity():
    results = []
    for rows in (B, 4):
        sae = make(se.TopAFA(capacity=400), dtype=torch.float32)
        step = train_step(sae, lr=1e-2, losses=AFA(), memory_budget=rows * F * 4)
        torch.manual_seed(2)
        results.append([*step(torch.randn(B, D)).values(), *sae.state_dict().values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    sae = make(se.TopAFA(capacity=20), dtype=torch.float32)
    assert train_step(sae, lr=1e-2, memory_budget=4 * F * 4)(torch.randn(B, D))["overflow"]


def test_what_cannot_be_chunked_says_so():
    sae = make(Quadratic())
    with pytest.raises(RuntimeError, match="memory_budget"):
        train_step(sae, lr=1e-2, memory_budget=F * 8)(torch.randn(B, D, dtype=F64))


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "error", "name"), [
    ({"lr": 0.0}, ValueError, "lr"), ({"lr": "1"}, TypeError, "lr"), ({"losses": 3}, TypeError, "losses"),
    ({"losses": [AFA(), AFA()]}, ValueError, "losses"), ({"losses": ["auxk"]}, TypeError, "losses"),
    ({"grad_clip": -1.0}, ValueError, "grad_clip"), ({"compute_dtype": torch.int8}, TypeError, "compute_dtype"),
    ({"accumulate": 0}, ValueError, "accumulate"), ({"reduce": 3}, TypeError, "reduce"),
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


# --- several processes, density, and what only a GPU can show --------------------------------------------------------

RANK = """
import os, sys
import torch, torch.distributed as dist
import sae_engine as se

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)

def mean(tensors):
    for t in tensors:
        dist.all_reduce(t)
        t /= 2

saved = torch.load(f"{folder}/start.pt", weights_only=True)
sae = se.SparseAutoencoder(6, 40, se.TopK(4), dtype=torch.float64)
sae.load_state_dict(saved["sae"])
step = se.training.TrainStep(sae, lr=1e-2, reduce=mean, dead_after=10**9)
for x in saved["batches"]:
    step(x[rank::2])
torch.save({"sae": sae.state_dict(), "since_fired": step.dead.since_fired}, f"{folder}/{rank}.pt")
dist.barrier()  # a rank that leaves early takes its connections with it
os._exit(0)  # gloo's threads now and then abort an orderly exit
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    sae = make(se.TopK(4))
    batches = torch.randn(5, B, D, dtype=F64)
    start = {name: t.cpu() for name, t in sae.state_dict().items()}
    torch.save({"sae": start, "batches": batches.cpu()}, tmp_path / "start.pt")
    commands = [[sys.executable, "-c", RANK, str(rank), str(tmp_path)] for rank in range(2)]
    ranks = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    step = TrainStep(sae, lr=1e-2, dead_after=10**9)
    for x in batches:
        step(x)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, p in sae.state_dict().items():
        assert torch.equal(first["sae"][name], second["sae"][name]), name
        torch.testing.assert_close(first["sae"][name], p.cpu(), rtol=1e-5, atol=1e-6)
    for saved in (first, second):  # counted in tokens of one process
        assert torch.equal(saved["since_fired"], step.dead.since_fired.cpu() // 2)


def test_a_loaded_state_is_written_where_a_captured_graph_looks():
    """Moments, counters, learning rate and 16-bit copies stay the tensors that they were."""

    def build():
        sae = make(se.BatchTopK(3.5), dtype=torch.float32)
        return sae, TrainStep(sae, lr=1e-2, dead_after=30, compute_dtype=torch.bfloat16)

    def places(sae, step):
        moments = [t for p in sae.parameters() for t in step.optimizer.state[p].values()]
        return [step.optimizer.options["lr"], step.dead.since_fired, *moments, *step._copies.current()]

    batches = torch.randn(5, B, D)
    sae, step = build()
    for x in batches[:2]:
        step(x)
    step.optimizer.options["lr"].fill_(5e-3)
    weights, state = copy.deepcopy(sae.state_dict()), copy.deepcopy(step.state_dict())
    expected = [step(x)["loss"] for x in batches[2:4]]
    other, second = build()
    second(batches[4])
    before = places(other, second)
    other.load_state_dict(weights)
    second.load_state_dict(state)
    after = places(other, second)
    assert all(a is b for a, b in zip(before, after, strict=True))
    for copied, master in zip(after[-2:], (other.W_dec, other.W_enc.T), strict=True):
        assert torch.equal(copied, master.bfloat16())
    assert second.optimizer.options["lr"].item() == torch.tensor(5e-3).item()
    assert_same(tuple(second(x)["loss"] for x in batches[2:4]), tuple(expected))


def test_copies_are_renewed_in_place_after_somebody_wrote_the_weights():
    sae = make(se.TopK(4), dtype=torch.float32)
    step = TrainStep(sae, lr=1e-2, compute_dtype=torch.bfloat16)
    step(torch.randn(B, D))
    held = step._copies.weights
    with torch.no_grad():
        sae.W_dec.mul_(2)
    step.refresh()
    assert step._copies.weights is held and torch.equal(held.decoder, sae.W_dec.bfloat16())


def test_a_warm_up_is_a_step_that_also_makes_the_auxiliary_selection():
    """Nothing is dead yet: an ordinary step leaves AuxK out, and a capture, which cannot know, does not."""
    batches = torch.randn(3, B, D)
    (plain, ordinary), (warm, warming) = ((sae, TrainStep(sae, lr=1e-2, losses=[AuxK(5)])) for sae in
                                          (make(se.TopK(4), dtype=torch.float32) for _ in range(2)))  # fmt: skip
    seen = []
    rule = AuxK.rule
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AuxK, "rule", lambda aux, sae, dead: seen.append(dead) or rule(aux, sae, dead))
        for x in batches:
            expected, found = ordinary(x), warming.warm_up(x)
            assert expected.keys() == found.keys()
            torch.testing.assert_close(found["loss"], expected["loss"])
    assert seen == [0, F] * 3
    assert_parameters_close(plain, warm)
    warming(batches[0])
    with pytest.raises(ValueError, match="d_in"):
        warming.warm_up(torch.randn(B, D + 1))
    assert not warming._warming_up


def test_a_capture_is_remembered_until_a_state_is_loaded(monkeypatch):
    """The host hears of no replay: afterwards it neither asks the device each time nor trusts an old answer."""
    dead = se.training.DeadLatents(8, dead_after=100)
    assert dead.at_most(10) == 0
    state = dead.state_dict()
    monkeypatch.setattr("sae_engine.training.dead.capturing", lambda tensor: True)
    assert dead.at_most(10) == 8
    monkeypatch.setattr("sae_engine.training.dead.capturing", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: pytest.fail("the device was read"))
    assert dead.at_most(10) == 8
    dead.load_state_dict(state)
    assert dead.at_most(10) == 0


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


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [lambda: se.TopK(4), lambda: se.BatchTopK(3.5), lambda: se.TopAFA(capacity=B * F)],
                         ids=["TopK", "BatchTopK", "TopAFA"])  # fmt: skip
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_nothing_waits_for_the_device(rule, dense, no_waiting):
    sae = make(rule(), dtype=torch.float32)
    step = TrainStep(sae, lr=1e-3, losses=[AuxK(5)], compute_dtype=torch.bfloat16, dense=dense)
    x = torch.randn(B, D)
    step.warm_up(x)  # compiles, reads the free memory and, with a capacity, the density
    with no_waiting():
        step(x)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["TopK", "BatchTopK", "FeatureChoice"])
def test_a_captured_step_trains_as_the_step_does(rule):
    """Also a batch of another shape on the way, weights that somebody else writes, and a schedule."""
    rules = {
        "TopK": lambda: se.TopK(4), "BatchTopK": lambda: se.BatchTopK(4),
        "FeatureChoice": lambda: se.FeatureChoice(F, 3, mutual_steps=2),
    }  # fmt: skip
    saes = [make(rules[rule](), dtype=torch.float32) for _ in range(2)]
    steps = [
        TrainStep(sae, lr=1e-2, losses=[AuxK(5)], compute_dtype=torch.bfloat16, density_interval=3,
                  scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
        for sae in saes
    ]  # fmt: skip
    captured = CapturedStep(steps[1])
    for number, rows in enumerate([B] * 6 + [B // 2] + [B] * 4):
        x = torch.randn(rows, D)
        expected, report = steps[0].warm_up(x), captured(x)
        for name, scalar in expected.items():
            torch.testing.assert_close(report[name], scalar, msg=f"{name}, call {number}")
        if number == 7:
            with torch.no_grad():
                for sae in saes:
                    sae.W_enc.mul_(1.01)
    assert captured._graph is not None and steps[0].calls == steps[1].calls == 11
    assert_parameters_close(*saes)
    lrs = [float(step.optimizer.param_groups[0]["lr"]) for step in steps]
    assert lrs[0] == lrs[1] < 0.01


def test_what_cannot_be_captured_is_refused():
    sae = se.SparseAutoencoder(D, F, se.TopK(4), device="cpu")
    with pytest.raises(ValueError, match="GPU"):
        CapturedStep(TrainStep(sae, lr=1e-2))
    with pytest.raises(TypeError, match="TrainStep"):
        CapturedStep(sae)
    if torch.cuda.is_available():
        sae = sae.cuda()
        with pytest.raises(ValueError, match="accumulate"):
            CapturedStep(TrainStep(sae, lr=1e-2, accumulate=2))
        with pytest.raises(ValueError, match="reduce"):
            CapturedStep(TrainStep(sae, lr=1e-2, reduce=lambda tensors: None))


@pytest.mark.gpu
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])  # codes this small would go through GEMMs
def test_a_step_in_a_cuda_graph(dense):
    saes = [make(se.TopK(4), dtype=torch.float32) for _ in range(2)]
    eager, graphed = (TrainStep(sae, lr=1e-2, losses=[AuxK(5)], dense=dense) for sae in saes)
    batches = torch.randn(6, B, D)
    for x in batches[:2]:  # compiles, and makes what lives on
        eager(x)
        graphed.warm_up(x)
    static, graph = batches[2].clone(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        report = graphed(static)
    for x in batches[2:]:
        static.copy_(x)
        graph.replay()
        expected = eager(x)
        torch.testing.assert_close(report["loss"], expected["loss"])
    assert_parameters_close(*saes)
