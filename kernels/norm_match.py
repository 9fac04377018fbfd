"""Norm matching (top-AFA): each row keeps the prefix whose norm lies nearest to a target; no sort.

Math      rank by r = relu(pre) * weight_norm; keep the prefix that minimises |sqrt(sum r^2) - target|
Grid      (B,); one program owns one row
Traffic   streams the row once for its maximum, once for its energy, then once per bisection step until
          NORM_CANDIDATES entries are left, which finish in registers (the row stays in cache)
Numerics  r rounded once to fp32; energies by trees in fp32, summed across tiles in fp64; same bits on every run
Source    Lee et al. 2025, arXiv:2503.24277 (nearest prefix, compared in norm space)
"""
import torch
import triton
import triton.language as tl

from . import _tuning
from ._compact import allocate, compact
from ._device import INF_KEY, load_key, middle


@triton.jit
def _energy(key, scale, wanted):
    """fp64 sum of (r * scale)^2 over the wanted lanes; `key` is the bit pattern of a non-negative r."""
    r = tl.where(wanted, key, 0).to(tl.float32, bitcast=True) * scale
    return tl.sum(r * r, axis=0).to(tl.float64)


@triton.jit
def _norm_cut_kernel(
    pre_ptr,      # [B, F] in
    weight_ptr,   # [F] in, fp32, or unused
    target_ptr,   # [B] in, fp32
    scratch_ptr,  # [B, CANDIDATES] scratch, int32
    cut_ptr, quota_ptr, count_ptr,  # [B] out each, int32
    F, stride_pb, stride_pf, stride_wf,
    HAS_WEIGHT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):
    """One row: bisect for the key at which the energy crosses the target, then take the nearer side."""
    row = tl.program_id(0).to(tl.int64)
    pre_ptr += row * stride_pb
    scratch_ptr += row * CANDIDATES
    tiles = tl.cdiv(F, BLOCK)

    top = tl.full((), 0, tl.int32)
    positives = tl.full((), 0, tl.int32)
    for tile in range(0, tiles):
        cols = tile * BLOCK + tl.arange(0, BLOCK)
        at = cols.to(tl.int64) if WIDE else cols
        key = load_key(pre_ptr, pre_ptr, weight_ptr, at, cols < F, stride_pf, 0, stride_wf,
                       False, True, False, HAS_WEIGHT, 0)
        top = tl.maximum(top, tl.max(key, axis=0))
        positives += tl.sum((key > 0).to(tl.int32), axis=0)

    # A power of two near 1 / max(r) keeps r^2 finite without rounding anything.
    scale = (tl.maximum(254 - (top >> 23), 1) << 23).to(tl.float32, bitcast=True)
    target = tl.load(target_ptr + row).to(tl.float64) * scale.to(tl.float64)
    total = tl.full((), 0.0, tl.float64)
    if top < INF_KEY:
        for tile in range(0, tiles):
            cols = tile * BLOCK + tl.arange(0, BLOCK)
            at = cols.to(tl.int64) if WIDE else cols
            key = load_key(pre_ptr, pre_ptr, weight_ptr, at, cols < F, stride_pf, 0, stride_wf,
                           False, True, False, HAS_WEIGHT, 0)
            total += _energy(key, scale, key > 0)
    infinite_match = (top == INF_KEY) & (target == float("inf"))
    keep_all = infinite_match | ((top < INF_KEY) & (target >= tl.sqrt(total)))

    # Invariant: energy(key >= lo) reaches the target, energy(key > hi) does not. A row whose first entry is not
    # finite, or a target that is not a positive number, keeps that one entry: lo = hi = top.
    search = (target > 0) & (top < INF_KEY) & (keep_all == 0)
    lo = tl.where(search, 1, top)
    hi = top
    count_lo = positives
    energy_hi = tl.full((), 0.0, tl.float64)
    count_hi = tl.full((), 0, tl.int32)
    while (lo < hi) & (count_lo - count_hi > CANDIDATES):
        mid = middle(lo, hi)
        energy = tl.full((), 0.0, tl.float64)
        count = tl.full((), 0, tl.int32)
        for tile in range(0, tiles):
            cols = tile * BLOCK + tl.arange(0, BLOCK)
            at = cols.to(tl.int64) if WIDE else cols
            key = load_key(pre_ptr, pre_ptr, weight_ptr, at, cols < F, stride_pf, 0, stride_wf,
                           False, True, False, HAS_WEIGHT, 0)
            energy += _energy(key, scale, key >= mid)
            count += tl.sum((key >= mid).to(tl.int32), axis=0)
        reached = energy >= target * target
        lo = tl.where(reached, mid, lo)
        count_lo = tl.where(reached, count, count_lo)
        hi = tl.where(reached, hi, mid - 1)
        energy_hi = tl.where(reached, energy_hi, energy)
        count_hi = tl.where(reached, count_hi, count)

    tied = tl.maximum(count_lo - count_hi, 1)
    if lo < hi:
        written = tl.full((), 0, tl.int32)
        for tile in range(0, tiles):
            cols = tile * BLOCK + tl.arange(0, BLOCK)
            at = cols.to(tl.int64) if WIDE else cols
            key = load_key(pre_ptr, pre_ptr, weight_ptr, at, cols < F, stride_pf, 0, stride_wf,
                           False, True, False, HAS_WEIGHT, 0)
            inside = ((key >= lo) & (key <= hi)).to(tl.int32)
            tl.store(scratch_ptr + written + tl.cumsum(inside, axis=0) - 1, key, mask=inside == 1)
            written += tl.sum(inside, axis=0)
        tl.debug_barrier()  # the candidates are read back by other lanes
        lane = tl.arange(0, CANDIDATES)
        key = tl.load(scratch_ptr + lane, mask=lane < written, other=0)
        while lo < hi:
            mid = middle(lo, hi)
            reached = energy_hi + _energy(key, scale, key >= mid) >= target * target
            lo = tl.where(reached, mid, lo)
            hi = tl.where(reached, hi, mid - 1)
        energy_hi += _energy(key, scale, key > lo)
        count_hi += tl.sum((key > lo).to(tl.int32), axis=0)
        tied = tl.sum((key == lo).to(tl.int32), axis=0)

    # Of the entries tied at the crossing, the number that ends nearest in norm; the first minimum, and at least one.
    unit = _energy(tl.full((1,), 0, tl.int32) + lo, scale, tl.full((1,), 1, tl.int1))
    unit = tl.where(search, unit, 1.0)
    target = tl.where(search, target, 1.0)
    before = tl.floor((target * target - energy_hi) / unit)
    before = tl.minimum(tl.maximum(before, 0.0), tied.to(tl.float64) - 1.0)
    below = tl.abs(tl.sqrt(energy_hi + before * unit) - target)
    beyond = tl.abs(tl.sqrt(energy_hi + (before + 1.0) * unit) - target)
    quota = before.to(tl.int32) + (beyond < below).to(tl.int32)
    quota = tl.where(count_hi + quota == 0, 1, quota)
    quota = tl.where(search, quota, 1)
    count = tl.where(keep_all, positives, tl.minimum(count_hi + quota, positives))
    tl.store(cut_ptr + row, tl.where(keep_all | (positives == 0), 0, lo))
    tl.store(quota_ptr + row, tl.where(keep_all | (positives == 0), 0, quota))
    tl.store(count_ptr + row, count)


