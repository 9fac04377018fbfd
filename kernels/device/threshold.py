"""Threshold: every entry above its latent's theta; NaN is kept and counted.

Math      keep pre > theta_j (or > theta_j - bandwidth / 2, entries up to theta_j then holding 0), or |pre| > theta_j
Grid      (B * splits of a row,); few rows have several splits
Traffic   reads B*F*s once, and again the entries that are kept, or the tiles where they are many; a bit an entry is
          written and read; writes N*(s + 4)
Numerics  compared in fp32; exact
Source    Rajamanoharan et al. 2024, arXiv:2407.14435 (JumpReLU); Bussmann et al. 2024 (inference of BatchTopK)
"""
from typing import NamedTuple

import triton
import triton.language as tl

from . import _tuning
from ._bitmask import (
    NEIGHBOURS,
    BitmaskPlan,
    lane_bits,
    nothing_kept,
    number_of,
    plan_bitmask,
    plan_write,
    split_of,
    theta_of,
    write,
)
from ._compact import SHARE_ROWS
from ._launch import Launch, Layout, layout, planned


@triton.jit(do_not_specialize=["row_splits", "units"])
def _bitmask_kernel(
    pre_ptr, theta_ptr,              # [B, F] in, [F] in, fp32
    bits_ptr, count_ptr, sums_ptr,   # [B, ROW_BYTES] out, int8, [B * splits] out, int32, in/out: see _bitmask.Bitmask
    row_splits, units, F, ROW_BYTES, half_window, stride_pb, stride_pf, STRIDE_TF: tl.constexpr,
    HAS_WINDOW: tl.constexpr, MAGNITUDE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """One split of a row: which entries it stores, and how many."""
    split = tl.program_id(0).to(tl.int64)
    row, begin, end = split_of(split, row_splits, units, F)
    pre_ptr += row * stride_pb
    bits_ptr += row * ROW_BYTES
    lane = tl.arange(0, BLOCK // NEIGHBOURS)
    counts = tl.zeros((BLOCK // NEIGHBOURS,), tl.int32)
    for tile in range(begin, end, BLOCK):
        cols = tile + lane[:, None] * NEIGHBOURS + tl.arange(0, NEIGHBOURS)[None, :]  # [LANES, NEIGHBOURS]
        at = cols.to(tl.int64) if WIDE else cols
        # what lies outside the row is above nothing
        value = tl.load(pre_ptr + at * stride_pf, mask=cols < F, other=-float("inf")).to(tl.float32)
        if MAGNITUDE:
            value = tl.where(cols < F, tl.abs(value), value)
        floor = theta_of(theta_ptr, cols, cols < F, STRIDE_TF)
        if HAS_WINDOW:
            floor -= half_window
        bits = lane_bits((value > floor) | (value != value))
        counts += number_of(bits)
        tl.store(bits_ptr + tile // NEIGHBOURS + lane, bits.to(tl.int8), mask=tile // NEIGHBOURS + lane < ROW_BYTES)
    count = tl.sum(counts, axis=0)
    tl.store(count_ptr + split, count)
    tl.atomic_add(sums_ptr + split // SHARE_ROWS, count.to(tl.int64), sem="relaxed")


class _Plan(NamedTuple):
    """Sizes, and the launches in their order."""

    bitmask: BitmaskPlan
    stream: Launch
    write: Launch


@planned
def _plan(pre: Layout, theta: Layout, bandwidth: float | None, magnitude: bool) -> _Plan:
    num_latents = pre.shape[1]
    bitmask = plan_bitmask(pre, _tuning.BITMASK_SPLITS)
    block, warps = _tuning.bitmask_tile(num_latents, pre.dtype.itemsize)
    stream = Launch(
        _bitmask_kernel, (bitmask.rows * bitmask.row_splits,), warps=warps, row_splits=bitmask.row_splits,
        units=bitmask.units, F=num_latents, ROW_BYTES=bitmask.row_bytes,
        half_window=0.0 if bandwidth is None else bandwidth / 2, stride_pb=pre.strides[0], stride_pf=pre.strides[1],
        STRIDE_TF=theta.strides[0], HAS_WINDOW=bandwidth is not None, MAGNITUDE=magnitude,
        WIDE=_tuning.is_wide(num_latents * pre.strides[1]), BLOCK=block,
    )
    return _Plan(bitmask, stream, plan_write(pre, bitmask, theta=None if bandwidth is None else theta))


def launch(pre, theta, bandwidth, capacity, magnitude):
    """values (N,), indices (N,), offsets (B + 1,), required (); see ``reference.threshold``."""
    if pre.shape[0] == 0:
        return nothing_kept(pre, capacity)
    plan = _plan(layout(pre), layout(theta), bandwidth, magnitude)
    bitmask = plan.bitmask.unwritten(pre.device)
    plan.stream(pre, theta, bitmask.bits, bitmask.counts, bitmask.sums)
    return write(plan.write, pre, bitmask, capacity, None, None, None, None if bandwidth is None else theta)
