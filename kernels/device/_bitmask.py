"""A bitmask of the latents of each row that may be kept, left by the pass that streams the row.

The writer reads the bitmask, a sixteenth of a bf16 matrix, and of the matrix only the entries whose bits are set; where
many are, it reads all, tile by tile. Rows are cut into splits, so that few rows have many programs; each finds its
place in the result from the numbers that the streaming pass has counted.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _tuning
from ._compact import SHARE_ROWS, sums_before
from ._device import relu, scores
from ._launch import Launch, Layout

NEIGHBOURS = tl.constexpr(8)  # columns of one lane, a byte of the bitmask: 16-byte loads of 16-bit values
WORD = tl.constexpr(32)  # columns of a word of the bitmask
UNIT = tl.constexpr(8192)  # columns: a split is a multiple of it, so that both passes find whole tiles in it
SPARSE = tl.constexpr(16)  # tiles with less than one bit in so many set are written bit by bit


@triton.jit
def split_of(split, row_splits, units, F):
    """The row of a split, its first column and the end of its columns."""
    begin = (split % row_splits).to(tl.int32) * units * UNIT
    return split // row_splits, begin, tl.minimum(begin + units * UNIT, F)


@triton.jit
def lane_bits(keep):
    """A tile of kept columns (LANES, 8) as a byte for each lane."""
    bits = 1 << tl.arange(0, NEIGHBOURS)
    return tl.sum(tl.where(keep, bits[None, :], 0), axis=1)


@triton.jit
def number_of(bits):
    """How many of a word's bits are set."""
    bits = bits.to(tl.uint32)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    return ((((bits + (bits >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _lowest(bits):
    """The lowest bit that is set of a word, and its number."""
    bit = bits & (0 - bits)
    return bit, (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _keeps(r, cols, cut, below, last):
    """Whether r lies above the cut, or equals it up to column `last`; NaN does."""
    return (r <= tl.where(cols <= last, below, cut)) == 0


@triton.jit
def theta_of(theta_ptr, cols, mask, STRIDE_TF: tl.constexpr):
    """Theta of a tile of latents; one load where it is a number expanded, whose stride is 0."""
    return tl.load(theta_ptr) if STRIDE_TF == 0 else tl.load(theta_ptr + cols * STRIDE_TF, mask=mask, other=0.0)


@triton.jit
def _stored(value, theta_ptr, cols, mask, STRIDE_TF: tl.constexpr, HAS_WINDOW: tl.constexpr, RELU: tl.constexpr):
    """What is stored of a kept entry."""
    if HAS_WINDOW:
        theta = theta_of(theta_ptr, cols, mask, STRIDE_TF)
        wide = value.to(tl.float32)
        value = tl.where((wide > theta) | (wide != wide), wide, 0.0).to(value.dtype)
    if RELU:
        value = relu(value.to(tl.float32)).to(value.dtype)
    return value


@triton.jit
def _write_few(
    pre_ptr, weight_ptr, theta_ptr, values_ptr, indices_ptr, first, bits, cut, below, last, written, room,
    stride_pf, stride_wf, STRIDE_TF: tl.constexpr, HAS_CUT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, WIDE: tl.constexpr,
):
    """Writes the entries of words that begin at columns `first`, bit by bit; returns `written` with these added."""
    counts = number_of(bits)
    most = tl.max(counts, axis=0)
    if HAS_CUT:
        left = bits
        for _ in range(0, most):
            bit, place = _lowest(left)
            cols = first + place
            r = scores(pre_ptr, weight_ptr, cols, left != 0, stride_pf, stride_wf, HAS_WEIGHT, WIDE)[1]
            bits ^= tl.where(_keeps(r, cols, cut, below, last), 0, bit)
            left ^= bit
        counts = number_of(bits)
    ends = written + tl.cumsum(counts, axis=0)
    position = ends - counts
    for _ in range(0, most):
        bit, place = _lowest(bits)
        cols = first + place
        kept = (bits != 0) & (position < room)
        at = cols.to(tl.int64) if WIDE else cols
        value = tl.load(pre_ptr + at * stride_pf, mask=kept, other=0.0)
        value = _stored(value, theta_ptr, cols, kept, STRIDE_TF, HAS_WINDOW, HAS_CUT)
        tl.store(indices_ptr + position, cols, mask=kept)
        tl.store(values_ptr + position, value, mask=kept)
        position += 1
        bits ^= bit
    return tl.max(ends, axis=0)


@triton.jit
def _write_many(
    pre_ptr, weight_ptr, bits_ptr, theta_ptr, values_ptr, indices_ptr, begin, end, cut, below, last, written, room,
    stride_pf, stride_wf, STRIDE_TF: tl.constexpr, HAS_CUT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, WIDE: tl.constexpr, DENSE: tl.constexpr,
):
    """Writes the entries of the columns from `begin` to `end`, tile by tile; returns `written` with these added."""
    lane = tl.arange(0, DENSE)
    for tile in range(begin, end, DENSE * NEIGHBOURS):
        cols = tile + lane[:, None] * NEIGHBOURS + tl.arange(0, NEIGHBOURS)[None, :]  # [DENSE, NEIGHBOURS]
        value, r = scores(pre_ptr, weight_ptr, cols, cols < end, stride_pf, stride_wf, HAS_WEIGHT, WIDE)
        if HAS_CUT:
            keep = _keeps(r, cols, cut, below, last).to(tl.int32)
        else:
            first = tile + lane * NEIGHBOURS
            bits = tl.load(bits_ptr + first // WORD, mask=first < end, other=0) >> first % WORD  # [DENSE]
            keep = (bits[:, None] >> tl.arange(0, NEIGHBOURS)[None, :]) & 1
        counts = tl.sum(keep, axis=1)
        ends = written + tl.cumsum(counts, axis=0)
        # `keep` is a number and no mask, because a mask costs more to hand from lane to lane
        position = tl.where(keep == 1, (ends - counts)[:, None] + tl.cumsum(keep, axis=1) - 1, room)
        value = _stored(value, theta_ptr, cols, cols < end, STRIDE_TF, HAS_WINDOW, HAS_CUT)
        tl.store(indices_ptr + position, cols, mask=position < room)
        tl.store(values_ptr + position, value, mask=position < room)
        written += tl.sum(counts, axis=0)
    return written


@triton.jit
def _clear_share(values_ptr, indices_ptr, total, capacity, split, splits, BLOCK: tl.constexpr):
    """A split's share of the places that belong to nobody: zeros, so that nothing reads what was never written."""
    share = tl.cdiv(capacity - total, splits)
    end = tl.minimum(total + (split + 1) * share, capacity)
    for first in range(total + split * share, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(values_ptr + place, tl.zeros((BLOCK,), values_ptr.dtype.element_ty), mask=place < end)
        tl.store(indices_ptr + place, tl.zeros((BLOCK,), tl.int32), mask=place < end)


@triton.jit(do_not_specialize=["rows", "row_splits", "units", "capacity"])
def _write_kept_kernel(
    pre_ptr,                        # [rows, F] in
    bits_ptr,                      # [rows, ROW_WORDS] in, int32
    counts_ptr, sums_ptr,           # [rows * row_splits] in, int32; [ceil(rows * row_splits / SHARE_ROWS)] in, int64
    weight_ptr, cut_ptr, last_ptr,  # [F] in or unused, [rows] in, bits of fp32, [rows] in, int32; with a cut
    theta_ptr,                      # [F] in, fp32, with a window
    offsets_ptr, required_ptr,      # [rows + 1] out, int64; [] out, int64
    values_ptr, indices_ptr,        # [capacity] out, [capacity] out, int32
    capacity, rows, row_splits, units, F, ROW_WORDS, stride_pb, stride_pf, stride_wf, STRIDE_TF: tl.constexpr,
    HAS_CUT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_WINDOW: tl.constexpr, WIDE: tl.constexpr,
    WORDS: tl.constexpr, DENSE: tl.constexpr,
):
    """One split of a row, tile by tile in column order, until it has written its share."""
    TILE: tl.constexpr = WORDS * WORD
    split = tl.program_id(0).to(tl.int64)
    splits = rows.to(tl.int64) * row_splits
    row, begin, end = split_of(split, row_splits, units, F)
    start, total = sums_before(counts_ptr, sums_ptr, split, splits)
    limit = capacity.to(tl.int64)
    tl.store(offsets_ptr + row, tl.minimum(start, limit), mask=split % row_splits == 0)
    tl.store(offsets_ptr + rows, tl.minimum(total, limit), mask=split == splits - 1)
    tl.store(required_ptr, total, mask=split == splits - 1)
    _clear_share(values_ptr, indices_ptr, tl.minimum(total, limit), limit, split, splits, WORDS)

    number = tl.load(counts_ptr + split).to(tl.int64)
    room = tl.minimum(number, tl.maximum(limit - start, 0)).to(tl.int32)  # cut short by the capacity
    values_ptr += start
    indices_ptr += start
    pre_ptr += row * stride_pb
    bits_ptr += row * ROW_WORDS
    cut = tl.full((), 0.0, tl.float32)
    below = cut
    last = begin
    if HAS_CUT:
        key = tl.load(cut_ptr + row)
        cut = key.to(tl.float32, bitcast=True)
        below = tl.maximum(key - 1, 0).to(tl.float32, bitcast=True)
        last = tl.load(last_ptr + row)
    word = tl.arange(0, WORDS)
    written = tl.full((), 0, tl.int32)
    tile = tl.full((), 0, tl.int32)
    while (begin + tile * TILE < end) & (written < room):
        column = begin + tile * TILE
        first = column + word * WORD
        bits = tl.load(bits_ptr + column // WORD + word, mask=first < end, other=0).to(tl.uint32, bitcast=True)
        number_set = tl.sum(number_of(bits), axis=0)
        if number_set * SPARSE >= TILE:
            written = _write_many(
                pre_ptr, weight_ptr, bits_ptr, theta_ptr, values_ptr, indices_ptr, column,
                tl.minimum(column + TILE, end), cut, below, last, written, room, stride_pf, stride_wf,
                STRIDE_TF, HAS_CUT, HAS_WEIGHT, HAS_WINDOW, WIDE, DENSE)
        elif number_set > 0:
            written = _write_few(
                pre_ptr, weight_ptr, theta_ptr, values_ptr, indices_ptr, first, bits, cut, below, last, written, room,
                stride_pf, stride_wf, STRIDE_TF, HAS_CUT, HAS_WEIGHT, HAS_WINDOW, WIDE)
        tile += 1


class Bitmask(NamedTuple):
    """What the streaming pass leaves, and :func:`write` reads."""

    bits: torch.Tensor  # (B, ROW_BYTES) int8, bit j of byte i for column 8 * i + j; whole words of 4 bytes
    counts: torch.Tensor  # (B * row_splits,) int32: how many each split keeps
    sums: torch.Tensor  # (ceil(B * row_splits / SHARE_ROWS),) int64: the same, summed; zeros to begin with


class BitmaskPlan(NamedTuple):
    """Into which splits rows are cut, by :func:`plan_bitmask`."""

    rows: int
    row_bytes: int  # bytes of a row's bitmask
    row_splits: int  # splits of a row
    units: int  # length of a split, in UNIT columns

    def unwritten(self, device) -> Bitmask:
        splits = self.rows * self.row_splits
        return Bitmask(
            torch.empty(self.rows, self.row_bytes, dtype=torch.int8, device=device),
            torch.empty(splits, dtype=torch.int32, device=device),
            torch.zeros(triton.cdiv(splits, SHARE_ROWS.value), dtype=torch.int64, device=device),
        )


def plan_bitmask(pre: Layout, splits: int = 1) -> BitmaskPlan:
    """For a matrix, cut into so many ``splits`` or a few more where the rows' length allows it."""
    rows, num_latents = pre.shape
    whole = triton.cdiv(num_latents, UNIT.value)
    units = max(whole * rows // max(splits, rows, 1), 1)
    return BitmaskPlan(rows, triton.cdiv(num_latents, 128) * 16, triton.cdiv(whole, units), units)


def plan_write(
    pre: Layout, plan: BitmaskPlan, *, weight: Layout | None = None, theta: Layout | None = None, has_cut: bool = False
) -> Launch:
    """The launch of :func:`write`. ``weight`` (F,) where there is a cut, ``theta`` (F,) where there is a window."""
    num_latents = pre.shape[1]
    tile = _tuning.write_tile(num_latents)
    return Launch(
        _write_kept_kernel, (plan.rows * plan.row_splits,), warps=tile.warps, rows=plan.rows,
        row_splits=plan.row_splits, units=plan.units, F=num_latents, ROW_WORDS=plan.row_bytes // 4,
        stride_pb=pre.strides[0],
        stride_pf=pre.strides[1], stride_wf=0 if weight is None else weight.strides[0],
        STRIDE_TF=0 if theta is None else theta.strides[0], HAS_CUT=has_cut, HAS_WEIGHT=weight is not None,
        HAS_WINDOW=theta is not None, WIDE=_tuning.is_wide(num_latents * pre.strides[1]), WORDS=tile.words,
        DENSE=tile.dense,
    )


def write(launch: Launch, pre, bitmask: Bitmask, capacity, weight, cuts, last, theta):
    """values (N,), indices (N,), offsets (B + 1,), required () of the entries whose bits are set.

    ``theta`` (F,): values up to it are stored as 0. With ``cuts`` (B,): of these, what has
    relu(pre) * weight above its row's cut or, up to its column ``last``, equal to it; values pass a ReLU.
    Without a ``capacity`` the host reads the number of entries, once.
    """
    device = pre.device
    size = int(bitmask.sums.sum()) if capacity is None else capacity
    values = torch.empty(size, dtype=pre.dtype, device=device)
    indices = torch.empty(size, dtype=torch.int32, device=device)
    offsets = torch.empty(pre.shape[0] + 1, dtype=torch.int64, device=device)
    required = torch.empty((), dtype=torch.int64, device=device)
    launch(
        pre, bitmask.bits.view(torch.int32), bitmask.counts, bitmask.sums, weight, cuts, last, theta, offsets, required,
        values, indices, size,
    )
    return values, indices, offsets, required


def nothing_kept(pre, capacity):
    """The same of a matrix without rows."""
    size, empty = capacity or 0, torch.zeros((), dtype=torch.int64, device=pre.device)
    return pre.new_zeros(size), pre.new_zeros(size, dtype=torch.int32), empty[None].clone(), empty
