"""Formulas that belong to one rule each."""
from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .. import functional
from .._sources import numbered
from ..codes import SparseCodes
from ..rules import JumpReLU
from .formulas import auxk, squared_error


def step_l0(codes: SparseCodes, rule: JumpReLU) -> Tensor:
    """Kept entries per token, mean over tokens, differentiable in the rule's threshold: JumpReLU's L0 term.

    The rectangle estimator: ``d(theta_j) = -(1 / bandwidth)`` for each entry with ``|pre - theta_j| < bandwidth / 2``,
    nothing to the pre-activations. ``codes`` must come from ``rule`` in training, which then stores that window.
    Source: Rajamanoharan et al. 2024, arXiv:2407.14435.

    Raises:
        TypeError: ``rule`` is no :class:`JumpReLU`.
        RuntimeError: it is in eval mode, or its threshold learns nothing.

    Example:
        >>> rule = se.JumpReLU(3, threshold=1.0, bandwidth=0.5)
        >>> loss = step_l0(rule.select(torch.tensor([[0.5, 2.0, 1.1]])), rule)
        >>> loss.backward()
        >>> loss.item(), rule.threshold.grad
        (2.0, tensor([ 0.,  0., -2.]))
    """
    _check_rule(rule)
    theta = functional.at_latents(rule._theta(), codes)
    fixed, values = theta.detach(), codes.values.detach()
    # a stored 0 is an entry of the window's dropped half; entries of unused capacity are nobody's and get no gradient
    inside = (values == 0) | ((values - fixed).abs() < rule.bandwidth / 2)
    kept = (values != 0).to(fixed.dtype)
    carrier = torch.where(inside, -1 / rule.bandwidth, 0.0) * (theta - fixed)
    return (kept + carrier).sum() / max(codes.rows, 1)


def target_l0(codes: SparseCodes, rule: JumpReLU, target: float) -> Tensor:
    """``(L0 / target - 1)^2`` with the L0 of :func:`step_l0`: dictionary_learning's sparsity loss, unweighted.

    Raises:
        As :func:`step_l0`; and ValueError where ``target`` is not positive.

    Example:
        >>> rule = se.JumpReLU(3, threshold=1.0)
        >>> target_l0(rule.select(torch.tensor([[0.5, 2.0, 3.0]])), rule, 4.0).item()
        0.25
    """
    return aimed(step_l0(codes, rule), target)


def aimed(l0: Tensor, target: float) -> Tensor:
    """How far an L0 is from the one that is wanted."""
    return (l0 / check.positive("target", target) - 1).square()


def l1(codes: SparseCodes, *, weight_norm: Tensor | None = None) -> Tensor:
    """``sum over entries of |value| * weight_norm``, mean over tokens, in fp32 or wider.

    Differentiable in the values and in ``weight_norm``, the norms of the decoder rows: (F,), or (sources, F) for codes
    (sources, *batch_shape, F) of a :class:`Crosscoder`, whose tokens each stand in a row of every source. None is 1.

    Raises:
        TypeError: an argument is not floating-point, or of the wrong kind; names it.
        ValueError: a shape or a device does not fit the others; names the argument.

    Example:
        >>> codes = se.SparseCodes.from_dense(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
        >>> l1(codes, weight_norm=torch.tensor([1.0, 2.0]))
        tensor(4.5000)
    """
    values = codes.values.to(torch.promote_types(codes.values.dtype, torch.float32))
    values = torch.where(values < 0, -values, values)  # slope 1 at a stored 0, by which a threshold learns; abs has 0
    values, tokens = _weighed(values, codes, weight_norm)
    return values.sum() / tokens


def tanh_l0(codes: SparseCodes, *, scale: float = 4.0, weight_norm: Tensor | None = None) -> Tensor:
    """``sum over entries of tanh(scale * value * weight_norm)``, mean over tokens: a smooth L0 for JumpReLU.

    Differentiable in the values (and through them in a threshold) and in ``weight_norm``, the norms of the decoder
    rows, as in :func:`l1`. SAELens' tanh mode, after Anthropic's update of January 2025.

    Raises:
        TypeError: an argument is not floating-point, or of the wrong kind; names it.
        ValueError: a shape or a device does not fit the others; names the argument.

    Example:
        >>> codes = se.SparseCodes.from_dense(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
        >>> tanh_l0(codes, scale=100.0)  # three entries of two tokens
        tensor(1.5000)
    """
    scale = check.positive("scale", scale)
    values = codes.values.to(torch.promote_types(codes.values.dtype, torch.float32))
    values, tokens = _weighed(values, codes, weight_norm)
    return torch.tanh(scale * values).sum() / tokens


