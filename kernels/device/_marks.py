"""Marks: one bit for each latent of a row that may be kept, left by the pass that streams the row.

The writer reads the marks, a sixteenth of a bf16 matrix, and of the matrix only what is marked; where much is, all of
it, tile by tile. Rows are cut into segments, so that few rows have many programs; each finds its place in the result
from the numbers that the streaming pass has counted.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _tuning
from ._compact import SHARE_ROWS, sums_before
from ._device import relu, scores
from ._launch import Launch, Layout

NEIGHBOURS = tl.constexpr(8)  # columns of one lane, a byte of marks: 16-byte loads of 16-bit values
WORD = tl.constexpr(32)  # columns of a word of marks
PART = tl.constexpr(8192)  # columns that segments are counted in: whole tiles of either pass
SPARSE = tl.constexpr(16)  # tiles that mark less than one entry in so many are written mark by mark


@triton.jit
def segment_of(segment, parts, part, F):
    """The row of a segment, its first column and the end of its columns."""
    begin = (segment % parts).to(tl.int32) * part * PART
    return segment // parts, begin, tl.minimum(begin + part * PART, F)


@triton.jit
def lane_marks(keep):
    """A tile of kept columns (LANES, 8) as a byte for each lane."""
    bits = 1 << tl.arange(0, NEIGHBOURS)
    return tl.sum(tl.where(keep, bits[None, :], 0), axis=1)


@triton.jit
def number_of(marks):
    """How many of a word's bits are set."""
    marks = marks.to(tl.uint32)
    marks = marks - ((marks >> 1) & 0x55555555)
    marks = (marks & 0x33333333) + ((marks >> 2) & 0x33333333)
    return ((((marks + (marks >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _lowest(marks):
    """The lowest bit that is set of a word, and its number."""
    bit = marks & (0 - marks)
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
    pre_ptr, weight_ptr, theta_ptr, values_ptr, indices_ptr, first, marks, cut, below, last, written, room,
    stride_pf, stride_wf, STRIDE_TF: tl.constexpr, HAS_CUT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, WIDE: tl.constexpr,
):
    """Writes what words that begin at columns `first` have marked, mark by mark; returns how many are written then."""
    counts = number_of(marks)
    most = tl.max(counts, axis=0)
    if HAS_CUT:
        left = marks
        for _ in range(0, most):
            bit, place = _lowest(left)
            cols = first + place
            r = scores(pre_ptr, weight_ptr, cols, left != 0, stride_pf, stride_wf, HAS_WEIGHT, WIDE)[1]
            marks ^= tl.where(_keeps(r, cols, cut, below, last), 0, bit)
            left ^= bit
        counts = number_of(marks)
    ends = written + tl.cumsum(counts, axis=0)
    position = ends - counts
    for _ in range(0, most):
        bit, place = _lowest(marks)
        cols = first + place
        kept = (marks != 0) & (position < room)
        at = cols.to(tl.int64) if WIDE else cols
        value = tl.load(pre_ptr + at * stride_pf, mask=kept, other=0.0)
        value = _stored(value, theta_ptr, cols, kept, STRIDE_TF, HAS_WINDOW, HAS_CUT)
        tl.store(indices_ptr + position, cols, mask=kept)
        tl.store(values_ptr + position, value, mask=kept)
        position += 1
        marks ^= bit
    return tl.max(ends, axis=0)


@triton.jit
def _write_many(
    pre_ptr, weight_ptr, marks_ptr, theta_ptr, values_ptr, indices_ptr, begin, end, cut, below, last, written, room,
    stride_pf, stride_wf, STRIDE_TF: tl.constexpr, HAS_CUT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, WIDE: tl.constexpr, DENSE: tl.constexpr,
):
    """The same of whole columns from `begin` to `end`."""
    lane = tl.arange(0, DENSE)
    for tile in range(begin, end, DENSE * NEIGHBOURS):
        cols = tile + lane[:, None] * NEIGHBOURS + tl.arange(0, NEIGHBOURS)[None, :]  # [DENSE, NEIGHBOURS]
        value, r = scores(pre_ptr, weight_ptr, cols, cols < end, stride_pf, stride_wf, HAS_WEIGHT, WIDE)
        if HAS_CUT:
            keep = _keeps(r, cols, cut, below, last).to(tl.int32)
        else:
            first = tile + lane * NEIGHBOURS
            marks = tl.load(marks_ptr + first // WORD, mask=first < end, other=0) >> first % WORD  # [DENSE]
            keep = (marks[:, None] >> tl.arange(0, NEIGHBOURS)[None, :]) & 1
        counts = tl.sum(keep, axis=1)
        ends = written + tl.cumsum(counts, axis=0)
        # kept by a number that says so, as masks cost more to hand from lane to lane
        position = tl.where(keep == 1, (ends - counts)[:, None] + tl.cumsum(keep, axis=1) - 1, room)
        value = _stored(value, theta_ptr, cols, cols < end, STRIDE_TF, HAS_WINDOW, HAS_CUT)
        tl.store(indices_ptr + position, cols, mask=position < room)
        tl.store(values_ptr + position, value, mask=position < room)
        written += tl.sum(counts, axis=0)
    return written


@triton.jit
def _clear_share(values_ptr, indices_ptr, total, capacity, segment, segments, BLOCK: tl.constexpr):
    """A segment's share of the places that belong to nobody: zeros, so that nothing reads what was never written."""
    share = tl.cdiv(capacity - total, segments)
    end = tl.minimum(total + (segment + 1) * share, capacity)
    for first in range(total + segment * share, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(values_ptr + place, tl.zeros((BLOCK,), values_ptr.dtype.element_ty), mask=place < end)
        tl.store(indices_ptr + place, tl.zeros((BLOCK,), tl.int32), mask=place < end)


@triton.jit(do_not_specialize=["rows", "parts", "part", "capacity"])
def _write_marked_kernel(
    pre_ptr,                        # [rows, F] in
    marks_ptr,                      # [rows, ROW_WORDS] in, int32
    counts_ptr, sums_ptr,           # [rows * parts] in, int32; [ceil(rows * parts / SHARE_ROWS)] in, int64
    weight_ptr, cut_ptr, last_ptr,  # [F] in or unused, [rows] in, bits of fp32, [rows] in, int32; with a cut
    theta_ptr,                      # [F] in, fp32, with a window
    offsets_ptr, required_ptr,      # [rows + 1] out, int64; [] out, int64
    values_ptr, indices_ptr,        # [capacity] out, [capacity] out, int32
    capacity, rows, parts, part, F, ROW_WORDS, stride_pb, stride_pf, stride_wf, STRIDE_TF: tl.constexpr,
    HAS_CUT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_WINDOW: tl.constexpr, WIDE: tl.constexpr,
    WORDS: tl.constexpr, DENSE: tl.constexpr,
):
    """One segment of a row, tile by tile in column order, until it has written its share."""
    TILE: tl.constexpr = WORDS * WORD
    segment = tl.program_id(0).to(tl.int64)
    segments = rows.to(tl.int64) * parts
    row, begin, end = segment_of(segment, parts, part, F)
    start, total = sums_before(counts_ptr, sums_ptr, segment, segments)
    limit = capacity.to(tl.int64)
    tl.store(offsets_ptr + row, tl.minimum(start, limit), mask=segment % parts == 0)
    tl.store(offsets_ptr + rows, tl.minimum(total, limit), mask=segment == segments - 1)
    tl.store(required_ptr, total, mask=segment == segments - 1)
    _clear_share(values_ptr, indices_ptr, tl.minimum(total, limit), limit, segment, segments, WORDS)

    number = tl.load(counts_ptr + segment).to(tl.int64)
    room = tl.minimum(number, tl.maximum(limit - start, 0)).to(tl.int32)  # cut short by the capacity
    values_ptr += start
    indices_ptr += start
    pre_ptr += row * stride_pb
    marks_ptr += row * ROW_WORDS
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
        marks = tl.load(marks_ptr + column // WORD + word, mask=first < end, other=0).to(tl.uint32, bitcast=True)
        marked = tl.sum(number_of(marks), axis=0)
        if marked * SPARSE >= TILE:
            written = _write_many(
                pre_ptr, weight_ptr, marks_ptr, theta_ptr, values_ptr, indices_ptr, column,
                tl.minimum(column + TILE, end), cut, below, last, written, room, stride_pf, stride_wf,
                STRIDE_TF, HAS_CUT, HAS_WEIGHT, HAS_WINDOW, WIDE, DENSE)
        elif marked > 0:
            written = _write_few(
                pre_ptr, weight_ptr, theta_ptr, values_ptr, indices_ptr, first, marks, cut, below, last, written, room,
                stride_pf, stride_wf, STRIDE_TF, HAS_CUT, HAS_WEIGHT, HAS_WINDOW, WIDE)
        tile += 1


class Marks(NamedTuple):
    """What the streaming pass leaves, and :func:`write` reads."""

    bits: torch.Tensor  # (B, ROW_MARKS) int8, bit j of byte i for column 8 * i + j; whole words of 4 bytes
    counts: torch.Tensor  # (B * parts,) int32: how many each segment keeps
    sums: torch.Tensor  # (ceil(B * parts / SHARE_ROWS),) int64: the same, summed; zeros to begin with


class MarksPlan(NamedTuple):
    """Into which segments rows are cut, by :func:`plan_marks`."""

    rows: int
    row_marks: int  # bytes of marks of a row
    parts: int  # segments of a row
    part: int  # length of a segment, in PART columns

    def unmarked(self, device) -> Marks:
        segments = self.rows * self.parts
        return Marks(
            torch.empty(self.rows, self.row_marks, dtype=torch.int8, device=device),
            torch.empty(segments, dtype=torch.int32, device=device),
            torch.zeros(triton.cdiv(segments, SHARE_ROWS.value), dtype=torch.int64, device=device),
        )


def plan_marks(pre: Layout, segments: int = 1) -> MarksPlan:
    """For a matrix, cut into so many ``segments`` or a few more where the rows' length allows it."""
    rows, num_latents = pre.shape
    units = triton.cdiv(num_latents, PART.value)
    part = max(units * rows // max(segments, rows, 1), 1)
    return MarksPlan(rows, triton.cdiv(num_latents, 128) * 16, triton.cdiv(units, part), part)


def plan_write(
    pre: Layout, marks: MarksPlan, *, weight: Layout | None = None, theta: Layout | None = None, has_cut: bool = False
) -> Launch:
    """The launch of :func:`write`. ``weight`` (F,) where there is a cut, ``theta`` (F,) where there is a window."""
    num_latents = pre.shape[1]
    tile = _tuning.marked_tile(num_latents)
    return Launch(
        _write_marked_kernel, (marks.rows * marks.parts,), warps=tile.warps, rows=marks.rows, parts=marks.parts,
        part=marks.part, F=num_latents, ROW_WORDS=marks.row_marks // 4, stride_pb=pre.strides[0],
        stride_pf=pre.strides[1], stride_wf=0 if weight is None else weight.strides[0],
        STRIDE_TF=0 if theta is None else theta.strides[0], HAS_CUT=has_cut, HAS_WEIGHT=weight is not None,
        HAS_WINDOW=theta is not None, WIDE=_tuning.is_wide(num_latents * pre.strides[1]), WORDS=tile.words,
        DENSE=tile.dense,
    )


def write(launch: Launch, pre, marks: Marks, capacity, weight, cuts, last, theta):
    """values (N,), indices (N,), offsets (B + 1,), required () of what is marked.

    ``theta`` (F,): values up to it are stored as 0. With ``cuts`` (B,): of what is marked, what has
    relu(pre) * weight above its row's cut or, up to its column ``last``, equal to it; values pass a ReLU.
    Without a ``capacity`` the host reads the number of entries, once.
    """
    device = pre.device
    size = int(marks.sums.sum()) if capacity is None else capacity
    values = torch.empty(size, dtype=pre.dtype, device=device)
    indices = torch.empty(size, dtype=torch.int32, device=device)
    offsets = torch.empty(pre.shape[0] + 1, dtype=torch.int64, device=device)
    required = torch.empty((), dtype=torch.int64, device=device)
    launch(
        pre, marks.bits.view(torch.int32), marks.counts, marks.sums, weight, cuts, last, theta, offsets, required,
        values, indices, size,
    )
    return values, indices, offsets, required


def nothing_marked(pre, capacity):
    """The same of a matrix without rows."""
    size, empty = capacity or 0, torch.zeros((), dtype=torch.int64, device=pre.device)
    return pre.new_zeros(size), pre.new_zeros(size, dtype=torch.int32), empty[None].clone(), empty
