"""Compaction: writes the kept entries of each row, in ascending order, where its offset says.

Every rule whose rows are not written by its own kernel ends here: it has found, for each row, a `cut` (keep the keys
above it) and a `quota` (keep the first so many keys equal to it).
"""
import torch
import triton
import triton.language as tl

from . import _tuning
from ._device import keep_first, load_key, relu


@triton.jit
def _compact_kernel(
    score_ptr,    # [B, F] in: what ranks
    pre_ptr,      # [B, F] in: what is kept
    mask_ptr,     # [F] or [B, F] in, bool, or unused
    weight_ptr,   # [F] in, or unused
    cut_ptr,      # [B] in, int32
    quota_ptr,    # [B] in, int32
    offsets_ptr,  # [B + 1] in, int64
    maxima_ptr,   # [B, NG] in, int32: group maxima, whose groups below the cut are not read; or unused
    values_ptr,   # [N] out
    indices_ptr,  # [N] out, int32
    F, NG, stride_sb, stride_sf, stride_pb, stride_pf, stride_mb, stride_mf, stride_wf,
    MAGNITUDE: tl.constexpr, RANK_RELU: tl.constexpr, VALUE_RELU: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_MAXIMA: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr,
    G: tl.constexpr, BLOCK: tl.constexpr,
):
    """One row, tile by tile in column order, until it has written its share."""
    row = tl.program_id(0).to(tl.int64)
    score_ptr += row * stride_sb
    pre_ptr += row * stride_pb
    if HAS_MASK:
        mask_ptr += row * stride_mb
    cut = tl.load(cut_ptr + row)
    quota = tl.load(quota_ptr + row)
    start = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    tile = tl.full((), 0, tl.int32)
    while (tile * BLOCK < F) & (start < end):
        cols = tile * BLOCK + tl.arange(0, BLOCK)
        present = cols < F
        if HAS_MAXIMA:
            present = present & (tl.load(maxima_ptr + row * NG + cols // G, mask=present, other=cut - 1) >= cut)
        at = cols.to(tl.int64) if WIDE else cols
        key = load_key(score_ptr, mask_ptr, weight_ptr, at, present, stride_sf, stride_mf, stride_wf,
                       MAGNITUDE, RANK_RELU, HAS_MASK, HAS_WEIGHT, SHIFT)
        keep, position = keep_first(key, cut, quota)
        keep = keep & present
        value = tl.load(pre_ptr + at * stride_pf, mask=keep, other=0.0)
        if VALUE_RELU:
            value = relu(value.to(tl.float32)).to(value.dtype)
        if HAS_MASK:
            allowed = tl.load(mask_ptr + at * stride_mf, mask=keep, other=0) != 0
            value = tl.where(allowed, value.to(tl.float32), 0.0).to(value.dtype)
        entry = start + position
        keep = keep & (entry < end)  # a row cut short by its capacity
        tl.store(indices_ptr + entry, cols, mask=keep)
        tl.store(values_ptr + entry, value, mask=keep)
        equal = tl.sum((present & (key == cut)).to(tl.int32), axis=0)
        start += tl.sum((present & (key > cut)).to(tl.int32), axis=0) + tl.minimum(equal, quota)
        quota -= tl.minimum(equal, quota)
        tile += 1


def compact(
    pre, score, mask, weight, cut, quota, offsets, values, indices, *,
    magnitude, rank_relu, value_relu, shift, maxima=None, group_size=1,
):
    """Fills ``values`` and ``indices`` (N,); F, strides and dtypes are those of ``pre`` and ``score`` (B, F)."""
    rows, num_latents = pre.shape
    if rows == 0 or values.numel() == 0:
        return
    mask_strides = (0, 0) if mask is None else mask.expand(pre.shape).stride()
    weight_stride = 0 if weight is None else weight.stride(0)
    block = min(_tuning.stream_block(num_latents), 2048)  # the scan's shared memory grows with the tile
    _compact_kernel[(rows,)](
        score, pre, mask, weight, cut, quota, offsets, maxima, values, indices,
        F=num_latents, NG=0 if maxima is None else maxima.shape[1],
        stride_sb=score.stride(0), stride_sf=score.stride(1), stride_pb=pre.stride(0), stride_pf=pre.stride(1),
        stride_mb=mask_strides[0], stride_mf=mask_strides[1], stride_wf=weight_stride,
        MAGNITUDE=magnitude, RANK_RELU=rank_relu, VALUE_RELU=value_relu, HAS_MASK=mask is not None,
        HAS_WEIGHT=weight is not None, HAS_MAXIMA=maxima is not None, SHIFT=shift,
        WIDE=_tuning.is_wide(*(num_latents * s for s in (score.stride(1), pre.stride(1), mask_strides[1]))),
        G=group_size, BLOCK=block, num_warps=_tuning.num_warps(block),
    )


def allocate(pre, counts, capacity):
    """Empty compressed rows for ``counts`` (B,) entries each; without a capacity the host reads their sum, once."""
    offsets = torch.zeros(pre.shape[0] + 1, dtype=torch.int64, device=pre.device)
    offsets[1:] = counts.cumsum(0, dtype=torch.int64)
    required = offsets[-1].clone()
    if capacity is None:
        size = int(required)
        return pre.new_empty(size), pre.new_empty(size, dtype=torch.int32), offsets, required
    # Entries past the last row belong to nobody: zeros, so that nothing reads memory that was never written.
    values, indices = pre.new_zeros(capacity), pre.new_zeros(capacity, dtype=torch.int32)
    return values, indices, offsets.clamp_(max=capacity), required
