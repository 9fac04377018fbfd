"""Sparse decode: the weighted sum of each row's active decoder vectors; or how far it is from a target.

Of several sources, each of which writes some columns, one launch adds all: a tile of a row is written once.

Math      out[b] = sum over row b's entries of value * weight[index] (+ bias); residual = out - target, squares = |.|^2
Grid      (B, cdiv(D, BLOCK_D)); one program owns one tile of one row, so no atomics; rows of many entries are summed
          in splits before, by (N / SPLIT, cdiv(D, BLOCK_D))
Traffic   reads N*(s_v + 4) and N*D*s_w (rows reused through L2 only), writes B*D*s_o; the target is read once
Numerics  fp32 accumulation, IN_FLIGHT entries at a time in entry order, splits in order; bitwise reproducible
Source    Gao et al. 2024, arXiv:2406.04093 (sparse decoder)
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _tuning
from ._device import owner_end
from ._launch import Launch, Layout, layout, planned, strides_of, with_unit_stride


@triton.jit
def _sum_of(values_ptr, indices_ptr, weight_ptr, entries, present, column, mask_d, stride_wf):
    """The sum over a few entries; their weight rows are one tile, so that all are loaded before any is used."""
    value = tl.load(values_ptr + entries, mask=present, other=0.0).to(tl.float32)
    latent = tl.load(indices_ptr + entries, mask=present, other=0).to(tl.int64)
    at = latent[:, None] * stride_wf + column[None, :]  # [IN_FLIGHT, BLOCK_D]
    weight = tl.load(weight_ptr + at, mask=present[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
    return tl.sum(value[:, None] * weight, axis=0)


@triton.jit
def _add_entries(
    acc, values_ptr, indices_ptr, weight_ptr, entry, end, column, mask_d, stride_wf, IN_FLIGHT: tl.constexpr
):
    """acc plus the entries [entry, end), IN_FLIGHT at a time."""
    while entry < end:
        entries = entry + tl.arange(0, IN_FLIGHT)
        acc += _sum_of(values_ptr, indices_ptr, weight_ptr, entries, entries < end, column, mask_d, stride_wf)
        entry += IN_FLIGHT
    return acc


@triton.jit(do_not_specialize=["B"])
def _row_split_kernel(
    values_ptr, indices_ptr, offsets_ptr, weight_ptr,  # [N] in, [N] in int32, [B + 1] in int64, [F, D] in
    partial_ptr,  # [N / SPLIT, D] out, fp32
    B, D, stride_wf, stride_wd, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, IN_FLIGHT: tl.constexpr,
):
    """One tile of SPLIT entries from a multiple of SPLIT on, where all belong to one row, found by bisection."""
    split = tl.program_id(0).to(tl.int64)
    first = split * SPLIT
    end = first + SPLIT
    if end <= owner_end(offsets_ptr, first, B):
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        column = offs_d.to(tl.int64) * stride_wd
        acc = tl.zeros((BLOCK_D,), tl.float32)
        for step in range(0, SPLIT, IN_FLIGHT):
            entries = first + step + tl.arange(0, IN_FLIGHT)
            acc += _sum_of(values_ptr, indices_ptr, weight_ptr, entries, entries >= 0, column, mask_d, stride_wf)
        tl.store(partial_ptr + split * D + offs_d, acc, mask=mask_d)


@triton.jit
def _add_row(
    acc, values_ptr, indices_ptr, offsets_ptr, weight_ptr, partial_ptr, row, place, column, mask_d, D, stride_wf,
    SPLIT: tl.constexpr, IN_FLIGHT: tl.constexpr,
):
    """acc plus a row's entries, and the splits that lie inside it; ``column`` and ``place`` of a weight, of a split."""
    entry = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    while entry < end:
        border = (entry // SPLIT + 1) * SPLIT
        if (border - entry == SPLIT) & (border <= end):
            acc += tl.load(partial_ptr + entry // SPLIT * D + place, mask=mask_d, other=0.0)
        else:
            acc = _add_entries(acc, values_ptr, indices_ptr, weight_ptr, entry, tl.minimum(border, end), column,
                               mask_d, stride_wf, IN_FLIGHT)
        entry = border
    return acc


@triton.jit
def _finish(
    acc, bias_ptr, target_ptr, out_ptr, squares_ptr, row, offs_d, mask_d, stride_bd, stride_tb, stride_td, stride_ob,
    HAS_BIAS: tl.constexpr, HAS_TARGET: tl.constexpr,
):
    """Stores a tile: plus bias, minus target, with its part of the squared norm."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_d * stride_bd, mask=mask_d, other=0.0).to(tl.float32)
    if HAS_TARGET:
        at = row * stride_tb + offs_d.to(tl.int64) * stride_td
        acc -= tl.load(target_ptr + at, mask=mask_d, other=0.0).to(tl.float32)
        square = tl.sum(tl.where(mask_d, acc * acc, 0.0), axis=0)
        tl.store(squares_ptr + row * tl.num_programs(1) + tl.program_id(1), square)
    tl.store(out_ptr + row * stride_ob + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def _decode_kernel(
    values_ptr, indices_ptr, offsets_ptr,  # [N] in, [N] in int32, [B + 1] in int64
    weight_ptr, bias_ptr, target_ptr,      # [F, D] in, [D] in or unused, [B, D] in or unused
    partial_ptr, out_ptr, squares_ptr,     # [N / SPLIT, D] in, fp32, [B, D] out, [B, tiles] out, fp32, or unused
    D, stride_wf, stride_wd, stride_bd, stride_tb, stride_td, stride_ob,
    HAS_BIAS: tl.constexpr, HAS_TARGET: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr, IN_FLIGHT: tl.constexpr,
):
    """One tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    acc = _add_row(tl.zeros((BLOCK_D,), tl.float32), values_ptr, indices_ptr, offsets_ptr, weight_ptr, partial_ptr,
                   row, offs_d, offs_d.to(tl.int64) * stride_wd, mask_d, D, stride_wf, SPLIT, IN_FLIGHT)
    _finish(acc, bias_ptr, target_ptr, out_ptr, squares_ptr, row, offs_d, mask_d, stride_bd, stride_tb, stride_td,
            stride_ob, HAS_BIAS, HAS_TARGET)


@triton.jit
def _sources_kernel(
    sources, strides_wf,  # of each source: values, indices, offsets, weight, partial sums, as above; strides
    bias_ptr, target_ptr, out_ptr, squares_ptr,  # as above
    D, stride_bd, stride_tb, stride_td, stride_ob, FIRSTS: tl.constexpr, STOPS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TARGET: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr, IN_FLIGHT: tl.constexpr,
):
    """One tile of one row: source after source, each of which writes the columns from its FIRST to its STOP."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_D
    offs_d = start + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for s in tl.static_range(len(FIRSTS)):
        if (start < STOPS[s]) & (start + BLOCK_D > FIRSTS[s]):
            source = sources[s]
            place = offs_d - FIRSTS[s]
            mask = (offs_d >= FIRSTS[s]) & (offs_d < STOPS[s])
            acc = _add_row(acc, source[0], source[1], source[2], source[3], source[4], row, place, place.to(tl.int64),
                           mask, STOPS[s] - FIRSTS[s], strides_wf[s], SPLIT, IN_FLIGHT)
    _finish(acc, bias_ptr, target_ptr, out_ptr, squares_ptr, row, offs_d, offs_d < D, stride_bd, stride_tb, stride_td,
            stride_ob, HAS_BIAS, HAS_TARGET)


class _Plan(NamedTuple):
    """The launches in their order."""

    tiles: int  # of a row
    splits: Launch
    decode: Launch


@planned
def _plan(rows: int, weight: Layout, bias: Layout | None, target: Layout | None) -> _Plan:
    width = weight.shape[1]
    block = _tuning.decode_block(width)
    tiles = triton.cdiv(width, block)
    common = dict(
        warps=_tuning.decode_warps(block), D=width, stride_wf=weight.strides[0], stride_wd=weight.strides[1],
        SPLIT=_tuning.SPLIT_ROW, BLOCK_D=block, IN_FLIGHT=_tuning.ENTRIES_IN_FLIGHT,
    )
    target_strides = strides_of(target)
    decode = Launch(
        _decode_kernel, (rows, tiles), stride_bd=0 if bias is None else bias.strides[0], stride_tb=target_strides[0],
        stride_td=target_strides[1], stride_ob=width, HAS_BIAS=bias is not None, HAS_TARGET=target is not None,
        **common,
    )
    return _Plan(tiles, Launch(_row_split_kernel, (0, tiles), B=rows, **common), decode)


@planned
def _plan_sources(
    rows: int, width: int, ranges: tuple, strides: tuple, bias: Layout | None, target: Layout | None
) -> tuple[int, Launch, tuple[Launch, ...]]:
    """Tiles of a row, the launch, and before it that of each source's splits."""
    block = _tuning.decode_block(width)
    tiles = triton.cdiv(width, block)
    common = dict(
        warps=_tuning.decode_warps(block), SPLIT=_tuning.SPLIT_ROW, BLOCK_D=block, IN_FLIGHT=_tuning.ENTRIES_IN_FLIGHT
    )
    splits = tuple(
        Launch(_row_split_kernel, (0, triton.cdiv(stop - first, block)), B=rows, D=stop - first, stride_wf=stride,
               stride_wd=1, **common)
        for (first, stop), stride in zip(ranges, strides, strict=True)
    )  # fmt: skip
    target_strides = strides_of(target)
    launch = Launch(
        _sources_kernel, (rows, tiles), D=width, stride_bd=0 if bias is None else bias.strides[0],
        stride_tb=target_strides[0], stride_td=target_strides[1], stride_ob=width,
        FIRSTS=tuple(first for first, _ in ranges), STOPS=tuple(stop for _, stop in ranges),
        HAS_BIAS=bias is not None, HAS_TARGET=target is not None, **common,
    )  # fmt: skip
    return tiles, launch, splits


def _launch(values, indices, offsets, weight, bias, target, dtype):
    """out (B, D), and squares (B, tiles) where there is a target."""
    rows, width, device = offsets.shape[0] - 1, weight.shape[1], weight.device
    plan = _plan(rows, layout(weight), layout(bias), layout(target))
    out = torch.empty(rows, width, dtype=dtype, device=device)
    squares = None if target is None else torch.empty(rows, plan.tiles, dtype=torch.float32, device=device)
    if rows and width:
        splits = values.shape[0] // _tuning.SPLIT_ROW
        partial = torch.empty(splits, width, dtype=torch.float32, device=device)
        if splits:
            plan.splits(values, indices, offsets, weight, partial, grid=(splits, plan.tiles))
        plan.decode(values, indices, offsets, weight, bias, target, partial, out, squares)
    return out, squares


def launch(values, indices, offsets, weight, bias, dtype, *_by_latent):
    """out (B, D) in ``dtype``; see ``reference.decode``. The transposed index serves the backward only."""
    return _launch(values, indices, offsets, weight, bias, None, dtype)[0]


def launch_error(values, indices, offsets, weight, bias, target, dtype):
    """residual (B, D) in ``dtype``, squares (B,); see ``reference.decode_error``."""
    residual, squares = _launch(values, indices, offsets, weight, bias, target, dtype)
    return residual, squares.view(-1) if squares.shape[1] == 1 else squares.sum(1)


def launch_sources(values, indices, offsets, weights, firsts, width, bias, target, dtype):
    """out or residual (B, width) in ``dtype``, squares (B,) or (0,); see ``reference.decode_sources``."""
    weights = [with_unit_stride(weight) for weight in weights]
    rows, device = offsets[0].shape[0] - 1, weights[0].device
    ranges = tuple((first, first + weight.shape[1]) for first, weight in zip(firsts, weights, strict=True))
    strides = tuple(weight.stride(0) for weight in weights)
    tiles, launch, splits = _plan_sources(rows, width, ranges, strides, layout(bias), layout(target))
    out = torch.empty(rows, width, dtype=dtype, device=device)
    squares = torch.empty(rows if target is not None else 0, tiles, dtype=torch.float32, device=device)
    if rows and width:
        sources = []
        for *codes, weight, of_splits in zip(values, indices, offsets, weights, splits, strict=True):
            v, i, o = (array.contiguous() for array in codes)
            number = v.shape[0] // _tuning.SPLIT_ROW
            partial = torch.empty(max(number, 1), weight.shape[1], dtype=torch.float32, device=device)
            if number:
                of_splits(v, i, o, weight, partial, grid=(number, of_splits.grid[1]))
            sources.append((v, i, o, weight, partial))
        launch(tuple(sources), strides, bias, target, out, squares)
    return out, squares.sum(1)
