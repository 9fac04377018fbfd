"""The operations on codes as GEMMs, for codes too dense for gathers. Torch only, any device, any back end.

The same results as the sparse versions up to the order of summation; ``is_dense`` says when they win.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .._terms import GIVEN
from .dense import rows_of, to_dense

# Share of stored entries above which an operation on codes densifies and uses a GEMM instead: where
# benchmarks/crossover.py saw the GEMM overtake.
DENSE_SHARE = {
    # At 1/2, the densest measured, the GEMM still lost two of three.
    "cpu": {"decode": 0.5, "decode_backward_values": 0.12, "decode_backward_weight": 0.5},
    # At 1 and 8 rows of 768 or 2048 numbers, fp32 and bf16: gathers took half to all of the GEMM's time at 0.45.
    "cpu, few rows": {"decode": 0.5, "decode_backward_values": 0.45, "decode_backward_weight": 0.5},
    # Extrapolated: at 1/16, the densest measured, gathers took 0.85, 0.94 and 0.59 of the GEMM's time.
    "cuda": {"decode": 0.07, "decode_backward_values": 0.065, "decode_backward_weight": 0.1},
    "cuda, 16 bit": {"decode": 0.017, "decode_backward_values": 0.012, "decode_backward_weight": 0.014},
}

FEW_ROWS = 8  # of codes, on a CPU

# Overrules the shares where the number of stored entries does not tell how dense codes are (unused capacity).
DENSE_CHOICE: ContextVar[bool | None] = ContextVar("dense_choice", default=None)


@contextmanager
def choosing(choice: bool | None) -> Iterator[None]:
    """Within it sums over codes go through GEMMs or gathers as ``choice`` says; None leaves that to their density."""
    token = DENSE_CHOICE.set(choice)
    try:
        yield
    finally:
        DENSE_CHOICE.reset(token)


def is_dense(operation: str, entries: int, rows: int, columns: int, device_type: str, *dtypes: torch.dtype) -> bool:
    """Whether ``operation`` on ``entries`` codes of a (rows, columns) matrix is better done as a GEMM.

    ``dtypes``: of what it would multiply; a GPU multiplies 16-bit numbers a dozen times as fast as others.
    """
    choice = DENSE_CHOICE.get()
    if choice is not None:
        return choice
    kind = "cuda" if device_type != "cpu" else "cpu, few rows" if rows <= FEW_ROWS else "cpu"
    if kind == "cuda" and dtypes and all(dtype.itemsize == 2 for dtype in dtypes):
        kind = "cuda, 16 bit"
    return entries > DENSE_SHARE[kind][operation] * rows * columns


def _sizes_of_decode(values, indices, offsets, weight, *_) -> tuple:
    sizes = values.numel(), offsets.numel() - 1, weight.shape[0], values.device.type, values.dtype, weight.dtype
    return "decode", *sizes


def _sizes_of_sources(values, indices, offsets, weights, *_) -> tuple:
    """One decision for all sources."""
    entries, latents = (sum(t.shape[0] for t in tensors) for tensors in (values, weights))
    dtypes = {t.dtype for t in (*values, *weights)}
    return "decode", entries, offsets[0].numel() - 1, latents, values[0].device.type, *dtypes


def _sizes_of_values(grad, values, indices, offsets, weight) -> tuple:
    sizes = values.numel(), grad.shape[0], weight.shape[0], grad.device.type, grad.dtype, weight.dtype
    return "decode_backward_values", *sizes


def _sizes_of_weight(grad, values, latent_offsets, *_) -> tuple:
    sizes = values.numel(), grad.shape[0], latent_offsets.numel() - 1, grad.device.type, grad.dtype, values.dtype
    return "decode_backward_weight", *sizes


SIZES: dict[str, Callable[..., tuple]] = {  # of the operations that an operator's call may replace, from its arguments
    "decode": _sizes_of_decode, "decode_error": _sizes_of_decode, "decode_sources": _sizes_of_sources,
    "decode_backward_values": _sizes_of_values, "decode_backward_weight": _sizes_of_weight,
}  # fmt: skip


def pays(operator: str, args: tuple) -> bool:
    """Whether the call of an operator does better as a GEMM: decided by shapes alone, hence alike on every run."""
    return operator in SIZES and is_dense(*SIZES[operator](*args))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(a.dtype, b.dtype)
    # A 16-bit result would be rounded once more, and a CPU without units for 16 bits takes fifty times as long for it.
    if wide in (torch.bfloat16, torch.float16) and (dtype != wide or not a.is_cuda):
        if a.is_cuda and dtype == torch.float32:
            return torch.mm(a.to(wide), b.to(wide), out_dtype=dtype)
        wide = torch.float32
    return (a.to(wide) @ b.to(wide)).to(dtype)


def decode(values, indices, offsets, weight, bias, dtype, *_by_latent):
    """(B, D); see ``reference.decode``."""
    if bias is None:
        return _product(to_dense(values, indices, offsets, weight.shape[0]), weight, dtype)
    wide = torch.promote_types(torch.promote_types(values.dtype, weight.dtype), torch.float32)
    out = _product(to_dense(values, indices, offsets, weight.shape[0]), weight, wide)
    return (out + bias.to(wide)).to(dtype)


def error_of(out, bias, target, dtype):
    """residual (B, D) in ``dtype``, squares (B,) of ``out`` (B, D), which is used up: ``reference.decode_error``."""
    residual = (out if bias is None else out.add_(bias)).sub_(target)
    return residual.to(dtype), torch.linalg.vecdot(residual, residual)


def decode_error(values, indices, offsets, weight, bias, target, dtype):
    wide = torch.promote_types(torch.promote_types(values.dtype, weight.dtype), torch.float32)
    return error_of(decode(values, indices, offsets, weight, None, wide), bias, target, dtype)


def decode_sources(*arguments):
    """(B, width), and (B,) or (0,); see ``reference.decode_sources``."""
    return added_sources(decode, *arguments)


def added_sources(decode, values, indices, offsets, weights, firsts, width, bias, target, dtype):
    """The same, source after source by ``decode``."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in (*values, *weights)) else torch.float32
    shape = offsets[0].shape[0] - 1, width
    out = weights[0].new_zeros(shape, dtype=wide)
    if bias is not None:
        out += bias
    if target is not None:
        out -= target
    for first, weight, *codes in zip(firsts, weights, values, indices, offsets, strict=True):
        out[:, first : first + weight.shape[1]] += decode(*codes, weight, None, wide)
    squares = out.new_zeros(0) if target is None else torch.linalg.vecdot(out, out)
    return out.to(dtype), squares


