"""Codes of all latents of one's own tokens, from and to codes of one's own latents of all tokens of the group."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..codes import SparseCodes
from .sums import ExchangedEntries

if TYPE_CHECKING:
    from .shards import Shards


def to_owners(shards: Shards, codes: SparseCodes) -> SparseCodes:
    """From (all tokens, my latents) to (my tokens, all latents). The host reads how many entries there are."""
    ends = torch.tensor([0, *shards.rows], device="cpu").cumsum(0)
    rows, number = _rows_of(codes)
    sent = codes.offsets[ends.to(codes.device)].diff().tolist()
    values, (indices, row) = _exchanged(
        shards, sent, codes.values[:number], codes.indices[:number] + shards.mine.start, rows.int()
    )
    row = row - shards.first_row
    order = row.argsort(stable=True)  # of a row by rank, which is by latent
    return _codes(values[order], indices[order], row[order], shards.rows[shards.rank], shards.num_latents)


def to_latents(shards: Shards, codes: SparseCodes) -> SparseCodes:
    """From (my tokens, all latents) to (all tokens, my latents), with zeros where a rank has no such entry."""
    rows, number = _rows_of(codes)
    bounds = torch.tensor(shards.layout.bounds[1:], dtype=torch.int32, device=codes.device)
    owner = torch.searchsorted(bounds, codes.indices[:number], right=True)
    order = owner.argsort(stable=True)
    counts = torch.zeros(shards.size, dtype=torch.int64, device=codes.device)
    sent = counts.scatter_add_(0, owner, torch.ones_like(owner)).tolist()
    values, (indices, row) = _exchanged(
        shards, sent, codes.values[:number][order], codes.indices[:number][order],
        (rows[order] + shards.first_row).int(),
    )  # fmt: skip
    latents = shards.mine.stop - shards.mine.start
    return _codes(values, indices - shards.mine.start, row, shards.rows_here, latents)


def _rows_of(codes: SparseCodes) -> tuple[Tensor, int]:
    counts = codes.offsets.diff()
    number = int(codes.offsets[-1])
    return torch.repeat_interleave(counts, output_size=number), number


def _exchanged(shards: Shards, sent: list[int], values: Tensor, *others: Tensor) -> tuple[Tensor, list[Tensor]]:
    told = shards.agreement.wire.hosts(sent, "numbers of entries")[shards.group * shards.size :]
    received = [numbers[shards.rank] for numbers in told[: shards.size]]
    return ExchangedEntries.apply(values, shards.wire, sent, received, "values"), [
        shards.wire.exchange(t, sent, received, "places") for t in others
    ]


def _codes(values: Tensor, indices: Tensor, row: Tensor, tokens: int, num_latents: int) -> SparseCodes:
    offsets = torch.searchsorted(row.long(), torch.arange(tokens + 1, device=row.device))
    return SparseCodes(values, indices, offsets, (tokens,), num_latents)
