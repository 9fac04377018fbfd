"""Losses beside the reconstruction error that keep latents alive or codes in proportion."""
from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_kernels.ops import ops
from sae_kernels.stock.dense import rows_of

from .. import _checks as check
from .. import functional
from ..autoencoder import SparseAutoencoder
from ..codes import SparseCodes
from ..distributed.wire import tree_sum
from ..rules import Activation, AuxTopK, AuxZipfTopK, RunningDensity
from .base import Loss, LossInput, Pull, error_and_pull
from .formulas import afa

if TYPE_CHECKING:
    from ..distributed.shards import Shards
    from ..training.forward import Forward


def every_latent(sae: SparseAutoencoder) -> int:
    """Of the autoencoder, also where it is one rank's share of one."""
    shards = getattr(sae, "shards", None)
    return sae.d_sae if shards is None else shards.num_latents


@dataclass(frozen=True)
class AuxK(Loss):
    """Dead latents reconstruct what the others left of the target, without b_dec. Gao et al. 2024, arXiv:2406.04093.

    With layer norm, the residual is that of the normalized target. A latent is dead that had not fired for
    ``dead_after`` tokens before this batch; OpenAI and dictionary_learning count the batch itself too, and so spare a
    latent that has just revived.

    Args:
        k: entries of each token, at most as many as are dead; default d_in // 2. With several sources, of each of
            them, from its own dead latents; default half of what one reads on average, shared by all.
        coefficient: weight of the loss.
        relu: whether negative pre-activations count as 0.
        normalize: divide by the residual's squared distance from its batch mean.
        scale_by_dead: times min(dead / k, 1).

    The defaults are those of OpenAI, but for their k = 512; :meth:`openai`, :meth:`saelens` and
    :meth:`dictionary_learning` are the three conventions.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> sae = se.SparseAutoencoder(4, 16, se.TopK(2))
        >>> step = se.training.TrainStep(sae, lr=1e-3, losses=AuxK(k=4))
        >>> sorted(step(torch.randn(8, 4)))
        ['auxk', 'dead', 'fvu', 'grad_norm', 'l0', 'loss', 'squared_error']
    """

    k: int | None = None
    coefficient: float = 1 / 32
    relu: bool = True
    normalize: bool = True
    scale_by_dead: bool = False
    name = "auxk"
    adds_over_shards = True

    def __post_init__(self) -> None:
        self._settle(k=None if self.k is None else check.integer_k(self.k))
        self._settle(coefficient=check.positive("coefficient", self.coefficient))

    @classmethod
    def openai(cls, k: int = 512) -> AuxK:
        """ReLU, error relative to the residual's variance, weight 1/32."""
        return cls(k=k)

    @classmethod
    def saelens(cls, coefficient: float = 1.0) -> AuxK:
        """No ReLU, absolute error, times min(dead / k, 1), weight 1."""
        return cls(coefficient=coefficient, relu=False, normalize=False, scale_by_dead=True)

    @classmethod
    def dictionary_learning(cls) -> AuxK:
        """As OpenAI's, with k = d_in // 2."""
        return cls()

    def wanted(self, sae: SparseAutoencoder) -> int:
        """Entries of each token where enough latents are dead."""
        read = sum(source.d_in for source in sae.sources)
        return min(max(read // (2 * len(sae.sources) ** 2), 1) if self.k is None else self.k, every_latent(sae))

    def number_of_dead(self, rule: Activation, dead: Tensor) -> Tensor:
        """() on the device."""
        return dead.sum()

    def rule(self, sae: SparseAutoencoder, dead_at_most: int) -> Activation | None:
        return AuxTopK(min(self.wanted(sae), dead_at_most), relu=self.relu) if dead_at_most else None

    def value(self, batch: LossInput) -> Tensor:
        left = (batch.target - batch.main.output).detach()
        if batch.info.std is not None:
            left = left / batch.info.std
        spread = (left - left.mean(0)).square().sum()
        weight = self._weight(self.number_of_dead(batch.rule, batch.dead), batch.sae, spread, batch.tokens)
        return weight * (batch.decoded - left).square().sum() / batch.tokens

    def pull(self, forward: Forward, number: int) -> tuple[Tensor, Pull]:
        left = -forward.residual(0)[0]
        if forward.info.std is not None:
            left = left / forward.info.std
        dead = forward.total(self.number_of_dead(forward.kept[number].rule, forward.dead))
        spread = forward.spread(left) if self.normalize else left.new_zeros(())
        weight = self._weight(dead, forward.sae, spread, forward.tokens)
        self.observe(forward.kept[0].codes)
        error = forward.decode(number).sub_(left)
        loss = weight * forward.sum_all(error.square()) / forward.tokens
        return loss, Pull(number, decoded=error.mul_(2 / forward.tokens * weight))

    def _weight(self, number: Tensor, sae: SparseAutoencoder, spread: Tensor, tokens: int) -> Tensor:
        """What multiplies the squared error of the residual, whose squared distance from its mean is ``spread`` ()."""
        weight = self.coefficient * (number > 0).to(spread.dtype)
        if self.scale_by_dead:
            weight = weight * (number / self.wanted(sae)).clamp(max=1).to(spread.dtype)
        if self.normalize:
            spread = spread / tokens
            weight = torch.where(spread > 0, weight / spread, 0.0)
        return weight

    def at_dropped(self, batch: LossInput) -> Tensor | None:
        return None  # its codes are its own rule's

    def observe(self, codes: SparseCodes) -> None:
        """Called by a training step with what the autoencoder's own rule kept."""


@dataclass(frozen=True)
class AuxZipf(AuxK):
    """AuxK for dead and under-used latents: each reconstructs the residual as far as it falls short of Zipf's law.

    The k entries of each token that rank first by ``shortfall * pre``, with values ``shortfall * relu(pre)``
    (:class:`AuxZipfTopK`), where :class:`AuxK` has 1 for dead latents and 0 for others; it is the same where only those
    fall short. ``scale_by_dead`` takes the sum of the shortfalls for the number of dead latents.

    Args:
        density: running densities, from which the shortfall of each step follows; updated by it, saved by the caller.
            None: those of :class:`FeatureChoice`.
        latents: per token, that the shares sum up to; default the rule's own k.
        exponent, shift: of Zipf's law: ``1 / (rank + shift)^exponent``.

    After the abstract of Ayonrinde 2024, arXiv:2411.02124, which names aux_zipf_loss; the formula is ours.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        TypeError: in a step, where neither it nor the rule has a density or a number of latents per token.

    Example:
        >>> sae = se.SparseAutoencoder(4, 16, se.FeatureChoice(16, 2))
        >>> step = se.training.TrainStep(sae, lr=1e-3, losses=AuxZipf(k=4))
        >>> sorted(step(torch.randn(8, 4)))
        ['aux_zipf', 'dead', 'fvu', 'grad_norm', 'l0', 'loss', 'squared_error']
    """

    density: RunningDensity | None = None
    latents: float | None = None
    exponent: float = 1.0
    shift: float = 0.0
    name = "aux_zipf"
    takes_sources = False

    @property
    def adds_over_shards(self) -> bool:  # type: ignore[override]
        return self.density is None  # the rule's own are cut as the latents are

    def __post_init__(self) -> None:
        super().__post_init__()
        exponent, shift = check.budget_law(self.exponent, self.shift)
        latents = None if self.latents is None else check.number_k(self.latents, name="latents")
        self._settle(exponent=exponent, shift=shift, latents=latents)
        if self.density is not None and not isinstance(self.density, RunningDensity):
            raise TypeError(f"density must be a RunningDensity or None, got {self.density!r}")

    def rule(self, sae: SparseAutoencoder, dead_at_most: int) -> Activation | None:
        density = getattr(sae.activation if self.density is None else self.density, "density", None)
        latents = getattr(sae.activation, "k", None) if self.latents is None else self.latents
        if density is None or latents is None:
            missing = "density" if density is None else "latents"
            raise TypeError(f"AuxZipf needs {missing}, which {type(sae.activation).__name__} does not have")
        shards = getattr(sae, "shards", None)
        density = density if shards is None else shards.all_latents(density, "densities")
        short = functional.zipf_shortfall(density, latents, exponent=self.exponent, shift=self.shift)
        short = short if shards is None else short[shards.mine]
        return AuxZipfTopK(self.wanted(sae), relu=self.relu, shortfall=short)

    def number_of_dead(self, rule: Activation, dead: Tensor) -> Tensor:
        assert isinstance(rule, AuxZipfTopK) and rule.shortfall is not None
        blocks = [rule.shortfall] if rule.shards is None else rule.shards.latent_blocks_of(rule.shortfall)
        return tree_sum([block.sum() for block in blocks])

    def observe(self, codes: SparseCodes) -> None:
        if self.density is not None:
            self.density.update(codes)  # for the next step


@dataclass(frozen=True)
class MultiTopK(Loss):
    """The error with ``factor`` times as many entries, so that a latent's worth does not hang on k: L(k) + L(4k) / 8.

    For rules with a ``k``, at most d_sae. Gao et al. 2024, arXiv:2406.04093.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        TypeError: in a step, where the rule has no ``k``.

    Example:
        >>> sae = se.SparseAutoencoder(4, 16, se.TopK(2))
        >>> step = se.training.TrainStep(sae, lr=1e-3, losses=MultiTopK())
        >>> sorted(step(torch.randn(8, 4)))
        ['dead', 'fvu', 'grad_norm', 'l0', 'loss', 'multi_topk', 'squared_error']
    """

    factor: int = 4
    coefficient: float = 1 / 8
    name = "multi_topk"
    adds_over_shards = True

    def __post_init__(self) -> None:
        self._settle(factor=check.integer_k(self.factor, name="factor"))
        self._settle(coefficient=check.positive("coefficient", self.coefficient))

    def rule(self, sae: SparseAutoencoder, dead_at_most: int) -> Activation | None:
        k = getattr(sae.activation, "k", None)
        if k is None:
            raise TypeError(f"MultiTopK needs a rule with k, got {sae.activation!r}")
        most = every_latent(sae) * getattr(sae.activation, "sources", 1)
        wider = copy.copy(sae.activation)
        wider.__dict__.update(sae.activation.__dict__)  # a process group, too, which copies leave out
        setattr(wider, "k", min(self.factor * k, most))  # noqa: B010 - no attribute that all rules have
        return wider

    def value(self, batch: LossInput) -> Tensor:
        return self.coefficient * (batch.output - batch.target).square().sum() / batch.tokens

    def pull(self, forward: Forward, number: int) -> tuple[Tensor, Pull]:
        return error_and_pull(forward, number, self.coefficient)


@dataclass(frozen=True)
class AFA(Loss):
    """Squared gap between the norms of codes and input, mean over tokens. Lee et al. 2025, arXiv:2503.24277.

    ``coefficient`` is the authors' afa_coeff (1/128 to 1/16), which stands beside an error per element. Beside ours,
    summed over d, the term is multiplied by d_out.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> sae = se.SparseAutoencoder(4, 16, se.TopAFA())
        >>> step = se.training.TrainStep(sae, lr=1e-3, losses=AFA(1 / 64))
        >>> sorted(step(torch.randn(8, 4)))
        ['afa', 'dead', 'fvu', 'grad_norm', 'l0', 'loss', 'squared_error']
    """

    coefficient: float = 1 / 32
    name = "afa"
    adds_over_shards = True
    takes_sources = False

    def __post_init__(self) -> None:
        self._settle(coefficient=check.positive("coefficient", self.coefficient))

    def value(self, batch: LossInput) -> Tensor:
        return self.coefficient * batch.target.shape[1] * afa(batch.codes, batch.x.to(batch.target.dtype))

    def pull(self, forward: Forward, number: int) -> tuple[Tensor, Pull]:
        codes, wide = forward.kept[number].codes, forward.wide
        values = codes.values.to(wide)
        energy = _sum_by_row(values.square(), codes, forward.shards, forward.backend)
        target = forward.x.to(wide).norm(dim=1)
        if forward.shards is not None:
            energy = forward.shards.sum(energy, "energies of codes")
            target = forward.of_all_ranks(target, "norms of tokens")
        norm = energy.clamp(min=torch.finfo(wide).tiny).sqrt()
        gap = norm - target
        weight = self.coefficient * forward.target.shape[1] / forward.tokens
        slope = 2 * weight * gap / norm
        if forward.shards is not None:
            gap = gap[forward.shards.first_row :][: len(forward.x)]  # other tokens' are other ranks' to add
        return weight * forward.sum_all(gap.square()), Pull(number, values=values * _at_rows(slope, codes))


def _sum_by_row(entries: Tensor, codes: SparseCodes, shards: Shards | None, backend: str) -> Tensor:
    """(rows,) sums of ``entries`` (N,), in their dtype."""
    ones, blocks = entries.new_ones(codes.num_latents, 1), 1 if shards is None else shards.latent_blocks
    if blocks > 1:
        codes = codes._runs([codes.num_latents // blocks * (n + 1) for n in range(blocks)])
    sums = ops.decode(entries, codes.indices, codes.offsets, ones, None, entries.dtype, None, None, None, backend)
    return tree_sum(sums.view(-1, blocks).unbind(1))


def _at_rows(vector: Tensor, codes: SparseCodes) -> Tensor:
    """(N,) of a quantity per row, read at the entries; 0 at those that belong to no row."""
    rows = rows_of(codes.offsets, codes.values.shape[0])
    return torch.cat([vector, vector.new_zeros(1)])[rows]
