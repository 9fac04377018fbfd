"""How a provider's result is compared with the reference before it is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from inputs import Inputs, total
from stock import Output, dense_codes
from torch import Tensor

from sae_engine import SparseCodes
from sae_kernels import reference

if TYPE_CHECKING:
    from registry import Provider


def require(holds: bool, op: str, provider: Provider, what: str) -> None:
    if not holds:
        raise AssertionError(f"{op}: {provider.name} differs from the reference: {what}")


def as_dense(output: Output, like: Tensor) -> Tensor:
    """Any of the forms in which providers return a selection, as a matrix."""
    dense = torch.zeros_like(like)
    match output:
        case SparseCodes():
            return output.check().to_dense()
        case Tensor():
            return output
        case (values, rows, columns):
            dense[rows, columns] = values
        case (values, indices) if values.dim() == 2:
            dense.scatter_(1, indices.long(), values)
        case (values, positions):
            dense.view(-1)[positions] = values
    return dense


def check_selection(name: str, expected: Callable[[Inputs], Tensor], *, batch: bool) -> Callable:
    """Ours, and whoever promises our tie rule, must keep the very same entries; others the same values."""

    def check(i: Inputs, provider: Provider, output: Output) -> None:
        want, got = expected(i), as_dense(output, i.pre)
        if provider.lowest or provider.name.startswith("ours"):
            require(torch.equal(want, got), name, provider, "other entries")
            return
        want, got = (t.flatten() if batch else t for t in (want, got))
        same = torch.equal(want.sort(-1).values, got.sort(-1).values)
        require(same, name, provider, "other values")

    return check


def check_norm_match(i: Inputs, provider: Provider, output: Output) -> None:
    """Kept values are unscaled, and no prefix is nearer by more than rounding: 1e-6 ours, 1e-4 a running fp32 sum."""
    kept = as_dense(output, i.pre)
    values, indices, offsets, _ = reference.norm_match(i.pre, i.target, i.weight_norm, None)
    best = reference.to_dense(values, indices, offsets, i.case.F)
    require(bool(((kept == 0) | (kept == i.pre)).all()), "norm_match", provider, "values that are not the input's")
    distance, least = (
        ((t.double() * i.weight_norm).norm(dim=1) - i.target.double()).abs() for t in (kept, best)
    )
    rounding = (1e-6 if provider.name.startswith("ours") else 1e-4) * i.target.double()
    require(bool((distance <= least + rounding).all()), "norm_match", provider, "a prefix that is not the nearest")


def check_sum(name: str, expected: Callable[[Inputs, torch.dtype], Tensor]) -> Callable:
    """Within twice the reference's own error in the tested dtype plus a rounding (CONTRIBUTING, Tolerances).

    Stock operators may round every partial sum to the tested dtype: they get one rounding per entry.
    """

    def check(i: Inputs, provider: Provider, output: Output) -> None:
        dtype = output.dtype
        truth, honest = expected(i, torch.float64), expected(i, dtype)
        error, yardstick = ((t.double() - truth).abs().max().item() for t in (output, honest))
        roundings = 1 if provider.name.startswith("ours") else max(i.case.k, 8)
        allowed = 2 * (yardstick + roundings * torch.finfo(dtype).eps * truth.abs().max().item())
        require(output.shape == truth.shape, name, provider, f"shape {tuple(output.shape)}")
        require(error <= allowed, name, provider, f"error {error:.3g}, allowed {allowed:.3g}")

    return check


def expected_topk(i: Inputs) -> Tensor:
    values, indices = reference.topk(i.pre, None, None, i.k, False, True)
    return torch.zeros_like(i.pre).scatter_(1, indices.view(-1, i.k).long(), values.view(-1, i.k))


def expected_batch_topk(i: Inputs) -> Tensor:
    values, indices, offsets = reference.batch_topk(i.pre, None, total(i))
    return reference.to_dense(values, indices, offsets, i.case.F)


def expected_feature_topm(i: Inputs) -> Tensor:
    return reference.to_dense(*reference.feature_topm(i.pre, i.m, i.total), i.case.F)


def expected_decode(i: Inputs, dtype: torch.dtype) -> Tensor:
    c = i.codes
    values, weight, bias = (t.to(dtype) for t in (c.values, i.weight, i.bias))
    return reference.decode(values, c.indices, c.offsets, weight, bias, dtype)


def check_error(i: Inputs, provider: Provider, output: Output) -> None:
    for number, part in enumerate(output):
        check = check_sum("decode_error", functools.partial(expected_error, number=number))
        check(i, provider, part.to(i.weight.dtype))


def expected_error(i: Inputs, dtype: torch.dtype, number: int) -> Tensor:
    c = i.codes
    values, weight, bias, target = (t.to(dtype) for t in (c.values, i.weight, i.bias, i.grad))
    return reference.decode_error(values, c.indices, c.offsets, weight, bias, target, dtype)[number]


def expected_value_gradient(i: Inputs, dtype: torch.dtype) -> Tensor:
    c = i.codes
    values, weight, grad = (t.to(dtype) for t in (c.values, i.weight, i.grad))
    return reference.decode_backward_values(grad, values, c.indices, c.offsets, weight)


def expected_weight_gradient(i: Inputs, dtype: torch.dtype) -> Tensor:
    c = i.codes
    turned = reference.by_latent(c.indices, c.offsets, c.num_latents)
    return reference.decode_backward_weight(i.grad.to(dtype), c.values.to(dtype), *turned, dtype)


def check_autoencoder(i: Inputs, provider: Provider, output: Output) -> None:
    """Row by row in norm. GEMMs round differently, so entries within a rounding of the cut may be swapped; decoder rows
    have unit norm, so each swap moves the result by at most twice the cut."""
    sae, dtype = i.sae, output.dtype
    x, weight = i.x.double(), sae.W_dec.double()
    pre = x @ sae.W_enc.double()  # biases are zero
    values, columns = pre.topk(i.k)
    truth = torch.einsum("bk,bkd->bd", values.relu(), weight[columns])
    cut = values[:, -1:]
    eps = torch.finfo(dtype).eps
    rounding = 2 * eps * cut + 2 * i.case.d**0.5 * torch.finfo(torch.float32).eps * x.norm(dim=1, keepdim=True)
    swaps = ((pre - cut).abs() <= rounding).sum(1) - 1
    allowed = 2 * swaps * cut[:, 0] + 2 * i.k * eps * truth.norm(dim=1)
    error = (output.double() - truth).norm(dim=1)
    worst = (error - allowed).argmax()
    what = f"error {error[worst]:.3g} of a row, allowed {allowed[worst]:.3g}"
    require(bool((error <= allowed).all()), "autoencoder", provider, what)


def check_encode(i: Inputs, provider: Provider, output: Output) -> None:
    """Ours: the product by error, the selection from it entry by entry. Others say only what they keep: GEMMs round
    differently, so an entry within two roundings of the cut may be in or out, any other may not.

    A rounding is that of a pre-activation to the tested dtype, which stock GEMMs may also do to a few partial sums,
    and the fp32 sum's.
    """
    x, weight = i.x.double(), i.weight.double()
    truth = x @ weight + i.bias.double()
    if provider.name.startswith("ours"):
        codes, pre = output
        values, indices = reference.topk(pre, None, None, i.k, False, True)
        same = torch.equal(codes.indices, indices) and torch.equal(codes.values, values)
        require(same, "encode", provider, "other entries than those of its pre-activations")
        error, honest = ((t.double() - truth).abs().max() for t in (pre, reference.linear(i.x, i.weight, i.bias)))
        allowed = 2 * (honest + torch.finfo(pre.dtype).eps * truth.abs().max())
        require(bool(error <= allowed), "encode", provider, f"error {error:.3g}, allowed {allowed:.3g}")
        return
    truth = truth.relu()
    kept = as_dense(output, i.x.new_zeros(truth.shape)).double()
    size = truth + x.norm(dim=1, keepdim=True) * weight.norm(dim=0) / i.case.d**0.5
    slack = 4 * torch.finfo(i.x.dtype).eps * size
    slack += 2 * i.case.d**0.5 * torch.finfo(torch.float32).eps * x.norm(dim=1, keepdim=True)
    cut = truth.topk(i.k).values[:, -1:]
    chosen = kept != 0
    require(bool((chosen.sum(1) <= i.k).all()), "encode", provider, "more than k entries in a row")
    require(bool((chosen | (truth <= cut + 2 * slack)).all()), "encode", provider, "an entry is missing")
    require(bool((~chosen | (truth >= cut - 2 * slack)).all()), "encode", provider, "an entry too many")
    require(bool(((kept - truth).abs() <= slack)[chosen].all()), "encode", provider, "other values")


def check_gemm(i: Inputs, provider: Provider, output: Output) -> None:
    truth = i.x.double() @ i.weight.double()
    size = truth.abs() + i.x.double().norm(dim=1, keepdim=True) / i.case.d**0.5  # of partial sums
    error = ((output.double() - truth).abs() / size).max().item()
    allowed = 4 * torch.finfo(output.dtype).eps + 2 * i.case.d**0.5 * torch.finfo(torch.float32).eps
    require(error <= allowed, "encode", provider, f"error {error:.3g}, allowed {allowed:.3g}")


def check_group_maxima(i: Inputs, provider: Provider, output: Output) -> None:
    """Keys of numbers that are not negative are their bits; those of 16-bit numbers are shifted: they end in zeros."""
    lost = -i.pre.shape[1] % i.group_size
    groups = torch.nn.functional.pad(i.pre.relu().float(), (0, lost)).unflatten(1, (-1, i.group_size))
    bits = groups.amax(2).view(torch.int32)
    shift = {torch.bfloat16: 16, torch.float16: 13}.get(i.pre.dtype, 0)
    require(torch.equal(output.int(), bits >> shift), "batch_topk", provider, "other maxima")


def check_flat(check: Callable) -> Callable:
    """Gradients of values come as (B, k) from stock operators and as (N,) from ours."""
    return lambda i, provider, output: check(i, provider, output.flatten())


def check_dense(i: Inputs, provider: Provider, output: Output) -> None:
    require(torch.equal(output, dense_codes(i)), "to_dense", provider, "another matrix")
