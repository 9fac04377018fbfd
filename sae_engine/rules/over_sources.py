"""The rule of a crosscoder that shares one budget of each token among the latents of all sources."""
from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._running import RunningOverSources
from ..codes import SparseCodes
from .base import Activation, kept_values


class TopKOverSources(Activation):
    """k entries of each token among the latents of all sources of a :class:`~sae_engine.Crosscoder`, then ReLU.

    :class:`TopK` keeps k of each source; this one keeps k of all, so that layers which need more latents get more. Ties
    go to the first source, there to the lowest latent. What a source keeps depends on the pre-activations of all later
    ones: there is no replaced run with such codes, in which a layer's latents come before the next layer is computed.

    It takes pre-activations (sources, *batch_shape, F).

    Args:
        k: entries of each token, at most ``sources * F``.
        sources: of the crosscoder, at least 2; of a single one :class:`TopK` is the rule.

    Source: the rule that crosslayer-coding calls ``global`` and others ``layertopk``.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> rule = se.rules.TopKOverSources(3, sources=2)
        >>> codes = rule.select(torch.tensor([[[1.0, 5.0, 2.0]], [[4.0, 0.5, 3.0]]]))
        >>> codes.to_dense()
        tensor([[[0., 5., 0.]],
        <BLANKLINE>
                [[4., 0., 3.]]])
        >>> se.Crosscoder.clt(2, 4, 16, rule).encode(torch.randn(5, 2, 4)).l0.sum(0)
        tensor([3, 3, 3, 3, 3])
    """

    scope = "token"
    selects_over_shards = True
    entry_values = kept_values

    def __init__(self, k: int, sources: int) -> None:
        super().__init__()
        self.k = check.integer_k(k)
        self.sources = check.integer_k(sources, name="sources")
        if self.sources < 2:
            raise ValueError(f"sources must be at least 2, got {sources}: of a single source TopK(k) is the rule")

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        check.floating("pre", pre)
        if pre.dim() < 2 or pre.shape[0] != self.sources:
            raise ValueError(f"pre must be (sources, *batch_shape, F) of {self.sources} sources, got shape "
                             f"{tuple(pre.shape)}")  # fmt: skip
        rows = check.matrix(pre)
        running = self.running(len(rows), pre.shape[-1], backend=backend)
        running.add(rows.detach(), slice(0, len(rows)), slice(0, pre.shape[-1]))
        codes, _ = running.finish()
        row = torch.arange(len(rows), device=pre.device).repeat_interleave(
            codes.offsets.diff(), output_size=codes.values.shape[0]
        )
        values = kept_values(self, rows[row, codes.indices.long()], codes)
        return SparseCodes(values, codes.indices, codes.offsets, tuple(pre.shape[:-1]), pre.shape[-1])

    def running(self, tokens: int, num_latents: int, *, backend: str = "auto") -> RunningOverSources:
        return RunningOverSources(tokens, num_latents, backend, self.k, self.sources, self.shards)
