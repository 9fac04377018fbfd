"""Prefixes of ranked rows that end at an energy; no sort. Two criteria: norm matching (top-AFA), and a share.

Math      rank by r = relu(pre) * weight_norm; keep the prefix that minimises |sqrt(sum r^2) - target|, or the smallest
          whose sum of r^2 reaches a share of the row's
Grid      (B,); one program owns one row, first to find its cut, then to write what it keeps
Traffic   a sample of the row says between which two r the energy will cross the target; one pass checks it exactly,
          sets aside what lies between, and a bit for what may be kept. Where the sample cannot tell (targets near the
          row's norm, a few entries that hold most of it), that pass takes the row's energy and sets the largest aside,
          for one or two more to work from. Where ties end a row it is read up to the last that is kept. Then these
          entries again, or the tiles where they are many; a bit an entry is written and read; writes N*(s + 4).
          A share says what to look for once the row's energy is known, so its first pass is always of the latter kind:
          one where the share lies in the largest few hundred entries or the row is short, else two, seldom three; and
          one more where the first was measured in a unit that does not suit the row
Numerics  r rounded once to fp32; energies of 8 entries in fp32, summed in fp64, always in the same order: same bits on
          every run. The sample decides how many passes there are, never the result
Source    Lee et al. 2025, arXiv:2503.24277 (nearest prefix, compared in norm space); narrowing by a sample as in
          Floyd & Rivest 1975, "Expected time bounds for selection"
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _tuning
from ._bitmask import NEIGHBOURS, BitmaskPlan, lane_bits, nothing_kept, plan_bitmask, plan_write, write
from ._compact import SHARE_ROWS
from ._device import INF_KEY, ONE_KEY, middle, scores
from ._launch import Launch, Layout, layout, planned

GUIDED_PASSES = tl.constexpr(4)  # that a sample narrows down; then bisection, which always ends
SAMPLE_ROUNDS = tl.constexpr(8)  # the sample's resolution: its range over 256, finer than its standard error
# Standard errors on either side: with 2, one row in twenty takes another pass; with 1, where 2 do not fit, one in 3.
MOST_ERRORS, LEAST_ERRORS = tl.constexpr(2.0), tl.constexpr(1.0)
ODD_ERRORS = tl.constexpr(3.0)  # standard errors off the row's known energy: such a sample says nothing of its spread
FEWEST_OCTAVES, MOST_OCTAVES = tl.constexpr(-20), tl.constexpr(60)  # of the largest r over a unit: squares are fp32
# Where the sample has nothing, so many times what one sampled entry stands for may lie above.
UNSEEN = tl.constexpr(3.0)
DEPTH = tl.constexpr(16 << 23)  # octaves below the target


@triton.jit
def _from_bits(key):
    return key.to(tl.float32, bitcast=True)


@triton.jit
def _columns(tile):
    """The columns of a tile (LANES, 8), each (LANES,), in order; a thread holds whole lanes, so nothing moves."""
    even, odd = tl.split(tl.reshape(tile, (tile.shape[0], 4, 2)))
    c04, c26 = tl.split(tl.reshape(even, (tile.shape[0], 2, 2)))
    c15, c37 = tl.split(tl.reshape(odd, (tile.shape[0], 2, 2)))
    c0, c4 = tl.split(c04)
    c1, c5 = tl.split(c15)
    c2, c6 = tl.split(c26)
    c3, c7 = tl.split(c37)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def _scaled(r, scale):
    """r * scale, cut near 2^61, which reaches any target: neither it nor its square overflows."""
    return tl.minimum(r, (2.0**61 - 2.0**37) / tl.maximum(scale, 2.0**-67)) * scale


@triton.jit
def _set_aside(scratch_ptr, tile, lo, hi, place, end):
    """Writes each lane's r in [lo, hi] to its next places, while it has some; returns the places after them."""
    columns = _columns(tile)
    for column in tl.static_range(NEIGHBOURS):
        r = columns[column]
        inside = (r >= lo) & (r <= hi)
        tl.store(scratch_ptr + place, r, mask=inside & (place < end))
        place = tl.where(inside, place + r.shape[0], place)
    return place


