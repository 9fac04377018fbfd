"""Rows of a decoder: how they start, and their norms."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .distributed.shards import Shards

BLOCK = 4096  # rows that are drawn at a time


def decoder_norms(W_dec: Tensor) -> Tensor:
    """(F,) norms of the rows in fp32 or wider, differentiable: rounded to 16 bits they would bias what is selected."""
    return torch.linalg.vector_norm(W_dec, dim=1, dtype=torch.promote_types(W_dec.dtype, torch.float32))


def unit_rows(rows: int, width: int, *, dtype=None, device=None, shards: Shards | None = None) -> Tensor:
    """Random directions, one a row: drawn and normalized in fp32. With ``shards``, those of my latents.

    Each further block of 4096 rows has a generator of its own, so that a rank draws the same rows as one device without
    drawing those before them. What they start from is rank 0's.
    """
    mine = slice(0, rows) if shards is None else shards.mine
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    first = torch.randn(min(rows, BLOCK), width, device=device, dtype=wide)
    if shards is not None:
        shards.everyone.first(first, "initial rows")
    out = torch.empty(mine.stop - mine.start, width, device=device, dtype=dtype or torch.get_default_dtype())
    if first.is_meta:
        return out
    seed = 0
    if rows > BLOCK:
        chosen = torch.randint(1 << 62, (1,), device="cpu")
        seed = int(chosen if shards is None else shards.agreement.wire.first(chosen, "initial rows"))
    for number, start in enumerate(range(0, rows, BLOCK)):
        end = min(start + BLOCK, rows)
        part = slice(max(start, mine.start), min(end, mine.stop))
        if part.start >= part.stop:
            continue
        drawn = first
        if number:
            generator = torch.Generator(first.device).manual_seed((seed + number) % (1 << 63))
            drawn = torch.randn(end - start, width, device=device, dtype=wide, generator=generator)
        drawn = drawn[part.start - start : part.stop - start]
        out[part.start - mine.start : part.stop - mine.start] = drawn / drawn.norm(dim=1, keepdim=True)
    return out
