"""Loss terms of single rules: JumpReLU's three, the gate's, Matryoshka's."""
import pytest
import torch

import sae_engine as se
from sae_engine import losses

F = 30


def learning(cls=se.JumpReLU, **options):
    return cls(F, **{"threshold": 0.4, "bandwidth": 0.5, **options})


@pytest.mark.parametrize("capacity", [None, 400])
def test_step_l0_counts_and_teaches_the_threshold_alone(capacity):
    rule = learning()
    pre = torch.randn(8, F, requires_grad=True)
    codes = se.functional.threshold(pre, rule._theta(), bandwidth=0.5, capacity=capacity)
    loss = losses.step_l0(codes, rule)
    theta = rule.threshold.detach()
    torch.testing.assert_close(loss, (pre > theta).sum() / torch.tensor(8.0))
    loss.backward()
    inside = (pre.detach() - theta).abs() < 0.25
    torch.testing.assert_close(rule.threshold.grad, -(1 / 0.5) * inside.sum(0) / 8)
    assert pre.grad is None or not pre.grad.any()
    assert rule.threshold.grad.any()


def test_step_l0_through_an_autoencoder_in_any_shape():
    sae = se.SparseAutoencoder(6, F, learning())
    x = torch.randn(2, 4, 6)
    (codes,), _, pre = sae.encode_with(x, keep_pre=True)
    losses.step_l0(codes, sae.activation).backward()
    inside = (pre.detach() - 0.4).abs() < 0.25
    torch.testing.assert_close(sae.activation.threshold.grad, -2.0 * inside.flatten(0, 1).sum(0) / 8)
    assert sae.W_enc.grad is None or not sae.W_enc.grad.any()


def test_step_l0_of_logarithmic_thresholds_and_of_none():
    rule = learning(se.LogJumpReLU)
    pre = torch.randn(8, F)
    losses.step_l0(rule.select(pre), rule).backward()
    inside = (pre - 0.4).abs() < 0.25
    torch.testing.assert_close(rule.log_threshold.grad, 0.4 * -2.0 * inside.sum(0) / 8)
    assert losses.step_l0(rule.select(pre[:0]), rule) == 0


def test_target_l0_by_hand():
    """(L0 / target - 1)^2: its gradient turns sign at the target."""
    pre = torch.randn(8, F)
    l0 = float((pre > 0.4).sum()) / 8
    for target in (0.5 * l0, 2 * l0):
        rule = learning()
        loss = losses.target_l0(rule.select(pre), rule, target)
        torch.testing.assert_close(float(loss.detach()), (l0 / target - 1) ** 2)
        loss.backward()
        slope = 2 * (l0 / target - 1) / target
        inside = (pre - 0.4).abs() < 0.25
        torch.testing.assert_close(rule.threshold.grad, slope * -2.0 * inside.sum(0) / 8)


def test_tanh_l0_against_the_dense_formula_in_fp64():
    sae = se.SparseAutoencoder(6, F, se.JumpReLU(F, threshold=0.2, bandwidth=0.3), dtype=torch.float64)
    x = torch.randn(9, 6, dtype=torch.float64)
    losses.tanh_l0(sae.encode(x), scale=3.0, weight_norm=sae.W_dec.norm(dim=1)).backward()
    got = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
    theta = sae.activation.threshold.detach().double()
    leaves = {n: p.detach().clone().requires_grad_() for n, p in sae.named_parameters()}
    pre = (x - leaves["b_dec"]) @ leaves["W_enc"] + leaves["b_enc"]
    pre.retain_grad()
    dense = torch.where(pre > theta, pre, 0.0)
    (torch.tanh(3.0 * dense * leaves["W_dec"].norm(dim=1)).sum() / 9).backward()
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(got[name], leaves[name].grad, msg=name)
    slope = 3.0 * (1 - torch.tanh(3.0 * dense).square()).detach() / 9  # the norms are 1
    inside = (pre.detach() - theta).abs() < 0.15
    expected = -(theta / 0.3) * (slope * inside).sum(0)
    # an fp32 parameter
    torch.testing.assert_close(got["activation.threshold"].double(), expected, rtol=1e-5, atol=1e-6)
    assert expected.any()


def test_jumprelu_losses_want_a_rule_that_learns():
    rule, pre = learning(), torch.randn(3, F)
    with pytest.raises(TypeError, match="rule"):
        losses.step_l0(rule.select(pre), se.TopK(3))
    with pytest.raises(ValueError, match="scale"):
        losses.tanh_l0(rule.select(pre), scale=0)
    with pytest.raises(ValueError, match="target"):
        losses.target_l0(rule.select(pre), rule, 0)
    with pytest.raises(RuntimeError, match="training"):
        losses.step_l0(rule.eval().select(pre), rule)