@triton.jit
def _measure(
    pre_ptr, weight_ptr, scratch_ptr, bits_ptr, F, ROW_BYTES, stride_pf, stride_wf, scale, lo, hi, bar, limit,
    HAS_WEIGHT: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr,
):
    """One pass over a row: its largest r; count and energy of the r above `bar`; the energy of those from lo on.

    What lies from lo on gets a bit, and up to hi is set aside: a lane has `limit` places; `number` is how many it would
    have needed. NaN is above everything. The energy from a key on is the same number in every pass and falls with the
    key, as its sum runs over all columns, with 0 for what is below.
    """
    lo = _from_bits(lo)
    hi = _from_bits(hi)
    bar = _from_bits(bar)
    lane = tl.arange(0, LANES)
    place = lane
    top = tl.zeros((LANES,), tl.float32)
    above = tl.zeros((LANES,), tl.int32)
    energy_above = tl.zeros((LANES,), tl.float64)
    energy_from = tl.zeros((LANES,), tl.float64)
    for tile in range(0, tl.cdiv(F, LANES * NEIGHBOURS)):
        cols = (tile * LANES + lane[:, None]) * NEIGHBOURS + tl.arange(0, NEIGHBOURS)[None, :]
        r = scores(pre_ptr, weight_ptr, cols, cols < F, stride_pf, stride_wf, HAS_WEIGHT, WIDE)[1]
        beyond = (r <= bar) == 0
        from_lo = (r < lo) == 0
        scaled = _scaled(r, scale)
        upper = tl.where(beyond, scaled, 0.0)
        lower = tl.where(from_lo, scaled, 0.0)
        above += tl.sum(beyond.to(tl.int32), axis=1)
        energy_above += tl.sum(upper * upper, axis=1).to(tl.float64)
        energy_from += tl.sum(lower * lower, axis=1).to(tl.float64)
        for column in tl.static_range(NEIGHBOURS):
            top = tl.maximum(top, _columns(r)[column], propagate_nan=tl.PropagateNan.ALL)
        place = _set_aside(scratch_ptr, r, lo, hi, place, limit * LANES)
        tl.store(bits_ptr + tile * LANES + lane, lane_bits(from_lo).to(tl.int8), mask=tile * LANES + lane < ROW_BYTES)
    top = tl.where(top != top, INF_KEY + 1, top.to(tl.int32, bitcast=True))
    return (tl.max(top, axis=0), place // LANES, tl.sum(above, axis=0),
            tl.sum(energy_above, axis=0), tl.sum(energy_from, axis=0))


@triton.jit
def _sum(tile):
    return tl.sum(tl.sum(tile, axis=1), axis=0)


@triton.jit
def _sampled_bound(r, energy, squares, first, last, wanted, share, errors, scale):
    """The range within [first, last] in which the sample's energy from a key on, so many standard errors off, crosses.

    `share`: which part of the energy in question is wanted, where that is known; 0 where it is an estimate as well.
    """
    lo = first
    hi = last
    for _ in range(0, SAMPLE_ROUNDS):
        mid = middle(lo, hi)
        at = _from_bits(mid)
        part = tl.where(r >= at, energy, 0.0)
        above = _sum(part * part)
        variance = (1 - share) * (1 - share) * above + share * share * (squares - above)
        unseen = tl.where(errors > 0, UNSEEN * _scaled(at, scale) * _scaled(at, scale), 0.0)
        bound = _sum(part) + errors * tl.sqrt(tl.maximum(variance, 0.0)) + unseen
        lo = tl.where(bound >= wanted, mid, lo)
        hi = tl.where(bound >= wanted, hi, tl.maximum(mid - 1, lo))
    return lo, hi


@triton.jit
def _counted_bound(r, first, last, b, most):
    """The least key within [first, last] from which on, up to b, the sample has no more than `most` entries."""
    lo = first
    hi = last
    for _ in range(0, SAMPLE_ROUNDS):
        mid = middle(lo, hi)
        few = _sum(((r >= _from_bits(mid)) & (r <= _from_bits(b))).to(tl.int32)).to(tl.float32) <= most
        lo = tl.where(few, lo, mid)
        hi = tl.where(few, mid, hi)
    return hi


