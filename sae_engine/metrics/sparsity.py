"""How many latents a token uses, and how many tokens use a latent, over a stream of codes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..codes import SparseCodes

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS_PER_DECADE = 4


class Sparsity:
    """L0 and firing densities. A latent fires on a token where its value is not 0 (NaN is not).

    Counts are integers on the device of the codes, so no order and no batching of the stream changes a bit, and nothing
    waits for the device before :meth:`compute`.

    Args:
        d_sae: number of latents.
        dense_above: a latent that fires on a larger share of the tokens counts as dense.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        RuntimeError: ``compute()`` before any token was seen.

    Example:
        >>> metric = Sparsity(3)
        >>> metric.update(se.SparseCodes.from_dense(torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0]])))
        >>> found = metric.compute()
        >>> found["l0"], found["dead"]
        (1.5, 1)
    """

    def __init__(self, d_sae: int, *, dense_above: float = 0.1) -> None:
        self.d_sae = check.integer_k(d_sae, name="d_sae")
        self.dense_above = check.positive("dense_above", dense_above)
        if self.dense_above > 1:
            raise ValueError(f"dense_above must satisfy 0 < dense_above <= 1, got {dense_above}")
        self.tokens = 0
        self._fired: Tensor | None = None

    @torch.no_grad()
    def update(self, codes: SparseCodes) -> None:
        """Adds the tokens of ``codes``, of any batch shape. May be empty."""
        check_codes(codes, self.d_sae)
        if self._fired is None:
            self._fired = torch.zeros(self.d_sae, dtype=torch.int64, device=codes.device)
            self._l0 = torch.zeros(self.d_sae + 1, dtype=torch.int64, device=codes.device)
            self._overflowed = torch.zeros((), dtype=torch.bool, device=codes.device)
        fired, indices = owned_entries(codes)
        fired = fired & (codes.values != 0)
        self._fired.index_add_(0, indices, fired.long())
        l0 = codes.l0.flatten()
        self._l0.index_add_(0, l0, torch.ones_like(l0))
        if codes.required is not None:
            self._overflowed |= codes.required > codes.values.shape[0]
        self.tokens += codes.rows

    @property
    def density(self) -> Tensor:
        """Share of the tokens on which each latent fires: (d_sae,) fp64 on the device."""
        return self._counts() / self.tokens

    def compute(self) -> dict[str, Any]:
        """Plain numbers; the stream may go on afterwards.

        ``tokens``, ``d_sae``;
        ``l0``: mean; ``l0_quantiles``: by level, exact (the smallest L0 that so many tokens do not exceed), ``l0_min``,
        ``l0_max``;
        ``dead``, ``dead_fraction``: latents that fired on no token; ``dense``, ``dense_fraction``: on more than
        ``dense_above``;
        ``density_histogram``: ``edges`` of log10(density) and ``counts`` of the latents that fired; a latent lies in
        the bin whose lower edge does not exceed it, one that always fires in the last.

        Raises:
            RuntimeError: no token has been seen, or some codes had overflowed their capacity.
        """
        fired = self._counts()
        if bool(self._overflowed):
            raise RuntimeError("some codes asked for more entries than their capacity: raise capacity, or leave it out")
        fired, histogram = fired.cpu(), self._l0.cpu()
        n, F = self.tokens, self.d_sae
        below = histogram.cumsum(0)
        ranks = torch.tensor([max(math.ceil(q * n), 1) for q in (*QUANTILES, 1.0)], device="cpu")
        *quantiles, most = torch.searchsorted(below, ranks).tolist()
        dead, dense = int((fired == 0).sum()), int((fired > self.dense_above * n).sum())
        return {
            "tokens": n, "d_sae": F,
            "l0": int(fired.sum()) / n, "l0_quantiles": dict(zip(QUANTILES, quantiles, strict=True)),
            "l0_min": int((histogram > 0).nonzero()[0]), "l0_max": most,
            "dead": dead, "dead_fraction": dead / F,
            "dense_above": self.dense_above, "dense": dense, "dense_fraction": dense / F,
            "density_histogram": self._density_histogram(fired),
        }  # fmt: skip

    def _counts(self) -> Tensor:
        if self._fired is None or not self.tokens:
            raise RuntimeError("nothing was measured: update() has seen no token")
        return self._fired

    def _density_histogram(self, fired: Tensor) -> dict[str, list]:
        decades = max(math.ceil(math.log10(self.tokens)), 1)  # the rarest live latent fires once
        bins = decades * BINS_PER_DECADE
        edges = [bin_ / BINS_PER_DECADE - decades for bin_ in range(bins + 1)]
        logs = (fired[fired > 0].double() / self.tokens).log10()
        # 1e-12: a density that is a power of ten must not fall below its edge by a rounding of the logarithm.
        place = ((logs + decades) * BINS_PER_DECADE + 1e-12).floor().long().clamp(0, bins - 1)
        return {"edges": edges, "counts": torch.bincount(place, minlength=bins).tolist()}


class SourceSparsity:
    """:class:`Sparsity` of each source of codes that are source-major: (sources, *batch_shape, d_sae).

    Args:
        sources: how many there are.
        d_sae: latents of one.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        RuntimeError: ``compute()`` before any token was seen.

    Example:
        >>> metric = SourceSparsity(2, 3)
        >>> metric.update(se.SparseCodes.from_dense(torch.tensor([[[1.0, 2.0, 0.0]], [[0.0, 0.0, 3.0]]])))
        >>> found = metric.compute()
        >>> [source["l0"] for source in found["sources"]], found["l0"], found["dead"]
        ([2.0, 1.0], 3.0, 3)
    """

    def __init__(self, sources: int, d_sae: int) -> None:
        self._sources = [Sparsity(d_sae) for _ in range(check.integer_k(sources, name="sources"))]
        self._fired: Tensor | None = None

    @torch.no_grad()
    def update(self, codes: SparseCodes) -> None:
        """Adds the tokens of ``codes``; of one source they may also be (*batch_shape, d_sae). May be empty."""
        F, count = self._sources[0].d_sae, len(self._sources)
        check_codes(codes, F)
        if count == 1:
            self._sources[0].update(codes)
            return
        if codes.batch_shape[:1] != (count,):
            raise ValueError(f"codes must have {count} sources in their first dimension, got {tuple(codes.shape)}")
        if self._fired is None:  # each source's counts are a row of these
            self._fired = torch.zeros(count, F, dtype=torch.int64, device=codes.device)
            self._l0 = torch.zeros(count, F + 1, dtype=torch.int64, device=codes.device)
            self._overflowed = torch.zeros((), dtype=torch.bool, device=codes.device)
            for number, each in enumerate(self._sources):
                each._fired, each._l0, each._overflowed = self._fired[number], self._l0[number], self._overflowed
        rows = codes.rows // count
        fired, latents = owned_entries(codes)
        fired = fired & (codes.values != 0)
        entries = torch.arange(len(latents), device=codes.device)
        row = torch.searchsorted(codes.offsets, entries, right=True) - 1
        source = (row // max(rows, 1)).clamp(max=count - 1)  # what no row owns lies behind the last
        self._fired.view(-1).index_add_(0, source * F + latents, fired.long())
        l0 = codes.l0.reshape(count, rows)
        places = l0 + torch.arange(count, device=codes.device)[:, None] * (F + 1)
        self._l0.view(-1).index_add_(0, places.flatten(), torch.ones_like(places).flatten())
        if codes.required is not None:
            self._overflowed |= codes.required > codes.values.shape[0]
        for each in self._sources:
            each.tokens += rows

    def compute(self) -> dict[str, Any]:
        """``tokens``; ``l0``: entries of a token in all sources, ``l0_by_source``; ``d_sae``, ``dead``,
        ``dead_fraction``, ``dense``, ``dense_fraction``, ``density_histogram``: of the latents of all; and in
        ``sources`` what :meth:`Sparsity.compute` says of each.

        Raises:
            RuntimeError: no token has been seen, or some codes had overflowed their capacity.
        """
        found = [each.compute() for each in self._sources]
        dead, dense, latents = (sum(each[name] for each in found) for name in ("dead", "dense", "d_sae"))
        histograms = [each["density_histogram"] for each in found]  # of as many tokens, and so with the same edges
        counts = [sum(bins) for bins in zip(*(each["counts"] for each in histograms), strict=True)]
        return {
            "tokens": found[0]["tokens"], "l0": sum(each["l0"] for each in found),
            "l0_by_source": [each["l0"] for each in found], "d_sae": latents, "dead": dead,
            "dead_fraction": dead / latents, "dense": dense, "dense_fraction": dense / latents,
            "density_histogram": {"edges": histograms[0]["edges"], "counts": counts}, "sources": found,
        }  # fmt: skip


def check_codes(codes: SparseCodes, d_sae: int) -> None:
    if not isinstance(codes, SparseCodes):
        raise TypeError(f"codes must be SparseCodes, got {type(codes).__name__}: SparseCodes.from_dense makes them")
    if codes.num_latents != d_sae:
        raise ValueError(f"codes must have d_sae = {d_sae} latents, got {codes.num_latents}")


def owned_entries(codes: SparseCodes) -> tuple[Tensor, Tensor]:
    """Which entries (N,) belong to a row, and their latents (int64), 0 where they do not.

    With a capacity the end of the buffers is unwritten.
    """
    if codes.required is None:
        return torch.ones_like(codes.indices, dtype=torch.bool), codes.indices.long()
    owned = torch.arange(codes.values.shape[0], device=codes.device) < codes.offsets[-1]
    return owned, torch.where(owned, codes.indices, 0).long()
