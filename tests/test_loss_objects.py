"""Losses as objects: a TrainStep follows the gradients of ``losses.evaluate``, or refuses to."""
import copy

import pytest
import torch

import sae_engine as se
from sae_engine import losses
from sae_engine.losses import AFA, L1, AuxK, GateLoss, MultiTopK, NestedReconstruction, StepL0, TanhL0
from sae_engine.training import TrainStep

B, D, F = 14, 6, 40
F64 = torch.float64
WIDTHS = (7, 20, F)


def jump(cls=se.JumpReLU):
    return cls(F, threshold=0.3, bandwidth=0.8)


class Entropy(losses.Loss):
    """A user's loss, which knows of codes, output, sum of decoder rows and decoder norms."""

    name = "entropy"

    def value(self, batch):
        share = (batch.codes.values.abs() + 0.1) / (batch.codes.values.abs() + 0.1).sum()
        along = batch.output.square().sum() + batch.decoded.pow(3).sum() + (batch.decoder_norms**2).sum()
        return -(share * share.log()).sum() + 0.01 * along


CASES = {
    "TopK": (lambda: se.TopK(4), [AuxK(5), MultiTopK(3), AFA(0.1)]),
    "TopK, SAELens' AuxK": (lambda: se.TopK(4), [AuxK.saelens()]),
    "AbsTopK": (lambda: se.AbsTopK(4), [AuxK(5), AFA(0.1)]),
    "BatchTopK": (lambda: se.BatchTopK(3.5), [AuxK(5), MultiTopK(2)]),
    "TopAFA": (lambda: se.TopAFA(), [AFA(0.1), AuxK(5)]),
    "FeatureChoice": (lambda: se.FeatureChoice(F, 3.5), [AuxK(5)]),
    "StatisticalTopK": (lambda: se.StatisticalTopK(4), [AuxK(5)]),
    "SampledTopK": (lambda: se.SampledTopK(3.5), [AuxK(5)]),
    "ReLU, L1": (lambda: se.ReLU(), [L1(0.7)]),
    "JumpReLU, L0": (jump, [StepL0(0.7), AuxK(5)]),
    "JumpReLU, L0 aimed": (jump, [StepL0(3.0, target=4.0)]),
    "JumpReLU, tanh": (jump, [TanhL0(0.7, 2.0)]),
    "JumpReLU, L1": (jump, [L1(0.7)]),
    "LogJumpReLU, L0": (lambda: jump(se.LogJumpReLU), [StepL0(0.7)]),
    "LogJumpReLU, tanh": (lambda: jump(se.LogJumpReLU), [TanhL0(0.7), AuxK(5)]),
    "Gated": (lambda: se.Gated(F), [GateLoss(0.7)]),
    "Gated, AuxK": (lambda: se.Gated(F), [GateLoss(0.7, weigh_by_norm=False), AuxK(5)]),
    "Matryoshka": (lambda: se.MatryoshkaBatchTopK(3.5, WIDTHS), []),
    "Matryoshka, mean, AuxK": (
        lambda: se.MatryoshkaBatchTopK(3.5, WIDTHS), [NestedReconstruction(WIDTHS, "mean"), AuxK(5), MultiTopK(2)]
    ),
    "nested prefixes of TopK": (lambda: se.TopK(4), [NestedReconstruction(WIDTHS), AFA(0.1)]),
    "nested prefixes of a dense gradient": (lambda: se.StatisticalTopK(4), [NestedReconstruction(WIDTHS)]),
    "a loss of one's own": (lambda: se.TopK(4), [Entropy()]),
    "a loss of one's own, JumpReLU": (jump, [Entropy(), StepL0(0.1)]),
}  # fmt: skip
CONVENTIONS = {
    "plain": {}, "rescaled": dict(rescale_acts_by_decoder_norm=True), "skip": dict(skip=True),
    "layer norm": dict(normalize_activations="layer_norm"), "centred": dict(normalize_activations="center"),
}  # fmt: skip


def make(rule, *, seed=0, **options):
    torch.manual_seed(seed)
    sae = se.SparseAutoencoder(D, F, rule, dtype=F64, **options)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if p.requires_grad and "threshold" not in name:
                p.copy_(torch.randn(p.shape, dtype=F64) * (0.4 if "W" in name else 0.2))
    return sae


def dead_latents():
    return torch.arange(F) % 3 == 0


