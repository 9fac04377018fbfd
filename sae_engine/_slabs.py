"""Pre-activations in rectangles: how many fit into memory, and which rules can be selected for by them."""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ._running import Running, WholeRows

SHARE_OF_FREE_MEMORY = 4  # pre-activations get a quarter of it
LATENTS_AT_LEAST = 2048  # of a slab that has not all of them: a CPU's product loses speed below
ALIGNMENT = 128  # latents: whole tiles of a product, whole groups of a selection


class NeedsWhole(RuntimeError):
    """A rule needs more pre-activations at once than the memory budget allows."""


class Rectangle(NamedTuple):
    """A part of a (tokens, latents) matrix."""

    tokens: slice
    latents: slice


def free_memory_bytes(device: torch.device) -> int:
    """Memory that nobody uses at the moment; half of all of it where the system does not say."""
    if device.type == "cuda":  # the driver counts as used what torch's allocator keeps for later
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return 4 << 30
    return free if pages == "SC_AVPHYS_PAGES" else free // 2


def total_memory_bytes(device: torch.device) -> int:
    """All memory of a device, or of the host; 16 GiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return 16 << 30


def default_budget_bytes(device: torch.device) -> int:
    """The default ``memory_budget``, in bytes: how large pre-activations may be that exist at a time."""
    return free_memory_bytes(device) // SHARE_OF_FREE_MEMORY


def slab_shape(tokens: int, num_latents: int, elements: int, *, whole_rows: bool = False) -> tuple[int, int]:
    """Tokens and latents of the largest rectangle; no more than ``elements``, or one token's least slab.

    All tokens and some latents, so that each weight is read once; where those would be fewer latents than a product
    wants, some tokens too. ``whole_rows``: all latents of some tokens.

    Example:
        >>> slab_shape(4096, 2**20, 2**26), slab_shape(4096, 2**20, 2**26, whole_rows=True)
        ((4096, 16384), (64, 1048576))
    """
    if tokens * num_latents <= elements or not tokens:
        return tokens, num_latents
    latents = elements // tokens
    if whole_rows or num_latents <= LATENTS_AT_LEAST:
        latents = num_latents
    elif latents < num_latents:
        latents = max(latents, LATENTS_AT_LEAST)
        slabs = -(-num_latents // (latents // ALIGNMENT * ALIGNMENT or latents))
        latents = -(-num_latents // (slabs * ALIGNMENT)) * ALIGNMENT  # of one size, as nearly as may be
    return min(max(elements // latents, 1), tokens), latents


def rectangles(tokens: int, num_latents: int, shape: tuple[int, int]) -> Iterator[Rectangle]:
    """A (tokens, latents) matrix in rectangles of a shape, latents in ascending order, the tokens of each within it.

    Example:
        >>> [(r.tokens.start, r.latents.stop) for r in rectangles(4, 5, (2, 4))]
        [(0, 4), (2, 4), (0, 5), (2, 5)]
    """
    for first in range(0, max(num_latents, 1), max(shape[1], 1)):
        for start in range(0, max(tokens, 1), max(shape[0], 1)):
            yield Rectangle(slice(start, min(start + shape[0], tokens)),
                            slice(first, min(first + shape[1], num_latents)))  # fmt: skip


def running_of(
    rules: Sequence[Any], contexts: Sequence[dict[str, Any]], tokens: int, num_latents: int, elements: int,
    backend: str, *, dense_gradient: bool, whole_rows_from: int | None = None,
) -> tuple[list[Running], tuple[int, int]]:  # fmt: skip
    """What each rule keeps as rectangles pass by, and the shape of these, of ``elements`` at most.

    Slabs of latents where every rule has a way for that (``Activation.running``), else all latents of some tokens: as
    also where as many tokens as ``whole_rows_from`` fit and every rule decides each token alone.

    Args:
        contexts: of each rule, for all tokens: tensors with a row for each token, or of all latents.
        dense_gradient: whether a rule without ``entry_values`` is to be differentiated, by way of the whole matrix.

    Raises:
        NeedsWhole: a rule needs the whole batch at once, which is more.
    """
    found: list[Running] = []
    by_rows = whole_rows_from is not None and elements >= whole_rows_from * num_latents and all(map(is_by_row, rules))
    for rule, context in zip(rules, contexts, strict=True):
        if (checked := getattr(rule, "_check_context", None)) is not None:
            checked(context)  # as ``select`` does
        make = None if by_rows else getattr(rule, "running", None)
        running = None if make is None else make(tokens, num_latents, backend=backend, **context)
        if running is None:
            is_dense = dense_gradient and getattr(rule, "entry_values", None) is None
            if getattr(rule, "scope", None) != "row" or is_dense:
                raise NeedsWhole(
                    f"{type(rule).__name__} needs the pre-activations of the whole batch at once, {tokens} tokens "
                    f"times {num_latents} latents: raise memory_budget to hold them, or use smaller batches"
                )
            running = WholeRows(rule, context, tokens, num_latents, backend)
        found.append(running)
    of_rows = any(isinstance(running, WholeRows) for running in found)
    shape = slab_shape(tokens, widest(rules, num_latents), elements, whole_rows=of_rows)
    return found, (shape[0], min(shape[1], num_latents))


def is_by_row(rule: Any) -> bool:
    """Whether a rule keeps of a token what it would keep in any batch, and has a sparse gradient."""
    is_sparse = getattr(rule, "entry_values", None) is not None
    if getattr(rule, "shards", None) is not None:  # ranks decide about a token together, once for all of them
        return False
    return getattr(rule, "scope", None) == "row" and is_sparse and getattr(rule, "capacity", None) is None


def widest(rules: Sequence[Any], num_latents: int) -> int:
    """Latents of the largest shard, where the rules select over shards, so that all ranks cut their tokens alike."""
    shards = next((shards for rule in rules if (shards := getattr(rule, "shards", None)) is not None), None)
    return num_latents if shards is None else shards.layout.largest
