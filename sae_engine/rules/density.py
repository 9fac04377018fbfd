"""How often latents fire."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import functional
from ..codes import SparseCodes

if TYPE_CHECKING:
    from ..distributed.shards import Shards


def fired_share(codes: SparseCodes, shards: Shards | None = None) -> Tensor:
    """(F,) float64: the share of rows in which each latent's value is not 0; with ``shards``, of the whole batch's."""
    fired = (codes.values.detach() != 0).long()
    counts = fired.new_zeros(codes.num_latents).scatter_add_(0, codes.indices.long(), fired)
    if shards is None:
        return counts.double() / codes.rows
    return shards.over_groups(counts, "fired").double() / shards.tokens


class RunningDensity(nn.Module):
    """The share of tokens on which each latent fires, as a running mean over batches.

    ``density`` (d_sae,) float64 is -1 while unset; the first :meth:`update` sets it, later ones move it by ``rate``.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> density = RunningDensity(2, rate=0.5)
        >>> for rows in ([[1.0, 0.0], [1.0, 2.0]], [[0.0, 1.0], [0.0, 1.0]]):
        ...     density.update(se.SparseCodes.from_dense(torch.tensor(rows)))
        >>> density.density
        tensor([0.5000, 0.7500], dtype=torch.float64)
    """

    density: Tensor

    def __init__(self, d_sae: int, *, rate: float = 0.01, device=None) -> None:
        super().__init__()
        self.rate = check.positive("rate", rate)
        if self.rate > 1:
            raise ValueError(f"rate must satisfy 0 < rate <= 1, got {rate}")
        d_sae = check.integer_k(d_sae, name="d_sae")
        device = check.device_or_default(device)
        self.register_buffer("density", torch.full((d_sae,), -1.0, dtype=torch.float64, device=device))

    @torch.no_grad()
    def update(self, codes: SparseCodes) -> None:
        """With what a batch kept; an empty one changes nothing."""
        if codes.rows:
            functional.move_threshold(self.density, fired_share(codes), self.rate)
