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


@triton.jit
def _values_kernel(
    grad_ptr, indices_ptr, offsets_ptr, weight_ptr, out_ptr,  # [B, D], [N] int32, [B + 1] int64, [F, D] in; [N] out
    D, stride_gb, stride_wf, stride_wd, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """One of a row's splits: its gradient against the weight rows of every so many BLOCK_N entries."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + row) + tl.program_id(1) * BLOCK_N
    end = tl.load(offsets_ptr + row + 1)
    while start < end:
        entry = start + tl.arange(0, BLOCK_N)
        latent = tl.load(indices_ptr + entry, mask=entry < end, other=0).to(tl.int64)
        acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for tile in range(0, tl.cdiv(D, BLOCK_D)):
            offs_d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
            grad = tl.load(grad_ptr + row * stride_gb + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
            at = latent[:, None] * stride_wf + offs_d.to(tl.int64)[None, :] * stride_wd
            both = (entry < end)[:, None] & (offs_d < D)[None, :]
            weight = tl.load(weight_ptr + at, mask=both, other=0.0).to(tl.float32)
            acc += weight * grad[None, :]
        tl.store(out_ptr + entry, tl.sum(acc, axis=1).to(out_ptr.dtype.element_ty), mask=entry < end)
        start += SPLITS * BLOCK_N


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


@planned
def _plan_values(grad: Layout, weight: Layout, splits: int) -> Launch:
    rows, width = grad.shape
    return Launch(
        _values_kernel, (rows, splits), warps=4, D=width, stride_gb=grad.strides[0], stride_wf=weight.strides[0],
        stride_wd=weight.strides[1], SPLITS=splits, BLOCK_N=_tuning.VALUES_BLOCK,
        BLOCK_D=_tuning.decode_block(width),
    )


def launch_values(grad, values, indices, offsets, weight):
    """(N,); see ``reference.decode_backward_values``."""
    rows, grad = grad.shape[0], with_unit_stride(grad)
    out = torch.zeros_like(values)
    if rows and values.shape[0]:
        splits = _tuning.splits_of_row(values.shape[0], rows)
        _plan_values(layout(grad), layout(weight), splits)(grad, indices, offsets, weight, out)
    return out


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
