"""Matryoshka: one selection, reconstructions from nested prefixes of the latents."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import _checks as check
from .._running import Running
from ..codes import SparseCodes
from .base import kept_values
from .batch_topk import BatchTopK


class MatryoshkaBatchTopK(BatchTopK):
    """:class:`BatchTopK` over all latents, to be trained with :func:`losses.matryoshka` over nested prefixes of them.

    Selection, threshold and eval are BatchTopK's; ``widths`` say which prefixes also have to reconstruct the input.

    Args:
        k: average entries per token, int or float.
        widths: latents of each prefix, ascending; the last is the number of latents.
        options: of :class:`BatchTopK`.

    Bussmann et al. 2025, arXiv:2503.17547.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> sae = se.SparseAutoencoder(4, 16, MatryoshkaBatchTopK(2, widths=[4, 16]))
        >>> [loss.name for loss in se.losses.losses_for(sae)]
        ['matryoshka']
    """

    selects_over_shards = True
    entry_values = kept_values

    def __init__(self, k: float, widths: Sequence[int], **options) -> None:
        super().__init__(k, **options)
        self.widths = check.widths(widths)

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        self._check_widths(check.pre_activations(pre).shape[-1])
        return super()._select(pre, backend)

    def running(self, tokens: int, num_latents: int, *, backend: str = "auto") -> Running | None:
        self._check_widths(num_latents)
        return super().running(tokens, num_latents, backend=backend)

    def _check_widths(self, num_latents: int) -> None:
        every = num_latents if self.shards is None else self.shards.num_latents
        if self.widths[-1] != every:
            raise ValueError(f"widths must end with the number of latents {every}, got {self.widths}")
