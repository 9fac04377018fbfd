"""Language models that skip weights: ``sparsify`` by a rule, ``accelerate`` where the model itself makes zeros."""
from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from sae_kernels.dispatch import BACKENDS

from .. import _checks as check
from ..acceleration._base import CannotAccelerate
from ..data.models import LanguageModel
from ..data.places import evaluating, few_tokens, hook_input, model_forward
from .files import fingerprint
from .layers import Selection, skipping, swap, unswap
from .places import Found, NothingThere, find
from .rules import PLACES, Exact, Learned, Rule, rule_of

if TYPE_CHECKING:
    from ..rules.base import Activation

M = TypeVar("M")

LEAST_ZEROS = 0.2  # share of zeros in a layer's activations, on a few tokens, from which skipping them is worth a try


def sparsify(
    model: M, rule: Rule | Activation, *, at: str | None = None, layers: Iterable[int] | None = None,
    training: bool = False, backend: str = "auto",
) -> M:  # fmt: skip
    """A language model goes on with what a rule keeps of its activations, in place, and skips what others multiply.

    The function changes, by how much is for :func:`report` to say. Parameters keep names, shapes and values, so
    that the model saves and loads as before; ``generate``, caches and attention are the model's own. Up to 8 tokens
    without gradients run sparse, others dense with the same rule as a mask. W_down of an ``nn.Linear`` is laid out
    column by column, in its place. Experts, and blocks that have no such MLP, stay as they are: :func:`report` lists
    the modules that skip. :func:`se.restore` undoes everything.

    Args:
        model: of transformers, or a :class:`sae_engine.data.LanguageModel`.
        rule: fitted where it has to be; or any activation of this library that decides token by token:
            ``se.TopK(512)`` is the lazy-neuron top-k, ``se.StatisticalTopK(512)`` Spark Transformer's.
        at: as in :meth:`Threshold.fit`, and by default what the rule was fitted at; else ``"gate"`` where the MLPs are
            gated and ``"hidden"`` where not.
        layers: numbers of the blocks; default all, or all that the rule was fitted on.
        training: always the dense code with the rule as a mask, through which gradients flow; parameters keep their
            layout in memory, as optimizers want it.
        backend: as everywhere.

    Returns:
        ``model`` itself.

    Raises:
        CannotAccelerate (a TypeError): says what stands in the way; nothing has been changed.
        TypeError, ValueError: an argument is of another kind or out of range; names it. The rule has not been fitted,
            or not on this model or place.

    Example:
        >>> from sae_engine.data import load_language_model
        >>> lm = load_language_model()
        >>> lm = se.lm.sparsify(lm, se.lm.TopShare(0.5), at="hidden")
        >>> lm = se.restore(lm)
    """
    inner = _module_of(model)
    rule, training = rule_of(rule), check.flag("training", training)
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    if rule.needs_fit and not rule.layers:
        raise ValueError(f"rule has not been fitted: {rule!r}.fit(lm, texts) first")
    if at is not None and at not in PLACES:
        raise ValueError(f"at must be one of {PLACES}, got {at!r}")
    if None not in (at, rule.at) and at != rule.at:
        raise ValueError(f"at must be {rule.at!r}, where the rule was fitted, got {at!r}")
    found = _places(inner, at or rule.at, layers)
    plans = []
    for one in found:
        learned = _learned(rule, one, all_asked=layers is not None)
        if learned is not None:
            plans.append((one, Selection(rule, learned, one.halves, training, backend=backend)))
    for plan in plans:
        swap(*plan)
    return model


def _module_of(model: Any) -> nn.Module:
    inner = model.model if isinstance(model, LanguageModel) else model
    if not isinstance(inner, nn.Module):
        raise TypeError(f"model must be a model of transformers or a LanguageModel, got {type(model).__name__}")
    if skipping(inner):
        raise CannotAccelerate(f"{type(inner).__name__} skips weights already: se.restore(model) first")
    return inner


def _places(model: nn.Module, at: str | None, layers: Iterable[int] | None) -> list[Found]:
    if at is not None:
        return find(model, at, layers)[0]
    try:
        return find(model, "gate", layers)[0]
    except NothingThere:
        return find(model, "hidden", layers)[0]


def _learned(rule: Rule, found: Found, *, all_asked: bool) -> Learned | None:
    """What the rule knows of a layer; None where it was fitted on others, and nobody asked for this one."""
    if not rule.layers:
        return Learned(density=rule.density_of(found.width))
    learned = rule.layers.get(found.name)
    if learned is None:
        if all_asked:
            raise ValueError(f"rule was not fitted on {found.name}, but on {', '.join(rule.layers)}")
        return None
    if learned.fingerprint not in (None, fingerprint(found)):
        raise ValueError(f"rule was fitted on another model: the weights of {found.name} are not those it has seen")
    return learned.to(found.device)


def accelerate(model: M, *, backend: str = "auto") -> M:
    """Skips what a language model multiplies by zeros of its own: ReLU, ProSparse, the top-k of Gemma 3n.

    The same function to rounding. See :func:`sae_engine.accelerate`.
    """
    inner = _module_of(model)
    candidates = _places(inner, None, None)
    zeros = _shares_of_zeros(inner, candidates)
    plans = [
        (one, Selection(Exact(), Learned(density=1 - share), one.halves, backend=backend))
        for one, share in zip(candidates, zeros, strict=True) if share >= LEAST_ZEROS
    ]  # fmt: skip
    if not plans:
        raise CannotAccelerate(
            f"{type(inner).__name__} sets none of its activations to zero: at most {max(zeros):.1%} of a layer's are; "
            "sae_engine.lm.sparsify lets a rule do it"
        )
    for one, selection in plans:
        if one.device.type == "cpu":
            selection.learned.density = None  # unknown: how many zeros there are is looked at in each call
        swap(one, selection)
    return model


@torch.no_grad()
def _shares_of_zeros(model: nn.Module, found: list[Found]) -> list[float]:
    """Of what each last matrix multiplies, on a few tokens."""
    shares = dict.fromkeys((one.name for one in found), 0.0)
    handles = []
    for one in found:
        def look(x, name=one.name):
            shares[name] = float((x == 0).float().mean())
            return x

        handles.append(hook_input(one.down, look))
    try:
        with evaluating(model):
            ids = few_tokens(model)
            model_forward(model, ids, torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    return list(shares.values())


def restore(model: M) -> M:
    """Undoes :func:`sparsify` and :func:`accelerate`: every module's own class and layout again."""
    inner: Any = model.model if isinstance(model, LanguageModel) else model
    for module in skipping(inner).values():
        unswap(module)
    return model
