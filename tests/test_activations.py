"""Activation modules: drop-ins, gradients, context, and the thresholds that some of them learn."""
import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sae_engine as se
from sae_engine.testing import assert_same, make_pre

MAKERS = {
    "ReLU": lambda: se.ReLU(), "TopK": lambda: se.TopK(3), "AbsTopK": lambda: se.AbsTopK(3),
    "BatchTopK": lambda: se.BatchTopK(2.5), "MutualChoice": lambda: se.MutualChoice(3),
    "JumpReLU": lambda: se.JumpReLU(20), "TopAFA": lambda: se.TopAFA(),
}  # fmt: skip


def context_for(name, pre):
    if name != "TopAFA":
        return {}
    return {"target_norm": pre.detach().relu().norm(dim=-1) * 0.8, "weight_norm": torch.ones(pre.shape[-1])}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", [(20,), (6, 20), (2, 3, 20), (0, 20)], ids=str)
def test_dense_and_codes_agree(name, shape):
    for training in (True, False):
        module = MAKERS[name]().train(training)
        if isinstance(module, se.BatchTopK):
            module.threshold.fill_(0.4)
        pre = torch.randn(shape)
        dense = module(pre, **context_for(name, pre))
        codes = module.select(pre, **context_for(name, pre))
        assert isinstance(codes, se.SparseCodes) and dense.shape == pre.shape and dense.dtype == pre.dtype
        assert_same(codes.to_dense(), dense)


@pytest.mark.parametrize("name", MAKERS)
def test_gradient_equals_that_of_the_mask(name):
    module, pre = MAKERS[name](), torch.randn(2, 3, 20, requires_grad=True)
    weight = torch.randn(2, 3, 20)
    (module(pre, **context_for(name, pre)) * weight).sum().backward()
    kept = module.select(pre.detach(), **context_for(name, pre)).to_dense() != 0
    assert torch.equal(pre.grad, weight * kept)


def test_topk_is_a_drop_in_for_the_usual_module():
    class Usual(nn.Module):  # topk, relu, scatter: what autoencoder libraries ship
        def forward(self, x):
            top = torch.topk(x, k=4, dim=-1)
            return torch.zeros_like(x).scatter_(-1, top.indices, top.values.relu())

    pre = torch.randn(5, 7, 30)
    grads = []
    for module in (Usual(), se.TopK(4)):
        x = pre.clone().requires_grad_()
        out = module(x)
        out.square().sum().backward()
        grads.append((out.detach(), x.grad))
    assert_same(*grads)
    stack = nn.Sequential(nn.Linear(30, 30), se.TopK(4), nn.Linear(30, 2))
    assert stack(torch.randn(3, 30)).shape == (3, 2)


@pytest.mark.parametrize("kind", ["special", "nan", "zeros"])
def test_special_rows(kind):
    pre = make_pre(kind, (4, 20))
    assert_same(se.ReLU()(pre), torch.relu(pre))
    jump = se.JumpReLU(20, threshold=0.2)
    assert_same(jump.eval()(pre), torch.where((pre > 0.2) | pre.isnan(), pre, 0.0))
    dense = se.TopK(3)(pre)
    assert_same(dense, se.functional.topk(pre, 3, backend="reference").to_dense())


def test_elementwise_rules_stay_elementwise():
    """No codes are built where a rule needs none."""
    for module in (se.ReLU(), se.JumpReLU(20).eval()):
        module._select = None
        assert module(torch.randn(3, 20)).shape == (3, 20)


def test_jumprelu_threshold_learns_in_training():
    module = se.JumpReLU(50, threshold=0.3, bandwidth=0.5)
    module(torch.randn(20, 50)).sum().backward()
    assert module.threshold.grad.abs().sum() > 0
    module.bfloat16()
    assert module.threshold.dtype == module.threshold.grad.dtype == torch.float32
    torch.optim.Adam(module.parameters()).step()
    assert module(torch.randn(2, 50).bfloat16()).dtype == torch.bfloat16


