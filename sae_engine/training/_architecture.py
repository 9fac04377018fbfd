"""What every architecture that a configuration names has in common."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .. import rules
from ..autoencoder import SparseAutoencoder
from ..losses import Loss
from ._faults import ConfigError

OURS = __name__.partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What all architectures have in common.

    One of your own is a frozen dataclass at the top of a module, whose fields are those of its entry in a file. A
    configuration knows it as ``architecture: my_module:MySAE`` and imports that module.

    Attributes:
        tag: what a configuration calls it.
        adam_beta1: where ``optim.adam_beta1`` is ``auto``.
        context: what its rule is given beside the pre-activations (:attr:`~sae_engine.Activation.context_keys`) and an
            autoencoder does not know itself: by name, the site whose rows these are, as the model has them.
        starts_over_shards: whether its :meth:`start`, where it has one, makes of an autoencoder on a mesh what it
            makes of one on a single device that is given the rows of all ranks.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, kw_only=True)
        ... class StrongestSAE(Architecture):
        ...     share: float = 0.9
        ...     def build_rule(self, d_sae, steps):
        ...         return se.TopK(max(int(d_sae * (1 - self.share)), 1))
        >>> StrongestSAE(share=0.99).build_rule(d_sae=1024, steps=100)
        TopK(k=10)
    """

    tag: ClassVar[str]
    adam_beta1: ClassVar[float] = 0.9
    context: ClassVar[Mapping[str, str]] = {}
    starts_over_shards: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.partition(".")[0] != OURS:
            cls.tag = f"{cls.__module__}:{cls.__qualname__}"

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

    def build_rule_of(self, sources: int, d_sae: int, steps: int) -> rules.Activation:
        """The same for a crosscoder of so many sources. One without a state for each latent serves them all."""
        return self.build_rule(d_sae, steps)

    def losses(self, d_in: int, d_out: int) -> list[Loss]:
        """What is added to the reconstruction error, or takes its place, but for AuxK."""
        return []

    def sparsity_name(self) -> tuple[str, ...]:
        """The names of those of :meth:`losses` whose weight rises over the sparsity warm-up."""
        return ()

    def prepare(self, sae: SparseAutoencoder) -> None:
        """Changes the initial weights, tied unit rows, where the rule wants others."""

    def start(self, sae: SparseAutoencoder, x: Tensor) -> None:
        """Changes initial values once more by the first rows ``x`` (tokens, d_in), as it is trained on them.

        ``b_dec`` has its own by then. On a mesh each rank has other rows and other latents, and this is called only
        where it says by ``starts_over_shards`` that it heeds that.
        """


def numbers(architecture: Architecture, name: str) -> Any:
    """What is no longer ``"auto"``."""
    if (value := getattr(architecture, name)) == "auto":
        raise ConfigError([(name, "is still 'auto', which resolved() makes a number of")])
    return value
