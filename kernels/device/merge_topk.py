"""Row top-k of slabs of latents: what exceeds the least that a row holds is listed, and merged with it in the end.

Math      the k that rank first of a row's first latents are held; of later ones, slab by slab, only what exceeds the
          least that is held can be among the k: what ties with it comes later, and loses
Grid      (B,); one program owns one row, however few there are: a slab's rows are short
Traffic   reads B*C*s and the B*k*s that rank once; a tile in which something exceeds the cut twice more, while the
          cache has it. Rows with such an entry: k and the list a few times, and what moves written, at most
          B*k*(s + 4)
Numerics  exact, ties to the lowest latent, NaN above +Inf; no floating-point arithmetic on the values
Source    Gao et al. 2024, arXiv:2406.04093 (TopK); the cut that only rises is that of any running selection
"""
import torch
import triton
import triton.language as tl

from . import _tuning
from ._device import KEY_MAX, keep_first, kth_largest, load_group_maxima, load_key
from ._launch import Launch, Layout, layout, planned

NEIGHBOURS = tl.constexpr(8)  # of a tile, whose maximum is taken before its key


@triton.jit(do_not_specialize=["first"])  # it differs from slab to slab
def _merge_topk_kernel(
    score_ptr,    # [B, C] in: what ranks of the slab; pre where nothing else does
    pre_ptr,      # [B, C] in: the slab
    mask_ptr,     # [F] in, bool, or unused
    scores_ptr,   # [B, K] in and out: what ranks of what is held; the values where nothing else does
    values_ptr,   # [B, K] in and out: what is held
    latents_ptr,  # [B, K] in and out, int32, ascending, below first
    columns_ptr,  # [B, LANES] scratch, int32: from K on, columns of the slab that may be kept
    first,
    C, K, stride_sb, stride_sf, stride_pb, stride_pf,
    MAGNITUDE: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MASK: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr,
):
    """One row: nothing is written where nothing exceeds its cut.

    The list has room for LANES - K >= K columns. A tile that does not fit finds it merged, its cut raised; of one that
    fits no empty list, no more than its own first K can be kept.
    """
    row = tl.program_id(0).to(tl.int64)
    score_ptr += row * stride_sb
    pre_ptr += row * stride_pb
    scores_ptr += row * K
    values_ptr += row * K
    latents_ptr += row * K
    columns_ptr += row * LANES
    slab_mask_ptr = mask_ptr
    if HAS_MASK:
        slab_mask_ptr += first

    lane = tl.arange(0, LANES // 2)  # K of them
    latents = lane
    if HAS_MASK:
        latents = tl.load(latents_ptr + lane, mask=lane < K, other=0)
    held = load_key(scores_ptr + lane, mask_ptr, latents, lane < K, 0, 1, MAGNITUDE, False, HAS_MASK, SHIFT)
    cut = tl.min(tl.where(lane < K, held, KEY_MAX), axis=0)

    room = LANES - K
    found = tl.full((), 0, tl.int32)
    tile = tl.full((), 0, tl.int32)
    while (tile < C) | (found > 0):
        cols = tile + tl.arange(0, BLOCK)
        at = cols.to(tl.int64) if WIDE else cols
        maxima = load_group_maxima(score_ptr, slab_mask_ptr, at, cols < C, stride_sf, 1,
                                   MAGNITUDE, False, HAS_MASK, SHIFT, NEIGHBOURS)
        top = tl.max(maxima, axis=0)
        number = found * 0
        if top > cut:
            key = load_key(score_ptr, slab_mask_ptr, at, cols < C, stride_sf, 1, MAGNITUDE, False, HAS_MASK, SHIFT)
            number = tl.sum((key > cut).to(tl.int32), axis=0)
        if (tile >= C) | ((found > 0) & (found + number > room)):
            cut = _merge(score_ptr, pre_ptr, mask_ptr, scores_ptr, values_ptr, latents_ptr, columns_ptr, first, found,
                         cut, K, stride_sf, stride_pf, MAGNITUDE, HAS_SCORE, HAS_MASK, SHIFT, WIDE, LANES)
            found = found * 0
        else:
            if number > 0:
                key = load_key(score_ptr, slab_mask_ptr, at, cols < C, stride_sf, 1, MAGNITUDE, False, HAS_MASK, SHIFT)
                bound = cut
                ties = found * 0
                if number > room:
                    bound = kth_largest(key, cut + 1, top, K)
                    ties = K - tl.sum((key > bound).to(tl.int32), axis=0)
                    number = found * 0 + K
                keep, position = keep_first(key, bound, ties)
                tl.store(columns_ptr + K + found + position, cols, mask=keep)
                found += number
            tile += BLOCK


@triton.jit
def _merge(
    score_ptr, pre_ptr, mask_ptr, scores_ptr, values_ptr, latents_ptr, columns_ptr,  # row pointers, as above
    first, found, cut, K, stride_sf, stride_pf,
    MAGNITUDE: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MASK: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr,
    LANES: tl.constexpr,
):
    """The K that rank first of what is held and `found` listed columns become what is held; the least of their keys."""
    # The K that are held, then what is listed, in ascending order of latents. The 0 that is added is one that the
    # compiler cannot know to be 0: else it would compute all addresses ahead of the loop around, and spill them.
    lane = tl.minimum(found, 0) + tl.arange(0, LANES)
    present = lane < K + found
    tl.debug_barrier()  # other lanes wrote the columns
    cols = tl.load(columns_ptr + lane, mask=present & (lane >= K), other=0)
    at = cols.to(tl.int64) if WIDE else cols
    latents = lane
    if HAS_MASK:
        latents = tl.load(latents_ptr + lane, mask=lane < K, other=0)
    key = load_key(scores_ptr + lane, mask_ptr, latents, lane < K, 0, 1, MAGNITUDE, False, HAS_MASK, SHIFT)
    listed = load_key(score_ptr + at * stride_sf, mask_ptr, first + cols, present & (lane >= K), 0, 1, MAGNITUDE, False,
                      HAS_MASK, SHIFT)
    key = tl.maximum(key, listed)
    cut = kth_largest(key, cut, tl.max(key, axis=0), K)
    keep, position = keep_first(key, cut, K - tl.sum((key > cut).to(tl.int32), axis=0))
    position = tl.where(keep & (position != lane), position, -1)  # of what moves

    # Values, scores and latents move one after the other, and columns are read anew for each: together they spill.
    tl.debug_barrier()
    held = tl.load(latents_ptr + lane, mask=(position >= 0) & (lane < K), other=0)
    cols = tl.load(columns_ptr + lane, mask=(position >= 0) & (lane >= K), other=0)
    tl.debug_barrier()  # all that moves has been read
    tl.store(latents_ptr + position, tl.where(lane < K, held, first + cols), mask=position >= 0)
    _move(values_ptr, pre_ptr, columns_ptr, lane, position, K, stride_pf, WIDE)
    if HAS_SCORE:
        _move(scores_ptr, score_ptr, columns_ptr, lane, position, K, stride_sf, WIDE)
    tl.debug_barrier()  # the next merge reads it
    return cut


@triton.jit
def _move(held_ptr, slab_ptr, columns_ptr, lane, position, K, stride_f, WIDE: tl.constexpr):
    """Moves entries of a row from where they are held, or in the slab, to their positions, where those are not -1."""
    cols = tl.load(columns_ptr + lane, mask=(position >= 0) & (lane >= K), other=0)
    at = cols.to(tl.int64) if WIDE else cols
    held = tl.load(held_ptr + lane, mask=(position >= 0) & (lane < K), other=0.0)
    listed = tl.load(slab_ptr + at * stride_f, mask=(position >= 0) & (lane >= K), other=0.0)
    tl.debug_barrier()
    tl.store(held_ptr + position, held, mask=(position >= 0) & (lane < K))
    tl.store(held_ptr + position, listed, mask=(position >= 0) & (lane >= K))


@planned
def _plan(values: Layout, pre: Layout, score: Layout, magnitude: bool, has_score: bool, has_mask: bool):
    """The launch, and the lanes of a row's list."""
    (rows, width), k = pre.shape, values.shape[1]
    lanes = _tuning.merge_lanes(k)
    tile = _tuning.merge_tile(width, lanes)
    return lanes, Launch(
        _merge_topk_kernel, (rows,), warps=tile.warps, C=width, K=k, stride_sb=score.strides[0],
        stride_sf=score.strides[1], stride_pb=pre.strides[0], stride_pf=pre.strides[1], MAGNITUDE=magnitude,
        HAS_SCORE=has_score, HAS_MASK=has_mask, SHIFT=_tuning.key_shift(score.dtype),
        WIDE=_tuning.is_wide(width * pre.strides[1], width * score.strides[1]), LANES=lanes, BLOCK=tile.block,
    )


def launch(values, scores, latents, pre, score, mask, first, magnitude):
    """Merges a slab into what is held, in place; see ``reference.merge_topk``.

    Raises:
        ValueError: what is held is not contiguous, or more than fits a program's registers.
    """
    held = [t for t in (values, scores, latents) if t is not None]
    if not all(t.is_contiguous() for t in held):
        raise ValueError("merge_topk writes values, scores and latents in place: they must be contiguous")
    rows, k = values.shape
    if k > _tuning.MOST_MERGED:
        raise ValueError(f"merge_topk on Triton holds at most {_tuning.MOST_MERGED} latents a row, got k={k}")
    if rows == 0 or pre.shape[1] == 0:
        return
    has_score = score is not None
    score, scores = (score, scores) if has_score else (pre, values)
    lanes, merge = _plan(layout(values), layout(pre), layout(score), magnitude, has_score, mask is not None)
    columns = torch.empty((rows, lanes), dtype=torch.int32, device=pre.device)
    merge(score, pre, mask, scores, values, latents, columns, first)
    torch.autograd.graph.increment_version(held)
