"""Compaction: writes the kept entries of each row, in ascending order, where its offset says.

Every rule whose rows are not written by its own kernel ends here: it has found, for each row, a `cut` (keep the keys
above it) and a `quota` (keep the first so many keys equal to it).
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _tuning
from ._device import ABSENT, keep_first, load_key, only_if, relu


class Candidates(NamedTuple):
    """The columns that may hold kept entries; row b's are ``columns[b, :counts[b]]``, all F where that is negative."""

    columns: torch.Tensor | None = None  # (B, n) int32, ascending in a row
    counts: torch.Tensor | None = None  # (B,) int32


class Shares(NamedTuple):
    """What a whole matrix keeps, from which each row finds its quota and its place: the first ``total`` entries."""

    equal: torch.Tensor  # (B,) int32: entries of a row that tie with the cut
    above: torch.Tensor | None  # (B,) int32: entries of a row above it
    sums: torch.Tensor | None  # (2, ceil(B / SHARE_ROWS)) int64: both, summed over SHARE_ROWS rows, above first
    total: int


EVERY_LATENT = Candidates()
SHARE_ROWS = tl.constexpr(256)


@triton.jit
def listed_lanes(counts_ptr, row, F, HAS_LIST: tl.constexpr):
    """Over how many lanes a row's candidates spread, and whether they are listed."""
    lanes = F
    listed = row < 0
    if HAS_LIST:
        count = tl.load(counts_ptr + row)
        listed = count >= 0
        lanes = tl.where(listed, count, F)
    return lanes, listed


@triton.jit
def lane_columns(columns_ptr, start, lane, lanes, listed, HAS_LIST: tl.constexpr):
    """The columns of a tile of lanes, ascending, and which of them exist; a list begins at `start`."""
    present = lane < lanes
    cols = lane
    if HAS_LIST:
        cols = tl.where(listed, tl.load(columns_ptr + start + lane, mask=only_if(listed, present), other=0), lane)
    return cols, present


@triton.jit
def sums_before(counts_ptr, sums_ptr, row, B):
    """The sum of the counts (B,) of earlier rows, and of all; ``sums`` are those of SHARE_ROWS rows each."""
    lane = tl.arange(0, SHARE_ROWS)
    share = row // SHARE_ROWS
    shares = tl.cdiv(B, SHARE_ROWS)
    counted = share * SHARE_ROWS + lane
    before = tl.sum(tl.load(counts_ptr + counted, mask=counted < row, other=0).to(tl.int64), axis=0)
    total = tl.full((), 0, tl.int64)
    for first in range(0, shares, SHARE_ROWS):
        place = first + lane
        sums = tl.load(sums_ptr + place, mask=place < shares, other=0)
        before += tl.sum(tl.where(place < share, sums, 0), axis=0)
        total += tl.sum(sums, axis=0)
    return before, total


@triton.jit
def _row_share(equal_ptr, above_ptr, sums_ptr, row, B, total):
    """A row's place among the kept entries of a matrix, how many it keeps, and its quota of ties.

    Ties go to the lowest flat index, row by row until they are used up.
    """
    above_before, above_total = sums_before(above_ptr, sums_ptr, row, B)
    equal_before, _ = sums_before(equal_ptr, sums_ptr + tl.cdiv(B, SHARE_ROWS), row, B)
    ties = total - above_total
    used = tl.minimum(equal_before, ties)
    quota = tl.minimum(tl.load(equal_ptr + row).to(tl.int64), ties - used).to(tl.int32)
    return above_before + used, tl.load(above_ptr + row) + quota, quota


