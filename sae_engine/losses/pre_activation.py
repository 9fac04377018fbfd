"""A loss at pre-activations that no code holds: what lifts latents which do not fire towards their thresholds."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import functional
from ..autoencoder import SparseAutoencoder
from ..rules import Activation, JumpReLU
from ..rules.per_source import rule_of
from .base import Loss, LossInput, Pull

if TYPE_CHECKING:
    from ..training.forward import Forward


@dataclass(frozen=True)
class PreActivation(Loss):
    """``coefficient`` times the sum of ``relu(theta - pre)`` times the norm of the decoder row, mean over tokens.

    Of a :class:`JumpReLU`, or a sequence of them: it pulls each latent up where it does not fire, so that none dies,
    and its threshold down. Written so it touches every token and latent. In a :class:`TrainStep` it does not: all
    tokens at which a latent is off share one gradient, so that it is that of the mean input, less what is due to the
    few tokens at which it is on. No (tokens, d_sae) matrix of gradients is made, and the sums are the same.

    The form is CLT-Forge's; the sparse one is ours. In 16 bits, pre-activations count as they were before rounding.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        TypeError: in a step, where a rule is no :class:`JumpReLU`, or has a capacity.
        ValueError: where the autoencoder rescales by decoder norm: theta is then compared with something else.

    Example:
        >>> sae = se.SparseAutoencoder(4, 16, se.JumpReLU(16))
        >>> step = se.training.TrainStep(sae, lr=1e-3, losses=[se.losses.TanhL0(0.1), PreActivation(1e-3)])
        >>> sorted(step(torch.randn(8, 4)))
        ['dead', 'fvu', 'grad_norm', 'l0', 'loss', 'pre_activation', 'squared_error', 'tanh_l0']
    """

    coefficient: float
    name = "pre_activation"
    adds_over_shards = True
    weighs_by_norms = True

    def __post_init__(self) -> None:
        self._settle(coefficient=check.from_zero("coefficient", self.coefficient))

    def rule(self, sae: SparseAutoencoder, dead_at_most: int) -> Activation | None:
        for number in range(len(sae.sources)):
            if not isinstance(rule_of(sae.activation, number), JumpReLU):
                raise TypeError("PreActivation lifts latents to the thresholds of a JumpReLU, which "
                                f"{type(rule_of(sae.activation, number)).__name__} is not")  # fmt: skip
        if sae.rescale_acts_by_decoder_norm:
            raise ValueError("rescale_acts_by_decoder_norm must be False with PreActivation, whose thresholds are "
                             "compared with pre-activations as they are")  # fmt: skip
        return sae.activation

    def value(self, batch: LossInput) -> Tensor:
        sae, x = batch.sae, batch.x
        x = x - sae.b_dec if sae.apply_b_dec_to_input else x
        norms = batch.decoder_norms.view(len(sae.sources), -1)
        total = x.new_zeros((), dtype=batch.target.dtype)
        for number, source in enumerate(sae.sources):
            pre = functional.linear(x[:, source.reads], source.W_enc, source._encoder_bias).to(total.dtype)
            rule: Any = rule_of(batch.rule, number)
            theta = rule._theta().to(total.dtype)
            total = total + (torch.relu(theta - pre) * norms[number]).sum()
        return self.coefficient * total / batch.tokens

    def at_dropped(self, batch: LossInput) -> Tensor | None:
        return None  # it is no loss at values

    def pull(self, forward: Forward, number: int) -> tuple[Tensor, Pull]:
        kept = forward.kept[number]
        if kept.codes.required is not None:
            raise TypeError("PreActivation needs codes without a capacity, and so cannot be captured in a CUDA graph")
        weight, wide = self.coefficient / forward.tokens, forward.wide
        tokens = forward.sources[0].tokens  # over shards, of one group of ranks, which adds its own
        entries, everywhere, at_norms, loss = [], [], [], []
        parameters: dict[Tensor, Tensor] = {}
        for of_source, part in zip(forward.sources, kept.parts, strict=True):
            source, latents = of_source.source, part.codes.indices.long()
            norms = forward.sae._norms_of(source).to(wide)
            rule: Any = part.rule
            theta = rule._theta().detach().to(wide)
            is_on = part.codes.values != 0
            values = part.codes.values.to(wide)
            summed = of_source.encoded.sum(0, dtype=wide) @ source.W_enc.to(wide)  # of the pre-activations of a latent
            bias = source._encoder_bias
            summed = summed if bias is None else summed + tokens * bias.to(wide)
            on, excess = forward.by_latent(part.codes, torch.stack([is_on.to(wide), (theta[latents] - values) * is_on]))
            short = tokens * theta - summed - excess
            loss.append((norms * short).sum())
            entries.append(weight * norms[latents] * is_on)
            everywhere.append(-weight * norms)
            at_norms.append(weight * short)
            learned = [p for p in rule.learned_parameters() if p.requires_grad]
            if learned:
                with torch.enable_grad():
                    moved = ((weight * norms * (tokens - on)).to(torch.float32) * rule._theta()).sum()
                parameters |= dict(zip(learned, torch.autograd.grad(moved, learned), strict=True))
        several = len(forward.sources) > 1
        return weight * torch.stack(loss).sum(), Pull(
            number, entries=torch.cat(entries), parameters=parameters or None,
            everywhere=torch.stack(everywhere) if several else everywhere[0],
            norms=torch.stack(at_norms) if several else at_norms[0],
        )  # fmt: skip