def test_gated_loss_against_dense_autograd_in_fp64():
    sae = se.SparseAutoencoder(6, F, se.Gated(F), dtype=torch.float64)
    rule = sae.activation
    with torch.no_grad():
        sae.b_dec.normal_()
        for parameter in (rule.b_gate, rule.b_mag, rule.r_mag):
            parameter.normal_(std=0.3)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    codes, gate = sae.encode_with(x, select=[rule, rule.gate]).codes
    norms = sae.W_dec.norm(dim=1)
    loss = losses.squared_error(sae.decode(codes), x)
    loss = loss + losses.gated(gate, x, sae.W_dec, sae.b_dec, l1=0.3, weight_norm=norms)
    loss.backward()
    leaves = {n: p.detach().clone().requires_grad_() for n, p in sae.named_parameters()}
    pre = (x - leaves["b_dec"]) @ leaves["W_enc"]
    b_gate, b_mag, r_mag = (leaves[f"activation.{n}"].double() for n in ("b_gate", "b_mag", "r_mag"))
    opened = pre + b_gate > 0
    f = torch.where(opened, (pre * r_mag.exp() + b_mag).relu(), 0.0)
    g = (pre + b_gate).relu()
    dense = (f @ leaves["W_dec"] + leaves["b_dec"] - x).square().sum(-1).mean()
    dense = dense + 0.3 * (g * leaves["W_dec"].norm(dim=1)).sum(-1).mean()
    dense = dense + (g @ sae.W_dec.detach() + sae.b_dec.detach() - x).square().sum(-1).mean()
    torch.testing.assert_close(loss, dense)
    dense.backward()
    for name, parameter in sae.named_parameters():
        if name == "b_enc":
            assert not parameter.requires_grad
            continue
        wide = {"rtol": 1e-5, "atol": 1e-6} if "activation" in name else {}  # fp32 parameters
        torch.testing.assert_close(parameter.grad, leaves[name].grad, msg=name, **wide)
    assert rule.b_gate.grad.any()
    assert {n for n, _ in sae.named_parameters()} >= {f"activation.{n}" for n in ("b_gate", "b_mag", "r_mag")}
    assert not list(rule.gate.parameters())


def test_the_reconstruction_alone_leaves_the_gate_alone():
    sae = se.SparseAutoencoder(6, F, se.Gated(F))
    losses.squared_error(sae(torch.randn(5, 6)), torch.randn(5, 6)).backward()
    assert sae.activation.b_gate.grad is None or not sae.activation.b_gate.grad.any()
    assert sae.activation.bfloat16().b_mag.dtype == torch.float32


def test_matryoshka_loss_against_dense_autograd_in_fp64():
    widths = (5, 12, F)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    for reduction in ("sum", "mean"):
        sae = se.SparseAutoencoder(6, F, se.MatryoshkaBatchTopK(4, widths), dtype=torch.float64)
        codes = sae.encode(x)
        loss = losses.matryoshka(codes, x, sae.W_dec, sae.b_dec, widths=sae.activation.widths, reduction=reduction)
        loss.backward()
        leaves = {n: p.detach().clone().requires_grad_() for n, p in sae.named_parameters()}
        pre = (x - leaves["b_dec"]) @ leaves["W_enc"] + leaves["b_enc"]
        dense = torch.where(codes.to_dense() > 0, pre, 0.0)
        errors = [
            (dense[..., :w] @ leaves["W_dec"][:w] + leaves["b_dec"] - x).square().sum(-1).mean() for w in widths
        ]
        expected = sum(errors) / (1 if reduction == "sum" else 3)
        torch.testing.assert_close(loss, expected)
        expected.backward()
        for name, parameter in sae.named_parameters():
            torch.testing.assert_close(parameter.grad, leaves[name].grad, msg=name)


def test_matryoshka_arguments():
    codes, x, W_dec = se.functional.topk(torch.randn(4, F), 3), torch.randn(4, 6), torch.randn(F, 6)
    with pytest.raises(ValueError, match="reduction"):
        losses.matryoshka(codes, x, W_dec, widths=(F,), reduction="max")
    with pytest.raises(ValueError, match="x must"):
        losses.matryoshka(codes, x[:2], W_dec, widths=(F,))
    with pytest.raises(ValueError, match="l1"):
        losses.gated(codes, x, W_dec, l1=0)
