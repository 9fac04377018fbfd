"""Sampled TopK: a batch rule among the latents that the batch uses most."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks as check
from .. import functional
from ..codes import SparseCodes
from .base import kept_values
from .batch_topk import BatchTopK

SCORES = ("l2", "entropy")
CHUNK_ELEMENTS = 1 << 24  # of a (rows, F) temporary


class SampledTopK(BatchTopK):
    """``int(k * tokens)`` entries of the batch among its ``ceil(k * pool)`` best latents; a threshold afterwards.

    A latent's score over the batch is the L2 norm of its activations relu(pre), or the entropy of their distribution
    over the tokens (0 where it does not fire), in fp32; ties go to the lowest latent. ``pool >= F / k`` is BatchTopK;
    ``pool = 1`` keeps every positive of k latents that serve the whole batch. ``.eval()`` has no batch to pool over: it
    keeps ``pre > threshold`` among all latents, as :class:`BatchTopK` does.

    Args:
        k: average entries per token, int or float.
        pool: latents in the pool, in units of k; at least 1.
        score: ``"l2"`` or ``"entropy"``.
        options: of :class:`BatchTopK`.

    Oozeer et al. 2025, arXiv:2508.21324 (Sampled-SAE), from its abstract: that high entropy ranks first, the rounding
    of the pool and the rule in eval are ours.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        RuntimeError: in eval, where no threshold was learned yet.

    Example:
        >>> pre = torch.tensor([[1.0, 2.0, 0.5], [3.0, 1.0, 0.6]])
        >>> SampledTopK(1, pool=1)(pre)  # of the one latent of largest norm
        tensor([[1., 0., 0.],
                [3., 0., 0.]])
    """

    scope = "latent"
    selects_over_shards = True
    entry_values = kept_values

    def __init__(self, k: float, *, pool: float = 4.0, score: str = "l2", **options) -> None:
        super().__init__(k, **options)
        self.pool = check.positive("pool", pool)
        if self.pool < 1:
            raise ValueError(f"pool must be at least 1, got {pool}")
        if score not in SCORES:
            raise ValueError(f"score must be one of {SCORES}, got {score!r}")
        self.score = score

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        if not self.training:
            return super()._select(pre, backend)
        check.pre_activations(pre)
        every = pre.shape[-1] if self.shards is None else self.shards.num_latents
        check.number_k(self.k, every)
        size = math.ceil(self.k * self.pool)
        if self.shards is not None:
            return self._select_over_shards(check.matrix(pre), size, backend)
        if size >= every:
            return functional.batch_topk(pre, self.k, backend=backend)
        score = column_score(check.matrix(pre.detach()), self.score)
        best = functional.topk(score[None], size, relu=False, backend=backend).indices.long()
        mask = torch.zeros(pre.shape[-1], dtype=torch.bool, device=pre.device).index_fill(0, best, True)
        return functional.batch_topk(pre, self.k, mask=mask, backend=backend)

    def _select_over_shards(self, pre: Tensor, size: int, backend: str) -> SparseCodes:
        shards = self.shards
        assert shards is not None
        width = pre.shape[1] // shards.latent_blocks or 1
        sums = shards.of_batch([
            torch.cat([column_sums(cell, self.score) for cell in rows.detach().split(width, 1)], 1)
            for rows in shards.token_blocks_of(pre)
        ], "sums of latents")  # fmt: skip
        score = shards.all_latents(score_of(sums, self.score), "scores")
        best = functional.topk(score[None], min(size, len(score)), relu=False, backend=backend).indices.long()
        mask = torch.zeros_like(score, dtype=torch.bool).index_fill_(0, best, True)[shards.mine]
        return shards.batch_topk(pre, self.total(shards.tokens), mask, backend)


def column_score(pre: Tensor, kind: str) -> Tensor:
    """(F,) of each latent's relu(pre) over the rows of (rows, F): its norm, or the entropy of its distribution."""
    return score_of(column_sums(pre, kind), kind)


def column_sums(pre: Tensor, kind: str) -> Tensor:
    """(2, F) what the scores follow from, in fp32 or wider; they add over rows."""
    wide = torch.promote_types(pre.dtype, torch.float32)
    sums = pre.new_zeros(2, pre.shape[1], dtype=wide)
    for chunk in pre.split(max(CHUNK_ELEMENTS // pre.shape[1], 1)):
        kept = chunk.to(wide).relu()
        sums[0] += kept.square().sum(0) if kind == "l2" else kept.sum(0)
        if kind == "entropy":  # H = log(sum a) - sum(a log a) / sum(a)
            sums[1] += torch.special.xlogy(kept, kept).sum(0)
    return sums


def score_of(sums: Tensor, kind: str) -> Tensor:
    """(F,) from (2, F)."""
    if kind == "l2":
        return sums[0].sqrt()
    return torch.where(sums[0] == 0, 0.0, sums[0].log() - sums[1] / sums[0])
