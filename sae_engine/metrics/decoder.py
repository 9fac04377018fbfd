"""How much decoder directions resemble one another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SIMILAR = (0.5, 0.7, 0.9)


@torch.no_grad()
def decoder_cosines(W_dec: Tensor, *, block: int = 4096) -> Tensor:
    """Each latent's largest cosine with another latent's decoder row: duplicates lie near 1.

    Args:
        W_dec: (d_sae, d_out), any strides.
        block: latents per tile. Beyond the result, memory is ``block * (block + 2 * d_out)`` elements whatever d_sae.

    Returns:
        (d_sae,), fp32 or wider. A row of zeros has cosine 0 with all others; with a single latent there is no other:
        NaN. NaN in a row makes every cosine with it, and so every result, NaN.

    Cost: half of the d_sae x d_sae products, since a tile serves its rows and its columns.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> decoder_cosines(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))
        tensor([1., 0., 1.])
    """
    check.floating("W_dec", W_dec, dims=2)
    block = check.integer_k(block, name="block")
    F = W_dec.shape[0]
    if F == 0:
        raise ValueError(f"W_dec must have at least one row, got shape {tuple(W_dec.shape)}")
    wide = torch.promote_types(W_dec.dtype, torch.float32)
    best = torch.full((F,), -torch.inf, dtype=wide, device=W_dec.device)

    def directions(start: int) -> Tensor:
        rows = W_dec[start : start + block].to(wide)
        norms = rows.norm(dim=1, keepdim=True)
        return rows / torch.where(norms == 0, 1.0, norms)

    with torch.autocast(W_dec.device.type, enabled=False):
        for start in range(0, F, block):
            rows = directions(start)
            for other in range(start, F, block):
                cosines = rows @ (rows if other == start else directions(other)).T
                if other == start:
                    cosines.fill_diagonal_(-torch.inf)
                mine, theirs = best[start : start + block], best[other : other + block]
                torch.maximum(mine, cosines.amax(1), out=mine)
                if other != start:
                    torch.maximum(theirs, cosines.amax(0), out=theirs)
    return best if F > 1 else torch.full_like(best, torch.nan)


def decoder_similarity(W_dec: Tensor, *, block: int = 4096) -> dict[str, Any]:
    """Statistics of :func:`decoder_cosines` as plain numbers.

    ``max_cosine_mean``, ``max_cosine_quantiles`` by level, ``max_cosine_max``, and ``share_above``: the share of the
    latents with another one whose cosine exceeds 0.5, 0.7, 0.9.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> decoder_similarity(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))["share_above"]
        {0.5: 0.6666666666666666, 0.7: 0.6666666666666666, 0.9: 0.6666666666666666}
    """
    cosines = decoder_cosines(W_dec, block=block).double().cpu()
    levels = torch.tensor(QUANTILES, dtype=torch.float64, device="cpu")
    return {
        "max_cosine_mean": cosines.mean().item(),
        "max_cosine_quantiles": dict(zip(QUANTILES, cosines.quantile(levels).tolist(), strict=True)),
        "max_cosine_max": cosines.max().item(),
        "share_above": {limit: (cosines > limit).double().mean().item() for limit in SIMILAR},
    }
