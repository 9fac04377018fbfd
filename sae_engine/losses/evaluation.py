"""The losses of a batch under autograd: what a training step minimises, for ``loss.backward()``."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..autoencoder import SparseAutoencoder
from ..rules import Activation
from .base import Loss, LossInput, checked_target, losses_for


def evaluate(
    sae: SparseAutoencoder, x: Tensor, losses: Sequence[Loss] = (), *, target: Tensor | None = None,
    dead: Tensor | None = None, **context: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """The losses of a batch, differentiable: what a :class:`~sae_engine.training.TrainStep` minimises.

    ``evaluate(sae, x, [L1(3.0)])["loss"].backward()`` gives the gradients of ``TrainStep(sae, lr=…, losses=[L1(3.0)])``
    (but for what the step does to them afterwards). One matrix product serves the rules of all losses.

    Args:
        sae: in training mode, where its rule learns from what it keeps, as it does from a forward.
        x: ``(*batch_shape, d_in)``.
        losses: added to the reconstruction error, which :func:`losses_for` names.
        target: ``(*batch_shape, d_out)``; default ``x``.
        dead: ``(d_sae,)`` bool, latents that count as dead for :class:`AuxK`; default none. The host reads how many.
            Of several sources ``(sources, d_sae)``.
        context: as in :meth:`SparseAutoencoder.encode`.

    Returns:
        ``loss``, and its summands by name.

    Raises:
        TypeError: the rule needs a loss that is not among them (:func:`losses_for`).

    Example:
        >>> sae, x = se.SparseAutoencoder(4, 16, se.TopK(2)), torch.randn(8, 4)
        >>> found = evaluate(sae, x, [se.losses.L1(0.1)])
        >>> sorted(found), found["loss"].requires_grad
        (['l1', 'loss', 'squared_error'], True)
    """
    if not isinstance(sae, SparseAutoencoder):
        raise TypeError(f"sae must be a SparseAutoencoder, got {type(sae).__name__}")
    taken = losses_for(sae, losses)
    check.floating("x", x)
    x = sae._side_by_side(x)
    target = checked_target(sae, x, target)
    target = target.to(torch.promote_types(target.dtype, torch.float32))
    number_dead, sources = 0, len(sae.sources)
    shape = (sae.d_sae,) if sources == 1 else (sources, sae.d_sae)
    if dead is None:
        dead = torch.zeros(shape, dtype=torch.bool, device=sae.b_dec.device)
    else:
        check.shaped("dead", dead, shape, sae.b_dec, why="one per latent")
        number_dead = int(dead.sum())
    rules: list[Activation] = [sae.activation]
    rule_of = {}
    for loss in taken:
        rule = loss.rule(sae, number_dead)
        rule_of[loss.name] = rule
        if rule is not None and all(rule is not known for known in rules):
            rules.append(rule)
    if any("dead_mask" in rule.context_keys for rule in rules):
        context["dead_mask"] = dead
    flat = check.matrix(x)
    context = {name: _per_row(value, x, flat) for name, value in context.items()}
    codes, info, _ = sae.encode_with(flat, select=rules, **context)
    codes[0].assert_fits()
    sae.activation.update(codes[0])
    seen, _ = sae._normalized(flat)
    parts: list[LossInput] = []
    for rule, kept in zip(rules, codes, strict=True):
        parts.append(LossInput(sae, rule, kept, seen, target, dead, info, parts[0] if parts else None))
    values = {}
    for loss in taken:
        rule = rule_of[loss.name]
        part = next((p for p in parts if p.rule is rule), None)
        values[loss.name] = target.new_zeros(()) if part is None else loss.value(part)
    return {"loss": torch.stack(list(values.values())).sum(), **values}


def _per_row(value: Any, x: Tensor, flat: Tensor) -> Any:
    """A context's leading dimensions flattened as those of ``x`` are."""
    dims = x.dim() - 1
    if isinstance(value, Tensor) and value.shape[:dims] == x.shape[:-1] and x.dim() != 2:
        return value.reshape(flat.shape[0], *value.shape[dims:])
    return value
