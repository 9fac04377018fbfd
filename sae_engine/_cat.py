"""Codes below one another."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .codes import SparseCodes


def cat(codes: Sequence[SparseCodes]) -> SparseCodes:
    """Codes over the same latents, concatenated along their first leading dimension.

    Raises:
        TypeError: an element is no :class:`SparseCodes`.
        ValueError: there is none, or their shapes disagree.

    Example:
        >>> codes = SparseCodes.from_dense(torch.eye(3))
        >>> cat([codes, codes[:1]]).shape
        torch.Size([4, 3])
    """
    codes = list(codes)
    if not codes:
        raise ValueError("codes must hold at least one SparseCodes, got none")
    first = codes[0]
    for other in codes:
        if not isinstance(other, SparseCodes):
            raise TypeError(f"codes must hold SparseCodes, got {type(other).__name__}")
        if not other.batch_shape:
            raise ValueError("codes of a single row cannot be concatenated: they have no leading dimension")
        if other.num_latents != first.num_latents or other.batch_shape[1:] != first.batch_shape[1:]:
            raise ValueError(f"codes disagree in shape: {tuple(first.shape)} and {tuple(other.shape)}")
    k = first.k if all(c.k == first.k for c in codes) else None
    pieces = [c if c.required is None else _trimmed(c) for c in codes]
    sizes = [0]
    for piece in pieces:
        sizes.append(sizes[-1] + piece.values.shape[0])
    offsets = [c.offsets[1:] + start for c, start in zip(pieces, sizes, strict=False)]
    return SparseCodes(
        values=torch.cat([c.values for c in pieces]),
        indices=torch.cat([c.indices for c in pieces]),
        offsets=torch.cat([first.offsets[:1], *offsets]),
        batch_shape=(sum(c.batch_shape[0] for c in codes), *first.batch_shape[1:]),
        num_latents=first.num_latents,
        k=k,
    )


def _trimmed(codes: SparseCodes) -> SparseCodes:
    """Without the unused end of its capacity; an overflow is reported, never carried along."""
    owned = codes._owned()
    return replace(codes, values=codes.values[:owned], indices=codes.indices[:owned], required=None, _transposed=[])
