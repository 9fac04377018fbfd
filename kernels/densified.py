"""The operations on codes as GEMMs, for codes too dense for gathers. Torch only, any device, any back end.

The same results as the sparse versions up to the order of summation; ``_tuning.is_dense`` says when they win.
"""
import torch
from torch import Tensor

from ._terms import GIVEN


def entries_of_each_row(offsets: Tensor, entries: int) -> int | None:
    """How many entries every row owns, where that is one number and on a CPU, which may look; else None."""
    rows = offsets.numel() - 1
    if not (offsets.is_cpu and rows and entries) or entries % rows:
        return None
    k = entries // rows
    return k if torch.equal(offsets, torch.arange(0, entries + 1, k, device=offsets.device)) else None


def rows_of(offsets: Tensor, entries: int) -> Tensor:
    """The row (N,) int64 of each entry; entries that belong to no row get row B."""
    k = entries_of_each_row(offsets, entries)
    if k is not None:
        return torch.arange(entries // k, device=offsets.device).repeat_interleave(k)
    counts = torch.cat([offsets.diff(), entries - offsets[-1:]])
    return torch.repeat_interleave(torch.arange(offsets.numel(), device=offsets.device), counts, output_size=entries)


def to_dense(values: Tensor, indices: Tensor, offsets: Tensor, num_latents: int) -> Tensor:
    """(B, F) without a host read: entries that belong to no row land in a row that is cut off."""
    k = entries_of_each_row(offsets, values.numel())
    if k is not None:
        dense = values.new_zeros(values.numel() // k, num_latents)
        return dense.scatter_(1, indices.reshape(-1, k).long(), values.reshape(-1, k))
    rows = rows_of(offsets, values.numel())
    dense = values.new_zeros(offsets.numel(), num_latents)
    dense.view(-1)[rows * num_latents + indices.clamp(max=num_latents - 1)] = values
    return dense[:-1]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(a.dtype, b.dtype)
    if wide in (torch.bfloat16, torch.float16) and dtype != wide:  # a 16-bit result would be rounded once more
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