def gradients_of_a_step(sae, x, added, **options):
    step = TrainStep(sae, lr=1e-3, losses=added, normalize_decoder=False, grad_clip=1e9, dead_after=1000, **options)
    step.dead.since_fired[dead_latents()] = 1000
    step.dead.tokens = 1000
    gradients = {}
    step.optimizer.apply = lambda stored, skip: gradients.update((p, g.clone()) for p, g in stored.items())
    report = step(x)
    return report, {name: gradients[p] for name, p in sae.named_parameters() if p in gradients}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_follows_the_gradients_of_the_losses(case, convention):
    rule, added = CASES[case]
    if case.startswith("Matryoshka, mean") and convention == "skip":
        added = added[:1]
    sae = make(rule(), **CONVENTIONS[convention])
    x = torch.randn(B, D, dtype=F64)
    plain = copy.deepcopy(sae)  # rules learn from being evaluated, too
    expected = losses.evaluate(plain, x, added, dead=dead_latents())
    learned = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(expected["loss"], list(learned.values()), allow_unused=True)
    report, ours = gradients_of_a_step(sae, x, added)
    for name, loss in expected.items():
        torch.testing.assert_close(report[name], loss.detach(), msg=lambda m, name=name: f"{name}: {m}")
    for name, grad in zip(learned, grads, strict=True):
        assert grad is not None and grad.any(), f"{name} gets no gradient, which this case is here for"
        # a threshold is an fp32 number, and so is its gradient
        tolerance = {} if grad.dtype == F64 else dict(rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[name], grad, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize("case", ["Matryoshka", "Gated", "JumpReLU, L0", "ReLU, L1"])
def test_by_dense_formulas(case):
    """The same gradients once more, from sums that know nothing of codes."""
    rule, added = CASES[case]
    sae = make(rule())
    x = torch.randn(B, D, dtype=F64)
    pre = (x - sae.b_dec) @ sae.W_enc + (0 if case == "Gated" else sae.b_enc)
    if case == "Gated":
        rule = sae.activation
        gate = (pre + rule.b_gate).relu()
        f = torch.where(gate.detach() > 0, (pre * rule.r_mag.double().exp() + rule.b_mag).relu(), 0.0)
        aside = gate @ sae.W_dec.detach() + sae.b_dec.detach()
        norms = sae.W_dec.norm(dim=1)
        loss = 0.7 * (gate * norms).sum() / B + (aside - x).square().sum() / B
    elif case == "Matryoshka":
        top = pre.relu().flatten().topk(int(3.5 * B)).indices
        f = torch.zeros(B * F, dtype=F64).index_put((top,), pre.relu().flatten()[top]).view(B, F)
        loss = sum((f[:, :w] @ sae.W_dec[:w] + sae.b_dec - x).square().sum() / B for w in WIDTHS[:-1])
    elif case == "ReLU, L1":
        f = pre.relu()
        loss = 0.7 * (f * sae.W_dec.norm(dim=1)).sum() / B
    else:
        f = torch.where(pre > 0.3, pre, 0.0)
        loss = 0.0
    loss = loss + (f @ sae.W_dec + sae.b_dec - x).square().sum() / B
    names = [n for n, p in sae.named_parameters() if p.requires_grad and "threshold" not in n]
    grads = torch.autograd.grad(loss, [dict(sae.named_parameters())[n] for n in names])
    added = [*added[:1]]  # without AuxK
    _, ours = gradients_of_a_step(sae, x, added)
    for name, grad in zip(names, grads, strict=True):
        tolerance = {} if grad.dtype == F64 else dict(rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[name], grad, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", ["Matryoshka, mean, AuxK", "Gated", "JumpReLU, tanh"])
def test_other_back_ends(case, backend):
    results = []
    for chosen in ("torch", backend):
        rule, added = CASES[case]
        sae = make(rule()).float()
        torch.manual_seed(1)
        step = TrainStep(sae, lr=1e-2, losses=added, dense=False, backend=chosen)
        results.append([step(torch.randn(B, D)) for _ in range(2)])
    for ours, theirs in zip(*results, strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)  # fp32 sums, twice


@pytest.mark.parametrize("case", ["JumpReLU, L0", "ReLU, L1", "Matryoshka, mean, AuxK", "a loss of one's own"])
def test_chunks(case):
    results = []
    for rows in (B, 4):
        rule, added = CASES[case]
        sae = make(rule()).float()
        torch.manual_seed(1)
        step = TrainStep(sae, lr=1e-2, losses=added, memory_budget=rows * F * 4)
        results.append(step(torch.randn(B, D)))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-5, msg=name)  # fp32 products


@pytest.mark.parametrize("case", ["JumpReLU, L0", "LogJumpReLU, tanh", "Gated", "Matryoshka"])
def test_training_moves_what_the_reconstruction_alone_leaves(case):
    rule, added = CASES[case]
    sae = make(rule(), seed=1)
    before = {name: p.detach().clone() for name, p in sae.activation.named_parameters()}
    step = TrainStep(sae, lr=1e-2, losses=added)
    x = torch.randn(256, D, dtype=F64)
    first = step(x)
    for _ in range(60):
        last = step(x)
    assert last["loss"] < 0.9 * first["loss"]
    for name, p in sae.activation.named_parameters():
        assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize(("rule", "names"), [
    (lambda: se.ReLU(), ["ReLU", r"L1\(coefficient\)"]), (jump, ["JumpReLU", r"StepL0\(coefficient\)"]),
    (lambda: jump(se.LogJumpReLU), ["LogJumpReLU", "TanhL0"]), (lambda: se.Gated(F), ["Gated", "GateLoss"]),
])  # fmt: skip
def test_a_rule_that_needs_a_loss_is_not_trained_without(rule, names):
    for name in names:
        with pytest.raises(TypeError, match=name):
            TrainStep(make(rule()), lr=1e-3)
        with pytest.raises(TypeError, match=name):
            losses.evaluate(make(rule()), torch.randn(B, D, dtype=F64))


def test_fixed_thresholds_need_none():
    rule = jump()
    rule.threshold.requires_grad_(False)
    assert "squared_error" in TrainStep(make(rule), lr=1e-3)(torch.randn(B, D, dtype=F64))


class Reaches(losses.Loss):
    name = "reaches"

    def __init__(self, value):
        self._value = value

    def value(self, batch):
        return self._value(batch)


@pytest.mark.parametrize(("value", "message"), [
    (lambda batch: batch.sae.W_dec.square().sum(), "parameter of the autoencoder"),
    (lambda batch: batch.codes.values, "scalar"), (lambda batch: 3.0, "scalar"),
])  # fmt: skip
def test_what_a_step_cannot_follow_is_refused(value, message):
    with pytest.raises(TypeError, match=message):
        TrainStep(make(se.TopK(4)), lr=1e-3, losses=Reaches(value))(torch.randn(B, D, dtype=F64))


def test_a_constant_is_reported():
    report = TrainStep(make(se.TopK(4)), lr=1e-3, losses=Reaches(lambda batch: batch.target.new_ones(())))(
        torch.randn(B, D, dtype=F64)
    )
    assert report["reaches"] == 1 and report["loss"] == report["squared_error"] + 1


@pytest.mark.parametrize(("make_loss", "error", "name"), [
    (lambda: L1(-1.0), ValueError, "coefficient"), (lambda: L1("1"), TypeError, "coefficient"),
    (lambda: StepL0(float("inf")), ValueError, "coefficient"), (lambda: TanhL0(True), TypeError, "coefficient"),
    (lambda: GateLoss(-0.1), ValueError, "l1"), (lambda: NestedReconstruction((3, 2)), ValueError, "widths"),
    (lambda: NestedReconstruction((3, 4), "max"), ValueError, "reduction"),
])  # fmt: skip
def test_arguments_are_checked(make_loss, error, name):
    with pytest.raises(error, match=name):
        make_loss()


def test_losses_of_another_rule_are_refused():
    x = torch.randn(B, D, dtype=F64)
    with pytest.raises(TypeError, match="Gated"):
        losses.evaluate(make(se.TopK(4)), x, [GateLoss(1.0)])
    with pytest.raises(TypeError, match="JumpReLU"):
        losses.evaluate(make(se.TopK(4)), x, [StepL0(1.0)])
    taken = Reaches(lambda batch: batch.codes.values.sum())
    taken.name = "l0"
    with pytest.raises(ValueError, match="l0"):
        losses.evaluate(make(se.TopK(4)), x, taken)
    with pytest.raises(ValueError, match="once"):
        losses.evaluate(make(se.TopK(4)), x, [L1(1.0), L1(2.0)])


def test_any_leading_dimensions():
    sae = make(se.TopK(4))
    x = torch.randn(2, 7, D, dtype=F64)
    flat, folded = (losses.evaluate(sae, t, [AFA(0.1)])["loss"] for t in (x.view(-1, D), x))
    torch.testing.assert_close(flat, folded)