def test_jumprelu_never_keeps_what_is_negative():
    module = se.JumpReLU(50)
    with torch.no_grad():
        module.threshold.fill_(-0.3)  # as an optimizer may leave it
    for training in (True, False):
        assert bool((module.train(training)(torch.randn(4, 50)) >= 0).all())


class TestBatchTopKThreshold:
    def test_first_forward_sets_it_and_later_ones_move_it(self):
        module = se.BatchTopK(2, threshold_lr=0.1)
        smallest = []
        for _ in range(3):
            out = module(torch.randn(8, 30))
            smallest.append(out[out > 0].min().double())
        expected = smallest[0]
        for value in smallest[1:]:
            expected = expected + 0.1 * (value - expected)
        torch.testing.assert_close(module.threshold, expected)

    def test_what_does_not_move_it(self):
        module, pre = se.BatchTopK(2), torch.randn(8, 30)
        module.select(pre)
        with torch.no_grad():
            module(pre)
        module(-pre.abs())  # nothing positive kept
        module(pre[:0])
        assert module.threshold == -1
        module(pre)
        before = module.threshold.clone()
        module.eval()(pre)
        assert module.threshold == before

    def test_a_checkpoint_counts_once(self):
        plain, checked = se.BatchTopK(2, threshold_lr=0.5), se.BatchTopK(2, threshold_lr=0.5)
        for _ in range(2):
            pre = torch.randn(8, 30)
            plain(pre)
            checkpoint(checked, pre.requires_grad_(), use_reentrant=False).sum().backward()
        assert plain.threshold == checked.threshold > 0

    def test_a_compiled_checkpoint_counts_once(self, compile_backend):
        torch._dynamo.reset()
        plain, checked = se.BatchTopK(2, threshold_lr=0.5), se.BatchTopK(2, threshold_lr=0.5)
        compiled = torch.compile(checked, backend=compile_backend)
        for _ in range(3):
            pre = torch.randn(8, 30)
            plain(pre)
            checkpoint(compiled, pre.requires_grad_(), use_reentrant=False).sum().backward()
        torch.testing.assert_close(checked.threshold, plain.threshold)

    def test_a_threshold_that_is_replaced_is_read_again(self):
        module = se.BatchTopK(2).eval()
        module.threshold.fill_(0.2)
        module(torch.randn(3, 10))
        module.load_state_dict(se.BatchTopK(2).state_dict(), assign=True)
        with pytest.raises(RuntimeError, match="threshold"):
            module(torch.randn(3, 10))

    def test_unset_in_eval_raises_naming_it(self):
        module = se.BatchTopK(2).eval()
        for call in (module, module.select):
            with pytest.raises(RuntimeError, match="threshold"):
                call(torch.randn(3, 10))
        module.threshold.fill_(0.2)
        assert module(torch.randn(3, 10)).shape == (3, 10)
        module.threshold.fill_(-1)
        with pytest.raises(RuntimeError, match="threshold"):
            module(torch.randn(3, 10))

    def test_survives_state_dict_copy_and_cast(self):
        module = se.BatchTopK(2)
        module(torch.randn(8, 30))
        exact = module.threshold.clone()
        other = se.BatchTopK(2)
        other.load_state_dict(module.state_dict())
        for m in (other, copy.deepcopy(module), module.bfloat16(), module.half(), module.float(), module.double()):
            assert m.threshold.dtype == torch.float64 and m.threshold == exact


def test_context_is_checked():
    pre = torch.randn(3, 10)
    with pytest.raises(TypeError, match="weight_norm"):
        se.TopAFA()(pre, target_norm=torch.ones(3))
    with pytest.raises(TypeError, match="dead_mask"):
        se.TopK(2)(pre, dead_mask=torch.ones(10))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: se.TopK(0), "k"), (lambda: se.TopK(2.5), "k"), (lambda: se.AbsTopK(True), "k"),
        (lambda: se.BatchTopK(-1), "k"), (lambda: se.BatchTopK("3"), "k"),
        (lambda: se.BatchTopK(2, threshold_lr=0), "threshold_lr"), (lambda: se.JumpReLU(0), "d_sae"),
        (lambda: se.JumpReLU(5, threshold=-0.1), "threshold"), (lambda: se.JumpReLU(5, bandwidth=0), "bandwidth"),
        (lambda: se.TopAFA(capacity=-2), "capacity"), (lambda: se.JumpReLU(5)(torch.randn(2, 6)), "theta|pre"),
        (lambda: se.JumpReLU(5).eval()(torch.randn(2, 6)), "pre"), (lambda: se.TopK(7)(torch.randn(2, 6)), "k"),
    ],
)  # fmt: skip
def test_arguments_are_checked(make, name):
    with pytest.raises((ValueError, TypeError), match=name):
        make()


