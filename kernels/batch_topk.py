"""Batch top-k (mutual choice): exactly `total` entries of the whole matrix, ranked by (relu(pre), flat index).

Math      the first `total` entries lie inside the `total` groups of G latents that rank first by their maximum, and
          reach the last of these maxima
Grid      group maxima (B, tiles of a row); digit passes (B, shares of a row); counts and compaction (B,)
Traffic   reads B*F*s once for the maxima, then, per digit, the maxima; the total*G entries of the chosen groups once;
          then, per digit, those that reach the cut
Numerics  exact; integer histograms only, so atomics do not reorder anything; no host synchronisation
Source    Bussmann et al. 2024, arXiv:2412.06410; Ayonrinde 2024, arXiv:2411.02124 (mutual choice)
"""
import torch
import triton
import triton.language as tl

from . import _tuning
from ._compact import EVERY_LATENT, Candidates, compact, lane_columns, lane_range
from ._device import load_group_maxima, load_key


@triton.jit
def _find_digit(counts, rank):
    """The digit that holds the rank-th largest key, and the rank inside it; counts [256] int64 by digit."""
    at_least = tl.cumsum(counts, axis=0, reverse=True)
    digit = tl.sum((at_least >= rank).to(tl.int32), axis=0) - 1
    above = tl.sum(tl.where(tl.arange(0, 256) > digit, counts, 0), axis=0)
    return digit, rank - above


@triton.jit
def _resolve(counts_ptr, rank, DIGITS: tl.constexpr):
    """Prefix made of the first DIGITS digits of the rank-th largest key, and the rank among the keys that share it."""
    prefix = tl.full((), 0, tl.uint32)
    for digit in tl.static_range(DIGITS):
        counts = tl.load(counts_ptr + digit * 256 + tl.arange(0, 256))
        found, rank = _find_digit(counts, rank)
        prefix = (prefix << 8) | found.to(tl.uint32)
    return prefix, rank


@triton.jit
def _key_of_prefix(prefix, DIGITS: tl.constexpr, SHIFT: tl.constexpr):
    """The (shifted) key whose leading digits are `prefix`, zeros behind them."""
    unsigned = (prefix << (32 - 8 * DIGITS)) ^ 0x80000000
    return unsigned.to(tl.int32, bitcast=True) >> SHIFT


@triton.jit
def _group_max_kernel(
    pre_ptr, mask_ptr, maxima_ptr,  # [B, F] in, [F] or [B, F] in or unused, [B, NG] out, int32
    F, NG, stride_pb, stride_pf, stride_mb, stride_mf,
    HAS_MASK: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):
    """One tile of one row: the largest key of each of its groups."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if HAS_MASK:
        mask_ptr += row * stride_mb
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    at = cols.to(tl.int64) if WIDE else cols
    maxima = load_group_maxima(pre_ptr + row * stride_pb, mask_ptr, at, cols < F, stride_pf, stride_mf,
                               False, True, HAS_MASK, SHIFT, G)
    groups = tile * (BLOCK // G) + tl.arange(0, BLOCK // G)
    tl.store(maxima_ptr + row * NG + groups, maxima, mask=groups < NG)


@triton.jit(do_not_specialize=["rank"])  # it follows the number of rows
def _digit_kernel(
    score_ptr, mask_ptr,               # [B, F] in, [F] or [B, F] in or unused
    groups_ptr, starts_ptr, ends_ptr,  # [M] in, int32, and twice [B] in, int64; or unused
    counts_ptr,                        # [4, 256] in/out, int64
    F, rank, stride_sb, stride_sf, stride_mb, stride_mf,
    DIGIT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GROUPS: tl.constexpr,
    SHIFT: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):
    """A share of one row, added to the histogram of digit DIGIT of the keys that share the digits before it."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_MASK:
        mask_ptr += row * stride_mb
    first, lanes = lane_range(starts_ptr, ends_ptr, row, F, HAS_GROUPS, G)
    prefix, _ = _resolve(counts_ptr, rank.to(tl.int64), DIGIT)
    bins = tl.arange(0, 256)
    histogram = tl.zeros((256,), tl.int32)
    for tile in range(tl.program_id(1), tl.cdiv(lanes, BLOCK), tl.num_programs(1)):
        lane = tile * BLOCK + tl.arange(0, BLOCK)
        cols, present = lane_columns(groups_ptr, first, lane, lanes, F, HAS_GROUPS, G)
        at = cols.to(tl.int64) if WIDE else cols
        key = load_key(score_ptr + row * stride_sb, mask_ptr, score_ptr, at, present, stride_sf, stride_mf, 0,
                       False, True, HAS_MASK, False, SHIFT)
        unsigned = (key << SHIFT).to(tl.uint32, bitcast=True) ^ 0x80000000
        if DIGIT > 0:
            present = present & ((unsigned >> (32 - 8 * DIGIT)) == prefix)
        digit = ((unsigned >> (24 - 8 * DIGIT)) & 255).to(tl.int32)
        histogram += tl.histogram(tl.where(present, digit, 0), 256, mask=present)
    tl.atomic_add(counts_ptr + DIGIT * 256 + bins, histogram.to(tl.int64), mask=histogram > 0, sem="relaxed")


