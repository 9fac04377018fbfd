"""Which of a rank's candidates are among those that are kept of all latents.

A rank's candidates are what it would keep if there were no others, ranked as on one device: by key, then by index. Its
latents are contiguous, so what is kept of the whole is the beginning of that list, and a count says it all.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_kernels.ops import ops
from sae_kernels.reference import ordered_keys, relu

from ..codes import SparseCodes

if TYPE_CHECKING:
    from .shards import Shards
    from .wire import Wire

ONE = 1 << 40  # of norm matching: the target's energy in fixed point
MOST = 1 << 42  # a single entry's energy, at most: 2^20 of them fit an int64


def row_mask(shards: Shards, by: Tensor, allowed: Tensor | None, k: int, sources: int = 1) -> Tensor:
    """(sources of all tokens, c) bool: which of my candidates are among the ``k`` of their token.

    Keys go to the tokens' owners, who find the cut, give ties away in order of sources, then of ranks, and return a
    count for each row.

    Args:
        by: (sources of all tokens, c) what ranks, c = min(k, my latents), by ascending latent; one source's tokens
            below another's.
        allowed: of them, False where the mask forbids a candidate; such rank below everything. None: all.
    """
    key = ordered_keys(by)
    lowest = torch.iinfo(key.dtype).min  # -Inf lies above the number after it
    if allowed is not None:
        key = torch.where(allowed, key, lowest + 1)
    best, order = key.sort(dim=1, descending=True, stable=True)
    width = min(k, shards.num_latents)
    if best.shape[1] < width:
        best = torch.cat([best, best.new_full((best.shape[0], width - best.shape[1]), lowest)], 1)
    by_token = best.view(sources, len(best) // sources, width).transpose(0, 1).contiguous()
    candidates = shards.wire.scatter_rows(by_token, shards.rows, "candidates")  # (ranks, my tokens, sources, width)
    every = candidates.transpose(0, 1).flatten(1)
    cut = every.sort(dim=1, descending=True).values[:, k - 1, None, None]
    above, tied = (found.sum(-1).permute(2, 0, 1).flatten(0, 1) for found in (candidates > cut, candidates == cut))
    left = k - above.sum(0) - (tied.cumsum(0) - tied)
    numbers = (above + left.clamp(min=0).minimum(tied)).int().unflatten(0, (sources, shards.size))
    counts = shards.wire.return_rows(numbers.permute(1, 2, 0).contiguous(), shards.rows, "counts")
    kept = torch.arange(by.shape[1], device=by.device) < counts.T.reshape(-1, 1)
    return torch.zeros_like(kept).scatter_(1, order, kept)


def batch_mask(
    shards: Shards, codes: SparseCodes, total: int, allowed: Tensor | None = None, among: int = 1
) -> Tensor:
    """(N,) bool: which of my candidates are among the ``total`` largest of the batch, by relu(value).

    A histogram of keys, digit by digit, is added over all ranks. Ties go by flat position: group by group of ranks, and
    in a group row before rank.

    Args:
        codes: my candidates, min(total, all of them); all of its entries belong to a row.
        allowed: (N,), False where the mask forbids a candidate.
        among: sources whose tokens are the rows, one source's below another's.
    """
    values, row = codes.values.detach(), _rows_of(codes)
    if total == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    key = ordered_keys(relu(values)).long()
    key = key if allowed is None else torch.where(allowed, key, -1)  # forbidden ones tie, below 0
    top = 8 * values.element_size() - 16
    left: Tensor | int = total
    cut, alive = key.new_zeros(()), torch.ones_like(key, dtype=torch.bool)
    for shift in range(top, -1, -16):
        is_first = shift == top
        digits = (key >> shift) + 1 if is_first else (key >> shift) & 0xFFFF
        counts = key.new_zeros((1 << 15) + 1 if is_first else 1 << 16)
        counts.scatter_add_(0, digits, alive.long())
        digit, above = _digit_of(shards.everyone.add(counts, "histogram"), left)
        left, alive = left - above, alive & (digits == digit)
        cut = digit - 1 if is_first else (cut << 16) + digit
    ties = codes.offsets.new_zeros(codes.rows).scatter_add_(0, row, alive.long())
    ties = ties.view(among, len(ties) // among)
    left = left - ties.new_zeros(among)
    if shards.across is not None:  # of a source, the groups before mine come first
        of_groups = shards.across.gather(shards.wire.add(ties.sum(1), "ties of groups"), "ties of groups").T
        before = (of_groups.flatten().cumsum(0) - of_groups.flatten()).view(of_groups.shape)[:, shards.group]
        quota = torch.cat([_quota_of_ties(shards, *of_source, by_row=False)
                           for of_source in zip(ties, left - before, strict=True)])  # fmt: skip
    else:
        quota = _quota_of_ties(shards, ties.flatten(), left[0], by_row=False)
    ties = ties.flatten()
    return (key > cut) | _first_ties(alive, row, ties, quota)


def latent_mask(across: Wire, codes: SparseCodes, budgets: Tensor) -> Tensor:
    """(N,) bool: which of my candidates are among each latent's ``budgets`` (my latents,), by relu(value).

    Of the tokens of all groups: sixteen-ary search on keys, each digit's counts added over the groups. Ties go to the
    lowest token, by group first.

    Args:
        codes: each latent's candidates in my group, min(budget, all of its tokens).
    """
    key, latent = ordered_keys(relu(codes.values.detach())).long(), codes.indices.long()
    left = budgets.long()
    cut, alive = torch.zeros_like(left), torch.ones_like(key, dtype=torch.bool)
    for shift in range(8 * codes.values.element_size() - 4, -1, -4):
        digits = (key >> shift) & 15
        counts = left.new_zeros(len(left), 16)
        counts.view(-1).scatter_add_(0, latent * 16 + digits, alive.long())
        counts = across.add(counts, "counts of latents")
        reach = counts.flip(1).cumsum(1).flip(1)
        digit = ((reach >= left[:, None]).sum(1) - 1).clamp(min=0)
        left = left - (reach - counts).gather(1, digit[:, None])[:, 0]
        cut, alive = (cut << 4) + digit, alive & (digits == digit[latent])
    every = across.gather(left.new_zeros(len(left)).scatter_add_(0, latent, alive.long()), "ties of latents")
    left = left - every[: across.rank].sum(0)
    order = latent.argsort(stable=True)  # by latent, then by token
    tied = alive[order].long()
    seen = tied.cumsum(0)
    of_latent = latent[order]
    starts = torch.searchsorted(of_latent, torch.arange(len(left), device=left.device))
    before = torch.cat([seen.new_zeros(1), seen])[starts]
    first = torch.zeros_like(alive).scatter_(0, order, (tied > 0) & (seen - before[of_latent] <= left[of_latent]))
    return (key > cut[latent]) | first


def batch_topk(shards: Shards, pre: Tensor, total: int, mask: Tensor | None, backend: str) -> SparseCodes:
    """The ``total`` largest of the batch among the latents of ``mask`` (my latents,), of which mine are ``pre``."""
    values, indices, offsets = ops.batch_topk(pre, mask, min(total, pre.numel()), backend)
    codes = SparseCodes(values, indices, offsets, (pre.shape[0],), pre.shape[1])
    allowed = None if mask is None else mask[codes.indices.long()]
    return narrowed(codes, batch_mask(shards, codes, total, allowed), (), trims=shards.trims)[0]


def norm_match(
    shards: Shards, pre: Tensor, target: Tensor, weight_norm: Tensor | None, capacity: int | None
) -> SparseCodes:
    """The prefix of each whole row whose norm is nearest to ``target`` (tokens,), of which my latents are ``pre``.

    Energies are integers, r²/target² in units of 2^-40: sums are exact, so the number of ranks, and any order, give
    the same. What is rounded away is below 2^-21 of the target's energy. Sixteen-ary search on keys.

    Args:
        capacity: of the batch; a rank has room for a quarter more than its share of it.
    """
    wide = torch.float64 if pre.dtype == torch.float64 else torch.float32
    score = relu(pre.detach()).to(wide)
    if weight_norm is not None:
        score = score * weight_norm.to(wide)
    key, wanted = ordered_keys(score).long(), target.detach().double()[:, None]
    energy = _energy_of(score, wanted)
    cut = key.new_zeros(len(pre))
    above, everything = torch.zeros_like(cut), torch.zeros_like(cut, dtype=torch.bool)
    top = 8 * score.element_size() - 4
    for shift in range(top, -1, -4):
        digits = (key >> shift) - (cut << 4)[:, None]
        alive = (digits >= 0) & (digits < 16)
        parts = key.new_zeros(len(pre), 16)
        parts.scatter_add_(1, digits.clamp(0, 15), torch.where(alive, energy, 0))
        parts = shards.wire.add(parts, "energies")
        if shift == top:
            everything = parts.sum(1) <= ONE
        reach = parts.flip(1).cumsum(1).flip(1) + above[:, None]
        digit = ((reach >= ONE).sum(1) - 1).clamp(min=0)
        above = (reach - parts).gather(1, digit[:, None])[:, 0]
        cut = (cut << 4) + digit
    at_cut = cut if wide == torch.float64 else cut.int()
    each = _energy_of(at_cut.view(wide)[:, None], wanted)[:, 0]
    number = -(-(ONE - above) // each.clamp(min=1))  # the entry that crosses, counted among the ties
    beyond = above + number * each
    fewer = (beyond > each) & (_distance(beyond - each) <= _distance(beyond))  # one entry is kept at least
    tied = key == cut[:, None]
    ties = tied.sum(1)
    quota = _quota_of_ties(shards, ties, number - fewer.long(), by_row=True)
    kept = (key > cut[:, None]) | (tied & (tied.cumsum(1) <= quota[:, None])) | everything[:, None]
    kept &= key > 0
    if shards.trims and capacity is None:
        flat = kept.flatten().nonzero()[:, 0]
        offsets = torch.cat([key.new_zeros(1), kept.sum(1).cumsum(0)])
        values = relu(pre).flatten()[flat]
        return SparseCodes(values, (flat % max(pre.shape[1], 1)).int(), offsets, (len(pre),), pre.shape[1])
    ranks = shards.everyone.size
    room = pre.numel() if capacity is None else min(-(-5 * capacity // (4 * ranks)), pre.numel())
    whole = SparseCodes(
        relu(pre).flatten(), torch.arange(pre.shape[1], dtype=torch.int32, device=pre.device).repeat(len(pre)),
        torch.arange(len(pre) + 1, device=pre.device) * pre.shape[1], (len(pre),), pre.shape[1],
    )  # fmt: skip
    return narrowed(whole, kept.flatten(), (), trims=False, room=room)[0]


def narrowed(
    codes: SparseCodes, kept: Tensor, others: Sequence[Tensor | None], *, trims: bool, room: int | None = None
) -> tuple:
    """``codes`` where ``kept`` (N,), and ``others`` (N,) there. Where nothing may be read, the rest is unused room."""
    row = _rows_of(codes)
    counts = codes.offsets.new_zeros(codes.rows).scatter_add_(0, row, kept.long())
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    required: Tensor | None = None
    if trims:
        place = kept.nonzero()[:, 0]

        def of_kept(tensor: Tensor) -> Tensor:
            return tensor[place]
    else:
        size = kept.numel() if room is None else room
        place = torch.where(kept, kept.cumsum(0) - 1, size).clamp(max=size)  # beyond: one place that is cut off

        def of_kept(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(size + 1).scatter_(0, place, tensor)[:size]

        required, offsets = offsets[-1].clone(), offsets.clamp(max=size)
    narrower = replace(
        codes, values=of_kept(codes.values), indices=of_kept(codes.indices), offsets=offsets, k=None,
        required=required, _transposed=[],
    )  # fmt: skip
    return narrower, *(None if t is None else of_kept(t) for t in others)


def _rows_of(codes: SparseCodes) -> Tensor:
    """(N,) the row of each entry, all of which belong to one."""
    return torch.repeat_interleave(codes.offsets.diff(), output_size=codes.values.shape[0])


def _digit_of(counts: Tensor, total: Tensor | int) -> tuple[Tensor, Tensor]:
    """The largest digit d with sum(counts[d:]) >= total, and the sum above it."""
    reach = counts.flip(0).cumsum(0).flip(0)
    digit = (reach >= total).sum() - 1
    return digit, (reach - counts).gather(0, digit[None])[0]


def _quota_of_ties(shards: Shards, ties: Tensor, left: Tensor | int, *, by_row: bool) -> Tensor:
    """(tokens,) how many of my ``ties`` (tokens,) are kept: in order of flat positions, ``left`` of the batch, or of
    each row."""
    every = shards.wire.gather(ties.int(), "ties").long().T  # (tokens, ranks)
    flat = every if by_row else every.flatten()
    before = (flat.cumsum(-1) - flat).view(every.shape)[:, shards.rank]
    return (left - before).clamp(min=0).minimum(ties)


def _first_ties(tied: Tensor, row: Tensor, ties: Tensor, quota: Tensor) -> Tensor:
    """(N,) the first ``quota`` (tokens,) of each row's ``ties`` (tokens,) tied entries."""
    before = ties.cumsum(0) - ties
    return tied & (tied.cumsum(0) - before[row] <= quota[row])


def _energy_of(score: Tensor, target: Tensor) -> Tensor:
    units = score.double().square() / target.square() * ONE
    units = torch.where(units.isnan() | (units > MOST), float(MOST), units).round().long()
    endless = (target == torch.inf) & ~score.isnan()
    return torch.where(endless | (score == 0), 0, units)


def _distance(energy: Tensor) -> Tensor:
    return (energy.double().sqrt() - ONE**0.5).abs()
