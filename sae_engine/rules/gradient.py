"""Gradient TopK: latents are ranked by what they matter to the language model's loss."""
from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .. import functional
from .._running import RunningTopK
from ..codes import SparseCodes
from .base import kept_values
from .topk import TopK


class GradientTopK(TopK):
    """k entries of each token that rank first by ``pre * (1 + beta * |attribution|)``, then ReLU; values stay ``pre``.

    Context: ``attribution`` (*batch_shape, F), what the loss changes by per unit of each latent, ``g @ W_dec.T`` with g
    the gradient of the language model's loss with respect to the input. ``SparseAutoencoder`` computes it:
    ``sae(x, gradient=g)``, with g from :func:`sae_engine.data.read_gradients`. A constant for autograd.

    Olmo et al. 2024, arXiv:2411.10397 (g-SAE). The form of the score is ours.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        TypeError: a call lacks ``attribution``.

    Example:
        >>> pre, attribution = torch.tensor([[2.0, 3.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
        >>> GradientTopK(1)(pre, attribution=attribution)
        tensor([[2., 0., 0.]])
    """

    context_keys = frozenset({"attribution"})
    selects_over_shards = True
    entry_values = kept_values

    def __init__(self, k: int, *, beta: float = 1.0) -> None:
        super().__init__(k)
        self.beta = check.positive("beta", beta)

    def _select(self, pre: Tensor, backend: str, *, attribution: Tensor) -> SparseCodes:
        check.pre_activations(pre)
        check.floating("attribution", attribution)
        check.shaped("attribution", attribution, pre.shape, pre, why="that of pre")
        return functional.topk(pre, self.k, score=self._score(pre, attribution), backend=backend)

    def _score(self, pre: Tensor, attribution: Tensor) -> Tensor:
        wide = torch.promote_types(pre.dtype, torch.float32)
        return pre.detach().to(wide) * (1 + self.beta * attribution.detach().to(wide).abs())

    def running(  # type: ignore[override]
        self, tokens: int, num_latents: int, *, backend: str = "auto", attribution: Tensor
    ) -> RunningTopK:
        if isinstance(attribution, Tensor):  # else a product, made for this matrix
            check.floating("attribution", attribution, dims=2)
            check.shaped("attribution", attribution, (tokens, num_latents), attribution, why="that of pre")

        def score(pre: Tensor, rows: slice, latents: slice) -> Tensor:
            return self._score(pre, attribution[rows, latents])

        return RunningTopK(tokens, num_latents, backend, self.k, score=score, shards=self.shards)
