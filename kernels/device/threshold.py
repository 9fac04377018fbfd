"""Threshold: every entry above its latent's theta; NaN is kept and counted.

Math      keep pre > theta_j (or > theta_j - bandwidth / 2, entries up to theta_j then holding 0)
Grid      (B * parts of a row,); few rows have several parts
Traffic   reads B*F*s once, and again the entries that are kept, or the tiles where they are many; a bit an entry is
          written and read; writes N*(s + 4)
Numerics  compared in fp32; exact
Source    Rajamanoharan et al. 2024, arXiv:2407.14435 (JumpReLU); Bussmann et al. 2024 (inference of BatchTopK)
"""
from typing import NamedTuple

import triton
import triton.language as tl

from . import _tuning
from ._compact import SHARE_ROWS
from ._launch import Launch, Layout, layout, planned
from ._marks import (
    NEIGHBOURS,
    MarksPlan,
    lane_marks,
    nothing_marked,
    number_of,
    plan_marks,
    plan_write,
    segment_of,
    theta_of,
    write,
)


@triton.jit(do_not_specialize=["parts", "part"])
def _mark_kernel(
    pre_ptr, theta_ptr,              # [B, F] in, [F] in, fp32
    marks_ptr, count_ptr, sums_ptr,  # [B, ROW_MARKS] out, int8, [B * parts] out, int32, in/out: see _marks.Marks
    parts, part, F, ROW_MARKS, half_window, stride_pb, stride_pf, STRIDE_TF: tl.constexpr, HAS_WINDOW: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """One segment of a row: which entries it stores, and how many."""
    segment = tl.program_id(0).to(tl.int64)
    row, begin, end = segment_of(segment, parts, part, F)
    pre_ptr += row * stride_pb
    marks_ptr += row * ROW_MARKS
    lane = tl.arange(0, BLOCK // NEIGHBOURS)
    counts = tl.zeros((BLOCK // NEIGHBOURS,), tl.int32)
    for tile in range(begin, end, BLOCK):
        cols = tile + lane[:, None] * NEIGHBOURS + tl.arange(0, NEIGHBOURS)[None, :]  # [LANES, NEIGHBOURS]
        at = cols.to(tl.int64) if WIDE else cols
        # what lies outside the row is above nothing
        value = tl.load(pre_ptr + at * stride_pf, mask=cols < F, other=-float("inf")).to(tl.float32)
        floor = theta_of(theta_ptr, cols, cols < F, STRIDE_TF)
        if HAS_WINDOW:
            floor -= half_window
        marks = lane_marks((value > floor) | (value != value))
        counts += number_of(marks)
        tl.store(marks_ptr + tile // NEIGHBOURS + lane, marks.to(tl.int8), mask=tile // NEIGHBOURS + lane < ROW_MARKS)
    count = tl.sum(counts, axis=0)
    tl.store(count_ptr + segment, count)
    tl.atomic_add(sums_ptr + segment // SHARE_ROWS, count.to(tl.int64), sem="relaxed")


class _Plan(NamedTuple):
    """Sizes, and the launches in their order."""

    marks: MarksPlan
    mark: Launch
    write: Launch


@planned
def _plan(pre: Layout, theta: Layout, bandwidth: float | None) -> _Plan:
    num_latents = pre.shape[1]
    marks = plan_marks(pre, _tuning.MARKED_SEGMENTS)
    block, warps = _tuning.mark_tile(num_latents, pre.dtype.itemsize)
    mark = Launch(
        _mark_kernel, (marks.rows * marks.parts,), warps=warps, parts=marks.parts, part=marks.part, F=num_latents,
        ROW_MARKS=marks.row_marks, half_window=0.0 if bandwidth is None else bandwidth / 2, stride_pb=pre.strides[0],
        stride_pf=pre.strides[1], STRIDE_TF=theta.strides[0], HAS_WINDOW=bandwidth is not None,
        WIDE=_tuning.is_wide(num_latents * pre.strides[1]), BLOCK=block,
    )
    return _Plan(marks, mark, plan_write(pre, marks, theta=None if bandwidth is None else theta))


def launch(pre, theta, bandwidth, capacity):
    """values (N,), indices (N,), offsets (B + 1,), required (); see ``reference.threshold``."""
    if pre.shape[0] == 0:
        return nothing_marked(pre, capacity)
    plan = _plan(layout(pre), layout(theta), bandwidth)
    marks = plan.marks.unmarked(pre.device)
    plan.mark(pre, theta, marks.bits, marks.counts, marks.sums)
    return write(plan.write, pre, marks, capacity, None, None, None, None if bandwidth is None else theta)
