"""A loss whose weight grows during training."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..autoencoder import SparseAutoencoder
from ..rules import Activation
from .base import Loss, LossInput, Pull

if TYPE_CHECKING:
    from ..training.forward import Forward


class Warmed(Loss):
    """``factor`` times another loss, whose name it goes by; the factor is on the device, and moved by :meth:`set`.

    So sparsity losses are warmed up: from near 0 to their whole weight over the first thousands of updates.

    Args:
        loss: what is weighted.
        device: of the factor; the training's.

    Raises:
        TypeError: ``loss`` is none.

    Example:
        >>> sae = se.SparseAutoencoder(4, 16, se.ReLU())
        >>> penalty = Warmed(se.losses.L1(2.0))
        >>> penalty.set(0.25)
        >>> found = se.losses.evaluate(sae, torch.randn(8, 4), [penalty])
        >>> half = se.losses.evaluate(sae, torch.randn(8, 4), [se.losses.L1(0.5)])
        >>> sorted(found) == sorted(half)
        True
    """

    def __init__(self, loss: Loss, device: torch.device | str | None = None) -> None:
        if not isinstance(loss, Loss):
            raise TypeError(f"loss must be a Loss such as L1(3.0), got {loss!r}")
        self.loss, self.name = loss, loss.name
        self._settle(provides=loss.provides, takes_sources=loss.takes_sources, weighs_by_norms=loss.weighs_by_norms,
                     at_dropped=loss.at_dropped)  # of which a pull has the slope, times the factor
        self.factor = torch.ones((), device=device)

    def __repr__(self) -> str:
        return f"Warmed({self.loss!r})"

    @property
    def adds_over_shards(self) -> bool:  # type: ignore[override]
        return self.loss.adds_over_shards

    def set(self, factor: float) -> None:
        """Of the next steps; nothing waits for it, and a captured CUDA graph sees it."""
        self.factor.fill_(factor)

    def rule(self, sae: SparseAutoencoder, dead_at_most: int) -> Activation | None:
        return self.loss.rule(sae, dead_at_most)

    def value(self, batch: LossInput) -> Tensor:
        return self.loss.value(batch) * self.factor

    def pull(self, forward: Forward, number: int) -> tuple[Tensor, Pull]:
        value, pull = self.loss.pull(forward, number)
        scaled: dict[str, Any] = {
            name: gradient * self.factor for name, gradient in pull._asdict().items() if isinstance(gradient, Tensor)
        }
        parameters = pull.parameters and {p: gradient * self.factor for p, gradient in pull.parameters.items()}
        return value * self.factor, pull._replace(parameters=parameters, **scaled)
