"""Rules that keep k entries of each token."""
from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .. import functional
from .._running import RunningTopK
from ..codes import SparseCodes
from .base import Activation, kept_values


class TopK(Activation):
    """k entries of each token, then ReLU. Gao et al. 2024, arXiv:2406.04093.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> TopK(2)(torch.tensor([[0.5, 2.0, -3.0, 1.0]]))
        tensor([[0., 2., 0., 1.]])
    """

    selects_over_shards = True
    entry_values = kept_values

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = check.integer_k(k)

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        return functional.topk(pre, self.k, backend=backend)

    def running(self, tokens: int, num_latents: int, *, backend: str = "auto") -> RunningTopK:
        return RunningTopK(tokens, num_latents, backend, self.k, shards=self.shards)


class AbsTopK(TopK):
    """k entries of each token with the largest magnitude, sign kept. Zhu et al. 2025, arXiv:2510.00404.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> AbsTopK(2).select(torch.tensor([[0.5, 2.0, -3.0, 1.0]])).values
        tensor([ 2., -3.])
    """

    selects_over_shards = True

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        return functional.topk(pre, self.k, magnitude=True, backend=backend)

    def running(self, tokens: int, num_latents: int, *, backend: str = "auto") -> RunningTopK:
        return RunningTopK(tokens, num_latents, backend, self.k, magnitude=True, relu=False, shards=self.shards)

    def entry_values(self, pre: Tensor, codes: SparseCodes) -> Tensor:
        return pre  # signed: a kept 0 passes its gradient


class AuxTopK(Activation):
    """k entries of each token among dead latents: what AuxK reconstructs the residual with. Gao et al. 2024.

    Context: ``dead_mask`` (F,), True for dead latents. Where fewer than k are dead, others are stored at value 0 and
    get no gradient. ``relu=False`` keeps negative pre-activations too, as SAELens does.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        TypeError: a call lacks ``dead_mask``.

    Example:
        >>> dead = torch.tensor([True, False, False, True])
        >>> AuxTopK(1)(torch.tensor([[0.5, 2.0, -3.0, 1.0]]), dead_mask=dead)
        tensor([[0., 0., 0., 1.]])
    """

    context_keys = frozenset({"dead_mask"})
    selects_over_shards = True

    def __init__(self, k: int, *, relu: bool = True) -> None:
        super().__init__()
        self.k = check.integer_k(k)
        self.relu = check.flag("relu", relu)

    def _select(self, pre: Tensor, backend: str, *, dead_mask: Tensor) -> SparseCodes:
        return functional.topk(pre, self.k, mask=dead_mask, relu=self.relu, backend=backend)

    def running(
        self, tokens: int, num_latents: int, *, backend: str = "auto", dead_mask: Tensor
    ) -> RunningTopK:
        return RunningTopK(
            tokens, num_latents, backend, self.k, mask=dead_mask, relu=self.relu, shards=self.shards
        )

    @property
    def has_gate(self) -> bool:
        return self.relu and type(self).entry_values is AuxTopK.entry_values

    def entry_values(self, pre: Tensor, codes: SparseCodes, *, dead_mask: Tensor) -> Tensor:
        if self.relu:
            return kept_values(self, pre, codes)
        return torch.where(dead_mask[codes.indices.long()], pre, 0.0)
