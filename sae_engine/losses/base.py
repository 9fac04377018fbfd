"""What a loss is; the reconstruction error, of the whole codes or of nested prefixes; and what trains a rule."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .. import functional
from ..autoencoder import SparseAutoencoder, decoder_norms
from ..codes import SparseCodes
from ..crosscoder import Crosscoder
from ..distributed.blocks import of_latents, of_tokens
from ..distributed.sums import SummedRanks
from ..distributed.wire import tree_sum
from ..functional import EncodeInfo
from ..rules.base import Activation

if TYPE_CHECKING:
    from ..distributed.shards import Shards
    from ..training.forward import Forward


class Pull(NamedTuple):
    """The gradient of one loss at the codes of one number. What is None is 0.

    Example:
        >>> Pull(0, values=torch.ones(3)).output is None  # its gradient at the output is 0
        True
    """

    number: int
    output: Tensor | None = None  # (B, d_out), at the autoencoder's output; (B, widths, d_out) of nested prefixes
    decoded: Tensor | None = None  # (B, d_out), at the sum of decoder rows
    values: Tensor | None = None  # (N,), at codes.values
    norms: Tensor | None = None  # (d_sae,), at the norms of the decoder's rows
    parameters: dict[Tensor, Tensor] | None = None  # at parameters of the rule
    entries: Tensor | None = None  # (N,), at the pre-activations of the codes' entries, past the rule
    everywhere: Tensor | None = None  # (d_sae,), at the pre-activations of every token; of several sources a row each
    dropped: Tensor | None = None  # as ``everywhere``, at the value of each entry that was dropped
    scale: float = 1.0  # is still to multiply ``output``, which may then be a residual of the batch itself


class LossInput:
    """One rule's part of a batch, as :meth:`Loss.value` sees it. Everything of it may be differentiated.

    Attributes:
        sae: the autoencoder. A loss does not differentiate its parameters: :attr:`output`, :attr:`decoder_norms` and
            :attr:`codes` stand for them. Constants, as ``sae.W_dec.detach()``, may be read.
        rule: whose codes these are.
        codes: over (B, d_sae).
        x: (B, d_in), as the encoder sees it: normalized, with ``b_dec``.
        target: (B, d_out), what is to be reconstructed, fp32 or wider.
        dead: (d_sae,) bool, latents that count as dead.

    Example:
        >>> class Largest(se.losses.Loss):
        ...     name = "largest"
        ...     def value(self, batch):
        ...         return batch.codes.values.max() / batch.tokens
        >>> sae, x = se.SparseAutoencoder(4, 16, se.TopK(2)), torch.randn(8, 4)
        >>> sorted(se.losses.evaluate(sae, x, [Largest()]))
        ['largest', 'loss', 'squared_error']
    """

    def __init__(
        self, sae: SparseAutoencoder, rule: Activation, codes: SparseCodes, x: Tensor, target: Tensor, dead: Tensor,
        info: EncodeInfo, main: LossInput | None = None,
    ) -> None:  # fmt: skip
        self.sae, self.rule, self.codes, self.x, self.target, self.dead = sae, rule, codes, x, target, dead
        self.info, self._main = info, main
        self._known: dict[str, Tensor] = {}

    @property
    def tokens(self) -> int:
        """B; over a mesh, of all ranks: what a mean over tokens divides by."""
        return self.x.shape[0]

    @property
    def share(self) -> float:
        """Of these, the part that :attr:`codes` are of: less than 1 where groups of ranks see their own tokens only."""
        return 1.0

    @property
    def ranks(self) -> int:
        """Of the mesh; 1 without one."""
        return 1

    def over_ranks(self, part: Tensor) -> Tensor:
        """The sum of every rank's ``part`` (), of which the loss is a function that does not add: each rank's summand
        of the loss is then that function over :attr:`ranks`."""
        return part

    @property
    def main(self) -> LossInput:
        """The part of the autoencoder's own rule."""
        return self if self._main is None else self._main

    @property
    def output(self) -> Tensor:
        """(B, d_out): the reconstruction from these codes, in the dtype of ``target`` or wider."""
        return self._once("output", lambda: self.sae.decode(self.codes, self.info).to(self.target.dtype))

    @property
    def decoded(self) -> Tensor:
        """(B, d_out): the sum of decoder rows alone, without ``b_dec``, layer norm and skip connection."""
        return self._once("decoded", self._decode)

    @property
    def decoder_norms(self) -> Tensor:
        """(d_sae,) norms of the decoder's rows; 1 where codes hold values times norm already.

        Of a :class:`Crosscoder` with several sources (sources, d_sae), a number for each latent of each source.
        """
        return self._once("decoder_norms", self._norms)

    def frozen_output(self) -> Tensor:
        """:attr:`output` by a decoder that is a constant: only the codes get a gradient."""
        sae, frozen = self.sae, {name: p.detach() for name, p in self.sae.named_parameters()}
        codes = self.codes_to_decode(frozen["W_dec"])
        out = functional.decode(codes, frozen["W_dec"], frozen["b_dec"]).to(self.target.dtype)
        if self.info.std is not None:
            out = out * self.info.std
        if self.info.mean is not None:
            out = out + self.info.mean
        if sae.W_skip is not None and self.info.skipped is not None:
            out = out + functional.linear(self.info.skipped, frozen["W_skip"].T)
        return out

    def codes_to_decode(self, W_dec: Tensor) -> SparseCodes:
        """The codes as the decoder multiplies them: where they hold values times norm, the norms are divided out."""
        if not self.sae.rescale_acts_by_decoder_norm:
            return self.codes
        norms = decoder_norms(W_dec)
        values = self.codes.values / functional.at_latents(torch.where(norms == 0, 1.0, norms), self.codes)
        return self.codes.replace(values=values.to(self.codes.values.dtype))

    def _decode(self) -> Tensor:
        if isinstance(self.sae, Crosscoder):
            return self.sae._sums(self.codes).to(self.target.dtype)
        return functional.decode(self.codes_to_decode(self.sae.W_dec), self.sae.W_dec).to(self.target.dtype)

    def _norms(self) -> Tensor:
        of_sources = [self.sae._norms_of(source).to(self.target.dtype) for source in self.sae.sources]
        norms = of_sources[0] if len(of_sources) == 1 else torch.stack(of_sources)
        return torch.ones_like(norms) if self.sae.rescale_acts_by_decoder_norm else norms

    def _once(self, name: str, make) -> Tensor:
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]


