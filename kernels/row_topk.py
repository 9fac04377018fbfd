"""Row top-k: the k entries of each row that rank first under (key descending, index ascending).

Math      a row's top-k lies inside its k groups of G latents that rank first under (group maximum, group index)
Grid      (B,); one program owns one row
Traffic   reads B*F*s once, then k*G candidates and F/G maxima a row; writes B*k*(s + 4). Maxima that were taken
          before spare the stream
Numerics  exact, ties to the lowest index, NaN above +Inf; no floating-point arithmetic on the values
Source    Gao et al. 2024, arXiv:2406.04093 (TopK); group maxima: see kernels/README.md
"""
import torch
import triton
import triton.language as tl

from . import _tuning
from ._compact import compact
from ._device import ABSENT, KEY_MAX, keep_first, kth_largest, load_group_maxima, load_key, middle, relu


@triton.jit
def _row_topk_kernel(
    score_ptr,      # [B, F] in: what ranks
    pre_ptr,        # [B, F] in: what is kept
    mask_ptr,       # [F] or [B, F] in, bool, or unused
    maxima_ptr,     # [B, NG] int32: group maxima, in where HAS_MAXIMA, else scratch
    chosen_ptr,     # [B, KP] scratch, int32: the first columns of the chosen groups
    values_ptr,     # [B, K] out
    indices_ptr,    # [B, K] out, int32, ascending
    F, NG, K, stride_sb, stride_sf, stride_pb, stride_pf, stride_mb, stride_mf,
    MAGNITUDE: tl.constexpr, RELU: tl.constexpr, HAS_MASK: tl.constexpr, HAS_MAXIMA: tl.constexpr, SHIFT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, NGP: tl.constexpr, KP: tl.constexpr,
):
    """One row: stream it for its group maxima unless they are given, choose k groups, choose k of their entries."""
    row = tl.program_id(0).to(tl.int64)
    score_ptr += row * stride_sb
    pre_ptr += row * stride_pb
    if HAS_MASK:
        mask_ptr += row * stride_mb
    maxima_ptr += row * NG
    chosen_ptr += row * KP
    lowest = ABSENT >> SHIFT

    if not HAS_MAXIMA:
        for tile in range(0, tl.cdiv(F, BLOCK)):
            cols = tile * BLOCK + tl.arange(0, BLOCK)
            at = cols.to(tl.int64) if WIDE else cols
            maxima = load_group_maxima(score_ptr, mask_ptr, at, cols < F, stride_sf, stride_mf,
                                       MAGNITUDE, False, HAS_MASK, SHIFT, G)
            groups = tile * (BLOCK // G) + tl.arange(0, BLOCK // G)
            tl.store(maxima_ptr + groups, maxima, mask=groups < NG)
        tl.debug_barrier()  # the maxima are read back by other lanes

    groups = tl.arange(0, NGP)  # [NGP]
    key = tl.load(maxima_ptr + groups, mask=groups < NG, other=lowest)
    k_groups = tl.minimum(K, NG)
    top = tl.max(key, axis=0)
    cut = kth_largest(key, lowest + top * 0, top, k_groups)
    keep, position = keep_first(key, cut, k_groups - tl.sum((key > cut).to(tl.int32), axis=0))
    tl.store(chosen_ptr + position, groups * G, mask=keep)
    tl.debug_barrier()

    slot = tl.arange(0, KP * G)  # [KP * G], candidates in ascending column order
    cols = tl.load(chosen_ptr + slot // G, mask=slot // G < k_groups, other=0) + slot % G
    present = (slot // G < k_groups) & (cols < F)
    at = cols.to(tl.int64) if WIDE else cols
    key = load_key(score_ptr, mask_ptr, score_ptr, at, present, stride_sf, stride_mf, 0,
                   MAGNITUDE, False, HAS_MASK, False, SHIFT)
    # k groups reach `cut`, hence so do k entries; with fewer groups than k nothing is known
    cut = kth_largest(key, tl.where(NG < K, lowest, cut), top, K)
    keep, position = keep_first(key, cut, K - tl.sum((key > cut).to(tl.int32), axis=0))
    tl.debug_barrier()  # the columns are read again: kept through the search, their registers spill
    cols = tl.load(chosen_ptr + slot // G, mask=keep, other=0) + slot % G
    at = cols.to(tl.int64) if WIDE else cols
    value = tl.load(pre_ptr + at * stride_pf, mask=keep, other=0.0)
    if RELU:
        value = relu(value.to(tl.float32)).to(value.dtype)
    if HAS_MASK:
        value = tl.where(key == lowest + 1, 0.0, value.to(tl.float32)).to(value.dtype)
    tl.store(indices_ptr + row * K + position, cols, mask=keep)
    tl.store(values_ptr + row * K + position, value, mask=keep)


@triton.jit
def _row_cut_kernel(
    score_ptr,  # [B, F] in
    mask_ptr,   # [F] or [B, F] in, bool, or unused
    cut_ptr,    # [B] out, int32: keep keys above it ...
    quota_ptr,  # [B] out, int32: ... and the first this many equal to it
    F, K, stride_sb, stride_sf, stride_mb, stride_mf,
    MAGNITUDE: tl.constexpr, HAS_MASK: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """One row's k-th largest key by bisection over streaming passes: any k, no scratch."""
    row = tl.program_id(0).to(tl.int64)
    score_ptr += row * stride_sb
    if HAS_MASK:
        mask_ptr += row * stride_mb
    lo = tl.full((), ABSENT >> SHIFT, tl.int32)
    hi = tl.full((), KEY_MAX >> SHIFT, tl.int32)
    above = tl.full((), 0, tl.int32)  # count(key > hi)
    while lo < hi:
        mid = middle(lo, hi)
        counts = tl.zeros((BLOCK,), tl.int32)
        for tile in range(0, tl.cdiv(F, BLOCK)):
            cols = tile * BLOCK + tl.arange(0, BLOCK)
            at = cols.to(tl.int64) if WIDE else cols
            key = load_key(score_ptr, mask_ptr, score_ptr, at, cols < F, stride_sf, stride_mf, 0,
                           MAGNITUDE, False, HAS_MASK, False, SHIFT)
            counts += (key >= mid).to(tl.int32)
        count = tl.sum(counts, axis=0)
        above = tl.where(count >= K, above, count)
        lo = tl.where(count >= K, mid, lo)
        hi = tl.where(count >= K, hi, mid - 1)
    tl.store(cut_ptr + row, lo)
    tl.store(quota_ptr + row, K - above)


def launch(pre, score, mask, k, magnitude, relu, maxima=None):
    """values (B*k,), indices (B*k,) of each row's top-k; see ``reference.topk``.

    ``maxima`` (B, NG) int32: the largest key of each group of ``_tuning.row_groups``, where they are known already.
    """
    rows, num_latents = pre.shape
    values = pre.new_empty(rows * k)
    indices = pre.new_empty(rows * k, dtype=torch.int32)
    if rows == 0:
        return values, indices
    score = pre if score is None else score
    shift = _tuning.key_shift(score.dtype)
    mask_strides = (0, 0) if mask is None else mask.expand(pre.shape).stride()
    flags = dict(
        stride_sb=score.stride(0), stride_sf=score.stride(1), stride_mb=mask_strides[0], stride_mf=mask_strides[1],
        MAGNITUDE=magnitude, HAS_MASK=mask is not None, SHIFT=shift,
        WIDE=_tuning.is_wide(*(num_latents * s for s in (score.stride(1), pre.stride(1), mask_strides[1]))),
    )
    groups = _tuning.row_groups(num_latents, k)
    if groups is None:
        cut, quota = (torch.empty(rows, dtype=torch.int32, device=pre.device) for _ in range(2))
        block = _tuning.stream_block(num_latents)
        _row_cut_kernel[(rows,)](
            score, mask, cut, quota, F=num_latents, K=k, **flags, BLOCK=block,
            **_tuning.options(_tuning.num_warps(block)),
        )
        offsets = torch.arange(rows + 1, dtype=torch.int64, device=pre.device) * k
        compact(pre, score, mask, None, cut, quota, offsets, values, indices,
                magnitude=magnitude, rank_relu=False, value_relu=relu, shift=shift)
        return values, indices
    k_padded, groups_padded = _tuning.next_power_of_2(k), _tuning.next_power_of_2(groups.number)
    has_maxima = maxima is not None
    if not has_maxima:
        maxima = torch.empty(rows, groups.number, dtype=torch.int32, device=pre.device)
    chosen = torch.empty(rows, k_padded, dtype=torch.int32, device=pre.device)
    _row_topk_kernel[(rows,)](
        score, pre, mask, maxima, chosen, values, indices,
        F=num_latents, NG=groups.number, K=k, stride_pb=pre.stride(0), stride_pf=pre.stride(1), **flags, RELU=relu,
        HAS_MAXIMA=has_maxima, BLOCK=groups.block, G=groups.size, NGP=groups_padded, KP=k_padded,
        **_tuning.options(groups.warps if mask is None else min(2 * groups.warps, 16)),  # a mask costs registers
    )
    return values, indices
