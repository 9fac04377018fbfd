"""One rule for each source of a cross-layer coder."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .._sources import below_one_another, parts_of
from ..codes import SparseCodes
from .base import Activation


class PerSource(Activation):
    """One rule for each source: what a :class:`~sae_engine.Crosscoder` makes of a sequence of them.

    It takes pre-activations (sources, *batch_shape, F); of a single source (*batch_shape, F).

    Args:
        rules: one a source. None of them knows of the others' latents.

    Raises:
        TypeError: something in ``rules`` is no rule.
        ValueError: there is none, or one is there twice.

    Example:
        >>> rule = se.rules.PerSource([se.TopK(1), se.TopK(2)])
        >>> rule.select(torch.rand(2, 5, 8)).l0.sum(1)
        tensor([ 5, 10])
    """

    scope = "batch"

    def __init__(self, rules: Sequence[Activation]) -> None:
        super().__init__()
        rules = list(rules)
        for number, rule in enumerate(rules):
            if not isinstance(rule, Activation) or isinstance(rule, PerSource):
                raise TypeError(f"activation[{number}] must be an sae_engine activation such as TopK(32), got {rule!r}")
        if not rules:
            raise ValueError("activation must hold one rule for each source, got none")
        if len({id(rule) for rule in rules}) < len(rules):
            raise ValueError("activation must hold a rule of its own for each source: one is there twice")
        self.rules = nn.ModuleList(rules)

    def __len__(self) -> int:
        return len(self.rules)

    def __iter__(self) -> Iterator[Activation]:
        return iter(self.rules)  # type: ignore[arg-type]

    def __getitem__(self, source: int) -> Activation:
        return self.rules[source]  # type: ignore[return-value]

    @property
    def selects_over_shards(self) -> bool:  # type: ignore[override]
        return all(rule.selects_over_shards for rule in self)

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        parts = (pre,) if len(self) == 1 else pre.unbind(0)
        if len(parts) != len(self):
            raise ValueError(f"pre must have {len(self)} sources in its first dimension, got {tuple(pre.shape)}")
        return below_one_another([rule.select(part, backend=backend) for rule, part in zip(self, parts, strict=True)])

    def update(self, codes: SparseCodes) -> None:
        for rule, part in zip(self, parts_of(codes, len(self)), strict=True):
            rule.update(part)

    def needs(self) -> dict[str, str]:
        return {need: remedy for rule in self for need, remedy in rule.needs().items()}

    def learned_parameters(self) -> list[nn.Parameter]:
        return [p for rule in self for p in rule.learned_parameters()]

    def options(self) -> dict[str, Any]:
        return {"rules": [(type(rule).__name__, rule.options()) for rule in self]}

    def extra_repr(self) -> str:
        return ""


def chooses_alone(rule: Activation, sources: int) -> bool:
    """Whether the rule's entries compete within a source only."""
    return sources == 1 or isinstance(rule, PerSource) or rule.scope == "row"


def rule_of(rule: Activation, source: int) -> Activation:
    """The rule that chooses for a source."""
    return rule[source] if isinstance(rule, PerSource) else rule


def rule_for(given: Any, sources: int, d_sae: int) -> Activation:
    """The rule of all sources, checked: it takes nothing that a crosscoder does not know, and fits its latents."""
    if isinstance(given, Sequence):
        if len(given) != sources:
            raise ValueError(f"activation must hold one rule for each of {sources} sources, got {len(given)}")
        given = PerSource(given)
    if not isinstance(given, Activation):
        raise TypeError(
            f"activation must be an sae_engine activation such as TopK(32), or a sequence of them, got {given!r}"
        )
    for rule in given if isinstance(given, PerSource) else [given]:
        name = type(rule).__name__
        if rule.context_keys:
            raise ValueError(
                f"activation must need the pre-activations alone, {name} needs {sorted(rule.context_keys)}"
            )
        if not rule.encoder_bias:
            raise ValueError(f"activation must leave an encoder bias to each source, which {name} does without")
        over = getattr(rule, "sources", 1)
        if over > 1 and (rule is not given or over != sources):
            raise ValueError(f"activation {name} chooses among the latents of {over} sources together: it must be the "
                             f"only rule of a crosscoder of {over} sources, got {sources} sources"
                             f"{'' if rule is given else ' with a rule each'}")  # fmt: skip
        k = getattr(rule, "k", None)
        if k is not None and k > d_sae * over:
            limit = "d_sae" if over == 1 else f"d_sae times {over} sources"
            raise ValueError(f"activation keeps k={k} of d_sae={d_sae} latents: k must not exceed {limit}")
        if sources > 1 and getattr(rule, "widths", None) is not None:
            raise ValueError(f"activation must not nest its latents with several sources, as {name} does")
        if sources > 1 and rule is given:
            if any(t.dim() for t in (*rule.parameters(), *rule.buffers())):
                raise ValueError(f"activation {name} has a state for each latent, and so cannot serve all "
                                 f"{sources} sources: pass a sequence with one rule for each")  # fmt: skip
            if rule.scope != "row" and None in (rule.running, rule.entry_values):
                raise ValueError(f"activation {name} cannot choose among the latents of all {sources} sources, which "
                                 "are never there at once: pass a sequence with one rule for each")  # fmt: skip
    return given