class Loss:
    """One summand of what a training step minimises.

    A subclass names itself, says in :meth:`value` what it is, and in :meth:`rule` whose codes it reads where that is
    not the autoencoder's own rule. That is enough for :func:`evaluate` and for a :class:`TrainStep`, which
    differentiates it through the kept values, the output, the decoder norms and the rule's own parameters. Ours
    override :meth:`pull` where a gradient written by hand is faster.

    A threshold learns also from entries that it has dropped, whose values are 0. In a step codes hold them as zeros,
    unless each loss says what its slope is there, by a method ``at_dropped(batch)``: (d_sae,) or (sources, d_sae),
    alike for all tokens and in :meth:`value`'s own dtype, or None where it is 0. A step then holds less.

    Where latents are cut over a mesh, a rank sees the codes of its own latents for the tokens of its group's ranks,
    beside the output of its own tokens. A loss that is then the sum of what the ranks make of these says so by
    ``adds_over_shards = True``: a sum over tokens of a function of their outputs, or over entries of one of theirs,
    over ``batch.tokens``; a mean over the codes' rows is to be multiplied by ``batch.share``. What it makes of a sum
    over all ranks, it makes of ``batch.over_ranks(part)``.

    Example:
        >>> class Entropy(Loss):
        ...     name = "entropy"
        ...     def value(self, batch):
        ...         share = batch.codes.values.clamp(min=1e-9) / batch.codes.values.sum()
        ...         return -(share * share.log()).sum()
    """

    name: str
    provides: ClassVar[frozenset[str]] = frozenset()  # which of a rule's needs (Activation.needs) it meets
    adds_over_shards: ClassVar[bool] = False
    takes_sources: ClassVar[bool] = True  # whether it is defined for the codes of several sources
    weighs_by_norms: ClassVar[bool] = False  # whether it reads decoder norms, which then get a gradient
    at_dropped: Callable[[Any], Tensor | None] | None = None

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if {"value", "pull"} & cls.__dict__.keys():  # what the base class says of its own value does not hold
            cls.at_dropped = cls.__dict__.get("at_dropped")

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def _settle(self, **checked) -> None:
        """Attributes of a frozen loss as the checks return them: numbers of NumPy's become Python's."""
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def rule(self, sae: SparseAutoencoder, dead_at_most: int) -> Activation | None:
        """The rule whose codes it reads, with at most ``dead_at_most`` latents dead; None: nothing to do this time."""
        return sae.activation

    def value(self, batch: LossInput) -> Tensor:
        """() differentiable."""
        raise TypeError(f"{type(self).__name__} must define value")

    def pull(self, forward: Forward, number: int) -> tuple[Tensor, Pull]:
        """() and its gradient at the codes of that number: through autograd, unless a subclass writes it by hand."""
        if forward.by_blocks is not None:
            return self._pull_by_blocks(forward, forward.by_blocks, number)
        main = None if number == 0 else _Leaves(forward, 0, None)
        return self._differentiated(forward, number, _Leaves(forward, number, main), main)

    def _pull_by_blocks(self, forward: Forward, shards: Shards, number: int) -> tuple[Tensor, Pull]:
        """The same of a sum over entries alone: (token blocks,), from each cell of tokens and latents by itself."""
        codes = forward.kept[number].codes
        width, at_values = codes.num_latents // shards.latent_blocks, torch.zeros_like(codes.values)
        sums, at_norms, at_parameters = [], [], []
        for where, block in of_tokens(codes, shards.token_blocks):
            losses, pulls = [], []
            for start in range(0, codes.num_latents, width):
                place, cell = of_latents(block, slice(start, start + width))
                loss, pull = self._differentiated(forward, number, _Leaves(forward, number, None, cell), None)
                losses.append(loss.double())  # as ranks add them
                pulls.append(pull)
                if pull.values is not None:
                    at_values[where][place] = pull.values
            sums.append(tree_sum(losses))
            at_norms.append([pull.norms for pull in pulls if pull.norms is not None])
            at_parameters.append([pull.parameters or {} for pull in pulls])
        norms = [tree_sum(of_block) for of_block in at_norms if of_block]  # each cell's are 0 but for its own latents
        parameters = {p: shards.of_batch([tree_sum([of_cell[p] for of_cell in of_block]) for of_block in at_parameters],
                                         "gradients of the rule") for p in at_parameters[0][0]}  # fmt: skip
        return torch.stack(sums), Pull(
            number, values=at_values, norms=shards.of_batch(norms, "gradients of norms") if norms else None,
            parameters=parameters or None,
        )  # fmt: skip

    def _differentiated(
        self, forward: Forward, number: int, batch: _Leaves, main: _Leaves | None
    ) -> tuple[Tensor, Pull]:
        """The loss of a batch, or of a cell of one, and its gradient."""
        learned = [p for p in batch.rule.learned_parameters() if p.requires_grad]
        with torch.enable_grad():
            loss = self.value(batch)
        if not isinstance(loss, Tensor) or loss.shape != ():
            raise TypeError(f"{type(self).__name__}.value must return a scalar tensor, got {loss!r}")
        if not loss.requires_grad:
            return loss, Pull(number)
        leaves, of_main = batch.leaves(), {} if main is None else main.leaves()
        weights = [p for p in forward.sae.parameters() if p.requires_grad and all(p is not q for q in learned)]
        wanted = [*leaves.values(), *learned, *weights, *of_main.values()]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        known = len(leaves) + len(learned)
        if any(g is not None and bool(p.is_leaf) for p, g in zip(weights, grads[known:], strict=False)):
            raise TypeError(
                f"{type(self).__name__}.value differentiates a parameter of the autoencoder itself, which a TrainStep "
                "does not follow: use batch.output, batch.decoded, batch.decoder_norms and batch.codes, or detach it"
            )
        if any(g is not None for g in grads[known + len(weights) :]):
            raise TypeError(f"{type(self).__name__}.value differentiates batch.main: detach what it takes from there")
        at = dict(zip(leaves, grads, strict=False))
        parameters: dict[Tensor, Tensor] = {
            p: g for p, g in zip(learned, grads[len(leaves) :], strict=False) if g is not None
        }
        is_apart = any(part.dropped is not None for part in forward.kept[number].parts)
        dropped = self.at_dropped(batch) if is_apart and self.at_dropped is not None else None
        return loss.detach(), Pull(
            number, output=at.get("output"), decoded=at.get("decoded"), values=at["values"],
            norms=at.get("decoder_norms"), parameters=parameters or None,
            dropped=None if dropped is None else dropped.detach(),
        )  # fmt: skip


