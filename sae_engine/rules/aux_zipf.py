"""The rule of aux_zipf_loss: dead and under-used latents, each as far as it falls short of Zipf's law."""
from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .. import functional
from .._running import RunningTopK
from ..codes import SparseCodes
from .base import Activation


class AuxZipfTopK(Activation):
    """k entries of each token that rank first by ``shortfall * pre``, with values ``shortfall * relu(pre)``.

    ``shortfall`` (F,) in [0, 1], from :func:`functional.zipf_shortfall`, is a context or given here. Latents at 0 are
    stored at value 0 and get no gradient. Where every shortfall is 0 or 1 this is :class:`AuxTopK`. ``relu=False``
    keeps negative pre-activations too.

    After the abstract of Ayonrinde 2024, arXiv:2411.02124; the weighting is ours.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        TypeError: a call lacks ``shortfall``, and none was given here.

    Example:
        >>> short = torch.tensor([1.0, 0.0, 0.5, 0.5])
        >>> AuxZipfTopK(2)(torch.tensor([[0.5, 2.0, -3.0, 4.0]]), shortfall=short)
        tensor([[0.5000, 0.0000, 0.0000, 2.0000]])
    """

    shortfall: Tensor | None
    context_keys = frozenset({"shortfall"})
    selects_over_shards = True

    def __init__(self, k: int, *, relu: bool = True, shortfall: Tensor | None = None) -> None:
        super().__init__()
        self.k = check.integer_k(k)
        self.relu = check.flag("relu", relu)
        if shortfall is not None:
            check.floating("shortfall", shortfall, dims=1)
        self.register_buffer("shortfall", shortfall, persistent=False)  # moves with the module
        if shortfall is not None:
            self.context_keys = frozenset()  # type: ignore[misc]

    def _select(self, pre: Tensor, backend: str, *, shortfall: Tensor | None = None) -> SparseCodes:
        weight = self._weight(pre, shortfall)
        check.shaped("shortfall", weight, pre.shape[-1:], pre, why="one per latent")
        score = pre.detach().to(weight.dtype) * weight
        codes = functional.topk(pre, self.k, score=score, mask=weight > 0, relu=self.relu, backend=backend)
        return codes.replace(values=(codes.values * weight[codes.indices.long()]).to(pre.dtype))

    def running(
        self, tokens: int, num_latents: int, *, backend: str = "auto", shortfall: Tensor | None = None
    ) -> RunningTopK:
        weight = self._weight(torch.empty(0, device="cpu"), shortfall)
        check.shaped("shortfall", weight, (num_latents,), weight, why="one per latent")

        def score(pre: Tensor, tokens: slice, latents: slice) -> Tensor:
            wide = self._weight(pre, shortfall)[latents]
            return pre.to(wide.dtype) * wide

        def values(kept: Tensor, codes: SparseCodes) -> Tensor:
            return (kept * self._weight(kept, shortfall)[codes.indices.long()]).to(kept.dtype)

        return RunningTopK(
            tokens, num_latents, backend, self.k, score=score, mask=weight > 0, relu=self.relu, values=values,
            shards=self.shards,
        )  # fmt: skip

    def entry_values(self, pre: Tensor, codes: SparseCodes, *, shortfall: Tensor | None = None) -> Tensor:
        weight = self._weight(pre, shortfall)[codes.indices.long()]
        gate = codes.values != 0 if self.relu else weight > 0
        return torch.where(gate, pre * weight, 0.0).to(pre.dtype)

    def _weight(self, pre: Tensor, shortfall: Tensor | None) -> Tensor:
        shortfall = self.shortfall if shortfall is None else shortfall
        assert shortfall is not None
        return shortfall.detach().to(torch.promote_types(pre.dtype, torch.float32))
