"""Batch top-k (mutual choice): exactly `total` entries of the whole matrix, ranked by (relu(pre), flat index).

Math      of disjoint sets of latents, each with a maximum that reaches a bound, `total` hold `total` entries that do:
          no entry below the `total`-th largest maximum of sets is kept
Grid      group maxima (B, tiles of a row); bound (tiles of maxima,); survivors, counts and compaction (B,); sample
          (its tiles,); near and digit passes (B, shares of a row)
Traffic   reads B*F*s once for the maxima, then the maxima twice, the groups that reach the bound once and their
          entries that do (survivors: of continuous data hardly more than `total`) two or three times. From F/8 entries
          a row on groups do not pay: B*F*s is read three times (four, where keys have two digits), once more where a
          sample has misled, and a sample first
Numerics  exact; integer histograms only, so atomics do not reorder anything; no host synchronisation
Source    Bussmann et al. 2024, arXiv:2412.06410; Ayonrinde 2024, arXiv:2411.02124 (mutual choice)

Keys are found by two digits: sign, exponent and 7 bits of the mantissa, which is all of a bf16, then the other 16 bits.
Five launches for bf16, six for fp16 and fp32, one more for fewer rows than clear the histograms in passing; in each,
every program reads what it needs from the histograms itself. Without groups a sample says near which digits the cut
lies, so that the entries counted one by one are few: each takes an atomic addition, and a quarter of a large matrix
would wait for millions of them. The whole matrix is counted: the sample decides how long that takes, never the result.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _tuning
from ._compact import SHARE_ROWS, lane_columns, listed_lanes, plan_compact
from ._device import ABSENT, KEY_MAX, load_key
from ._groups import Maxima, choose_groups, list_survivors, plan_maxima
from ._launch import Launch, Layout, layout, mask_layout, planned, strides_of

# A histogram of first digits: four numbers, then (16 places on) 2**15 counts. The numbers: the largest digit that was
# counted one by one; how many entries lie above the window of a sample, and how many within; and, where the cut lies
# above the window, the largest digit there.
FIRST = tl.constexpr(16 + 2**15)
ABOVE, WITHIN, BEYOND = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# Of second digits: 2**8 counts by their first half, then 2**16.
SECOND = tl.constexpr(2**8 + 2**16)
ZERO = tl.constexpr(1)  # the first digit of 0; masked entries have 0
NAN = tl.constexpr(2**15 - 1)


@triton.jit
def _first_digit(key, SHIFT: tl.constexpr):
    """Ascends with the key of relu(pre); masked entries have 0, every NaN the largest."""
    return tl.minimum(tl.maximum(((key << SHIFT) >> 16) + 1, 0), NAN)


@triton.jit
def _least_key(first, second, SHIFT: tl.constexpr):
    """The least key of the first digit whose second is at least `second`."""
    key = tl.where(first == NAN, KEY_MAX, ((first - 1) << 16) | second) >> SHIFT
    return tl.where(first == 0, (ABSENT >> SHIFT) + 1, key)


@triton.jit
def _add_first(counts_ptr, largest_ptr, digit, present, low, HAS_MASK: tl.constexpr):
    """Adds a tile's first digits to a histogram. Digits that many entries may share, whose additions would wait for one
    another, are summed over the tile first."""
    top = tl.max(tl.where(present, digit, -1), axis=0)
    common = ((present & (digit == top)).to(tl.int32) << 16) | (present & (digit == low)).to(tl.int32)
    common = tl.sum(common, axis=0)
    tl.atomic_max(largest_ptr, top.to(tl.int64), mask=top >= 0, sem="relaxed")
    tl.atomic_add(counts_ptr + 16 + top, (common >> 16).to(tl.int64), mask=top >= 0, sem="relaxed")
    at_low = common & 0xFFFF
    tl.atomic_add(counts_ptr + 16 + low, at_low.to(tl.int64), mask=(at_low > 0) & (low < top), sem="relaxed")
    rest = present & (digit > low) & (digit < top)
    tl.atomic_add(counts_ptr + 16 + digit, tl.full(digit.shape, 1, tl.int64), mask=rest, sem="relaxed")
    if HAS_MASK:
        masked = tl.sum((present & (digit < low)).to(tl.int32), axis=0)
        tl.atomic_add(counts_ptr + 16, masked.to(tl.int64), mask=(masked > 0) & (top > 0), sem="relaxed")


@triton.jit
def _find_first(counts_ptr, rank):
    """The first digit that holds the rank-th largest entry, and the rank inside it: from the largest downwards."""
    LANES: tl.constexpr = 256  # two octaves
    lane = tl.arange(0, LANES)
    beyond = tl.load(counts_ptr + BEYOND).to(tl.int32)  # then what lies above the window has been counted as well
    top = tl.maximum(tl.load(counts_ptr).to(tl.int32), beyond)
    above = tl.where(beyond > 0, 0, tl.load(counts_ptr + ABOVE))
    counts = tl.load(counts_ptr + 16 + top - lane, mask=lane <= top, other=0)
    here = tl.sum(counts, axis=0)
    while (above + here < rank) & (top >= LANES):
        above += here
        top -= LANES
        counts = tl.load(counts_ptr + 16 + top - lane, mask=lane <= top, other=0)
        here = tl.sum(counts, axis=0)
    reached = above + tl.cumsum(counts, axis=0)
    passed = reached < rank
    above = tl.maximum(above, tl.max(tl.where(passed, reached, 0), axis=0))
    return tl.maximum(top - tl.sum(passed.to(tl.int32), axis=0), 0), rank - above


@triton.jit
def _find_half(counts_ptr, rank):
    """The half of a digit, by its histogram of 256 counts, that holds the rank-th largest, and the rank inside it."""
    half = 255 - tl.arange(0, 256)
    reached = tl.cumsum(tl.load(counts_ptr + half), axis=0)
    passed = reached < rank
    return 255 - tl.sum(passed.to(tl.int32), axis=0), rank - tl.max(tl.where(passed, reached, 0), axis=0)


@triton.jit
def _find_second(counts_ptr, rank):
    """The second digit of the rank-th largest entry among those that share its first."""
    upper, rank = _find_half(counts_ptr, rank)
    lower, _ = _find_half(counts_ptr + 256 + upper * 256, rank)
    return upper * 256 + lower


@triton.jit(do_not_specialize=["B"])
def _bound_kernel(
    maxima_ptr,  # [B, NG] in: group maxima, int32 or int16
    counts_ptr,  # [FIRST] in/out, int64
    B, NG, SETS: tl.constexpr, GROUPS: tl.constexpr, SHIFT: tl.constexpr,
):
    """SETS sets of GROUPS groups, which need not be neighbours: the first digits of their maxima, counted."""
    first = tl.program_id(0).to(tl.int64) * (SETS * GROUPS)
    left = B.to(tl.int64) * NG - first
    lane = tl.arange(0, SETS)
    key = tl.full((SETS,), ABSENT >> SHIFT, tl.int32)
    for group in tl.static_range(GROUPS):
        at = group * SETS + lane
        key = tl.maximum(key, tl.load(maxima_ptr + first + at, mask=at < left, other=ABSENT >> SHIFT).to(tl.int32))
    present = lane < left
    digit = _first_digit(key, SHIFT)
    # Digits within two octaves of the largest go into a histogram first: else a million additions would meet in a few
    # hundred counters.
    window = tl.maximum(tl.max(digit, axis=0) - 255, ZERO)
    near = present & (digit >= window)
    bins = tl.arange(0, 256)
    histogram = tl.histogram(tl.where(near, digit - window, 0), 256, mask=near)
    tl.atomic_add(counts_ptr + 16 + window + bins, histogram.to(tl.int64), mask=histogram > 0, sem="relaxed")
    # both are present where a set is: the largest is `window` or above unless all are masked
    _add_first(counts_ptr, counts_ptr, digit, present & (digit < window), ZERO, True)
    tl.atomic_max(counts_ptr, tl.max(tl.where(present, digit, 0), axis=0).to(tl.int64), sem="relaxed")


@triton.jit
def _add_tile(
    score_ptr, mask_ptr, counts_ptr, largest_ptr, cols, present, least, most, digit, stride_sf, stride_mf,
    SECOND_DIGIT: tl.constexpr, HAS_MASK: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr,
):
    """Counts a tile's first digits from `least` to `most`, or the second digits of those whose first is `digit`.

    Entries at `least` may be many, at ZERO if it is 0, and what is masked: these are summed.
    """
    at = cols.to(tl.int64) if WIDE else cols
    key = load_key(score_ptr, mask_ptr, at, present, stride_sf, stride_mf, False, True, HAS_MASK, SHIFT)
    first = _first_digit(key, SHIFT)
    if SECOND_DIGIT:
        present = present & (first == digit)
        second = (key << SHIFT) & 0xFFFF
        top = tl.max(tl.where(present, second, -1), axis=0)  # all of them, where they tie
        common = tl.sum((present & (second == top)).to(tl.int32), axis=0).to(tl.int64)
        tl.atomic_add(counts_ptr + (top >> 8), common, mask=top >= 0, sem="relaxed")
        tl.atomic_add(counts_ptr + 256 + top, common, mask=top >= 0, sem="relaxed")
        rest = present & (second < top)
        one = tl.full(cols.shape, 1, tl.int64)
        tl.atomic_add(counts_ptr + (second >> 8), one, mask=rest, sem="relaxed")
        tl.atomic_add(counts_ptr + 256 + second, one, mask=rest, sem="relaxed")
    else:
        present = present & (first >= least) & (first <= most)
        _add_first(counts_ptr, largest_ptr, first, present, tl.maximum(least, ZERO), HAS_MASK)


@triton.jit
def _add_row(
    score_ptr, mask_ptr, counts_ptr, largest_ptr, columns_ptr, start, lanes, listed, first_tile, step, least, most,
    digit, F, stride_sf, stride_mf,
    SECOND_DIGIT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LIST: tl.constexpr, SHIFT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, STREAM: tl.constexpr,
):
    """Counts every `step`-th tile of a row from `first_tile` on: of BLOCK entries of its list, or of STREAM columns."""
    if HAS_LIST:
        for tile in range(first_tile, tl.cdiv(tl.where(listed, lanes, 0), BLOCK), step):
            cols, present = lane_columns(columns_ptr, start, tile * BLOCK + tl.arange(0, BLOCK), lanes, listed, True)
            _add_tile(score_ptr, mask_ptr, counts_ptr, largest_ptr, cols, present, least, most, digit, stride_sf,
                      stride_mf, SECOND_DIGIT, HAS_MASK, SHIFT, WIDE)
    for tile in range(first_tile, tl.cdiv(tl.where(listed, 0, F), STREAM), step):
        cols = tile * STREAM + tl.arange(0, STREAM)
        _add_tile(score_ptr, mask_ptr, counts_ptr, largest_ptr, cols, cols < F, least, most, digit, stride_sf,
                  stride_mf, SECOND_DIGIT, HAS_MASK, SHIFT, WIDE)


@triton.jit(do_not_specialize=["total"])
def _survivors_kernel(
    score_ptr, mask_ptr,      # [B, F] in, [F] or [B, F] in or unused
    bound_ptr, counts_ptr,    # [FIRST] in, int64: of sets; [FIRST] in/out: of survivors
    maxima_ptr,               # [B, NG] in, and scratch: group maxima, overwritten by the groups that reach the bound
    columns_ptr, found_ptr,   # [B, NG] out, int32; [B] out, int32: how many, or -1 where they do not fit
    F, NG, total, stride_sb, stride_sf, stride_mb, stride_mf,
    HAS_MASK: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr, STREAM: tl.constexpr,
):
    """One row: the latents that reach the bound, in order, and their first digits, counted."""
    row = tl.program_id(0).to(tl.int64)
    score_ptr += row * stride_sb
    if HAS_MASK:
        mask_ptr += row * stride_mb
    maxima_ptr += row * NG
    columns_ptr += row * NG
    low, _ = _find_first(bound_ptr, total.to(tl.int64))
    low_key = _least_key(low, 0, SHIFT)
    found = tl.full((), 0, tl.int32) + F
    # With few positive entries the bound is zero, which every entry reaches that no mask excludes: too many to list.
    if low >= (0 if HAS_MASK else ZERO + 1):
        groups = choose_groups(maxima_ptr, maxima_ptr, NG, low_key, 0, False, SHIFT, BLOCK_G)
        found = list_survivors(
            score_ptr, mask_ptr, maxima_ptr, columns_ptr, groups, low_key, 0, F, NG, stride_sf, stride_mf,
            False, True, HAS_MASK, True, False, SHIFT, WIDE, G, BLOCK,
        )
    listed = found <= NG
    tl.store(found_ptr + row, tl.where(listed, found, -1))
    least = tl.where(low == ZERO, 0, low)
    _add_row(
        score_ptr, mask_ptr, counts_ptr, counts_ptr, columns_ptr, 0, found, listed, 0, 1, least, NAN, 0,
        F, stride_sf, stride_mf, False, HAS_MASK, True, SHIFT, WIDE, BLOCK, STREAM,
    )


@triton.jit
def _sampled_window(sample_ptr, rank_above, rank_below):
    """The first digits of the entries of these ranks in a sample: the cut should lie between them, or be one."""
    most, _ = _find_first(sample_ptr, rank_above.to(tl.int64))
    least, _ = _find_first(sample_ptr, rank_below.to(tl.int64))
    return least, most


@triton.jit(do_not_specialize=["B"])
def _sample_kernel(
    score_ptr, mask_ptr,  # [B, F] in, [F] or [B, F] in or unused
    sample_ptr,           # [FIRST] in/out, int64
    B, F, stride_sb, stride_sf, stride_mb, stride_mf,
    HAS_MASK: tl.constexpr, SHIFT: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr,
):
    """RUNS runs of RUN neighbours, all rows alike and all columns, are counted by their first digits."""
    lane = tl.arange(0, BLOCK)
    run = tl.program_id(0) * (BLOCK // RUN) + lane // RUN
    row = run.to(tl.int64) * B // RUNS
    # the golden ratio spreads neighbouring runs over the row, whatever their number
    cols = (run.to(tl.int64) * 40503 % 65536 * (F // RUN) >> 16) * RUN + lane % RUN
    key = load_key(score_ptr + row * stride_sb, mask_ptr + row * stride_mb if HAS_MASK else mask_ptr, cols,
                   lane >= 0, stride_sf, stride_mf, False, True, HAS_MASK, SHIFT)
    _add_first(sample_ptr, sample_ptr, _first_digit(key, SHIFT), lane >= 0, ZERO, HAS_MASK)


@triton.jit(do_not_specialize=["rank_above", "rank_below"])
def _near_kernel(
    score_ptr, mask_ptr,     # [B, F] in, [F] or [B, F] in or unused
    sample_ptr, counts_ptr,  # [FIRST] in, [FIRST] in/out, int64
    F, rank_above, rank_below, stride_sb, stride_sf, stride_mb, stride_mf,
    HAS_MASK: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """A share of one row: how many entries lie above the sample's window, and within it the first digits, counted.

    The ends of the window are summed over the share, as one number may be the digit of many; what lies between them is
    some standard errors of the sample.
    """
    row = tl.program_id(0).to(tl.int64)
    if HAS_MASK:
        mask_ptr += row * stride_mb
    least, most = _sampled_window(sample_ptr, rank_above, rank_below)
    above = tl.zeros((BLOCK,), tl.int32)
    at_most = tl.zeros((BLOCK,), tl.int32)
    at_least = tl.zeros((BLOCK,), tl.int32)
    between = tl.zeros((BLOCK,), tl.int32)
    one = tl.full((BLOCK,), 1, tl.int64)
    for tile in range(tl.program_id(1), tl.cdiv(F, BLOCK), tl.num_programs(1)):
        cols = tile * BLOCK + tl.arange(0, BLOCK)
        at = cols.to(tl.int64) if WIDE else cols
        key = load_key(score_ptr + row * stride_sb, mask_ptr, at, cols < F, stride_sf, stride_mf,
                       False, True, HAS_MASK, SHIFT)
        digit = tl.where(cols < F, _first_digit(key, SHIFT), -1)
        above += (digit > most).to(tl.int32)
        at_most += (digit == most).to(tl.int32)
        at_least += (digit == least).to(tl.int32)
        inside = (digit > least) & (digit < most)
        between += inside.to(tl.int32)
        tl.atomic_add(counts_ptr + 16 + digit, one, mask=inside, sem="relaxed")
    number_above = tl.sum(above, axis=0).to(tl.int64)
    number_most = tl.sum(at_most, axis=0).to(tl.int64)
    number_least = tl.where(least < most, tl.sum(at_least, axis=0), 0).to(tl.int64)
    number_within = tl.sum(between, axis=0) + number_most + number_least
    tl.atomic_max(counts_ptr, most.to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + ABOVE, number_above, mask=number_above > 0, sem="relaxed")
    tl.atomic_add(counts_ptr + WITHIN, number_within, mask=number_within > 0, sem="relaxed")
    tl.atomic_add(counts_ptr + 16 + most, number_most, mask=number_most > 0, sem="relaxed")
    tl.atomic_add(counts_ptr + 16 + least, number_least, mask=number_least > 0, sem="relaxed")


@triton.jit(do_not_specialize=["total", "rank_above", "rank_below"])
def _digit_kernel(
    score_ptr, mask_ptr,     # [B, F] in, [F] or [B, F] in or unused
    columns_ptr, found_ptr,  # [B, CAPACITY] in, int32, and [B] in, int32; or unused
    sample_ptr,              # [FIRST] in, int64, or unused
    counts_ptr,              # [FIRST + SECOND] in/out, int64
    F, total, CAPACITY, rank_above, rank_below, stride_sb, stride_sf, stride_mb, stride_mf,
    SECOND_DIGIT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LIST: tl.constexpr, HAS_SAMPLE: tl.constexpr,
    SHIFT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, STREAM: tl.constexpr,
):
    """A share of one row: its first digits counted, or the second ones of those that share the first of the cut.

    After a sample the first ones of that side of its window on which the cut is; nothing where it lies within.
    """
    row = tl.program_id(0).to(tl.int64)
    if HAS_MASK:
        mask_ptr += row * stride_mb
    lanes, listed = listed_lanes(found_ptr, row, F, HAS_LIST)
    wanted = total.to(tl.int64)
    digit = tl.full((), 0, tl.int32)
    least = tl.full((), 0, tl.int32)
    most = tl.full((), 0, tl.int32) + NAN
    columns = F
    largest_ptr = counts_ptr
    if SECOND_DIGIT:
        digit, _ = _find_first(counts_ptr, wanted)
        counts_ptr += FIRST
    elif HAS_SAMPLE:
        lower, upper = _sampled_window(sample_ptr, rank_above, rank_below)
        above = tl.load(counts_ptr + ABOVE)
        beyond = above >= wanted
        columns = tl.where(beyond | (above + tl.load(counts_ptr + WITHIN) < wanted), F, 0)
        least = tl.where(beyond, upper + 1, 0)
        most = tl.where(beyond, NAN, lower - 1)
        largest_ptr += tl.where(beyond, BEYOND, 0)
    _add_row(
        score_ptr + row * stride_sb, mask_ptr, counts_ptr, largest_ptr, columns_ptr, row * CAPACITY, lanes, listed,
        tl.program_id(1), tl.num_programs(1), least, most, digit,
        columns, stride_sf, stride_mf, SECOND_DIGIT, HAS_MASK, HAS_LIST, SHIFT, WIDE, BLOCK, STREAM,
    )


@triton.jit
def _count_tile(
    score_ptr, mask_ptr, cols, present, cut, stride_sf, stride_mf,
    HAS_MASK: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr,
):
    """How many entries of a tile lie above the cut, and how many tie with it."""
    at = cols.to(tl.int64) if WIDE else cols
    key = load_key(score_ptr, mask_ptr, at, present, stride_sf, stride_mf, False, True, HAS_MASK, SHIFT)
    # one sum serves both: a tile has fewer than 32,768 lanes
    both = tl.sum(((present & (key > cut)).to(tl.int32) << 16) | (present & (key == cut)).to(tl.int32), axis=0)
    return both >> 16, both & 0xFFFF


@triton.jit(do_not_specialize=["B", "total"])
def _row_count_kernel(
    score_ptr, mask_ptr, columns_ptr, found_ptr, counts_ptr,  # as above
    cut_ptr, above_ptr, equal_ptr,                            # [B] out each, int32
    sums_ptr,                                                 # [2, ceil(B / SHARE_ROWS)] in/out, int64
    B, F, total, CAPACITY, stride_sb, stride_sf, stride_mb, stride_mf,
    SECOND_DIGIT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LIST: tl.constexpr,
    SHIFT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, STREAM: tl.constexpr,
):
    """One row: how many of its entries lie above the batch's cut, and how many tie with it."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_MASK:
        mask_ptr += row * stride_mb
    lanes, listed = listed_lanes(found_ptr, row, F, HAS_LIST)
    first, rank = _find_first(counts_ptr, total.to(tl.int64))
    second = first * 0
    if SECOND_DIGIT:
        second = _find_second(counts_ptr + FIRST, rank)
    cut = _least_key(first, second, SHIFT)
    above = tl.full((), 0, tl.int32)
    equal = tl.full((), 0, tl.int32)
    score_ptr += row * stride_sb
    if HAS_LIST:
        for tile in range(0, tl.cdiv(tl.where(listed, lanes, 0), BLOCK)):
            lane = tile * BLOCK + tl.arange(0, BLOCK)
            cols, present = lane_columns(columns_ptr, row * CAPACITY, lane, lanes, listed, True)
            more, ties = _count_tile(score_ptr, mask_ptr, cols, present, cut, stride_sf, stride_mf,
                                     HAS_MASK, SHIFT, WIDE)
            above += more
            equal += ties
    for tile in range(0, tl.cdiv(tl.where(listed, 0, F), STREAM)):
        cols = tile * STREAM + tl.arange(0, STREAM)
        more, ties = _count_tile(score_ptr, mask_ptr, cols, cols < F, cut, stride_sf, stride_mf, HAS_MASK, SHIFT, WIDE)
        above += more
        equal += ties
    tl.store(cut_ptr + row, cut)
    tl.store(above_ptr + row, above)
    tl.store(equal_ptr + row, equal)
    share = row // SHARE_ROWS
    tl.atomic_add(sums_ptr + share, above.to(tl.int64), sem="relaxed")
    tl.atomic_add(sums_ptr + tl.cdiv(B, SHARE_ROWS) + share, equal.to(tl.int64), sem="relaxed")


