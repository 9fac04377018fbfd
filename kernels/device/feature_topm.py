"""Feature choice: the m_j rows of each latent j that rank first by (relu(pre), row), as compressed rows.

Math      a column's first m_j entries lie inside the m_j groups of G rows that rank first by their maximum
Grid      group maxima (groups, tiles of columns); candidates (tiles of columns,); selection (F,), one latent each
Traffic   reads B*F*s once for the maxima, then the maxima and the m_j*G candidates of each latent; sorts N rows
Numerics  exact; no atomics, no host synchronisation
Source    Ayonrinde 2024, arXiv:2411.02124 (feature choice); the group maxima are ours
"""
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _tuning
from ._device import ABSENT, keep_first, middle, only_if, ordered_key, relu
from ._launch import Launch, Layout, layout, planned


@triton.jit(do_not_specialize=["B"])
def _column_group_max_kernel(
    pre_ptr, maxima_ptr,  # [B, F] in, [NG, F] out, int32
    B, F, stride_pb, stride_pf,
    SHIFT: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr,
):
    """One tile of columns of one group of rows: the largest key of each column."""
    group = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = cols < F
    at = cols.to(tl.int64) if WIDE else cols
    first = group * G
    # The maximum keeps NaN, so one key is made of it in the end; a key for each value would cost ten times as much.
    largest = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, G, AHEAD):
        for ahead in tl.static_range(AHEAD):
            row = first + step + ahead
            value = tl.load(pre_ptr + row * stride_pb + at * stride_pf, mask=only_if(row < B, present), other=0.0)
            largest = tl.maximum(largest, value.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    tl.store(maxima_ptr + group * F + cols, ordered_key(relu(largest)) >> SHIFT, mask=present)


@triton.jit
def _bounds(ends_ptr, latent, present, total):
    """Where the entries of latents begin and end, none beyond `total`, by the running sums of their numbers."""
    limit = total.to(tl.int64)
    start = tl.minimum(tl.load(ends_ptr + latent - 1, mask=present & (latent > 0), other=0), limit)
    return start, tl.minimum(tl.load(ends_ptr + latent, mask=present, other=0), limit)


@triton.jit(do_not_specialize=["NG", "total"])
def _candidates_kernel(
    maxima_ptr,          # [NG, F] in, int32
    ends_ptr,            # [F] in, int64: how many groups each column looks at, summed
    groups_ptr,          # [total] out, int32, ascending in a column
    low_ptr, high_ptr,   # [F] out each, int32: bounds of the column's cut
    NG, total, F, BLOCK_G: tl.constexpr, BLOCK_F: tl.constexpr,
):
    """One tile of columns: the first groups of each, the least of their maxima, and the largest."""
    cols = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    present = cols < F
    start, end = _bounds(ends_ptr, cols, present, total)
    count = tl.where(present, end - start, 0).to(tl.int32)
    rows = tl.arange(0, BLOCK_G)
    hi = tl.zeros((BLOCK_F,), tl.int32)
    for tile in range(0, NG, BLOCK_G):
        at = (tile + rows).to(tl.int64)[:, None] * F + cols[None, :]
        key = tl.load(maxima_ptr + at, mask=(tile + rows < NG)[:, None] & present[None, :], other=0)
        hi = tl.maximum(hi, tl.max(key, axis=0))
    tl.store(high_ptr + cols, hi, mask=present)
    lo = tl.zeros((BLOCK_F,), tl.int32)  # after a ReLU no key lies below 0
    while tl.max(hi - lo, axis=0) > 0:
        mid = middle(lo, hi)
        reached = tl.zeros((BLOCK_F,), tl.int32)
        for tile in range(0, NG, BLOCK_G):
            at = (tile + rows).to(tl.int64)[:, None] * F + cols[None, :]
            key = tl.load(maxima_ptr + at, mask=(tile + rows < NG)[:, None] & present[None, :], other=-1)
            reached += tl.sum((key >= mid[None, :]).to(tl.int32), axis=0)
        lo = tl.where(reached >= count, mid, lo)
        hi = tl.where(reached == count, mid, tl.where(reached > count, hi, mid - 1))
    tl.store(low_ptr + cols, lo, mask=present)
    quota = count
    for tile in range(0, NG, BLOCK_G):
        at = (tile + rows).to(tl.int64)[:, None] * F + cols[None, :]
        key = tl.load(maxima_ptr + at, mask=(tile + rows < NG)[:, None] & present[None, :], other=-1)
        quota -= tl.sum((key > lo[None, :]).to(tl.int32), axis=0)
    written = tl.zeros((BLOCK_F,), tl.int32)
    for tile in range(0, NG, BLOCK_G):
        at = (tile + rows).to(tl.int64)[:, None] * F + cols[None, :]
        key = tl.load(maxima_ptr + at, mask=(tile + rows < NG)[:, None] & present[None, :], other=-1)
        keep, position = keep_first(key, lo[None, :], quota[None, :])
        to = start[None, :] + (written[None, :] + position)
        group = (tile + rows)[:, None] + tl.zeros_like(position)
        tl.store(groups_ptr + to, group, mask=keep & (written[None, :] + position < count[None, :]))
        equal = tl.minimum(tl.sum((key == lo[None, :]).to(tl.int32), axis=0), quota)
        written += tl.sum((key > lo[None, :]).to(tl.int32), axis=0) + equal
        quota -= equal


@triton.jit
def _column_keys(
    column_ptr, groups_ptr, lane, lanes, B, stride_pb, HAS_GROUPS: tl.constexpr, SHIFT: tl.constexpr, G: tl.constexpr,
):
    """Keys and rows of a tile of a column's candidates, rows ascending; lanes that do not exist are ABSENT."""
    present = lane < lanes
    rows = lane
    if HAS_GROUPS:
        rows = tl.load(groups_ptr + lane // G, mask=present, other=0) * G + lane % G
        present = present & (rows < B)
    value = tl.load(column_ptr + rows.to(tl.int64) * stride_pb, mask=present, other=0.0)
    key = ordered_key(relu(value.to(tl.float32))) >> SHIFT
    return tl.where(present, key, ABSENT >> SHIFT), rows, value


@triton.jit
def _leave_over(rows_ptr, latents_ptr, values_ptr, ends_ptr, latent, B, F, total, BLOCK: tl.constexpr):
    """A latent's share of the places that the budgets leave over, none as a rule: zeros of row B, which is nobody's."""
    left = tl.minimum(tl.load(ends_ptr + F - 1), total.to(tl.int64))
    share = tl.cdiv(total - left, F)
    end = tl.minimum(left + (latent + 1) * share, total.to(tl.int64))
    for first in range(left + latent * share, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(rows_ptr + place, tl.zeros((BLOCK,), tl.int32) + B, mask=place < end)
        tl.store(latents_ptr + place, tl.zeros((BLOCK,), tl.int32), mask=place < end)
        tl.store(values_ptr + place, tl.zeros((BLOCK,), values_ptr.dtype.element_ty), mask=place < end)


@triton.jit(do_not_specialize=["B", "total"])
def _feature_topm_kernel(
    pre_ptr,                          # [B, F] in
    ends_ptr,                         # [F] in, int64: budgets, summed
    groups_ptr, group_ends_ptr,       # [total] in, int32, and [F] in, int64; or unused
    low_ptr, high_ptr,                # [F] in each, int32, or unused
    rows_ptr, latents_ptr, values_ptr,  # [total] out each, sorted by (latent, row)
    B, total, F, stride_pb, stride_pf,
    HAS_GROUPS: tl.constexpr, SHIFT: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):
    """One latent: bisects for its cut among its candidates, then writes what it keeps in ascending order of row."""
    latent = tl.program_id(0)
    column_ptr = pre_ptr + latent.to(tl.int64) * stride_pf
    start, end = _bounds(ends_ptr, latent, latent >= 0, total)
    budget = (end - start).to(tl.int32)
    _leave_over(rows_ptr, latents_ptr, values_ptr, ends_ptr, latent.to(tl.int64), B, F, total, BLOCK)
    lanes = B
    lo = tl.full((), 0, tl.int32)
    hi = tl.full((), 0x7FFFFFFF, tl.int32) >> SHIFT
    if HAS_GROUPS:
        first, end = _bounds(group_ends_ptr, latent, latent >= 0, total)
        groups_ptr += first
        groups = (end - first).to(tl.int32)
        lanes = groups * G
        lo = tl.where(budget > groups, 0, tl.load(low_ptr + latent))  # more than all groups: their maxima bound nothing
        hi = tl.load(high_ptr + latent)
    lanes = tl.where(budget == 0, 0, lanes)
    lane = tl.arange(0, BLOCK)
    # The first tile, often the only one, stays in registers.
    head, head_rows, head_values = _column_keys(column_ptr, groups_ptr, lane, lanes, B, stride_pb, HAS_GROUPS, SHIFT, G)
    while lo < hi:
        mid = middle(lo, hi)
        reached = tl.sum((head >= mid).to(tl.int32), axis=0)
        for tile in range(BLOCK, lanes, BLOCK):
            key, _, _ = _column_keys(column_ptr, groups_ptr, tile + lane, lanes, B, stride_pb, HAS_GROUPS, SHIFT, G)
            reached += tl.sum((key >= mid).to(tl.int32), axis=0)
        lo = tl.where(reached >= budget, mid, lo)
        hi = tl.where(reached == budget, mid, tl.where(reached > budget, hi, mid - 1))
    quota = budget - tl.sum((head > lo).to(tl.int32), axis=0)
    for tile in range(BLOCK, lanes, BLOCK):
        key, _, _ = _column_keys(column_ptr, groups_ptr, tile + lane, lanes, B, stride_pb, HAS_GROUPS, SHIFT, G)
        quota -= tl.sum((key > lo).to(tl.int32), axis=0)
    written = tl.full((), 0, tl.int32)
    for tile in range(0, lanes, BLOCK):
        key, rows, value = head, head_rows, head_values
        if tile > 0:
            key, rows, value = _column_keys(
                column_ptr, groups_ptr, tile + lane, lanes, B, stride_pb, HAS_GROUPS, SHIFT, G
            )
        keep, position = keep_first(key, lo, quota)
        to = start + (written + position)
        keep = keep & (written + position < budget)
        tl.store(rows_ptr + to, rows, mask=keep)
        tl.store(latents_ptr + to, tl.zeros_like(rows) + latent, mask=keep)
        tl.store(values_ptr + to, relu(value.to(tl.float32)).to(value.dtype), mask=keep)
        equal = tl.minimum(tl.sum((key == lo).to(tl.int32), axis=0), quota)
        written += tl.sum((key > lo).to(tl.int32), axis=0) + equal
        quota -= equal


class _Plan(NamedTuple):
    """Sizes, and the launches in their order; without groups the last alone."""

    groups: int | None  # of rows
    maxima: Launch | None
    candidates: Launch | None
    select: Launch


@planned
def _plan(pre: Layout, total: int) -> _Plan:
    rows, num_latents = pre.shape
    shift = _tuning.key_shift(pre.dtype)
    strides = dict(stride_pb=pre.strides[0], stride_pf=pre.strides[1])
    groups = _tuning.groups_of_rows(rows, num_latents, total, pre.strides[1])
    maxima = candidates = None
    if groups is not None:
        maxima = Launch(
            _column_group_max_kernel, (groups.number, triton.cdiv(num_latents, groups.block)), warps=groups.warps,
            B=rows, F=num_latents, **strides, SHIFT=shift, WIDE=_tuning.is_wide(num_latents * pre.strides[1]),
            G=groups.size, AHEAD=min(groups.size, 4), BLOCK=groups.block,
        )
        tile = _tuning.CANDIDATE_TILE
        candidates = Launch(
            _candidates_kernel, (triton.cdiv(num_latents, tile.columns),), warps=tile.warps,
            NG=groups.number, total=total, F=num_latents, BLOCK_G=tile.groups, BLOCK_F=tile.columns,
        )
    block = _tuning.UNGROUPED_BLOCK
    if groups is not None:
        block = _tuning.candidate_block(groups.size * max(total / num_latents, 1))
    select = Launch(
        _feature_topm_kernel, (num_latents,), warps=_tuning.candidate_warps(block), B=rows, total=total,
        F=num_latents, **strides, HAS_GROUPS=groups is not None, SHIFT=shift, G=1 if groups is None else groups.size,
        BLOCK=block,
    )
    return _Plan(None if groups is None else groups.number, maxima, candidates, select)


def launch(pre, m, total):
    """values (total,), indices (total,), offsets (B + 1,); see ``reference.feature_topm``."""
    (rows, num_latents), device = pre.shape, pre.device
    if not (total and rows):
        owners = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        return pre.new_zeros(total), torch.zeros(total, dtype=torch.int32, device=device), owners
    plan = _plan(layout(pre), total)
    new = functools.partial(torch.empty, dtype=torch.int32, device=device)
    # A sum above total is cut; places that one below it leaves over belong to row B, which is nobody's.
    ends = m.clamp(0, rows).cumsum(0, dtype=torch.int64)
    candidates: tuple = (None,) * 4
    if plan.groups is not None:
        maxima, chosen, low, high = new(plan.groups, num_latents), new(total), new(num_latents), new(num_latents)
        group_ends = m.clamp(0, min(plan.groups, rows)).cumsum(0, dtype=torch.int64)
        plan.maxima(pre, maxima)
        plan.candidates(maxima, group_ends, chosen, low, high)
        candidates = chosen, group_ends, low, high
    owners, latents, values = new(total), new(total), torch.empty(total, dtype=pre.dtype, device=device)
    plan.select(pre, ends, *candidates, owners, latents, values)
    owners, order = owners.sort(stable=True)  # latents ascend within a row, as they did before
    bounds = torch.arange(rows + 1, dtype=torch.int32, device=device)
    return values[order], latents[order], torch.searchsorted(owners, bounds)