@triton.jit(do_not_specialize=["rank"])
def _row_count_kernel(
    score_ptr, mask_ptr, groups_ptr, starts_ptr, ends_ptr, counts_ptr,  # as above
    cut_ptr, above_ptr, equal_ptr,                                      # [B] out each, int32
    F, rank, stride_sb, stride_sf, stride_mb, stride_mf,
    DIGITS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GROUPS: tl.constexpr,
    SHIFT: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):
    """One row: how many of its entries lie above the batch's cut, and how many tie with it."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_MASK:
        mask_ptr += row * stride_mb
    first, lanes = lane_range(starts_ptr, ends_ptr, row, F, HAS_GROUPS, G)
    prefix, _ = _resolve(counts_ptr, rank.to(tl.int64), DIGITS)
    cut = _key_of_prefix(prefix, DIGITS, SHIFT)
    above = tl.full((), 0, tl.int32)
    equal = tl.full((), 0, tl.int32)
    for tile in range(0, tl.cdiv(lanes, BLOCK)):
        lane = tile * BLOCK + tl.arange(0, BLOCK)
        cols, present = lane_columns(groups_ptr, first, lane, lanes, F, HAS_GROUPS, G)
        at = cols.to(tl.int64) if WIDE else cols
        key = load_key(score_ptr + row * stride_sb, mask_ptr, score_ptr, at, present, stride_sf, stride_mf, 0,
                       False, True, HAS_MASK, False, SHIFT)
        # one sum serves both: a tile has fewer than 32,768 lanes
        both = tl.sum(((present & (key > cut)).to(tl.int32) << 16) | (present & (key == cut)).to(tl.int32), axis=0)
        above += both >> 16
        equal += both & 0xFFFF
    tl.store(cut_ptr + row, cut)
    tl.store(above_ptr + row, above)
    tl.store(equal_ptr + row, equal)


@triton.jit
def _survivors_kernel(
    score_ptr, mask_ptr, groups_ptr, group_offsets_ptr, cut_ptr,  # as above; offsets [B + 1]
    survivors_ptr, starts_ptr, ends_ptr,  # [M * G] out, int32; [B] out each, int64
    F, stride_sb, stride_sf, stride_mb, stride_mf,
    HAS_MASK: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):
    """One row: the latents of its chosen groups that reach the groups' cut, in order, where the groups' lanes begin."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_MASK:
        mask_ptr += row * stride_mb
    first, lanes = lane_range(group_offsets_ptr, group_offsets_ptr + 1, row, F, True, G)
    cut = tl.load(cut_ptr + row)
    survivors_ptr += first * G
    written = tl.full((), 0, tl.int32)
    for tile in range(0, tl.cdiv(lanes, BLOCK)):
        lane = tile * BLOCK + tl.arange(0, BLOCK)
        cols, present = lane_columns(groups_ptr, first, lane, lanes, F, True, G)
        at = cols.to(tl.int64) if WIDE else cols
        key = load_key(score_ptr + row * stride_sb, mask_ptr, score_ptr, at, present, stride_sf, stride_mf, 0,
                       False, True, HAS_MASK, False, SHIFT)
        keep = (present & (key >= cut)).to(tl.int32)
        tl.store(survivors_ptr + written + tl.cumsum(keep, axis=0) - 1, cols, mask=keep == 1)
        written += tl.sum(keep, axis=0)
    tl.store(starts_ptr + row, first * G)
    tl.store(ends_ptr + row, first * G + written)