@triton.jit(do_not_specialize=["B", "total"])
def _compact_kernel(
    score_ptr,          # [B, F] in: what ranks
    pre_ptr,            # [B, F] in: what is kept
    mask_ptr,           # [F] or [B, F] in, bool, or unused
    weight_ptr,         # [F] in, or unused
    cut_ptr,            # [B] in, int32
    quota_ptr,          # [B] in, int32; with shares the ties of each row
    offsets_ptr,        # [B + 1] in, int64; with shares out
    above_ptr,          # [B] in, int32, with shares
    sums_ptr,           # [2, ceil(B / SHARE_ROWS)] in, int64, with shares
    columns_ptr,        # [B, CAPACITY] in, int32: the columns that are looked at; or unused
    counts_ptr,         # [B] in, int32: how many they are; or unused
    values_ptr,         # [N] out
    indices_ptr,        # [N] out, int32
    B, F, total, CAPACITY, stride_sb, stride_sf, stride_pb, stride_pf, stride_mb, stride_mf, stride_wf,
    MAGNITUDE: tl.constexpr, RANK_RELU: tl.constexpr, VALUE_RELU: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_LIST: tl.constexpr, HAS_SHARES: tl.constexpr, SHIFT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """One row, tile by tile in column order, until it has written its share."""
    row = tl.program_id(0).to(tl.int64)
    score_ptr += row * stride_sb
    pre_ptr += row * stride_pb
    if HAS_MASK:
        mask_ptr += row * stride_mb
    cut = tl.load(cut_ptr + row)
    if HAS_SHARES:
        start, room, quota = _row_share(quota_ptr, above_ptr, sums_ptr, row, B, total.to(tl.int64))
        tl.store(offsets_ptr + row, start)
        tl.store(offsets_ptr + row + 1, start + room, mask=row == B - 1)
    else:
        quota = tl.load(quota_ptr + row)
        start = tl.load(offsets_ptr + row)
        room = (tl.load(offsets_ptr + row + 1) - start).to(tl.int32)
    values_ptr += start
    indices_ptr += start
    lanes, listed = listed_lanes(counts_ptr, row, F, HAS_LIST)
    written = tl.full((), 0, tl.int32)
    tile = tl.full((), 0, tl.int32)
    while (tile * BLOCK < lanes) & (written < room):
        lane = tile * BLOCK + tl.arange(0, BLOCK)
        cols, present = lane_columns(columns_ptr, row * CAPACITY, lane, lanes, listed, HAS_LIST)
        at = cols.to(tl.int64) if WIDE else cols
        key = load_key(score_ptr, mask_ptr, weight_ptr, at, present, stride_sf, stride_mf, stride_wf,
                       MAGNITUDE, RANK_RELU, HAS_MASK, HAS_WEIGHT, SHIFT)
        keep, position = keep_first(key, cut, quota)
        position += written
        keep = keep & present & (position < room)  # a row cut short by its capacity
        tl.store(indices_ptr + position, cols, mask=keep)
        unmasked = keep
        if HAS_MASK:
            unmasked = keep & (key > (ABSENT >> SHIFT) + 1)  # masked entries fill the row as zeros
        value = tl.load(pre_ptr + at * stride_pf, mask=unmasked, other=0.0)
        if VALUE_RELU:
            value = relu(value.to(tl.float32)).to(value.dtype)
        tl.store(values_ptr + position, value, mask=keep)
        equal = tl.sum((present & (key == cut)).to(tl.int32), axis=0)
        written += tl.sum((present & (key > cut)).to(tl.int32), axis=0) + tl.minimum(equal, quota)
        quota -= tl.minimum(equal, quota)
        tile += 1


def compact(
    pre, score, mask, weight, cut, quota, offsets, values, indices, *,
    magnitude, rank_relu, value_relu, shift, candidates=EVERY_LATENT, tile=None,
):
    """Fills ``values`` and ``indices`` (N,); F, strides and dtypes are those of ``pre`` and ``score`` (B, F).

    ``quota`` is (B,) numbers of ties, or the ``Shares`` they and the offsets, which are then written, follow from.
    ``tile`` is lanes and warps for listed candidates.
    """
    rows, num_latents = pre.shape
    if rows == 0 or values.numel() == 0:
        return
    mask_strides = (0, 0) if mask is None else mask.expand(pre.shape).stride()
    weight_stride = 0 if weight is None else weight.stride(0)
    shares = quota if isinstance(quota, Shares) else Shares(quota, None, None, 0)  # the rest is unused
    block, warps = tile or _tuning.compact_tile(num_latents)
    wide = _tuning.is_wide(*(num_latents * s for s in (score.stride(1), pre.stride(1), mask_strides[1])))
    _compact_kernel[(rows,)](
        score, pre, mask, weight, cut, shares.equal, offsets, shares.above, shares.sums, *candidates, values, indices,
        B=rows, F=num_latents, total=shares.total,
        CAPACITY=0 if candidates.columns is None else candidates.columns.shape[1],
        stride_sb=score.stride(0), stride_sf=score.stride(1), stride_pb=pre.stride(0),
        stride_pf=pre.stride(1), stride_mb=mask_strides[0], stride_mf=mask_strides[1], stride_wf=weight_stride,
        MAGNITUDE=magnitude, RANK_RELU=rank_relu, VALUE_RELU=value_relu, HAS_MASK=mask is not None,
        HAS_WEIGHT=weight is not None, HAS_LIST=candidates.columns is not None, HAS_SHARES=shares.sums is not None,
        SHIFT=shift, WIDE=wide, BLOCK=block, **_tuning.options(warps),
    )