def decode_backward_values(grad, values, indices, offsets, weight):
    """(N,); see ``reference.decode_backward_values``."""
    rows = rows_of(offsets, values.numel())
    product = _product(grad, weight.T, torch.promote_types(values.dtype, torch.float32))
    product = torch.cat([product, product.new_zeros(1, weight.shape[0])])
    return product.view(-1)[rows * weight.shape[0] + indices].to(values.dtype)


def decode_backward_weight(grad, values, latent_offsets, latent_rows, latent_positions, dtype):
    """(F, D); see ``reference.decode_backward_weight``."""
    return _product(to_dense(values[latent_positions], latent_rows, latent_offsets, grad.shape[0]), grad, dtype)


def latent_gradients(x, weight, terms, dtype):
    """(F, D_out), (F, D_in), (F,) in ``dtype``: what these ``terms`` add; see ``reference.latent_gradients``."""
    num_latents = weight.shape[0]
    shapes = weight.shape, (num_latents, x.shape[1]), (num_latents,)
    total = [torch.zeros(shape, dtype=dtype, device=x.device) for shape in shapes]
    for term in terms:
        values = inner = term.values.to(dtype)
        if term.mode != GIVEN:
            inner = decode_backward_values(term.grad, values, term.indices, term.offsets, weight)
        slopes = term.at_entries(inner).to(dtype)
        values, slopes = (to_dense(t, term.indices, term.offsets, num_latents) for t in (values, slopes))
        total[0] += values.T @ term.grad.to(dtype)
        total[1] += slopes.T @ x.to(dtype)
        total[2] += slopes.sum(0)
    return total
