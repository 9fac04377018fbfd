"""Statistical top-k: about k entries of each row, from its mean and standard deviation."""
from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .. import functional
from ..codes import SparseCodes
from .base import Activation, captured_size


class StatisticalTopK(Activation):
    """``relu(pre - theta)`` with ``theta = mean + std * Q(1 - k / F)`` of each row, Q the normal quantile.

    As many entries as exceed theta are kept, about k where a row is normal; values are shrunk by theta. Linear time, no
    ranking. The gradient flows through mean and standard deviation (population), so it is dense. A row that holds NaN
    or an infinity is NaN throughout. Serves MLP activations as well.

    Args:
        k: entries aimed at, int or float, ``0 < k < F``.

    You et al. 2025, arXiv:2506.06644 (Spark Transformer).

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> StatisticalTopK(1).select(torch.tensor([[0.0, 0.0, 0.0, 8.0]])).indices
        tensor([3], dtype=torch.int32)
    """

    selects_over_shards = True

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = check.number_k(k)

    def _dense(self, pre: Tensor) -> Tensor:
        return torch.nn.functional.threshold(self._shifted(pre), 0.0, 0.0)

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        return functional.threshold(self._shifted(pre), 0.0, capacity=captured_size(pre), backend=backend)

    def _shifted(self, pre: Tensor) -> Tensor:
        """pre - theta, computed in fp32 or wider, in the dtype of pre."""
        check.pre_activations(pre)
        every = pre.shape[-1] if self.shards is None else self.shards.num_latents
        if not self.k < every:
            raise ValueError(f"k must satisfy 0 < k < {every} (the number of latents), got {self.k}")
        wide = pre.to(torch.promote_types(pre.dtype, torch.float32))
        mean = self._row_mean(wide, every)
        variance = self._row_mean((wide - mean).square(), every)
        std = variance.clamp(min=torch.finfo(wide.dtype).tiny).sqrt()  # the root's slope at 0 is infinite
        share = torch.full((), 1 - self.k / every, dtype=torch.float64, device=pre.device)
        return (wide - (mean + std * torch.special.ndtri(share).to(wide.dtype))).to(pre.dtype)

    def _row_mean(self, wide: Tensor, every: int) -> Tensor:
        """(*batch_shape, 1) over ``every`` latent, of which ``wide`` may be one shard's."""
        if self.shards is None:
            return wide.mean(-1, keepdim=True)
        sums = self.shards.sum(wide.sum(-1, keepdim=True, dtype=torch.float64), "row sums")
        return (sums / every).to(wide.dtype)