def _weighed(values: Tensor, codes: SparseCodes, weight_norm: Tensor | None) -> tuple[Tensor, int]:
    """``values`` (N,) times the norms of their decoder rows, and the number of tokens, at least 1."""
    if weight_norm is None:
        return values, max(codes.rows, 1)
    check.floating("weight_norm", weight_norm)
    if weight_norm.dim() == 1:
        return values * functional.at_latents(weight_norm, codes), max(codes.rows, 1)
    shape = codes.shape[:1] + codes.shape[-1:]
    check.shaped("weight_norm", weight_norm, shape, codes.values, why="one for each latent of each source")
    at = functional.at_latents(weight_norm.flatten(), numbered(codes, shape[0]))
    return values * at, max(codes.rows // shape[0], 1)


def gated(
    gate_codes: SparseCodes, x: Tensor, W_dec: Tensor, b_dec: Tensor | None = None, *, l1: float,
    weight_norm: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What trains the gate of :class:`Gated`: ``l1 * ||relu(gate pre)||_1`` and its reconstruction by a frozen decoder.

    ``mean over tokens of (l1 * sum_j gate_j * weight_norm_j + ||gate @ W_dec + b_dec - x||^2)``; the decoder is a
    constant in the second term. To be added to the reconstruction loss.

    Args:
        gate_codes: codes of the rule ``Gated.gate``.
        x: ``(*batch_shape, d)``, what is reconstructed.
        l1: weight of the first term.
        weight_norm: ``(F,)``, norms of the decoder rows where they are not held at 1 (SAELens); None is 1.

    Source: Rajamanoharan et al. 2024, arXiv:2404.16014.

    Raises:
        TypeError: an argument is not floating-point, or of the wrong kind; names it.
        ValueError: a shape or a device does not fit the others; names the argument.

    Example:
        >>> rule = se.Gated(2)
        >>> gate = rule.gate.select(torch.tensor([[1.0, -1.0]]))
        >>> gated(gate, torch.tensor([[1.0, 2.0]]), torch.eye(2), l1=0.5).item()
        4.5
    """
    l1 = check.positive("l1", l1)
    values = gate_codes.values.to(torch.promote_types(gate_codes.values.dtype, torch.float32))
    if weight_norm is not None:
        values = values * functional.at_latents(weight_norm, gate_codes)
    frozen = None if b_dec is None else b_dec.detach()
    error = squared_error(functional.decode(gate_codes, W_dec.detach(), frozen), x)
    return l1 * values.sum() / max(gate_codes.rows, 1) + error


def aux_zipf(codes: SparseCodes, W_dec: Tensor, residual: Tensor, *, normalize: bool = False) -> Tensor:
    """:func:`losses.auxk` for dead and under-used latents: ``codes`` are those of :class:`AuxZipfTopK`.

    ``short = functional.zipf_shortfall(density, k)`` and
    ``(codes,), *_ = sae.encode_with(x, select=AuxZipfTopK(k_aux), shortfall=short)``: each latent reconstructs the
    residual as far as it falls short of its share under Zipf's law.
    Equal to AuxK where only dead latents do. The name is Ayonrinde's (2024, arXiv:2411.02124), the formula ours.

    Raises:
        TypeError: an argument is not floating-point, or of the wrong kind; names it.
        ValueError: a shape or a device does not fit the others; names the argument.

    Example:
        >>> codes = se.SparseCodes.from_dense(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
        >>> aux_zipf(codes, torch.eye(2), torch.tensor([[1.0, 1.0], [2.0, 3.0]]))
        tensor(0.5000)
    """
    return auxk(codes, W_dec, residual, normalize=normalize)


def matryoshka(
    codes: SparseCodes, x: Tensor, W_dec: Tensor, b_dec: Tensor | None = None, *, widths, reduction: str = "sum"
) -> Tensor:
    """Squared error (summed over d, mean over tokens) of the reconstruction by each prefix of latents, put together.

    All prefixes come from one pass over the codes: :func:`functional.decode_prefixes`.

    Args:
        widths: latents of each prefix, ascending, the last all of them.
        reduction: ``"sum"`` of the prefixes' errors, as SAELens, or their ``"mean"``, as dictionary_learning.

    Source: Bussmann et al. 2025, arXiv:2503.17547.

    Raises:
        TypeError: an argument is not floating-point, or of the wrong kind; names it.
        ValueError: a shape or a device does not fit the others; names the argument.
        ValueError: ``widths`` do not ascend to F, or ``reduction`` is unknown.

    Example:
        >>> codes = se.SparseCodes.from_dense(torch.tensor([[1.0, 2.0]]))
        >>> matryoshka(codes, torch.tensor([[1.0, 2.0]]), torch.eye(2), widths=[1, 2])
        tensor(4.)
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    check.floating("x", x)
    x_hat = functional.decode_prefixes(codes, W_dec, b_dec, widths=widths)
    check.shaped("x", x, (*x_hat.shape[:-2], x_hat.shape[-1]), x_hat, why="that of a reconstruction")
    number = x_hat.shape[-2]
    error = squared_error(x_hat, x[..., None, :].expand(x_hat.shape))  # the mean over tokens and prefixes
    return error * number if reduction == "sum" else error


def _check_rule(rule) -> None:
    if not isinstance(rule, JumpReLU):
        raise TypeError(f"rule must be a JumpReLU, got {type(rule).__name__}")
    if not rule._learns():
        raise RuntimeError("rule must be in training mode, with gradients on and a threshold that requires them")
