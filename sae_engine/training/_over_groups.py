"""An update where groups of ranks have the same latents: each rank updates a part of those it shares with others.

Gradients go to the rank that updates their latents, which adds them in order of groups; Adam's moments are there alone.
The parameters that it makes go back to all groups, so that each has the same bits.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..distributed.share import everyones
from ..distributed.wire import shares, tree_sum

if TYPE_CHECKING:
    from ..autoencoder import SparseAutoencoder
    from ..distributed.wire import Wire


class Part:
    """The latents of a rank's share ``sae`` that this rank updates for all groups.

    Attributes:
        latents: of those of the share.
    """

    def __init__(self, sae: SparseAutoencoder) -> None:
        assert sae.shards is not None and sae.shards.across is not None
        self.wire: Wire = sae.shards.across
        self.latents = sae.shards.updated
        self._everyones = everyones(sae)
        # Which have latents second: their gradients, but for the encoders', are such too.
        self._encoders, self._biases = [source.W_enc for source in sae.sources], [sae.b_enc] * (sae.b_enc.dim() - 1)
        self._numbers = shares(sae.d_sae, self.wire.size)

    def of(self, parameter: Tensor) -> Tensor:
        """The parameter, or where it has latents a view of those that this rank updates."""
        if not self._is_cut(parameter):
            return parameter.detach()
        mine = self._by_latent(parameter)[self.latents]
        return mine.T if self._turned(parameter) else mine

    def summed(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Gradients of my latents, by latent, of all groups in their order, of those that this rank updates.

        What has no latents stays as it is. ``gradients`` is emptied on the way.
        """
        found = {}
        for p in list(gradients):
            gradient = gradients.pop(p)
            if not self._is_cut(p):
                found[p] = gradient
                continue
            turned = _is_in(p, self._biases)
            gradient = gradient.T if turned else gradient
            parts = self.wire.scatter_rows(gradient.contiguous(), self._numbers, "gradients over groups")
            del gradient  # the sum may have its room, and what comes next that of the parts
            found[p] = tree_sum(list(parts)).T if turned else tree_sum(list(parts))
            del parts
        return found

    def hand_out(self, parameters: Iterable[Tensor]) -> None:
        """Each group gets what the ranks have updated."""
        for p in parameters:
            if self._is_cut(p):
                rows = self._by_latent(p)
                rows.copy_(self.wire.gather_rows(rows[self.latents], self._numbers, "parameters over groups"))

    def _is_cut(self, parameter: Tensor) -> bool:
        return not _is_in(parameter, self._everyones)

    def _turned(self, parameter: Tensor) -> bool:
        return _is_in(parameter, self._encoders) or _is_in(parameter, self._biases)

    def _by_latent(self, parameter: Tensor) -> Tensor:
        return parameter.detach().T if self._turned(parameter) else parameter.detach()


def _is_in(parameter: Tensor, parameters: Sequence[Tensor]) -> bool:
    return any(parameter is one for one in parameters)