class _Plan(NamedTuple):
    """The launches of one selection in their order, and the lengths of the parts of the int64 scratch."""

    counts: tuple[int, ...]  # of sets or a sample, first digits, second digits, sums of rows
    maxima: Maxima | None
    bound: Launch | None
    survivors: Launch | None
    sample: Launch | None
    near: Launch | None
    digits: tuple[Launch, ...]
    row_counts: Launch
    write: Launch


@planned
def _plan(pre: Layout, mask: Layout | None, total: int) -> _Plan:
    rows, num_latents = pre.shape
    shift = _tuning.key_shift(pre.dtype)
    has_second = shift < 16
    counts = FIRST.value, FIRST.value, SECOND.value * has_second, 2 * triton.cdiv(rows, SHARE_ROWS.value)
    mask_strides = strides_of(mask)
    matrix = dict(
        F=num_latents, stride_sb=pre.strides[0], stride_sf=pre.strides[1], stride_mb=mask_strides[0],
        stride_mf=mask_strides[1], HAS_MASK=mask is not None, SHIFT=shift,
        WIDE=_tuning.is_wide(*(num_latents * s for s in (pre.strides[1], mask_strides[1]))),
    )
    groups = _tuning.batch_groups(rows, num_latents, total)
    maxima = bound = survivors = sample = near = listed_tile = None
    tile, listed = _tuning.digit_tile(num_latents), 0
    stream = tile.block
    if groups is not None:
        listed, listed_tile = groups.number, _tuning.list_tile(total / rows)
        tile, stream = listed_tile, _tuning.unlisted_block(listed_tile)
        maxima = plan_maxima(pre, mask, groups, magnitude=False, relu=True, zeros=sum(counts), numbered=True)
        sets = _tuning.sets_of_groups(groups.number, total / rows)
        bound = Launch(
            _bound_kernel, (triton.cdiv(rows * groups.number, sets.number * sets.size),), warps=sets.warps,
            B=rows, NG=groups.number, SETS=sets.number, GROUPS=sets.size, SHIFT=shift,
        )
        block_g, block, warps = _tuning.survivor_tiles(groups.number)
        survivors = Launch(
            _survivors_kernel, (rows,), warps=warps, NG=groups.number, G=groups.size, BLOCK_G=block_g, BLOCK=block,
            STREAM=_tuning.unlisted_block(_tuning.Tile(block, warps)), total=total, **matrix,
        )
    shares = min(_tuning.shares_of_row(rows), triton.cdiv(num_latents, 8 * tile.block))
    runs = _tuning.sampled_runs(rows, num_latents) if groups is None else 0
    rank_above, rank_below = _tuning.sampled_ranks(runs * _tuning.SAMPLED_RUN, total / (rows * num_latents))
    ranks = dict(rank_above=rank_above, rank_below=rank_below)
    if runs:
        block, warps = _tuning.SAMPLE_TILE
        block = min(block, runs * _tuning.SAMPLED_RUN)
        of_sample = matrix.copy()
        del of_sample["WIDE"]  # its runs lie all over the matrix
        sample = Launch(
            _sample_kernel, (runs * _tuning.SAMPLED_RUN // block,), warps=warps, B=rows, RUN=_tuning.SAMPLED_RUN,
            RUNS=runs, BLOCK=block, **of_sample,
        )
        near = Launch(_near_kernel, (rows, shares), warps=tile.warps, BLOCK=tile.block, **ranks, **matrix)
    matrix |= dict(total=total, CAPACITY=listed, HAS_LIST=listed > 0, BLOCK=tile.block, STREAM=stream)
    digits = tuple(
        Launch(
            _digit_kernel, (rows, shares), warps=tile.warps, SECOND_DIGIT=second, HAS_SAMPLE=runs > 0 and not second,
            **ranks, **matrix,
        )
        for second in (False, True)[groups is not None : 1 + has_second]
    )
    row_counts = Launch(_row_count_kernel, (rows,), warps=tile.warps, B=rows, SECOND_DIGIT=has_second, **matrix)
    write = plan_compact(pre, mask, total, listed, listed_tile)
    return _Plan(counts, maxima, bound, survivors, sample, near, digits, row_counts, write)


def launch(pre, mask, total):
    """values (total,), indices (total,), offsets (B + 1,); see ``reference.batch_topk``."""
    rows, device = pre.shape[0], pre.device
    values = torch.empty(total, dtype=pre.dtype, device=device)
    indices = torch.empty(total, dtype=torch.int32, device=device)
    if total == 0:
        return values, indices, torch.zeros(rows + 1, dtype=torch.int64, device=device)
    plan = _plan(layout(pre), mask_layout(mask, pre), total)
    counts = torch.empty(sum(plan.counts), dtype=torch.int64, device=device)
    bound, first, _, sums = counts.split(plan.counts)
    columns = found = None  # the candidates of each row, and how many they are
    if plan.maxima is None:
        counts.zero_()
        if plan.sample is not None:
            plan.sample(pre, mask, bound)
            plan.near(pre, mask, bound, first)
    else:
        maxima = plan.maxima.of(pre, mask, counts)
        plan.bound(maxima, bound)
        columns = torch.empty(maxima.shape, dtype=torch.int32, device=device)
        found = torch.empty(rows, dtype=torch.int32, device=device)
        plan.survivors(pre, mask, bound, first, maxima, columns, found)
    for digit in plan.digits:
        digit(pre, mask, columns, found, bound, first)
    cut, above, equal = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(3))
    plan.row_counts(pre, mask, columns, found, first, cut, above, equal, sums)
    offsets = torch.empty(rows + 1, dtype=torch.int64, device=device)
    plan.write(pre, mask, cut, equal, offsets, above, sums, columns, found, values, indices)
    return values, indices, offsets
