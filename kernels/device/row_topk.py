"""Row top-k: the k entries of each row that rank first under (key descending, index ascending).

Math      a row's top-k lies inside its k groups of G latents that rank first under (group maximum, group index); and of
          disjoint sets with a maximum each, no entry below the k-th largest maximum is kept
Grid      (B,); one program owns one row. Few rows, and rows whose groups or candidates fit no tile, have their maxima
          taken beforehand, (B, tiles of a row)
Traffic   reads B*F*s once, then k*G candidates and F/G maxima a row; writes B*k*(s + 4). Wide rows: maxima twice, some
          1.15*k*G candidates (1.4 for k above 2,048); without groups the row twice. Where more than 2*k entries reach
          the bound, the row for each bit of its keys
Numerics  exact, ties to the lowest index, NaN above +Inf; no floating-point arithmetic on the values
Source    Gao et al. 2024, arXiv:2406.04093 (TopK); group maxima: see kernels/README.md
"""
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _tuning
from ._compact import lane_columns
from ._device import ABSENT, keep_first, kth_largest, load_group_maxima, load_key, middle, relu
from ._groups import Maxima, choose_groups, list_survivors, plan_maxima
from ._launch import Launch, Layout, layout, mask_layout, planned, strides_of


@triton.jit
def _row_topk_kernel(
    score_ptr,      # [B, F] in: what ranks
    pre_ptr,        # [B, F] in: what is kept
    mask_ptr,       # [F] or [B, F] in, bool, or unused
    maxima_ptr,     # [B, NG] int32: group maxima, in where HAS_MAXIMA, else scratch
    chosen_ptr,     # [B, KP] scratch, int32: the first columns of the chosen groups
    values_ptr,     # [B, K] out
    indices_ptr,    # [B, K] out, int32, ascending
    F, NG, K, stride_sb, stride_sf, stride_pb, stride_pf, stride_mb, stride_mf,
    MAGNITUDE: tl.constexpr, RELU: tl.constexpr, HAS_MASK: tl.constexpr, HAS_MAXIMA: tl.constexpr, SHIFT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, NGP: tl.constexpr, KP: tl.constexpr,
):
    """One row: stream it for its group maxima unless they are given, choose k groups, choose k of their entries."""
    row = tl.program_id(0).to(tl.int64)
    score_ptr += row * stride_sb
    pre_ptr += row * stride_pb
    if HAS_MASK:
        mask_ptr += row * stride_mb
    maxima_ptr += row * NG
    chosen_ptr += row * KP
    lowest = ABSENT >> SHIFT

    if not HAS_MAXIMA:
        for tile in range(0, tl.cdiv(F, BLOCK)):
            cols = tile * BLOCK + tl.arange(0, BLOCK)
            at = cols.to(tl.int64) if WIDE else cols
            maxima = load_group_maxima(score_ptr, mask_ptr, at, cols < F, stride_sf, stride_mf,
                                       MAGNITUDE, False, HAS_MASK, SHIFT, G)
            groups = tile * (BLOCK // G) + tl.arange(0, BLOCK // G)
            tl.store(maxima_ptr + groups, maxima, mask=groups < NG)
        tl.debug_barrier()  # the maxima are read back by other lanes

    groups = tl.arange(0, NGP)  # [NGP]
    key = tl.load(maxima_ptr + groups, mask=groups < NG, other=lowest)
    k_groups = tl.minimum(K, NG)
    top = tl.max(key, axis=0)
    cut = kth_largest(key, lowest + top * 0, top, k_groups)
    keep, position = keep_first(key, cut, k_groups - tl.sum((key > cut).to(tl.int32), axis=0))
    tl.store(chosen_ptr + position, groups * G, mask=keep)
    tl.debug_barrier()

    slot = tl.arange(0, KP * G)  # [KP * G], candidates in ascending column order
    cols = tl.load(chosen_ptr + slot // G, mask=slot // G < k_groups, other=0) + slot % G
    present = (slot // G < k_groups) & (cols < F)
    at = cols.to(tl.int64) if WIDE else cols
    key = load_key(score_ptr, mask_ptr, at, present, stride_sf, stride_mf, MAGNITUDE, False, HAS_MASK, SHIFT)
    # k groups reach `cut`, hence so do k entries; with fewer groups than k nothing is known
    cut = kth_largest(key, tl.where(NG < K, lowest, cut), top, K)
    keep, position = keep_first(key, cut, K - tl.sum((key > cut).to(tl.int32), axis=0))
    tl.debug_barrier()  # the columns are read again: kept through the search, their registers spill
    cols = tl.load(chosen_ptr + slot // G, mask=keep, other=0) + slot % G
    at = cols.to(tl.int64) if WIDE else cols
    value = tl.load(pre_ptr + at * stride_pf, mask=keep, other=0.0)
    if RELU:
        value = relu(value.to(tl.float32)).to(value.dtype)
    if HAS_MASK:
        value = tl.where(key == lowest + 1, 0.0, value.to(tl.float32)).to(value.dtype)
    tl.store(indices_ptr + row * K + position, cols, mask=keep)
    tl.store(values_ptr + row * K + position, value, mask=keep)


# K is the first value of a loop's count of ties, and Triton would make a constant of a K of 1, which cannot change.
@triton.jit(do_not_specialize=["K"])
def _row_wide_kernel(
    score_ptr, pre_ptr, mask_ptr,  # as above
    maxima_ptr,           # [B, NG] in, int32 or int16, and scratch: group maxima; or unused
    columns_ptr,          # [B, CAPACITY] scratch, int32: the columns that reach a bound
    values_ptr,           # [B, K] out
    indices_ptr,          # [B, K] out, int32, ascending
    F, NG, K, CAPACITY, stride_sb, stride_sf, stride_pb, stride_pf, stride_mb, stride_mf,
    MAGNITUDE: tl.constexpr, RELU: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GROUPS: tl.constexpr, SHIFT: tl.constexpr,
    WIDE: tl.constexpr, G: tl.constexpr, SETS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):
    """One row whose groups or candidates fit no tile: the k-th largest maximum of sets of groups bounds its cut.

    What reaches the bound is listed, and searched; the row itself where it is more than the list holds.
    """
    row = tl.program_id(0).to(tl.int64)
    score_ptr += row * stride_sb
    pre_ptr += row * stride_pb
    if HAS_MASK:
        mask_ptr += row * stride_mb
    columns_ptr += row * CAPACITY
    lowest = ABSENT >> SHIFT

    lane = tl.arange(0, SETS)
    largest = tl.full((SETS,), lowest, tl.int32)
    if HAS_GROUPS:
        maxima_ptr += row * NG
        for tile in range(0, NG, SETS):
            key = tl.load(maxima_ptr + tile + lane, mask=tile + lane < NG, other=lowest)
            largest = tl.maximum(largest, key.to(tl.int32))
    else:
        for tile in range(0, F, SETS):
            cols = tile + lane
            at = cols.to(tl.int64) if WIDE else cols
            key = load_key(score_ptr, mask_ptr, at, cols < F, stride_sf, stride_mf, MAGNITUDE, False, HAS_MASK, SHIFT)
            largest = tl.maximum(largest, key)
    top = tl.max(largest, axis=0)
    # Where more entries are kept than there are sets, the sets' maxima bound nothing.
    low = kth_largest(largest, lowest + top * 0, tl.where(K > SETS, lowest, top), K)
    # Of entries equal to the bound at most the first K are kept, so no more than K groups of that maximum matter.
    groups = tl.full((), 0, tl.int32)
    if HAS_GROUPS:
        groups = choose_groups(maxima_ptr, maxima_ptr, NG, low, K, True, SHIFT, STEP)
    found = list_survivors(score_ptr, mask_ptr, maxima_ptr, columns_ptr, groups, low, K, F, CAPACITY, stride_sf,
                           stride_mf, MAGNITUDE, False, HAS_MASK, HAS_GROUPS, True, SHIFT, WIDE, G, STEP)

    listed = found <= CAPACITY
    lanes = tl.where(listed, found, F)
    head = _tile_keys(score_ptr, mask_ptr, columns_ptr, 0, lanes, listed, stride_sf, stride_mf,
                      MAGNITUDE, HAS_MASK, SHIFT, WIDE, BLOCK)
    hi = top
    while low < hi:
        mid = middle(low, hi)
        count = tl.sum((head >= mid).to(tl.int32), axis=0)
        for tile in range(BLOCK, lanes, BLOCK):
            key = _tile_keys(score_ptr, mask_ptr, columns_ptr, tile, lanes, listed, stride_sf, stride_mf,
                             MAGNITUDE, HAS_MASK, SHIFT, WIDE, BLOCK)
            count += tl.sum((key >= mid).to(tl.int32), axis=0)
        low = tl.where(count >= K, mid, low)
        hi = tl.where(count == K, mid, tl.where(count > K, hi, mid - 1))
    quota = K - tl.sum((head > low).to(tl.int32), axis=0)
    for tile in range(BLOCK, lanes, BLOCK):
        key = _tile_keys(score_ptr, mask_ptr, columns_ptr, tile, lanes, listed, stride_sf, stride_mf,
                         MAGNITUDE, HAS_MASK, SHIFT, WIDE, BLOCK)
        quota -= tl.sum((key > low).to(tl.int32), axis=0)
    written = tl.full((), 0, tl.int32)
    for tile in range(0, lanes, BLOCK):  # the first tile is read again: kept through the search, its registers spill
        key = _tile_keys(score_ptr, mask_ptr, columns_ptr, tile, lanes, listed, stride_sf, stride_mf,
                         MAGNITUDE, HAS_MASK, SHIFT, WIDE, BLOCK)
        keep, position = keep_first(key, low, quota)
        position += written
        keep = keep & (tile + tl.arange(0, BLOCK) < lanes) & (position < K)
        cols, _ = lane_columns(columns_ptr, 0, tile + tl.arange(0, BLOCK), lanes, listed, True)
        at = cols.to(tl.int64) if WIDE else cols
        value = tl.load(pre_ptr + at * stride_pf, mask=keep, other=0.0)
        if RELU:
            value = relu(value.to(tl.float32)).to(value.dtype)
        if HAS_MASK:
            value = tl.where(key == lowest + 1, 0.0, value.to(tl.float32)).to(value.dtype)
        tl.store(indices_ptr + row * K + position, cols, mask=keep)
        tl.store(values_ptr + row * K + position, value, mask=keep)
        equal = tl.minimum(tl.sum((key == low).to(tl.int32), axis=0), quota)
        written += tl.sum((key > low).to(tl.int32), axis=0) + equal
        quota -= equal


@triton.jit
def _tile_keys(
    score_ptr, mask_ptr, columns_ptr, tile, lanes, listed, stride_sf, stride_mf,
    MAGNITUDE: tl.constexpr, HAS_MASK: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Keys of a tile of a row's listed columns, or of the row; lanes that do not exist are ABSENT."""
    cols, present = lane_columns(columns_ptr, 0, tile + tl.arange(0, BLOCK), lanes, listed, True)
    at = cols.to(tl.int64) if WIDE else cols
    return load_key(score_ptr, mask_ptr, at, present, stride_sf, stride_mf, MAGNITUDE, False, HAS_MASK, SHIFT)


class _Plan(NamedTuple):
    """The launches of one selection, and the shape of the int32 scratch (B, n) that the second needs."""

    maxima: Maxima | None  # taken beforehand
    scratch: tuple[tuple[int, int], ...]
    select: Launch


@planned
def _plan(pre: Layout, score: Layout, mask: Layout | None, k: int, magnitude: bool, relu: bool) -> _Plan:
    rows, num_latents = pre.shape
    mask_strides = strides_of(mask)
    common = dict(
        F=num_latents, K=k, stride_sb=score.strides[0], stride_sf=score.strides[1], stride_pb=pre.strides[0],
        stride_pf=pre.strides[1], stride_mb=mask_strides[0], stride_mf=mask_strides[1], MAGNITUDE=magnitude, RELU=relu,
        HAS_MASK=mask is not None, SHIFT=_tuning.key_shift(score.dtype),
        WIDE=_tuning.is_wide(*(num_latents * s for s in (score.strides[1], pre.strides[1], mask_strides[1]))),
    )
    taken = functools.partial(plan_maxima, score, mask, magnitude=magnitude, relu=False)
    groups = _tuning.row_groups(num_latents, k)
    if groups is None:  # the rows' maxima by as many programs as fill the SMs, then a program for each row
        wide = _tuning.wide_row(rows, num_latents, k)
        groups = wide.groups
        select = Launch(
            _row_wide_kernel, (rows,), warps=wide.warps, NG=0 if groups is None else groups.number,
            CAPACITY=wide.capacity, HAS_GROUPS=groups is not None, G=1 if groups is None else groups.size,
            SETS=wide.sets, STEP=wide.step, BLOCK=wide.block, **common,
        )
        return _Plan(None if groups is None else taken(groups, numbered=True), ((rows, wide.capacity),), select)
    maxima = None
    if rows < _tuning.SPLIT_ROWS:
        tile = _tuning.maxima_tile(rows, num_latents, groups.size)
        maxima = taken(groups._replace(block=tile.block, warps=tile.warps))
    k_padded, groups_padded = _tuning.next_power_of_2(k), _tuning.next_power_of_2(groups.number)
    in_passing = maxima is None
    select = Launch(
        _row_topk_kernel, (rows,), NG=groups.number, HAS_MAXIMA=not in_passing, BLOCK=groups.block, G=groups.size,
        NGP=groups_padded, KP=k_padded, **common,
        warps=groups.warps if mask is None else min(2 * groups.warps, 16),  # a mask costs registers
    )
    return _Plan(maxima, (*(((rows, groups.number),) if in_passing else ()), (rows, k_padded)), select)


def launch(pre, score, mask, k, magnitude, relu):
    """values (B*k,), indices (B*k,) of each row's top-k; see ``reference.topk``."""
    rows, device = pre.shape[0], pre.device
    values = torch.empty(rows * k, dtype=pre.dtype, device=device)
    indices = torch.empty(rows * k, dtype=torch.int32, device=device)
    if rows == 0:
        return values, indices
    score = pre if score is None else score
    plan = _plan(layout(pre), layout(score), mask_layout(mask, pre), k, magnitude, relu)
    maxima = None if plan.maxima is None else plan.maxima.of(score, mask)
    scratch: list = [torch.empty(shape, dtype=torch.int32, device=device) for shape in plan.scratch]
    if len(scratch) == 1:
        scratch.insert(0, maxima)
    plan.select(score, pre, mask, *scratch, values, indices)
    return values, indices
