"""The reconstruction error, of the whole codes or of nested prefixes, and the losses that a rule is trained with."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .. import _checks as check
from .. import functional
from ..autoencoder import SparseAutoencoder
from .base import Loss, LossInput, Pull

if TYPE_CHECKING:
    from ..training.forward import Forward


# What a training step reports beside its losses.
RESERVED = frozenset({"loss", "fvu", "l0", "dead", "grad_norm", "overflow"})


def error_and_gradient(forward: Forward, number: int, weight: float) -> tuple[Tensor, Tensor]:
    """``weight`` times the squared error summed over d, mean over tokens; and its gradient (B, d_out)."""
    residual, squares = forward.residual(number)
    return weight * squares.sum() / forward.tokens, residual * (2 * weight / forward.tokens)


class Reconstruction(Loss):
    """Squared error summed over d, mean over tokens."""

    name = "squared_error"

    def value(self, batch: LossInput) -> Tensor:
        return (batch.output - batch.target).square().sum() / batch.tokens

    def pull(self, forward: Forward, number: int) -> tuple[Tensor, Pull]:
        loss, grad = error_and_gradient(forward, number, 1.0)
        return loss, Pull(number, output=grad)


@dataclass(frozen=True)
class NestedReconstruction(Loss):
    """Squared error of the reconstruction by each prefix of the latents, put together: Matryoshka.

    Args:
        widths: latents of each prefix, ascending, the last all of them.
        reduction: ``"sum"`` of the prefixes' errors, as SAELens, or their ``"mean"``, as dictionary_learning.

    Source: Bussmann et al. 2025, arXiv:2503.17547.
    """

    widths: tuple[int, ...]
    reduction: str = "sum"
    name = "matryoshka"
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
        return weight * residuals.square().sum(), Pull(number, output=residuals * (2 * weight))

    @property
    def _divisor(self) -> int:
        return len(self.widths) if self.reduction == "mean" else 1


def losses_for(sae: SparseAutoencoder, added: Sequence[Loss] | Loss = ()) -> tuple[Loss, ...]:
    """All losses that train ``sae``: its reconstruction error, of nested prefixes where its rule names widths, and
    ``added``.

    Raises:
        TypeError: something in ``added`` is no loss, or the rule has a need (:attr:`Activation.needs`) that none meets.
        ValueError: a loss is there twice.
    """
    others: tuple[Loss, ...] = tuple(added) if isinstance(added, list | tuple) else (added,)  # type: ignore[assignment]
    for loss in others:
        if not isinstance(loss, Loss):
            raise TypeError(f"losses must hold objects such as AuxK() or L1(3.0), got {loss!r}")
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