def _first(score, mask, total, shift, groups=EVERY_LATENT):
    """cut (B,), quota (B,) and offsets (B + 1,) of the ``total`` entries of a matrix that rank first."""
    rows, width = score.shape
    mask_strides = (0, 0) if mask is None else mask.expand(score.shape).stride()
    block = _tuning.digit_block(width, groups.indices is not None)
    matrix = dict(
        F=width, rank=total, stride_sb=score.stride(0), stride_sf=score.stride(1), stride_mb=mask_strides[0],
        stride_mf=mask_strides[1], HAS_MASK=mask is not None, HAS_GROUPS=groups.indices is not None, SHIFT=shift,
        WIDE=_tuning.is_wide(*(width * s for s in (score.stride(1), mask_strides[1]))), G=groups.size, BLOCK=block,
        **_tuning.options(_tuning.digit_warps(block)),
    )
    counts = torch.zeros(4, 256, dtype=torch.int64, device=score.device)
    digits = -(-(32 - shift) // 8)
    lanes = width if groups.indices is None else 2 * triton.cdiv(total, rows)  # the survivors of most rows
    shares = min(_tuning.shares_of_row(rows), triton.cdiv(lanes, block))
    for digit in range(digits):
        _digit_kernel[(rows, shares)](
            score, mask, groups.indices, groups.starts, groups.ends, counts, DIGIT=digit, **matrix
        )
    cut, above, equal = (torch.empty(rows, dtype=torch.int32, device=score.device) for _ in range(3))
    _row_count_kernel[(rows,)](
        score, mask, groups.indices, groups.starts, groups.ends, counts, cut, above, equal, DIGITS=digits, **matrix
    )
    tied = equal.cumsum(0, dtype=torch.int64)  # ties go to the lowest flat index: row by row until they are used up
    quota = (total - above.sum(dtype=torch.int64) - (tied - equal)).clamp(min=0).minimum(equal)
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=score.device)
    offsets[1:] = (above + quota).cumsum(0)
    return cut, quota.int(), offsets


def _survivors(pre, mask, total, shift, grouping, maxima):
    """The entries that may be among the first ``total``: those of the ``total`` groups whose maxima rank first that
    reach the last of these maxima. Each group holds one, so at least ``total``; of continuous data hardly more."""
    rows, num_latents = pre.shape
    mask_strides = (0, 0) if mask is None else mask.expand(pre.shape).stride()
    wide = _tuning.is_wide(*(num_latents * s for s in (pre.stride(1), mask_strides[1])))
    if maxima is None:
        maxima = torch.empty(rows, grouping.number, dtype=torch.int32, device=pre.device)
        _group_max_kernel[rows, triton.cdiv(num_latents, grouping.block)](
            pre, mask, maxima, F=num_latents, NG=grouping.number, stride_pb=pre.stride(0), stride_pf=pre.stride(1),
            stride_mb=mask_strides[0], stride_mf=mask_strides[1], HAS_MASK=mask is not None, SHIFT=shift,
            WIDE=wide, G=grouping.size, BLOCK=grouping.block, **_tuning.options(grouping.warps),
        )
    cut, quota, offsets = _first(maxima, None, total, shift)
    chosen, keys = (maxima.new_empty(total) for _ in range(2))
    compact(maxima, maxima, None, None, cut, quota, offsets, keys, chosen,
            magnitude=False, rank_relu=False, value_relu=False, shift=shift)
    survivors = maxima.new_empty(total * grouping.size)
    starts, ends = offsets.new_empty(rows), offsets.new_empty(rows)
    block, warps = _tuning.compact_tile(num_latents, True)
    _survivors_kernel[(rows,)](
        pre, mask, chosen, offsets, cut, survivors, starts, ends, F=num_latents, stride_sb=pre.stride(0),
        stride_sf=pre.stride(1), stride_mb=mask_strides[0], stride_mf=mask_strides[1], HAS_MASK=mask is not None,
        SHIFT=shift, WIDE=wide, G=grouping.size, BLOCK=block, **_tuning.options(warps),
    )
    return Candidates(survivors, starts, ends)


def launch(pre, mask, total, maxima=None):
    """values (total,), indices (total,), offsets (B + 1,); see ``reference.batch_topk``.

    ``maxima`` (B, NG) int32: the largest keys of relu(pre) in the groups of ``_tuning.batch_groups``, where known.
    """
    rows, num_latents = pre.shape
    values, indices = pre.new_empty(total), pre.new_empty(total, dtype=torch.int32)
    if total == 0:
        return values, indices, torch.zeros(rows + 1, dtype=torch.int64, device=pre.device)
    shift = _tuning.key_shift(pre.dtype)
    grouping = _tuning.batch_groups(rows, num_latents, total)
    entries = EVERY_LATENT if grouping is None else _survivors(pre, mask, total, shift, grouping, maxima)
    cut, quota, offsets = _first(pre, mask, total, shift, entries)
    compact(pre, pre, mask, None, cut, quota, offsets, values, indices,
            magnitude=False, rank_relu=True, value_relu=True, shift=shift, groups=entries)
    return values, indices, offsets