# --- the threshold at the end of training, and found anew ----------------------------------------------------------


def stream(number, *, seed, tokens=1024, d=16):
    """Activations with sparse structure: a few of 64 directions each, of the same kind in every batch."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same activations on every device
    drawn = partial(torch.rand, tokens, 64, generator=generator, device="cpu")
    directions = torch.randn(64, d, generator=torch.Generator().manual_seed(0), device="cpu")
    directions = torch.nn.functional.normalize(directions, dim=1)
    for _ in range(number):
        strengths = drawn() * (drawn() < 0.1)
        yield (strengths @ directions).to(torch.get_default_device())


def l0_and_fvu(sae, batches):
    codes = [sae.encode(x) for x in batches]
    x = torch.cat(batches)
    out = torch.cat([sae.decode(c) for c in codes])
    return sum(float((c.values != 0).sum()) for c in codes) / len(x), float(se.losses.fvu(out, x))


@pytest.mark.parametrize("make", [lambda k: se.BatchTopK(k), lambda k: se.MatryoshkaBatchTopK(k, (32, 128))],
                         ids=["BatchTopK", "Matryoshka"])  # fmt: skip
def test_the_threshold_serves_held_out_activations_as_the_batch_rule_does(make):
    k = 8
    sae = se.SparseAutoencoder(16, 128, make(k), device="cpu").to(torch.get_default_device())  # weights as everywhere
    step = se.training.TrainStep(sae, lr=3e-3)
    for x in stream(300, seed=1):
        step(x)
    held_out = list(stream(8, seed=2))
    with torch.no_grad():
        l0, fvu = l0_and_fvu(sae, held_out)
        assert l0 == k
        by_threshold = l0_and_fvu(sae.eval(), held_out)
        assert abs(by_threshold[0] / k - 1) < 0.02 and by_threshold[1] / fvu < 1.01
        sae.activation.threshold.mul_(1.3)  # as a running mean that lags
        assert abs(l0_and_fvu(sae, held_out)[0] / k - 1) > 0.1
        se.calibrate_threshold(sae, held_out[:4])
        found = l0_and_fvu(sae, held_out)
    assert not sae.training and abs(found[0] / k - 1) < 0.02 and abs(found[1] / fvu - 1) < 0.01


def test_calibration_is_the_mean_of_the_cuts_and_changes_nothing_else():
    sae = se.SparseAutoencoder(16, 40, se.FeatureChoice(40, 3, mutual_steps=2))
    batches = list(stream(3, seed=3, tokens=50))
    sae(batches[0])
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    cuts = [sae.encode(x).values for x in batches]
    expected = torch.stack([v[v > 0].min() for v in cuts]).double().mean()
    se.calibrate_threshold(sae, iter(batches))
    torch.testing.assert_close(sae.activation.threshold, expected)
    for name, t in sae.state_dict().items():
        assert name.endswith("threshold") or torch.equal(t, before[name]), name
    assert sae.training and sae.activation.threshold_lr == 0.1


def test_a_calibration_that_fails_changes_nothing():
    sae = se.SparseAutoencoder(16, 40, se.BatchTopK(3, initial_threshold=0.5)).eval()
    for batches, error in (([], ValueError), ([torch.randn(4, 16), "x"], TypeError), ([torch.randn(4, 3)], ValueError)):
        with pytest.raises(error):
            se.calibrate_threshold(sae, batches)
        assert sae.activation.threshold == 0.5 and not sae.training
    with pytest.raises(TypeError, match="TopK"):
        se.calibrate_threshold(se.SparseAutoencoder(16, 40, se.TopK(3)), [torch.randn(4, 16)])