class _Leaves(LossInput):
    """The part of a training step's batch, cut off where its own backward pass takes over."""

    def __init__(
        self, forward: Forward, number: int, main: LossInput | None, cell: SparseCodes | None = None
    ) -> None:  # fmt: skip
        kept = forward.kept[number]
        codes = kept.codes if cell is None else cell
        values = codes.values.detach().requires_grad_()
        super().__init__(
            forward.sae, kept.rule, codes.replace(values=values), forward.x, forward.target, forward.dead,
            forward.info, main,
        )  # fmt: skip
        self._forward, self._number = forward, number

    @property
    def tokens(self) -> int:
        return self._forward.tokens

    @property
    def share(self) -> float:
        shards = self._forward.shards  # a cell's rows are a block's
        return 1.0 if shards is None else self.codes.rows / len(self.sae.sources) / shards.tokens

    @property
    def ranks(self) -> int:
        return 1 if self._forward.shards is None else self._forward.shards.everyone.size

    def over_ranks(self, part: Tensor) -> Tensor:
        shards = self._forward.shards
        return part if shards is None else SummedRanks.apply(part, shards.everyone, "a sum in a loss")

    def leaves(self) -> dict[str, Tensor]:
        return {"values": self.codes.values, **{n: t for n, t in self._known.items() if t.requires_grad}}

    @property
    def output(self) -> Tensor:
        return self._once("output", lambda: self._leaf(self._forward.residual(self._number)[0] + self.target))

    @property
    def decoded(self) -> Tensor:
        return self._once("decoded", lambda: self._leaf(self._forward.decode(self._number)))

    @property
    def decoder_norms(self) -> Tensor:
        if self.sae.rescale_acts_by_decoder_norm:
            return self._once("decoder_norms", self._norms).detach()
        return self._once("decoder_norms", lambda: self._leaf(self._norms()))

    def _norms(self) -> Tensor:
        known = self._forward.known
        if "norms" not in known:
            known["norms"] = super()._norms()
        return known["norms"]

    @staticmethod
    def _leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_()


