"""What every architecture that a configuration names has in common."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import rules
from ..autoencoder import SparseAutoencoder
from ..losses import Loss
from ._faults import ConfigError


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What all architectures have in common.

    Example:
        >>> from sae_engine.training.architectures import TopKSAE
        >>> TopKSAE(k=64).build_rule(d_sae=1024, steps=100)
        TopK(k=64)
    """

    tag: ClassVar[str]
    adam_beta1: ClassVar[float] = 0.9

    def learning_rate(self, d_sae: int) -> float:
        """dictionary_learning's, after Gao et al. 2024: ``2e-4 / sqrt(d_sae / 2**14)``."""
        return 2e-4 / math.sqrt(d_sae / 2**14)

    def sparsity_warm_up(self, steps: int) -> int:
        """Updates over which the losses of :meth:`sparsity_name` rise to their weight, of a run of ``steps``."""
        return 0

    def resolved(self, d_in: int, d_sae: int, normalize_activations: str) -> Architecture:
        """The same without an ``"auto"``."""
        return self

    def build_rule(self, d_sae: int, steps: int) -> rules.Activation:
        """The selection rule, for a training of ``steps`` updates."""
        raise TypeError(f"{type(self).__name__} must define build_rule")

    def losses(self, d_in: int, d_out: int) -> list[Loss]:
        """What is added to the reconstruction error, or takes its place, but for AuxK."""
        return []

    def sparsity_name(self) -> tuple[str, ...]:
        """The names of those of :meth:`losses` whose weight rises over the sparsity warm-up."""
        return ()

    def prepare(self, sae: SparseAutoencoder) -> None:
        """Changes the initial weights, tied unit rows, where the rule wants others."""


def numbers(architecture: Architecture, name: str) -> Any:
    """What is no longer ``"auto"``."""
    if (value := getattr(architecture, name)) == "auto":
        raise ConfigError([(name, "is still 'auto', which resolved() makes a number of")])
    return value
