"""The published recipe of cross-layer transcoders: JumpReLU, sparsity that rises all along, no latent left dead."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from .. import rules
from ..autoencoder import SparseAutoencoder
from ..initial import init_firing
from ..losses import Loss, PreActivation, TanhL0
from ._architecture import Architecture, numbers
from ._faults import auto, real, settle, whole

PUBLISHED_L0 = 10_000  # at the start, over all of a source's latents


@dataclass(frozen=True, kw_only=True)
class TanhJumpReLUSAE(Architecture):
    """``tanh_jumprelu``: JumpReLU whose values are priced by ``tanh(scale * value * decoder norm)``. It is how
    cross-layer transcoders are trained; one place may be, too.

    Lindsey et al. 2024; Ameisen et al. 2025 (Circuit Tracing); the numbers are those of CLT-Forge's code. The price
    rises from 0 over the whole run. What does not fire is pulled towards its threshold
    (:class:`~sae_engine.losses.PreActivation`), so AuxK is better left out: ``aux_k_coefficient: 0``. Numbers belong to
    places of mean square 1: ``normalize_activations: standardize``.

    Args:
        l0_coefficient: weight of the price, of all latents a token together.
        tanh_scale: of the value times the norm of its decoder row, over all places.
        pre_activation_coefficient: weight of the pull; 0: none.
        jumprelu_bandwidth: of the estimator of the threshold's gradient, which is as wide as pre-activations are.
        jumprelu_init_threshold: where thresholds start. Their logarithms are learned.
        l0_at_start: latents of a source that fire on a token at first, by ``b_enc`` from the first rows; auto: 10,000,
            as published, or a twentieth of ``d_sae``, if that is less (ours).

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> TanhJumpReLUSAE(l0_coefficient=2.0).losses(768, 768)
        [TanhL0(coefficient=2.0, scale=4.0), PreActivation(coefficient=3e-06)]
    """

    tag = "tanh_jumprelu"
    starts_over_shards = True
    l0_coefficient: float = 1.0
    tanh_scale: float = 4.0
    pre_activation_coefficient: float = 3e-6
    jumprelu_bandwidth: float = 1.0
    jumprelu_init_threshold: float = 0.03
    l0_at_start: Literal["auto"] | int = "auto"

    def __post_init__(self) -> None:
        settle(self, l0_coefficient=real("from 0"), tanh_scale=real(), pre_activation_coefficient=real("from 0"),
               jumprelu_bandwidth=real(), jumprelu_init_threshold=real(), l0_at_start=auto(whole()))  # fmt: skip

    def sparsity_warm_up(self, steps: int) -> int:
        return steps

    def sparsity_name(self) -> tuple[str, ...]:
        return (TanhL0.name,)

    def resolved(self, d_in: int, d_sae: int, normalize_activations: str) -> Architecture:
        return replace(self, l0_at_start=min(PUBLISHED_L0, max(d_sae // 20, 1))) if self.l0_at_start == "auto" else self

    def build_rule(self, d_sae: int, steps: int) -> rules.Activation:
        return rules.LogJumpReLU(d_sae, threshold=self.jumprelu_init_threshold, bandwidth=self.jumprelu_bandwidth)

    def losses(self, d_in: int, d_out: int) -> list[Loss]:
        pulls: list[Loss] = [PreActivation(self.pre_activation_coefficient)] if self.pre_activation_coefficient else []
        return [TanhL0(self.l0_coefficient, self.tanh_scale), *pulls]

    def start(self, sae: SparseAutoencoder, x: Tensor) -> None:
        init_firing(sae, x, numbers(self, "l0_at_start"))
