"""A sparse MLP for a few tokens: each row of a weight that one of 8 tokens keeps is read once, for all of them.

Math      h[b, j] = kept[b, j] * (<x[b], up[j]> + up_bias[j]) where kept[b, j] != 0; out = h @ down + down_bias
Grid      for each block of TOKENS tokens. The union: as many programs as shares of its F columns. Up: as many as fill
          the device, each with every so many rows of the union. Down: parts of the union times tiles of D_out. The sum
          over parts: tiles of D_out, a token each
Traffic   reads the union's rows of up and down once for a block, B*F*s_k of marks (from the cache again for each
          program that counts what lies before its share), x for each tile of rows (from the cache); B*F*4 at most of
          values and parts*B*D_out*4 of sums are written, and read again
Numerics  fp32 accumulation in a fixed order, parts in order, one rounding; no atomics: bitwise reproducible
Source    the union of tokens' neurons: ours; skipping as in Liu et al. 2023, arXiv:2310.17157
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _tuning, _union_tuning
from ._device import only_if
from ._launch import Launch, Layout, layout, planned, strides_of


@triton.jit
def _marks(kept_ptr, token, column, B, F, stride_kb, stride_kf, WIDE: tl.constexpr):
    """[columns] 1 where one of the tokens keeps a neuron, else 0."""
    at = column.to(tl.int64) if WIDE else column
    present = (token < B)[:, None] & (column < F)[None, :]
    kept_ptr += token.to(tl.int64)[:, None] * stride_kb
    kept = tl.load(kept_ptr + at[None, :] * stride_kf, mask=present, other=0.0)
    return tl.max((kept.to(tl.float32) != 0.0).to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["B"])
def _union_kernel(
    kept_ptr,   # [B, F] in
    union_ptr,  # [blocks, F + 1] out, int32: ascending neurons that some token of the block keeps; last, their number
    B, F, stride_kb, stride_kf,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, SHARE: tl.constexpr, WIDE: tl.constexpr,
):
    """One share of the columns: the union's neurons before it are counted, and its own are listed behind so many."""
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    union_ptr += tl.program_id(1).to(tl.int64) * (F + 1)
    start = tl.program_id(0) * SHARE
    end = tl.minimum(start + SHARE, F)
    found = tl.full((), 0, tl.int32)
    for first in range(0, start, AHEAD):
        column = first + tl.arange(0, AHEAD)
        found += tl.sum(_marks(kept_ptr, token, column, B, start, stride_kb, stride_kf, WIDE), axis=0)
    for first in range(start, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mark = _marks(kept_ptr, token, column, B, F, stride_kb, stride_kf, WIDE)
        place = tl.cumsum(mark, axis=0)
        tl.store(union_ptr + found + place - 1, column, mask=mark == 1)
        found += tl.sum(mark, axis=0)
    tl.store(union_ptr + F, found, mask=end == F)


@triton.jit(do_not_specialize=["B"])
def _up_kernel(
    x_ptr, kept_ptr, union_ptr,  # [B, D] in, [B, F] in, [blocks, F + 1] in, int32
    weight_ptr, bias_ptr,        # [F, D] in, [F] in or unused
    values_ptr,                  # [B, F] out, fp32: h of the union's neurons, in its order; 0 where a token keeps none
    B, F, D, stride_xb, stride_xd, stride_kb, stride_kf, stride_wf, stride_wd,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Tiles of BLOCK_U rows of the union, dealt out to the programs, times every token of the block."""
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    union_ptr += tl.program_id(1).to(tl.int64) * (F + 1)
    count = tl.load(union_ptr + F)
    first = tl.program_id(0) * BLOCK_U
    while first < count:
        number = first + tl.arange(0, BLOCK_U)
        present = number < count
        neuron = tl.load(union_ptr + number, mask=present, other=0).to(tl.int64)
        acc = tl.zeros((ROWS, BLOCK_U), tl.float32)
        for start in range(0, D, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            at = neuron[:, None] * stride_wf + offs_d.to(tl.int64)[None, :] * stride_wd
            weight = tl.load(weight_ptr + at, mask=present[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
            for row in tl.static_range(ROWS):  # registers hold the weight; tokens come from the cache
                one = tl.program_id(1).to(tl.int64) * ROWS + row
                there = only_if(one < B, mask_d)
                x = tl.load(x_ptr + one * stride_xb + offs_d.to(tl.int64) * stride_xd, mask=there, other=0.0)
                inner = tl.sum(weight * x.to(tl.float32)[None, :], axis=1)
                acc = tl.where((tl.arange(0, ROWS) == row)[:, None], acc + inner[None, :], acc)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + neuron, mask=present, other=0.0).to(tl.float32)[None, :]
        here = (token < B)[:, None] & present[None, :]
        at = token.to(tl.int64)[:, None] * stride_kb + neuron[None, :] * stride_kf
        gate = tl.load(kept_ptr + at, mask=here, other=0.0).to(tl.float32)
        value = tl.where(gate == 0.0, 0.0, gate * acc)
        tl.store(values_ptr + token.to(tl.int64)[:, None] * F + number[None, :], value, mask=here)
        first += tl.num_programs(0) * BLOCK_U


@triton.jit
def _sum_of_rows(
    kept_ptr, values_ptr, union_ptr, weight_ptr, start, end, column, mask_d, B, F, stride_kb, stride_kf, stride_wf,
    HAS_UP: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, BLOCK_U: tl.constexpr,
):
    """[ROWS, columns] each token's sum over the union's neurons [start, end).

    A neuron that a token does not keep counts 0 times its row. MASKED leaves it out, which takes several times as long
    and gives something else where that row is not finite.
    """
    acc = tl.zeros((ROWS, column.shape[0]), tl.float32)
    while start < end:
        number = start + tl.arange(0, BLOCK_U)
        present = number < end
        neuron = tl.load(union_ptr + number, mask=present, other=0).to(tl.int64)
        at = neuron[:, None] * stride_wf + column[None, :]
        weight = tl.load(weight_ptr + at, mask=present[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        for row in tl.static_range(ROWS):
            one = tl.program_id(2).to(tl.int64) * ROWS + row
            here = only_if(one < B, present)
            if MASKED or not HAS_UP:
                kept = tl.load(kept_ptr + one * stride_kb + neuron * stride_kf, mask=here, other=0.0).to(tl.float32)
            value = kept if not HAS_UP else tl.load(values_ptr + one * F + number, mask=here, other=0.0)
            term = value[:, None] * weight
            if MASKED:
                term = tl.where((kept == 0.0)[:, None], 0.0, term)
            acc = tl.where((tl.arange(0, ROWS) == row)[:, None], acc + tl.sum(term, axis=0)[None, :], acc)
        start += BLOCK_U
    return acc


@triton.jit(do_not_specialize=["B"])
def _down_kernel(
    kept_ptr, values_ptr, union_ptr,  # [B, F] in, [B, F] in, fp32, or unused, [blocks, F + 1] in, int32
    weight_ptr,                       # [F, D] in
    partial_ptr,                      # [PARTS, B, D] out, fp32
    B, F, D, stride_kb, stride_kf, stride_wf, stride_wd,
    HAS_UP: tl.constexpr, ROWS: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """One part of the union times one tile of the width, for every token of the block."""
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    column = offs_d.to(tl.int64) * stride_wd
    union_ptr += tl.program_id(2).to(tl.int64) * (F + 1)
    count = tl.load(union_ptr + F)
    size = tl.cdiv(count, tl.num_programs(0))
    start = tl.program_id(0) * size
    end = tl.minimum(start + size, count)
    acc = _sum_of_rows(kept_ptr, values_ptr, union_ptr, weight_ptr, start, end, column, mask_d, B, F, stride_kb,
                       stride_kf, stride_wf, HAS_UP, False, ROWS, BLOCK_U)
    if ROWS > 1:  # one token keeps all of its union
        not_finite = tl.max(tl.max((acc - acc != 0.0).to(tl.int32), axis=1), axis=0)
        if not_finite > 0:
            acc = _sum_of_rows(kept_ptr, values_ptr, union_ptr, weight_ptr, start, end, column, mask_d, B, F, stride_kb,
                               stride_kf, stride_wf, HAS_UP, True, ROWS, 1)
    token = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    at = (tl.program_id(0).to(tl.int64) * B + token)[:, None] * D + offs_d[None, :]
    tl.store(partial_ptr + at, acc, mask=(token < B)[:, None] & mask_d[None, :])


@triton.jit(do_not_specialize=["B"])
def _sum_kernel(
    partial_ptr, bias_ptr, out_ptr,  # [PARTS, B, D] in, fp32, [D] in or unused, [B, D] out
    B, D, PARTS, HAS_BIAS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """One tile of one token: its parts in order."""
    token = tl.program_id(1).to(tl.int64)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, PARTS, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        at = (part.to(tl.int64) * B + token)[:, None] * D + offs_d[None, :]
        acc += tl.sum(tl.load(partial_ptr + at, mask=(part < PARTS)[:, None] & mask_d[None, :], other=0.0), axis=0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_d)


class _Plan(NamedTuple):
    """The launches in their order."""

    blocks: int  # of tokens that share a union
    parts: int  # of it, that are summed apart
    union: Launch
    up: Launch | None
    down: Launch
    last: Launch


@planned
def _plan(
    x: Layout | None, kept: Layout, up: Layout | None, has_up_bias: bool, down: Layout, has_down_bias: bool
) -> _Plan:
    (tokens, neurons), width = kept.shape, down.shape[1]
    rows = min(_tuning.next_power_of_2(tokens), _union_tuning.TOKENS)
    blocks = triton.cdiv(tokens, rows)
    kept_strides = {"stride_kb": kept.strides[0], "stride_kf": kept.strides[1]}
    common = dict(B=tokens, F=neurons, **kept_strides, ROWS=rows)
    marks = _union_tuning.mark_tiles(rows, neurons)
    union = Launch(
        _union_kernel, (triton.cdiv(neurons, marks.share), blocks), warps=marks.warps, BLOCK=marks.block,
        AHEAD=marks.ahead, SHARE=marks.share, WIDE=_tuning.is_wide(neurons * kept.strides[1]), **common,
    )
    product = None
    if up is not None:
        d = up.shape[1]
        tile = _union_tuning.up_tile(rows, d, up.dtype.itemsize)
        product = Launch(
            _up_kernel, (_union_tuning.up_programs(tile, blocks, neurons), blocks), warps=tile.warps, D=d,
            stride_xb=strides_of(x)[0], stride_xd=strides_of(x)[1], stride_wf=up.strides[0], stride_wd=up.strides[1],
            HAS_BIAS=has_up_bias, BLOCK_U=tile.neurons, BLOCK_D=tile.columns, **common,
        )
    tile = _union_tuning.down_tile(rows, width)
    parts = _union_tuning.down_parts(tile, blocks, neurons, width)
    sums = Launch(
        _down_kernel, (parts, triton.cdiv(width, tile.columns), blocks), warps=tile.warps, D=width,
        stride_wf=down.strides[0], stride_wd=down.strides[1], HAS_UP=up is not None, BLOCK_U=tile.neurons,
        BLOCK_D=tile.columns, **common,
    )
    columns = min(_tuning.next_power_of_2(width), _union_tuning.LAST_COLUMNS)
    last = Launch(
        _sum_kernel, (triton.cdiv(width, columns), tokens), warps=1, B=tokens, D=width, PARTS=parts,
        HAS_BIAS=has_down_bias, AT_ONCE=_union_tuning.PARTS_AT_ONCE, BLOCK_D=columns,
    )
    return _Plan(blocks, parts, union, product, sums, last)


def launch(x, kept, up, up_bias, down, down_bias):
    """(B, D_out); see ``reference.sparse_mlp``."""
    (tokens, neurons), width = kept.shape, down.shape[1]
    out = torch.empty((tokens, width), dtype=kept.dtype, device=kept.device)
    if out.numel() == 0:
        return out
    if neurons == 0:
        return out.zero_() if down_bias is None else out.copy_(down_bias)
    plan = _plan(layout(x), layout(kept), layout(up), up_bias is not None, layout(down), down_bias is not None)
    union = torch.empty((plan.blocks, neurons + 1), dtype=torch.int32, device=kept.device)
    plan.union(kept, union)
    values = None
    if plan.up is not None:
        values = torch.empty((tokens, neurons), dtype=torch.float32, device=kept.device)
        plan.up(x, kept, union, up, up_bias, values)
    partial = torch.empty((plan.parts, tokens, width), dtype=torch.float32, device=kept.device)
    plan.down(kept, values, union, down, partial)
    plan.last(partial, down_bias, out)
    return out
