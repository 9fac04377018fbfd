"""Rows of a decoder: how they start, as an encoder's do, and their norms."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .distributed.shards import Shards

BLOCK = 4096  # rows that are drawn at a time


def decoder_norms(W_dec: Tensor) -> Tensor:
    """(F,) norms of the rows in fp32 or wider, differentiable: rounded to 16 bits they would bias what is selected."""
    return torch.linalg.vector_norm(W_dec, dim=1, dtype=torch.promote_types(W_dec.dtype, torch.float32))


def norms_by_site(W_dec: Tensor, widths: Sequence[int]) -> Tensor:
    """(F, sites) norms of the parts of its rows that are ``widths`` wide, as :func:`decoder_norms`."""
    if len(set(widths)) > 1:
        return torch.stack([decoder_norms(part) for part in W_dec.split(list(widths), dim=1)], 1)
    # One reduction for all of them: over rows with gaps PyTorch takes four times as long on a CPU.
    wide = torch.promote_types(W_dec.dtype, torch.float32)
    return torch.linalg.vector_norm(W_dec.unflatten(1, (len(widths), widths[0])), dim=2, dtype=wide)


def unit_rows(rows: int, width: int, *, dtype=None, device=None, shards: Shards | None = None) -> Tensor:
    """Random directions, one a row: drawn and normalized in fp32. With ``shards``, those of my latents."""
    return drawn_rows(
        rows, width, torch.randn, lambda drawn: drawn / drawn.norm(dim=1, keepdim=True), dtype=dtype, device=device,
        shards=shards,
    )  # fmt: skip


def uniform_rows(
    rows: int, width: int, limit: float, *, dtype=None, device=None, shards: Shards | None = None
) -> Tensor:
    """(rows, width) within ±limit, drawn in fp32 or wider. With ``shards``, those of my latents."""
    return drawn_rows(
        rows, width, torch.rand, lambda drawn: (2 * drawn - 1) * limit, dtype=dtype, device=device, shards=shards
    )


def drawn_rows(
    rows: int, width: int, draw: Callable[..., Tensor], made: Callable[[Tensor], Tensor], *, dtype, device,
    shards: Shards | None,
) -> Tensor:  # fmt: skip
    """Rows that are ``made`` of what ``draw`` draws, in fp32 or fp64. With ``shards``, those of my latents.

    Each further block of 4096 rows has a generator of its own, so that a rank draws the same rows as one device without
    drawing those before them. What they start from is rank 0's.
    """
    mine = slice(0, rows) if shards is None else shards.mine
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    first = draw(min(rows, BLOCK), width, device=device, dtype=wide)
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
            drawn = draw(end - start, width, device=device, dtype=wide, generator=generator)
        drawn = drawn[part.start - start : part.stop - start]
        out[part.start - mine.start : part.stop - mine.start] = made(drawn)
    return out
