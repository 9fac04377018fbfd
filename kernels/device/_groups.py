"""Group maxima, and the entries of a row that reach a bound among the groups whose maxima do."""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _tuning
from ._device import ABSENT, keep_first, load_group_maxima, load_key
from ._launch import Launch, Layout, strides_of

ZERO_BLOCK = tl.constexpr(1024)


@triton.jit(do_not_specialize=["ZEROS"])  # it follows the number of rows
def _group_max_kernel(
    score_ptr, mask_ptr,  # [B, F] in, [F] or [B, F] in or unused
    maxima_ptr,           # [B, NG] out, int32 or int16
    zeros_ptr,            # [ZEROS] out, int64, or unused: what later kernels count in
    F, NG, stride_sb, stride_sf, stride_mb, stride_mf, ZEROS,
    MAGNITUDE: tl.constexpr, RELU: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ZEROS: tl.constexpr, SHIFT: tl.constexpr,
    WIDE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):
    """One tile of one row: the largest key of each of its groups. The first programs also clear what is counted in."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if HAS_MASK:
        mask_ptr += row * stride_mb
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    at = cols.to(tl.int64) if WIDE else cols
    maxima = load_group_maxima(score_ptr + row * stride_sb, mask_ptr, at, cols < F, stride_sf, stride_mf,
                               MAGNITUDE, RELU, HAS_MASK, SHIFT, G)
    groups = tile * (BLOCK // G) + tl.arange(0, BLOCK // G)
    tl.store(maxima_ptr + row * NG + groups, maxima.to(maxima_ptr.dtype.element_ty), mask=groups < NG)
    if HAS_ZEROS:
        first = (row * tl.num_programs(1) + tile) * ZERO_BLOCK
        if first < ZEROS:
            place = first + tl.arange(0, ZERO_BLOCK)
            tl.store(zeros_ptr + place, tl.zeros((ZERO_BLOCK,), tl.int64), mask=place < ZEROS)


class Maxima(NamedTuple):
    """How the largest keys of groups are taken, by :func:`plan_maxima`."""

    launch: Launch
    shape: tuple[int, int]  # (B, NG)
    dtype: torch.dtype
    clears: bool  # whether there are programs enough to clear ``zeros`` in passing

    def of(self, score, mask, zeros=None):
        """(B, NG); fills the int64 tensor ``zeros`` on the way."""
        maxima = torch.empty(self.shape, dtype=self.dtype, device=score.device)
        if zeros is not None and not self.clears:
            zeros.zero_()
        self.launch(score, mask, maxima, zeros)
        return maxima


def plan_maxima(
    score: Layout, mask: Layout | None, groups, *, magnitude: bool, relu: bool, zeros: int = 0, numbered: bool = False
) -> Maxima:
    """Plans the maxima of ``groups`` of a matrix, int32; ``zeros`` is the length of what is cleared on the way.

    Where they will be ``numbered`` by :func:`choose_groups`, int16 if both keys and numbers fit.
    """
    rows, num_latents = score.shape
    shift = _tuning.key_shift(score.dtype)
    grid = rows, triton.cdiv(num_latents, groups.block)
    clears = zeros > 0 and grid[0] * grid[1] * ZERO_BLOCK.value >= zeros
    mask_strides = strides_of(mask)
    launch = Launch(
        _group_max_kernel, grid, warps=groups.warps, F=num_latents, NG=groups.number, stride_sb=score.strides[0],
        stride_sf=score.strides[1], stride_mb=mask_strides[0], stride_mf=mask_strides[1], ZEROS=zeros,
        MAGNITUDE=magnitude, RELU=relu, HAS_MASK=mask is not None, HAS_ZEROS=clears, SHIFT=shift,
        WIDE=_tuning.is_wide(*(num_latents * s for s in (score.strides[1], mask_strides[1]))),
        G=groups.size, BLOCK=groups.block,
    )
    short = numbered and shift == 16 and groups.number <= 2**15
    return Maxima(launch, (rows, groups.number), torch.int16 if short else torch.int32, clears)


@triton.jit
def _reaching(key, present, low, ties, LIMITED: tl.constexpr):
    """Which keys of a tile reach `low`, of those equal to it the first `ties` where they are limited.

    Also each one's position, their number, and how many of the ties are among them.
    """
    if LIMITED:
        keep, position = keep_first(key, low, ties)
        above = tl.sum((present & (key > low)).to(tl.int32), axis=0)
        equal = tl.minimum(tl.sum((present & (key == low)).to(tl.int32), axis=0), ties)
        return keep & present, position, above + equal, equal
    else:
        keep = present & (key >= low)
        scan = tl.cumsum(keep.to(tl.int32), axis=0)
        return keep, scan - 1, tl.max(scan, axis=0), 0


@triton.jit
def choose_groups(
    maxima_ptr, chosen_ptr,  # row pointers: [NG] in; [NG] out, perhaps the same
    NG, low, ties, LIMITED: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):
    """Writes the groups of a row that reach `low`, ascending; how many they are."""
    chosen = tl.full((), 0, tl.int32)
    for tile in range(0, NG, BLOCK):
        groups = tile + tl.arange(0, BLOCK)
        key = tl.load(maxima_ptr + groups, mask=groups < NG, other=ABSENT >> SHIFT).to(tl.int32)
        keep, position, number, equal = _reaching(key, groups < NG, low, ties, LIMITED)
        tl.debug_barrier()  # over the maxima, they go where those were read, no further
        tl.store(chosen_ptr + chosen + position, groups.to(chosen_ptr.dtype.element_ty), mask=keep)
        chosen += number
        if LIMITED:
            ties -= equal
    tl.debug_barrier()
    return chosen


@triton.jit
def list_survivors(
    score_ptr, mask_ptr,      # row pointers: [F], [F] or unused
    groups_ptr, columns_ptr,  # [groups] in, ascending, or unused; [CAPACITY] out, int32
    groups, low, ties, F, CAPACITY, stride_sf, stride_mf,
    MAGNITUDE: tl.constexpr, RELU: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GROUPS: tl.constexpr,
    LIMITED: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):
    """Writes the columns of the groups' entries that reach `low`, ascending, as far as there is room; their number."""
    found = tl.full((), 0, tl.int32)
    lanes = F
    if HAS_GROUPS:
        lanes = groups * G
    for tile in range(0, lanes, BLOCK):
        lane = tile + tl.arange(0, BLOCK)
        present = lane < lanes
        cols = lane
        if HAS_GROUPS:
            cols = tl.load(groups_ptr + lane // G, mask=present, other=0).to(tl.int32) * G + lane % G
            present = present & (cols < F)
        at = cols.to(tl.int64) if WIDE else cols
        key = load_key(score_ptr, mask_ptr, at, present, stride_sf, stride_mf, MAGNITUDE, RELU, HAS_MASK, SHIFT)
        keep, position, number, equal = _reaching(key, present, low, ties, LIMITED)
        position += found
        tl.store(columns_ptr + position, cols, mask=keep & (position < CAPACITY))
        found += number
        if LIMITED:
            ties -= equal
    tl.debug_barrier()
    return found
