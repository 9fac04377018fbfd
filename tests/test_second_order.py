"""Gradients of gradients, of whole autoencoders and of each gradient operator, against dense formulas."""
import pytest
import torch

import sae_engine as se
from sae_engine import functional as f
from sae_engine.testing import assert_within_budget

RULES = {
    "topk": (lambda p: f.topk(p, 3), lambda p: kept(p, p.topk(3, -1).values[:, -1:]).relu()),
    "abstopk": (lambda p: f.topk(p, 3, magnitude=True), lambda p: kept(p, p.abs().topk(3, -1).values[:, -1:], p.abs())),
    "batch_topk": (lambda p: f.batch_topk(p, 2.0), lambda p: kept(p, p.flatten().topk(2 * len(p)).values[-1])),
    "feature_topm": (lambda p: f.feature_topm(p, 2), lambda p: kept(p, p.topk(2, 0).values[-1]).relu()),
    "threshold": (lambda p: f.threshold(p, 0.3), lambda p: kept(p, p.new_tensor(0.3))),
}


def kept(p, least, score=None):
    return torch.where((p if score is None else score) >= least, p, 0.0)


def penalty(call, tensors):
    """Second-order gradients: of the squared gradients of a loss that is no polynomial of low degree."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    first = torch.autograd.grad(call(*tensors).pow(3).sum(), tensors, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)


def operands(*shapes):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("rule", RULES)
def test_from_pre_activations_to_the_output(rule):
    select, dense = RULES[rule]
    tensors = [t.double() for t in operands((6, 10), (10, 4), 4)]
    ours = penalty(lambda p, W, b: f.decode(select(p), W, b), tensors)
    for a, b in zip(ours, penalty(lambda p, W, b: dense(p) @ W + b, tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("transposed", [False, True], ids=["row-major", "latent-major"])
def test_of_an_autoencoder(backend, transposed):
    tensors = operands((6, 4), (4, 10), 10, (10, 4), 4)

    def ours(x, W_enc, b_enc, W_dec, b_dec):
        W_enc = W_enc.T.contiguous().T if transposed else W_enc
        codes = f.encode(x, W_enc, b_enc, b_dec=b_dec, scale=W_dec.norm(dim=1), select=se.TopK(3), backend=backend)
        return f.decode(codes, W_dec, b_dec, backend=backend)

    def dense(x, W_enc, b_enc, W_dec, b_dec):
        pre = ((x - b_dec) @ W_enc + b_enc) * W_dec.norm(dim=1)
        return RULES["topk"][1](pre) @ W_dec + b_dec

    truth = penalty(dense, [t.double() for t in tensors])
    for a, exact, eager in zip(penalty(ours, tensors), truth, penalty(dense, tensors), strict=True):
        assert_within_budget(a, exact, eager)


@pytest.mark.parametrize("capacity", [None, 40])
def test_gradient_operators_can_be_differentiated_again(capacity):
    """gradgradcheck of what a decoder's backward pass calls, entries that belong to no row among them."""
    pre, weight = (t.double().requires_grad_() for t in operands((4, 8), (8, 3)))
    codes = f.threshold(pre, 0.2, capacity=capacity)

    def out(values, weight):
        return f.decode(codes.replace(values=values), weight)

    values = codes.values.detach().requires_grad_()
    assert torch.autograd.gradcheck(out, (values, weight)) and torch.autograd.gradgradcheck(out, (values, weight))
