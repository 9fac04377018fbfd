"""TrainStep's gradients against dense autograd in fp64: every rule, loss, convention, chunk and crossover."""

import copy

import pytest
import torch
from training_cases import AUX, F64, RULES, B, D, F, make, some_dead, train_step

import sae_engine as se
from sae_engine.losses import AFA, AuxK, MultiTopK
from sae_engine.testing import assert_same


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
    losses = {"squared_error": (output(f) - target).square().sum() / len(x)}
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
