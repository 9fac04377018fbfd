"""Gradients of the sparse decode: of the values row by row, of the weight latent by latent.

Math      grad_values[n] = <grad[row], weight[index]>; grad_weight[f] = sum over f's entries of value * grad[row]
Grid      values: (B, splits); weight: (F, cdiv(D, BLOCK_D)), after (N / SPLIT, cdiv(D, BLOCK_D)) for latents of many
Traffic   values: N*D*s_w + B*D*s_g; weight: N*D*s_g + F*D*s_w written
Numerics  fp32 accumulation in fixed order, no atomics: bitwise reproducible
Source    -
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _tuning
from ._device import owner_end
from ._launch import Launch, Layout, layout, planned, with_unit_stride
from ._value_gradients import value_gradients


@triton.jit
def _weighted_rows(
    acc, grad_ptr, values_ptr, rows_ptr, positions_ptr, entry, end, offs_d, mask_d, stride_gb, IN_FLIGHT: tl.constexpr
):
    """acc plus the sum of value * grad[row] over entries [entry, end), IN_FLIGHT at a time in entry order."""
    while entry < end:
        entries = entry + tl.arange(0, IN_FLIGHT)
        present = entries < end
        row = tl.load(rows_ptr + entries, mask=present, other=0).to(tl.int64)
        position = tl.load(positions_ptr + entries, mask=present, other=0)
        value = tl.load(values_ptr + position, mask=present, other=0.0).to(tl.float32)
        at = row[:, None] * stride_gb + offs_d[None, :]  # [IN_FLIGHT, BLOCK_D]
        grad = tl.load(grad_ptr + at, mask=present[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(value[:, None] * grad, axis=0)
        entry += IN_FLIGHT
    return acc


@triton.jit
def _latent_split_kernel(
    grad_ptr, values_ptr, offsets_ptr, rows_ptr, positions_ptr,  # [F + 1] int64 offsets
    partial_ptr,  # [N / SPLIT, D] out, fp32
    F, D, stride_gb, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, IN_FLIGHT: tl.constexpr,
):
    """One tile of SPLIT entries from a multiple of SPLIT on, where all belong to one latent, found by bisection."""
    split = tl.program_id(0).to(tl.int64)
    first = split * SPLIT
    end = first + SPLIT
    if end <= owner_end(offsets_ptr, first, F):
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        acc = _weighted_rows(tl.zeros((BLOCK_D,), tl.float32), grad_ptr, values_ptr, rows_ptr, positions_ptr,
                             first, end, offs_d, offs_d < D, stride_gb, IN_FLIGHT)
        tl.store(partial_ptr + split * D + offs_d, acc, mask=offs_d < D)


@triton.jit
def _weight_kernel(
    grad_ptr, values_ptr, offsets_ptr, rows_ptr, positions_ptr, partial_ptr,
    out_ptr,  # [F, D] out
    D, stride_gb, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, IN_FLIGHT: tl.constexpr,
):
    """One tile of one latent: the sum over its entries, and over the splits that lie inside it."""
    latent = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    acc = tl.zeros((BLOCK_D,), tl.float32)
    entry = tl.load(offsets_ptr + latent)
    end = tl.load(offsets_ptr + latent + 1)
    while entry < end:
        border = (entry // SPLIT + 1) * SPLIT
        if (border - entry == SPLIT) & (border <= end):
            acc += tl.load(partial_ptr + entry // SPLIT * D + offs_d, mask=mask_d, other=0.0)
        else:
            acc = _weighted_rows(acc, grad_ptr, values_ptr, rows_ptr, positions_ptr, entry, tl.minimum(border, end),
                                 offs_d, mask_d, stride_gb, IN_FLIGHT)
        entry = border
    tl.store(out_ptr + latent * D + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_d)


def launch_values(grad, values, indices, offsets, weight):
    """(N,); see ``reference.decode_backward_values``."""
    return value_gradients(grad, indices, offsets, weight, values.dtype)


class _WeightPlan(NamedTuple):
    """The launches in their order."""

    tiles: int  # of a row of the gradient
    splits: Launch
    weight: Launch


@planned
def _plan_weight(grad: Layout, num_latents: int) -> _WeightPlan:
    width = grad.shape[1]
    block = _tuning.weight_block(width)
    tiles = triton.cdiv(width, block)
    common = dict(
        D=width, stride_gb=grad.strides[0], SPLIT=_tuning.SPLIT_LATENT, BLOCK_D=block,
        IN_FLIGHT=_tuning.ENTRIES_IN_FLIGHT,
    )
    splits = Launch(_latent_split_kernel, (0, tiles), warps=_tuning.decode_warps(block), F=num_latents, **common)
    warps = _tuning.weight_warps(block, grad.dtype.itemsize)
    return _WeightPlan(tiles, splits, Launch(_weight_kernel, (num_latents, tiles), warps=warps, **common))


def launch_weight(grad, values, latent_offsets, latent_rows, latent_positions, dtype):
    """(F, D) in ``dtype``; see ``reference.decode_backward_weight``."""
    num_latents, width, device = latent_offsets.shape[0] - 1, grad.shape[1], grad.device
    grad = with_unit_stride(grad)
    out = torch.empty(num_latents, width, dtype=dtype, device=device)
    if num_latents and width:
        plan = _plan_weight(layout(grad), num_latents)
        splits = values.shape[0] // _tuning.SPLIT_LATENT
        partial = torch.empty(splits, width, dtype=torch.float32, device=device)
        entries = grad, values, latent_offsets, latent_rows, latent_positions, partial
        if splits:
            plan.splits(*entries, grid=(splits, plan.tiles))
        plan.weight(*entries, out)
    return out
