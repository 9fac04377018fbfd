"""Compaction: writes the kept entries of each row, in ascending order, where its offset says.

Every rule whose rows are not written by its own kernel ends here: it has found, for each row, a `cut` (keep the keys
above it) and a `quota` (keep the first so many keys equal to it).
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _tuning
from ._device import ABSENT, keep_first, load_key, relu


class Candidates(NamedTuple):
    """The groups of latents that may hold kept entries; row b's are ``indices[starts[b]:ends[b]]``."""

    indices: torch.Tensor | None = None  # (M,) int32, ascending in a row
    starts: torch.Tensor | None = None  # (B,) int64
    ends: torch.Tensor | None = None  # (B,) int64
    size: int = 1  # latents of a group


EVERY_LATENT = Candidates()


@triton.jit
def lane_range(starts_ptr, ends_ptr, row, F, HAS_GROUPS: tl.constexpr, G: tl.constexpr):
    """Where a row's groups start, and over how many lanes its entries spread."""
    first = row * 0
    lanes = F
    if HAS_GROUPS:
        first = tl.load(starts_ptr + row)
        lanes = (tl.load(ends_ptr + row) - first).to(tl.int32) * G
    return first, lanes


@triton.jit
def lane_columns(groups_ptr, first, lane, lanes, F, HAS_GROUPS: tl.constexpr, G: tl.constexpr):
    """The columns of a tile of lanes, ascending, and which of them exist."""
    present = lane < lanes
    cols = lane
    if HAS_GROUPS:
        cols = tl.load(groups_ptr + first + lane // G, mask=present, other=0) * G + lane % G
        present = present & (cols < F)
    return cols, present


@triton.jit
def _compact_kernel(
    score_ptr,          # [B, F] in: what ranks
    pre_ptr,            # [B, F] in: what is kept
    mask_ptr,           # [F] or [B, F] in, bool, or unused
    weight_ptr,         # [F] in, or unused
    cut_ptr,            # [B] in, int32
    quota_ptr,          # [B] in, int32
    offsets_ptr,        # [B + 1] in, int64
    groups_ptr,         # [M] in, int32: the groups that are looked at; or unused
    starts_ptr,         # [B] in, int64: where a row's groups begin; or unused
    ends_ptr,           # [B] in, int64: where they end; or unused
    values_ptr,         # [N] out
    indices_ptr,        # [N] out, int32
    F, stride_sb, stride_sf, stride_pb, stride_pf, stride_mb, stride_mf, stride_wf,
    MAGNITUDE: tl.constexpr, RANK_RELU: tl.constexpr, VALUE_RELU: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_GROUPS: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr,
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
    room = (tl.load(offsets_ptr + row + 1) - start).to(tl.int32)
    values_ptr += start
    indices_ptr += start
    first, lanes = lane_range(starts_ptr, ends_ptr, row, F, HAS_GROUPS, G)
    written = tl.full((), 0, tl.int32)
    tile = tl.full((), 0, tl.int32)
    while (tile * BLOCK < lanes) & (written < room):
        lane = tile * BLOCK + tl.arange(0, BLOCK)
        cols, present = lane_columns(groups_ptr, first, lane, lanes, F, HAS_GROUPS, G)
        at = cols.to(tl.int64) if WIDE else cols
        key = load_key(score_ptr, mask_ptr, weight_ptr, at, present, stride_sf, stride_mf, stride_wf,
                       MAGNITUDE, RANK_RELU, HAS_MASK, HAS_WEIGHT, SHIFT)
        keep, position = keep_first(key, cut, quota)
        position += written
        keep = keep & present & (position < room)  # a row cut short by its capacity
        tl.store(indices_ptr + position, cols, mask=keep)
        unmasked = keep
        if HAS_MASK:
            unmasked = keep & (key > (ABSENT >> SHIFT) + 1)  # masked entries fill the row as zeros
        value = tl.load(pre_ptr + at * stride_pf, mask=unmasked, other=0.0)
        if VALUE_RELU:
            value = relu(value.to(tl.float32)).to(value.dtype)
        tl.store(values_ptr + position, value, mask=keep)
        equal = tl.sum((present & (key == cut)).to(tl.int32), axis=0)
        written += tl.sum((present & (key > cut)).to(tl.int32), axis=0) + tl.minimum(equal, quota)
        quota -= tl.minimum(equal, quota)
        tile += 1


def compact(
    pre, score, mask, weight, cut, quota, offsets, values, indices, *,
    magnitude, rank_relu, value_relu, shift, groups=EVERY_LATENT,
):
    """Fills ``values`` and ``indices`` (N,); F, strides and dtypes are those of ``pre`` and ``score`` (B, F)."""
    rows, num_latents = pre.shape
    if rows == 0 or values.numel() == 0:
        return
    mask_strides = (0, 0) if mask is None else mask.expand(pre.shape).stride()
    weight_stride = 0 if weight is None else weight.stride(0)
    block, warps = _tuning.compact_tile(num_latents, groups.indices is not None)
    _compact_kernel[(rows,)](
        score, pre, mask, weight, cut, quota, offsets, groups.indices, groups.starts, groups.ends,
        values, indices,
        F=num_latents, stride_sb=score.stride(0), stride_sf=score.stride(1), stride_pb=pre.stride(0),
        stride_pf=pre.stride(1), stride_mb=mask_strides[0], stride_mf=mask_strides[1], stride_wf=weight_stride,
        MAGNITUDE=magnitude, RANK_RELU=rank_relu, VALUE_RELU=value_relu, HAS_MASK=mask is not None,
        HAS_WEIGHT=weight is not None, HAS_GROUPS=groups.indices is not None, SHIFT=shift,
        WIDE=_tuning.is_wide(*(num_latents * s for s in (score.stride(1), pre.stride(1), mask_strides[1]))),
        G=groups.size, BLOCK=block, **_tuning.options(warps),
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