@triton.jit
def _guess(
    pre_ptr, weight_ptr, F, stride_pf, stride_wf, scale, lo, hi, magnitude, missing, known, energy_between, blind,
    HAS_WEIGHT: tl.constexpr, WIDE: tl.constexpr, SAMPLE: tl.constexpr, PLACES: tl.constexpr,
):
    """Keys [a, b] within [lo, hi] between which the row's energy should cross; the key from which on the pass should
    count as well; whether what lies between will fit; and the largest key that the sample has there.

    `missing`: the energy still wanted of the keys up to hi; `energy_between`: theirs from lo on, where `known`.
    A few large entries, of which a sample sees hardly any, can hold most of a row's energy. Where it tells nothing, as
    many of the largest as fit are taken, and the energy from lo on is measured: either it crosses among them, or what
    they leave is a row that samples can tell about. So it is where the row is read `blind`: before what is wanted of it
    is known, when `magnitude` and the energies mean nothing.
    """
    chunk = tl.arange(0, SAMPLE // NEIGHBOURS) * (F // SAMPLE * NEIGHBOURS)
    cols = chunk[:, None] + tl.arange(0, NEIGHBOURS)[None, :]
    r = scores(pre_ptr, weight_ptr, cols, cols < F, stride_pf, stride_wf, HAS_WEIGHT, WIDE)[1]
    inside = (r >= _from_bits(lo)) & (r <= _from_bits(hi))
    energy = tl.where(inside, tl.minimum(_scaled(r, scale), 4.0), 0.0)  # the target's is 2 at most
    energy *= energy
    squares = _sum(energy * energy)
    share = tl.where(known, (missing / tl.where(known, energy_between, 1.0)).to(tl.float32), 0.0)
    wanted = tl.where(known, share * _sum(energy), missing.to(tl.float32) * (SAMPLE / F))
    # far below target / sqrt(F) entries add nothing: the range searched is some octaves, not all that fp32 has
    seen = tl.max(tl.max(tl.where(inside, r, 0.0), axis=1), axis=0).to(tl.int32, bitcast=True)
    first = tl.minimum(tl.maximum(tl.where(blind, seen, magnitude) - DEPTH, lo), hi)
    last = tl.maximum(seen, first)
    errors = share * 0 + tl.where(blind, 0.0, MOST_ERRORS)
    fits = errors < 0
    a = lo
    b = hi
    while (fits == 0) & (errors >= LEAST_ERRORS):
        a = _sampled_bound(r, energy, squares, first, last, wanted, share, -errors, scale)[0]
        b = _sampled_bound(r, energy, squares, first, last, wanted, share, errors, scale)[1]
        a = tl.where(a == first, lo, a)
        b = tl.where(b == last, hi, tl.maximum(a, b))
        between = _sum(((r >= _from_bits(a)) & (r <= _from_bits(b))).to(tl.int32)).to(tl.float32) * (F / SAMPLE)
        fits = between <= PLACES // 2  # lanes fill unevenly
        errors *= 0.5
    # nor does it where it has missed, or met, so much more of the energy than its own spread explains
    odd = tl.abs(_sum(energy) - energy_between.to(tl.float32) * (SAMPLE / F)) > tl.sqrt(squares) * ODD_ERRORS
    bar = b
    if tl.where(known, odd | ((fits == 0) & (a == lo)), fits == 0):
        a = _counted_bound(r, first, tl.minimum(hi, last), hi, (SAMPLE / F) * (PLACES // 8))  # lanes fill unevenly
        b = hi
        bar = lo - 1
        fits = fits | (fits == 0)
    return a, b, bar, fits, seen


@triton.jit
def _sums_from(r, least, scale):
    """Energy and count of the r (SLOTS, LANES) from the one whose bits are `least` on."""
    wanted = r >= _from_bits(least)
    scaled = tl.where(wanted, _scaled(r, scale), 0.0)
    energy = tl.sum(tl.sum(scaled * scaled, axis=0), axis=0)
    return energy.to(tl.float64), tl.sum(tl.sum(wanted.to(tl.int32), axis=0), axis=0)


@triton.jit
def _unit(magnitude):
    """A power of two near the inverse of the number that has these bits."""
    return (tl.maximum(254 - (magnitude >> 23), 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _column_of(
    pre_ptr, weight_ptr, key, number, F, stride_pf, stride_wf,
    HAS_WEIGHT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """The column of a row's entry of that number (from 1) among those whose r has these bits; -1 for number 0."""
    column = tl.full((), -1, tl.int32)
    tile = tl.full((), 0, tl.int32)
    while number > 0:
        cols = tile * BLOCK + tl.arange(0, BLOCK)
        r = scores(pre_ptr, weight_ptr, cols, cols < F, stride_pf, stride_wf, HAS_WEIGHT, WIDE)[1]
        tied = (r == _from_bits(key)).to(tl.int32)
        found = tl.sum(tied, axis=0)
        if found >= number:
            column = tl.min(tl.where((tied == 1) & (tl.cumsum(tied, axis=0) == number), cols, F), axis=0)
        number -= found
        tile += 1
    return column


@triton.jit
def _norm_cut_kernel(
    pre_ptr,      # [B, F] in
    weight_ptr,   # [F] in, fp32, or unused
    target_ptr,   # [B] in, fp32: norms, or shares
    scratch_ptr,  # [B, SLOTS * BLOCK / 8] scratch, fp32
    cut_ptr, last_ptr, count_ptr,  # [B] out each, int32: keep r above cut, and equal to it up to a column; their number
    bits_ptr, sums_ptr,            # [B, ROW_BYTES] out, int8; in/out: see _bitmask.Bitmask
    F, ROW_BYTES, stride_pb, stride_pf, stride_wf,
    HAS_WEIGHT: tl.constexpr, IS_SHARE: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, SAMPLE: tl.constexpr,
):
    """One row: narrow down the key at which the energy crosses the target, then take the side that is asked for."""
    row = tl.program_id(0).to(tl.int64)
    LANES: tl.constexpr = BLOCK // NEIGHBOURS
    pre_ptr += row * stride_pb
    scratch_ptr += row * (SLOTS * LANES)
    bits_ptr += row * ROW_BYTES
    target = tl.load(target_ptr + row)
    # Energies are of r * scale, which is near 1 at the target: at the row's, until the target of a share is known.
    if IS_SHARE:
        ordinary = (target > 0) & (target < 1)
        share = target.to(tl.float64)
        magnitude = tl.full((), ONE_KEY, tl.int32)
        scale = _unit(magnitude)
        norm = tl.full((), 1.0, tl.float64)
    else:
        ordinary = (target > 0) & (target < float("inf"))
        magnitude = tl.where(ordinary, target, 1.0).to(tl.int32, bitcast=True)
        scale = _unit(magnitude)
        norm = tl.where(ordinary, target, 1.0).to(tl.float64) * scale.to(tl.float64)
    wanted = norm * norm

    # The only tensor that the search carries comes first. The result of `searching`, which nobody reads, is dropped
    # from the loop's; Triton up to 3.8 then looks for later ones at a wrong place, and fails where it changes layouts.
    number = tl.zeros((LANES,), tl.int32)
    # Invariant: energy(key >= lo) reaches the target, unless that is the row's whole energy or more; energy(key > hi)
    # does not.
    lo = tl.full((), 1, tl.int32)
    hi = tl.full((), INF_KEY - 1, tl.int32)
    count_lo = tl.full((), 0, tl.int32)
    count_hi = tl.full((), 0, tl.int32)
    energy_lo = tl.full((), 0.0, tl.float64)
    energy_hi = tl.full((), 0.0, tl.float64)
    known = energy_lo > 0  # whether energy_lo and count_lo are those of key >= lo
    keep_all = known
    searching = lo > 0
    blind = searching & IS_SHARE
    top = tl.full((), 0, tl.int32)
    a = lo
    b = tl.where(ordinary, hi, 0)  # with other targets the pass counts what is positive
    bar = b
    limit = tl.full((), SLOTS, tl.int32)
    if SAMPLE > 0:
        passes = tl.full((), 0, tl.int32)
    while searching:
        if SAMPLE > 0:
            if ordinary:
                if passes < GUIDED_PASSES:
                    a, b, bar, fits, seen = _guess(
                        pre_ptr, weight_ptr, F, stride_pf, stride_wf, scale, lo, hi, magnitude, wanted - energy_hi,
                        known, energy_lo - energy_hi, blind, HAS_WEIGHT, WIDE, SAMPLE, SLOTS * LANES)
                    limit = tl.where(fits, SLOTS, 0)
                    if IS_SHARE:
                        magnitude = tl.where(blind & (passes == 0) & (seen > 0), seen, magnitude)
                        scale = _unit(magnitude)
                else:
                    a = middle(lo, hi)
                    b = hi
                    bar = b
                    limit = tl.full((), SLOTS, tl.int32)
            passes += 1
        top, number, above, energy_above, energy = _measure(
            pre_ptr, weight_ptr, scratch_ptr, bits_ptr, F, ROW_BYTES, stride_pf, stride_wf, scale, a, b, bar, limit,
            HAS_WEIGHT, WIDE, LANES)
        from_lo = bar < a  # then b is hi
        if IS_SHARE:
            total = tl.where(from_lo, energy_above, energy)
            if blind:
                octaves = (top >> 23) - (magnitude >> 23)
                blind = (top > 0) & (top < INF_KEY) & ((octaves < FEWEST_OCTAVES) | (octaves >= MOST_OCTAVES))
                if blind:  # once more, in a unit near the row's largest r; of this pass only that is used
                    a = lo
                    magnitude = top
                    scale = _unit(magnitude)
                else:
                    wanted = tl.where(ordinary & (top < INF_KEY), share * total, 1.0)
                    # what is left is to find this energy; in its own unit, a power of two, so that nothing is rounded
                    octaves = tl.sqrt(wanted).to(tl.float32).to(tl.int32, bitcast=True) - ONE_KEY
                    magnitude = tl.maximum(magnitude + tl.minimum(octaves, -(magnitude - INF_KEY) - 1), 0)
                    change = _unit(magnitude).to(tl.float64) / scale.to(tl.float64)
                    scale = _unit(magnitude)
                    change *= change
                    wanted *= change
                    energy *= change
                    energy_above *= change
        energy_lo = tl.where(from_lo, energy_above, energy_lo)
        count_lo = tl.where(from_lo, above, count_lo)
        energy_above = tl.where(from_lo, energy_hi, energy_above)
        above = tl.where(from_lo, count_hi, above)
        both = above + tl.sum(number, axis=0)
        total = tl.where(from_lo, energy_lo, energy)
        special = (top >= INF_KEY) | (ordinary == 0)
        if IS_SHARE:
            whole = (lo == 1) & (from_lo | (a == 1)) & (wanted >= total) & (blind == 0)
            keep_all = tl.where(special, (target >= 1) & (top < INF_KEY), whole)
        else:
            whole = (lo == 1) & (from_lo | (a == 1)) & (norm >= tl.sqrt(total))
            keep_all = tl.where(special, (target == float("inf")) & (top <= INF_KEY), whole)
        beyond = (energy_above >= wanted) & (blind == 0)
        reached = (energy >= wanted) | blind
        count_lo = tl.where(keep_all & (from_lo == 0), both, count_lo)
        count_lo = tl.where(keep_all, count_lo, tl.where(beyond, above, tl.where(reached, both, count_lo)))
        lo = tl.where(whole, lo, tl.where(beyond, b + 1, tl.where(reached, a, lo)))
        energy_lo = tl.where(beyond, energy_above, tl.where(reached, energy, energy_lo))
        energy_hi = tl.where(beyond, energy_hi, tl.where(reached, energy_above, energy))
        count_hi = tl.where(beyond, count_hi, tl.where(reached, above, both))
        hi = tl.where(beyond, hi, tl.where(reached, b, a - 1))
        hi = tl.minimum(hi, tl.maximum(top, lo))  # above the largest there is nothing
        known = (known | reached | from_lo) & (blind == 0)
        aside = reached & (beyond == 0) & (blind == 0) & (tl.max(number, axis=0) <= limit)
        ends = special | whole | aside | (known & (lo >= hi))
        searching = ends == 0

    if (lo < a) & (top < INF_KEY):  # the last pass has set no bits for what is kept: all may be
        tl.debug_barrier()  # its bits are overwritten by other lanes
        for first in range(0, ROW_BYTES, LANES):
            place = first + tl.arange(0, LANES)
            columns = tl.minimum(tl.maximum(F - place * NEIGHBOURS, 0), NEIGHBOURS)  # none outside the row
            tl.store(bits_ptr + place, ((1 << columns) - 1).to(tl.int8), mask=place < ROW_BYTES)

    # A row whose first entry is not finite, or a target that is not a positive number, keeps that one entry.
    search = ordinary & (top > 0) & (top < INF_KEY) & (keep_all == 0)
    tied = count_lo - count_hi
    if search & (lo < hi):
        tl.debug_barrier()  # the keys set aside are read back by other lanes
        slot = tl.arange(0, SLOTS)[:, None]
        at = slot * LANES + tl.arange(0, LANES)[None, :]
        r = tl.load(scratch_ptr + at, mask=slot < number[None, :], other=0.0)
        energy_b = energy_hi
        count_b = count_hi
        while (lo >> SHIFT < hi >> SHIFT) & (count_lo - count_hi > 1):
            mid = middle(lo >> SHIFT, hi >> SHIFT) << SHIFT
            energy, count = _sums_from(r, mid, scale)
            reached = energy_b + energy >= wanted
            lo = tl.where(reached, mid, lo)
            count_lo = tl.where(reached, count_b + count, count_lo)
            hi = tl.where(reached, hi, mid - 1)
            count_hi = tl.where(reached, count_hi, count_b + count)
        # the largest key up to hi; none is there where rounding alone made the difference: then the next above
        key = r.to(tl.int32, bitcast=True)
        below = tl.max(tl.max(tl.where(key <= hi, key, 0), axis=0), axis=0)
        next_above = tl.min(tl.min(tl.where(key > hi, key, INF_KEY), axis=0), axis=0)
        lo = tl.where(below >= lo, below, next_above)
        energy, count = _sums_from(r, lo + 1, scale)
        energy_hi = energy_b + energy
        count_hi = count_b + count
        tied = tl.sum(tl.sum((key == lo).to(tl.int32), axis=0), axis=0)

    # Of the entries tied at the crossing, the number that reaches what is wanted, or that ends nearest in norm (of two
    # that are as near, the smaller); and at least one.
    r = _scaled(_from_bits(tl.where(search, lo, 0)), scale)
    unit = tl.where(search, (r * r).to(tl.float64), 1.0)
    energy_hi = tl.where(search, energy_hi, 0.0)  # it may be infinite
    before = tl.floor((wanted - energy_hi) / unit)
    before = tl.minimum(tl.maximum(before, 0.0), tl.maximum(tied, 1).to(tl.float64) - 1.0)
    if IS_SHARE:
        quota = before.to(tl.int32) + (energy_hi + before * unit < wanted).to(tl.int32)
    else:
        below = tl.abs(tl.sqrt(energy_hi + before * unit) - norm)
        beyond = tl.abs(tl.sqrt(energy_hi + (before + 1.0) * unit) - norm)
        quota = before.to(tl.int32) + (beyond < below).to(tl.int32)
    quota = tl.maximum(quota, (count_hi == 0).to(tl.int32))
    quota = tl.where(search, tl.minimum(quota, tied), quota)  # what is counted is there to be written
    tl.store(cut_ptr + row, tl.where(search, lo, tl.where(keep_all, 1, tl.minimum(top, INF_KEY + 1))))
    last = tl.full((), -1, tl.int32) + F
    if search & (quota < tied):
        last = _column_of(pre_ptr, weight_ptr, lo, quota, F, stride_pf, stride_wf, HAS_WEIGHT, WIDE, BLOCK // 4)
    tl.store(last_ptr + row, last)
    count = tl.where(search, count_hi + quota, tl.where(keep_all, count_lo, (top > 0).to(tl.int32)))
    tl.store(count_ptr + row, count)
    tl.atomic_add(sums_ptr + row // SHARE_ROWS, count.to(tl.int64), sem="relaxed")


class _Plan(NamedTuple):
    """Sizes, and the launches in their order."""

    bitmask: BitmaskPlan
    scratch: tuple[int, int]
    cut: Launch
    write: Launch


@planned
def _plan(pre: Layout, weight_norm: Layout | None, is_share: bool) -> _Plan:
    rows, num_latents = pre.shape
    bitmask = plan_bitmask(pre)
    tile = _tuning.norm_tile(num_latents)
    cut = Launch(
        _norm_cut_kernel, (rows,), warps=tile.warps, most_registers=_tuning.NORM_REGISTERS, F=num_latents,
        ROW_BYTES=bitmask.row_bytes, stride_pb=pre.strides[0], stride_pf=pre.strides[1],
        stride_wf=0 if weight_norm is None else weight_norm.strides[0], HAS_WEIGHT=weight_norm is not None,
        IS_SHARE=is_share, SHIFT=0 if weight_norm is not None else _tuning.key_shift(pre.dtype),
        WIDE=_tuning.is_wide(num_latents * pre.strides[1]), BLOCK=tile.block, SLOTS=tile.slots, SAMPLE=tile.sample,
    )
    write = plan_write(pre, bitmask, weight=weight_norm, has_cut=True)
    return _Plan(bitmask, (rows, tile.slots * tile.block // 8), cut, write)


def launch(pre, target, weight_norm, is_share, capacity):
    """values (N,), indices (N,), offsets (B + 1,), required (); see ``reference.norm_match``."""
    rows, device = pre.shape[0], pre.device
    if rows == 0:
        return nothing_kept(pre, capacity)
    plan = _plan(layout(pre), layout(weight_norm), is_share)
    bitmask = plan.bitmask.unwritten(device)
    cut, last = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2))
    scratch = torch.empty(plan.scratch, dtype=torch.float32, device=device)
    plan.cut(pre, weight_norm, target, scratch, cut, last, bitmask.counts, bitmask.bits, bitmask.sums)
    return write(plan.write, pre, bitmask, capacity, weight_norm, cut, last, None)
