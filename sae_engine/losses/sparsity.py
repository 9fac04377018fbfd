"""What makes codes sparse where the rule does not: penalties on values, on their number, and the gate's own loss."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_kernels.ops import ops

from .. import _checks as check
from ..autoencoder import SparseAutoencoder
from ..rules import Activation, Gated, JumpReLU
from .base import Loss, LossInput, Pull
from .rule_formulas import aimed, l1, step_l0, tanh_l0

if TYPE_CHECKING:
    from ..training.forward import Forward


@dataclass(frozen=True)
class L1(Loss):
    """``coefficient`` times the sum of the values' magnitudes, each times its decoder row's norm, mean over tokens.

    With rows held at norm 1 (``normalize_decoder``) that is the plain L1 norm. Bricken et al. 2023; the norms are
    those of Anthropic's update of April 2024, without which values shrink and rows grow.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> sae = se.SparseAutoencoder(4, 16, se.ReLU())
        >>> step = se.training.TrainStep(sae, lr=1e-3, losses=L1(0.1))
        >>> sorted(step(torch.randn(8, 4)))
        ['dead', 'fvu', 'grad_norm', 'l0', 'l1', 'loss', 'squared_error']
    """

    coefficient: float
    name = "l1"
    adds_over_shards = True
    provides = frozenset({"sparsity"})
    weighs_by_norms = True

    def __post_init__(self) -> None:
        self._settle(coefficient=check.from_zero("coefficient", self.coefficient))

    def value(self, batch: LossInput) -> Tensor:
        return self.coefficient * batch.share * l1(batch.codes, weight_norm=batch.decoder_norms)

    def at_dropped(self, batch: LossInput) -> Tensor | None:
        return self.coefficient / batch.tokens * batch.decoder_norms


@dataclass(frozen=True)
class StepL0(Loss):
    """``coefficient`` times the number of kept entries per token, which teaches the thresholds of a JumpReLU.

    With ``target`` it is ``coefficient * (L0 / target - 1)^2``, as in dictionary_learning.
    Rajamanoharan et al. 2024, arXiv:2407.14435.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        TypeError: in a step, where the rule is no :class:`JumpReLU`.

    Example:
        >>> sae = se.SparseAutoencoder(4, 16, se.JumpReLU(16))
        >>> step = se.training.TrainStep(sae, lr=1e-3, losses=StepL0(0.1))
        >>> sorted(step(torch.randn(8, 4)))
        ['dead', 'fvu', 'grad_norm', 'l0', 'loss', 'squared_error', 'step_l0']
    """

    coefficient: float
    target: float | None = None
    name = "step_l0"
    adds_over_shards = True
    provides = frozenset({"sparsity"})

    def __post_init__(self) -> None:
        self._settle(coefficient=check.from_zero("coefficient", self.coefficient))

    def value(self, batch: LossInput) -> Tensor:
        if not isinstance(batch.rule, JumpReLU):
            raise TypeError(f"StepL0 trains the thresholds of a JumpReLU, which {type(batch.rule).__name__} is not")
        l0 = batch.share * step_l0(batch.codes, batch.rule)
        if self.target is None:
            return self.coefficient * l0
        return self.coefficient / batch.ranks * aimed(batch.over_ranks(l0), self.target)


@dataclass(frozen=True)
class TanhL0(Loss):
    """``coefficient`` times the sum of ``tanh(scale * value * norm of the decoder row)``, mean over tokens.

    SAELens' sparsity loss for JumpReLU, after Anthropic's update of January 2025.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> sae = se.SparseAutoencoder(4, 16, se.JumpReLU(16))
        >>> step = se.training.TrainStep(sae, lr=1e-3, losses=TanhL0(0.1))
        >>> sorted(step(torch.randn(8, 4)))
        ['dead', 'fvu', 'grad_norm', 'l0', 'loss', 'squared_error', 'tanh_l0']
    """

    coefficient: float
    scale: float = 4.0
    name = "tanh_l0"
    adds_over_shards = True
    provides = frozenset({"sparsity"})
    weighs_by_norms = True

    def __post_init__(self) -> None:
        self._settle(coefficient=check.from_zero("coefficient", self.coefficient))

    def value(self, batch: LossInput) -> Tensor:
        mean = tanh_l0(batch.codes, scale=self.scale, weight_norm=batch.decoder_norms)
        return self.coefficient * batch.share * mean

    def at_dropped(self, batch: LossInput) -> Tensor | None:
        return self.coefficient * self.scale / batch.tokens * batch.decoder_norms


@dataclass(frozen=True)
class GateLoss(Loss):
    """What trains the gate of :class:`Gated`: an L1 norm of its values, and its reconstruction by a frozen decoder.

    ``l1`` is the weight of the first; ``weigh_by_norm`` multiplies each value by the norm of its decoder row, for
    decoders whose rows are not held at norm 1. Rajamanoharan et al. 2024, arXiv:2404.16014.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        TypeError: in a step, where the rule is not :class:`Gated`.

    Example:
        >>> sae = se.SparseAutoencoder(4, 16, se.Gated(16))
        >>> step = se.training.TrainStep(sae, lr=1e-3, losses=GateLoss(l1=0.1))
        >>> sorted(step(torch.randn(8, 4)))
        ['dead', 'fvu', 'gate', 'grad_norm', 'l0', 'loss', 'squared_error']
    """

    l1: float
    weigh_by_norm: bool = True
    name = "gate"
    provides = frozenset({"gate"})
    adds_over_shards = True

    def __post_init__(self) -> None:
        self._settle(l1=check.from_zero("l1", self.l1))

    def rule(self, sae: SparseAutoencoder, dead_at_most: int) -> Activation | None:
        if not isinstance(sae.activation, Gated):
            raise TypeError(f"GateLoss trains the gate of a Gated rule, which {type(sae.activation).__name__} is not")
        return sae.activation.gate

    def value(self, batch: LossInput) -> Tensor:
        error = (batch.frozen_output() - batch.target).square().sum() / batch.tokens
        return _GatePenalty(self).value(batch) + error

    def pull(self, forward: Forward, number: int) -> tuple[Tensor, Pull]:
        if forward.shards is None:
            return super().pull(forward, number)
        # The output is a sum over all ranks' latents, which autograd does not follow here: by hand.
        penalty, pull = _GatePenalty(self).pull(forward, number)
        residual, squares = forward.residual(number)
        grad = residual * (2 / forward.tokens)
        grad = grad if forward.info.std is None else grad * forward.info.std
        part, source = forward.kept[number].parts[0], forward.sources[0]
        at_values = ops.decode_backward_values(
            forward.of_all_ranks(grad.to(forward.dtype), "gradient"), part.values.to(forward.wide),
            part.codes.indices, part.codes.offsets, source.weights.decoder, forward.backend,
        )  # fmt: skip
        at_values = at_values if source.norms is None else at_values / source.norms_at(part.codes)
        at_values = at_values if pull.values is None else at_values + pull.values
        error = forward.sum_all(squares) / forward.tokens
        alone = forward.by_blocks is not None  # each is then summed by itself
        both = torch.stack([penalty, error.to(penalty.dtype)]) if alone else penalty + error
        return both, pull._replace(values=at_values)


class _GatePenalty(Loss):
    """The first summand of a :class:`GateLoss`."""

    def __init__(self, gate: GateLoss) -> None:
        self.gate = gate

    def value(self, batch: LossInput) -> Tensor:
        norms = batch.decoder_norms if self.gate.weigh_by_norm else None
        return self.gate.l1 * batch.share * l1(batch.codes, weight_norm=norms)
