"""Compaction: writes the kept entries of each row, in ascending order, and where it begins.

Batch top-k ends here: it has found a cut, how many keys of each row lie above it, and how many are equal to it.
"""
import triton
import triton.language as tl

from . import _tuning
from ._device import ABSENT, keep_first, load_key, only_if, relu
from ._launch import Launch, Layout, strides_of

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
    pre_ptr,            # [B, F] in: relu of it ranks, and is kept
    mask_ptr,           # [F] or [B, F] in, bool, or unused
    cut_ptr,            # [B] in, int32
    equal_ptr,          # [B] in, int32: keys equal to the cut
    offsets_ptr,        # [B + 1] out, int64
    above_ptr,          # [B] in, int32: keys above the cut
    sums_ptr,           # [2, ceil(B / SHARE_ROWS)] in, int64: of above and equal
    columns_ptr,        # [B, CAPACITY] in, int32: the columns that are looked at; or unused
    counts_ptr,         # [B] in, int32: how many they are; or unused
    values_ptr,         # [N] out
    indices_ptr,        # [N] out, int32
    B, F, total, CAPACITY, stride_pb, stride_pf, stride_mb, stride_mf,
    HAS_MASK: tl.constexpr, HAS_LIST: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """One row, tile by tile in column order, until it has written its share."""
    row = tl.program_id(0).to(tl.int64)
    pre_ptr += row * stride_pb
    if HAS_MASK:
        mask_ptr += row * stride_mb
    cut = tl.load(cut_ptr + row)
    start, room, quota = _row_share(equal_ptr, above_ptr, sums_ptr, row, B, total.to(tl.int64))
    tl.store(offsets_ptr + row, start)
    tl.store(offsets_ptr + row + 1, start + room, mask=row == B - 1)
    values_ptr += start
    indices_ptr += start
    lanes, listed = listed_lanes(counts_ptr, row, F, HAS_LIST)
    written = tl.full((), 0, tl.int32)
    tile = tl.full((), 0, tl.int32)
    while (tile * BLOCK < lanes) & (written < room):
        lane = tile * BLOCK + tl.arange(0, BLOCK)
        cols, present = lane_columns(columns_ptr, row * CAPACITY, lane, lanes, listed, HAS_LIST)
        at = cols.to(tl.int64) if WIDE else cols
        key = load_key(pre_ptr, mask_ptr, at, present, stride_pf, stride_mf, False, True, HAS_MASK, SHIFT)
        keep, position = keep_first(key, cut, quota)
        position += written
        keep = keep & present & (position < room)  # never into the next row's place
        tl.store(indices_ptr + position, cols, mask=keep)
        unmasked = keep
        if HAS_MASK:
            unmasked = keep & (key > (ABSENT >> SHIFT) + 1)  # masked entries fill the row as zeros
        value = tl.load(pre_ptr + at * stride_pf, mask=unmasked, other=0.0)
        tl.store(values_ptr + position, relu(value.to(tl.float32)).to(value.dtype), mask=keep)
        equal = tl.sum((present & (key == cut)).to(tl.int32), axis=0)
        written += tl.sum((present & (key > cut)).to(tl.int32), axis=0) + tl.minimum(equal, quota)
        quota -= tl.minimum(equal, quota)
        tile += 1


def plan_compact(pre: Layout, mask: Layout | None, total: int, listed: int, tile=None) -> Launch:
    """The launch that writes ``total`` entries of a matrix, ranked and stored as relu(pre), and their offsets.

    ``listed``: the capacity of a row's list of candidates, 0 where all its latents are looked at; ``tile`` is lanes and
    warps for them. Its pointers are those of the kernel.
    """
    rows, num_latents = pre.shape
    mask_strides = strides_of(mask)
    block, warps = tile or _tuning.compact_tile(num_latents)
    return Launch(
        _compact_kernel, (rows,), warps=warps, B=rows, F=num_latents, total=total, CAPACITY=listed,
        stride_pb=pre.strides[0], stride_pf=pre.strides[1], stride_mb=mask_strides[0], stride_mf=mask_strides[1],
        HAS_MASK=mask is not None, HAS_LIST=listed > 0, SHIFT=_tuning.key_shift(pre.dtype),
        WIDE=_tuning.is_wide(*(num_latents * s for s in (pre.strides[1], mask_strides[1]))), BLOCK=block,
    )