# What a training step reports beside its losses.
RESERVED = frozenset({"loss", "fvu", "l0", "dead", "grad_norm", "overflow"})


def error_and_pull(forward: Forward, number: int, weight: float) -> tuple[Tensor, Pull]:
    """``weight`` times the squared error summed over d, mean over tokens; and its gradient."""
    residual, squares = forward.residual(number)
    pull = Pull(number, output=residual, scale=2 * weight / forward.tokens)
    return weight * forward.sum_all(squares) / forward.tokens, pull


class Reconstruction(Loss):
    """Squared error summed over d, mean over tokens.

    Example:
        >>> se.losses.losses_for(se.SparseAutoencoder(4, 16, se.TopK(2)))
        (Reconstruction(),)
    """

    name = "squared_error"
    adds_over_shards = True

    def value(self, batch: LossInput) -> Tensor:
        return (batch.output - batch.target).square().sum() / batch.tokens

    def pull(self, forward: Forward, number: int) -> tuple[Tensor, Pull]:
        return error_and_pull(forward, number, 1.0)

    def at_dropped(self, batch: LossInput) -> Tensor | None:
        return None  # beside what reaches the value by the output


@dataclass(frozen=True)
class NestedReconstruction(Loss):
    """Squared error of the reconstruction by each prefix of the latents, put together: Matryoshka.

    Args:
        widths: latents of each prefix, ascending, the last all of them.
        reduction: ``"sum"`` of the prefixes' errors, as SAELens, or their ``"mean"``, as dictionary_learning.

    Source: Bussmann et al. 2025, arXiv:2503.17547.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> rule = se.MatryoshkaBatchTopK(2, widths=[4, 16])
        >>> se.losses.losses_for(se.SparseAutoencoder(4, 16, rule))
        (NestedReconstruction(widths=(4, 16), reduction='sum'),)
    """

    widths: tuple[int, ...]
    reduction: str = "sum"
    name = "matryoshka"
    adds_over_shards = True
    provides = frozenset({"nested"})

    def __post_init__(self) -> None:
        self._settle(widths=check.widths(self.widths))
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {self.reduction!r}")

    def value(self, batch: LossInput) -> Tensor:
        sae, codes = batch.sae, batch.codes_to_decode(batch.sae.W_dec)
        outputs = functional.decode_prefixes(codes, sae.W_dec, widths=self.widths).to(batch.target.dtype) + sae.b_dec
        if batch.info.std is not None:
            outputs = outputs * batch.info.std[:, None]
        if batch.info.mean is not None:
            outputs = outputs + batch.info.mean[:, None]
        if sae.W_skip is not None and batch.info.skipped is not None:
            outputs = outputs + functional.linear(batch.info.skipped, sae.W_skip.T)[:, None]
        return (outputs - batch.target[:, None]).square().sum() / (batch.tokens * self._divisor)

    def pull(self, forward: Forward, number: int) -> tuple[Tensor, Pull]:
        residuals = forward.nested_residuals(number, self.widths)
        weight = 1 / (forward.tokens * self._divisor)
        return weight * forward.sum_all(residuals.square()), Pull(number, output=residuals, scale=2 * weight)

    @property
    def _divisor(self) -> int:
        return len(self.widths) if self.reduction == "mean" else 1


