"""Batch top-k (mutual choice): exactly `total` entries of the whole matrix, ranked by (relu(pre), flat index).

Math      the top `total` lie inside the groups whose maximum reaches the `total`-th largest group maximum
Grid      group maxima (B,); digit passes over tiles; counts and compaction (B,)
Traffic   reads B*F*s once for the maxima, then per digit pass only the groups that reach the bound
Numerics  exact; integer histograms only, so atomics do not reorder anything; no host synchronisation
Source    Bussmann et al. 2024, arXiv:2412.06410; Ayonrinde 2024, arXiv:2411.02124 (mutual choice)
"""
import torch
import triton
import triton.language as tl

from . import _tuning
from ._compact import compact
from ._device import ABSENT, load_key


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
def _count_digits(counts_ptr, key, present, rank, DIGIT: tl.constexpr, SHIFT: tl.constexpr):
    """Adds the tile's histogram of digit DIGIT, over keys that share the digits already resolved."""
    unsigned = (key << SHIFT).to(tl.uint32, bitcast=True) ^ 0x80000000
    if DIGIT > 0:
        prefix, _ = _resolve(counts_ptr, rank, DIGIT)
        present = present & ((unsigned >> (32 - 8 * DIGIT)) == prefix)
    digit = ((unsigned >> (24 - 8 * DIGIT)) & 255).to(tl.int32)
    histogram = tl.histogram(tl.where(present, digit, 0), 256, mask=present)
    bins = tl.arange(0, 256)
    tl.atomic_add(counts_ptr + DIGIT * 256 + bins, histogram.to(tl.int64), mask=histogram > 0, sem="relaxed")


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
    key = load_key(pre_ptr + row * stride_pb, mask_ptr, pre_ptr, at, cols < F, stride_pf, stride_mf, 0,
                   False, True, HAS_MASK, False, SHIFT)
    groups = tile * (BLOCK // G) + tl.arange(0, BLOCK // G)
    tl.store(maxima_ptr + row * NG + groups, tl.max(tl.reshape(key, (BLOCK // G, G)), axis=1), mask=groups < NG)


@triton.jit
def _maxima_digit_kernel(
    maxima_ptr, counts_ptr, size, rank,  # [size] in, [4, 256] in/out, int64
    DIGIT: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):
    """One tile of the group maxima, added to the histogram of one digit."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(maxima_ptr + offs, mask=offs < size, other=0)
    _count_digits(counts_ptr, key, offs < size, rank.to(tl.int64), DIGIT, SHIFT)


@triton.jit
def _load_reaching(
    pre_ptr, mask_ptr, maxima_ptr, row, cols, bound, F, NG, stride_pb, stride_pf, stride_mb, stride_mf,
    HAS_MASK: tl.constexpr, HAS_MAXIMA: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr,
):
    """Keys of a tile; only groups whose maximum reaches `bound` are read."""
    present = cols < F
    if HAS_MAXIMA:
        present = present & (tl.load(maxima_ptr + row * NG + cols // G, mask=present, other=bound - 1) >= bound)
    if HAS_MASK:
        mask_ptr += row * stride_mb
    at = cols.to(tl.int64) if WIDE else cols
    key = load_key(pre_ptr + row * stride_pb, mask_ptr, pre_ptr, at, present, stride_pf, stride_mf, 0,
                   False, True, HAS_MASK, False, SHIFT)
    return key, present


@triton.jit
def _entry_digit_kernel(
    pre_ptr, mask_ptr, maxima_ptr,     # [B, F] in, [F] or [B, F] in or unused, [B, NG] in or unused
    maxima_counts_ptr, counts_ptr,     # [4, 256] in, [4, 256] in/out, int64
    F, NG, rank, stride_pb, stride_pf, stride_mb, stride_mf,
    DIGIT: tl.constexpr, DIGITS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_MAXIMA: tl.constexpr,
    SHIFT: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):
    """One tile of one row, added to the histogram of one digit of the entries."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rank = rank.to(tl.int64)
    bound = tl.full((), ABSENT >> SHIFT, tl.int32)
    if HAS_MAXIMA:
        prefix, _ = _resolve(maxima_counts_ptr, rank, DIGITS)
        bound = _key_of_prefix(prefix, DIGITS, SHIFT)
    key, present = _load_reaching(pre_ptr, mask_ptr, maxima_ptr, row, cols, bound, F, NG,
                                  stride_pb, stride_pf, stride_mb, stride_mf, HAS_MASK, HAS_MAXIMA, SHIFT, WIDE, G)
    _count_digits(counts_ptr, key, present, rank, DIGIT, SHIFT)


@triton.jit
def _row_count_kernel(
    pre_ptr, mask_ptr, maxima_ptr, counts_ptr,
    cut_ptr, above_ptr, equal_ptr,  # [B] out each, int32
    F, NG, rank, stride_pb, stride_pf, stride_mb, stride_mf,
    DIGITS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_MAXIMA: tl.constexpr,
    SHIFT: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):
    """One row: how many of its entries lie above the batch's cut, and how many tie with it."""
    row = tl.program_id(0).to(tl.int64)
    prefix, _ = _resolve(counts_ptr, rank.to(tl.int64), DIGITS)
    cut = _key_of_prefix(prefix, DIGITS, SHIFT)
    above = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    for tile in range(0, tl.cdiv(F, BLOCK)):
        cols = tile * BLOCK + tl.arange(0, BLOCK)
        key, present = _load_reaching(pre_ptr, mask_ptr, maxima_ptr, row, cols, cut, F, NG,
                                      stride_pb, stride_pf, stride_mb, stride_mf,
                                      HAS_MASK, HAS_MAXIMA, SHIFT, WIDE, G)
        above += (present & (key > cut)).to(tl.int32)
        equal += (present & (key == cut)).to(tl.int32)
    tl.store(cut_ptr + row, cut)
    tl.store(above_ptr + row, tl.sum(above, axis=0))
    tl.store(equal_ptr + row, tl.sum(equal, axis=0))


def launch(pre, mask, total):
    """values (total,), indices (total,), offsets (B + 1,); see ``reference.batch_topk``."""
    rows, num_latents = pre.shape
    device = pre.device
    values, indices = pre.new_empty(total), pre.new_empty(total, dtype=torch.int32)
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    if total == 0:
        return values, indices, offsets
    shift = _tuning.key_shift(pre.dtype)
    digits = -(-(32 - shift) // 8)
    block = _tuning.stream_block(num_latents)
    groups = _tuning.batch_groups(rows, num_latents, total)
    mask_strides = (0, 0) if mask is None else mask.expand(pre.shape).stride()
    matrix = dict(
        F=num_latents, NG=0 if groups is None else groups.number,
        stride_pb=pre.stride(0), stride_pf=pre.stride(1), stride_mb=mask_strides[0], stride_mf=mask_strides[1],
        HAS_MASK=mask is not None, SHIFT=shift, G=1 if groups is None else groups.size, BLOCK=block,
        WIDE=_tuning.is_wide(*(num_latents * s for s in (pre.stride(1), mask_strides[1]))),
        num_warps=_tuning.num_warps(block),
    )
    counts = torch.zeros(2, 4, 256, dtype=torch.int64, device=device)  # of the maxima, of the entries
    tiles = (rows, triton.cdiv(num_latents, block))
    maxima = None
    if groups is not None:
        maxima = torch.empty(rows, groups.number, dtype=torch.int32, device=device)
        _group_max_kernel[tiles](pre, mask, maxima, **matrix)
        for digit in range(digits):
            _maxima_digit_kernel[(triton.cdiv(maxima.numel(), 4096),)](
                maxima, counts[0], maxima.numel(), total, DIGIT=digit, SHIFT=shift, BLOCK=4096
            )
    search = dict(rank=total, DIGITS=digits, HAS_MAXIMA=maxima is not None, **matrix)
    for digit in range(digits):
        _entry_digit_kernel[tiles](pre, mask, maxima, counts[0], counts[1], DIGIT=digit, **search)
    cut, above, equal = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(3))
    _row_count_kernel[(rows,)](pre, mask, maxima, counts[1], cut, above, equal, **search)

    tied = equal.cumsum(0, dtype=torch.int64)  # ties go to the lowest flat index: row by row until they are used up
    quota = (total - above.sum(dtype=torch.int64) - (tied - equal)).clamp(min=0).minimum(equal)
    offsets[1:] = (above + quota).cumsum(0)
    compact(pre, pre, mask, None, cut, quota.int(), offsets, values, indices, magnitude=False, rank_relu=True,
            value_relu=True, shift=shift, maxima=maxima, group_size=matrix["G"])
    return values, indices, offsets
