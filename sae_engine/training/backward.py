"""The backward half of a step: from the objectives' pulls to the terms of the latent pass and the small gradients."""
from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _passes
from ..activations import has_gate
from .forward import Forward, Kept
from .objectives import Pull


class Backward(NamedTuple):
    """Everything that the gradients follow from, not yet summed over the latents."""

    terms: list[_passes.Term]
    x: Tensor  # (B, d_in), what the encoder multiplied
    along: Tensor | None  # (F,): adds along[f] * W_dec[f] to the decoder's gradient
    dense: list[Tensor]  # (B, F) gradients at the pre-activations of rules whose gradient is dense
    small: dict[Tensor, Tensor]  # of b_dec (but for its part through the encoder), W_skip and the rules


def backward(forward: Forward, pulls: Sequence[Pull]) -> Backward:
    sae, wide, encoder = forward.sae, forward.wide, forward.weights.encoder
    x = forward.x - sae.b_dec if sae.apply_b_dec_to_input else forward.x
    result = Backward([], x.to(encoder.dtype), None, [], {})
    along = None
    for number, kept in enumerate(forward.kept):
        mine = [pull for pull in pulls if pull.number == number]
        if not mine:
            continue
        grad = _at_decoder(forward, mine, result.small).to(forward.weights.decoder.dtype)
        at_values = _total(pull.values for pull in mine)
        if has_gate(kept.rule):
            offered = at_values
            if at_values is not None and forward.norms is not None:
                offered = at_values * forward.norms_at(kept.codes)
                along = _total([along, _by_latent(at_values * kept.values, kept, forward)])
            result.terms.append(_passes.term_of(kept.codes, kept.values, grad, offered, _passes.GATED))
            continue
        decoder, values = forward.weights.decoder, kept.values.to(wide)
        inner = _passes.value_gradients(grad, kept.codes, values, decoder, forward.backend)
        at_codes = inner if forward.norms is None else inner / forward.norms_at(kept.codes)
        at_codes = at_codes if at_values is None else at_codes + at_values
        at_pre, parameters = _through_rule(kept, at_codes, forward.backend)
        for parameter, gradient in parameters.items():
            _add(result.small, parameter, gradient)
        if kept.rule.entry_values is None:
            result.dense.append(at_pre if forward.norms is None else at_pre * forward.norms)
            offered = torch.zeros_like(inner)
        else:
            offered = at_pre.to(wide) if forward.norms is None else at_pre.to(wide) * forward.norms_at(kept.codes)
        result.terms.append(_passes.term_of(kept.codes, kept.values, grad, offered, _passes.GIVEN))
        if forward.norms is not None:
            along = _total([along, _norm_slopes(kept, forward, at_pre, inner)])
    if along is not None and forward.norms is not None:
        along = along / forward.divisors
    return result._replace(along=along)


def _total(tensors: Iterable[Tensor | None]) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return functools.reduce(torch.add, present) if present else None


def _add(small: dict[Tensor, Tensor], parameter: Tensor, gradient: Tensor) -> None:
    small[parameter] = small[parameter] + gradient if parameter in small else gradient


def _at_decoder(forward: Forward, pulls: list[Pull], small: dict[Tensor, Tensor]) -> Tensor:
    """(B, d_out) at the sum of decoder rows; what passes b_dec and W_skip on its way is added to ``small``."""
    sae, info = forward.sae, forward.info
    output, decoded = (_total(getattr(pull, name) for pull in pulls) for name in ("output", "decoded"))
    if output is None:
        return torch.zeros_like(forward.target) if decoded is None else decoded
    if sae.W_skip is not None and info.skipped is not None:
        _add(small, sae.W_skip, output.T @ info.skipped.to(output.dtype))
    if info.std is not None:
        output = output * info.std
    _add(small, sae.b_dec, output.sum(0))
    return output if decoded is None else output + decoded


def _by_latent(entries: Tensor, kept: Kept, forward: Forward) -> Tensor:
    return _passes.sum_by_latent(entries.to(forward.wide), kept.codes, forward.wide, forward.backend)


def _norm_slopes(kept: Kept, forward: Forward, at_pre: Tensor, inner: Tensor) -> Tensor:
    """(F,) gradient of the decoder norms: up through what the rule sees, down through what the decoder divides out."""
    if kept.entries is not None:
        seen = _by_latent(at_pre.to(forward.wide) * kept.entries, kept, forward)
    else:
        assert kept.pre is not None
        seen = (at_pre.to(forward.wide) * kept.pre).sum(0)
    return (seen - _by_latent(inner * kept.values, kept, forward)) / forward.divisors


def _through_rule(kept: Kept, at_codes: Tensor, backend: str) -> tuple[Tensor, dict[Tensor, Tensor]]:
    """Gradients at the pre-activations, of the entries or (B, F), and of the rule's own parameters."""
    rule = kept.rule
    seen = kept.pre if rule.entry_values is None else kept.entries
    assert seen is not None
    seen = seen.detach().requires_grad_()
    learned = [p for p in rule.parameters() if p.requires_grad]
    with torch.enable_grad():
        if rule.entry_values is None:
            values = rule.select(seen, backend=backend, **kept.context).values
        else:
            values = rule.entry_values(seen, kept.codes, **kept.context)
    grads = torch.autograd.grad(values, [seen, *learned], at_codes.to(values.dtype), allow_unused=True)
    at_pre = torch.zeros_like(seen) if grads[0] is None else grads[0]
    return at_pre, {p: g for p, g in zip(learned, grads[1:], strict=True) if g is not None}