def losses_for(sae: SparseAutoencoder, added: Sequence[Loss] | Loss = ()) -> tuple[Loss, ...]:
    """All losses that train ``sae``: its reconstruction error, of nested prefixes where its rule names widths, and
    ``added``.

    Raises:
        TypeError: something in ``added`` is no loss, or the rule has a need (:attr:`Activation.needs`) that none meets.
        ValueError: a loss is there twice.

    Example:
        >>> sae = se.SparseAutoencoder(4, 16, se.TopK(2))
        >>> [loss.name for loss in losses_for(sae, se.losses.AuxK(4))]
        ['squared_error', 'auxk']
    """
    others: tuple[Loss, ...] = tuple(added) if isinstance(added, list | tuple) else (added,)  # type: ignore[assignment]
    for loss in others:
        if not isinstance(loss, Loss):
            raise TypeError(f"losses must hold objects such as AuxK() or L1(3.0), got {loss!r}")
    for loss in others:
        if len(sae.sources) > 1 and not loss.takes_sources:
            raise ValueError(f"losses must be defined for several sources, which {type(loss).__name__} is not")
    rule, provided = sae.activation, frozenset().union(*(loss.provides for loss in others))
    first: tuple[Loss, ...] = (Reconstruction(),)
    if "nested" in provided:
        first = ()
    elif (widths := getattr(rule, "widths", None)) is not None:
        first = (NestedReconstruction(tuple(widths)),)
    for need, remedy in rule.needs().items():
        if need not in provided:
            raise TypeError(
                f"losses lacks what {type(rule).__name__} cannot be trained without: {remedy} "
                "(a coefficient of 0 trains the reconstruction alone)"
            )
    taken = (*first, *others)
    names = [loss.name for loss in taken]
    for name in set(names) & RESERVED:
        raise ValueError(f"losses must not hold one named {name!r}: a training step reports something else so named")
    if len(set(names)) < len(names):
        raise ValueError(f"losses must hold each loss once, got {names}")
    return taken


def checked_target(sae: SparseAutoencoder, x: Tensor, target: Tensor | None) -> Tensor:
    """(B, d_out) of the target, or of ``x`` where there is none; constant for autograd."""
    x = sae._side_by_side(x)
    if target is None:
        if sae.d_out != sae.d_in:
            raise ValueError(f"target is needed, (*batch_shape, {sae.d_out}): d_out differs from d_in")
        target = x
    check.floating("target", target)
    target = sae._side_by_side(target, of="writes", name="target")
    check.shaped("target", target, (*x.shape[:-1], sae.d_out), x, why="d_out for each token of x")
    return check.matrix(target.detach())