def launch(pre, target_norm, weight_norm, capacity):
    """values (N,), indices (N,), offsets (B + 1,), required (); see ``reference.norm_match``."""
    rows, num_latents = pre.shape
    cut, quota, count = (torch.empty(rows, dtype=torch.int32, device=pre.device) for _ in range(3))
    wide = _tuning.is_wide(num_latents * pre.stride(1))
    if rows:
        block = _tuning.stream_block(num_latents)
        candidates = min(_tuning.NORM_CANDIDATES, block)
        _norm_cut_kernel[(rows,)](
            pre, weight_norm, target_norm, torch.empty(rows, candidates, dtype=torch.int32, device=pre.device),
            cut, quota, count,
            F=num_latents, stride_pb=pre.stride(0), stride_pf=pre.stride(1),
            stride_wf=0 if weight_norm is None else weight_norm.stride(0),
            HAS_WEIGHT=weight_norm is not None, WIDE=wide, BLOCK=block, CANDIDATES=candidates,
            **_tuning.options(_tuning.num_warps(block)),
        )
    values, indices, offsets, required = allocate(pre, count, capacity)
    compact(pre, pre, None, weight_norm, cut, quota, offsets, values, indices,
            magnitude=False, rank_relu=True, value_relu=True, shift=0)
    return values, indices, offsets, required
