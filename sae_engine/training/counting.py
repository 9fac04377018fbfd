"""Architectures that keep so many latents of each token."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .. import rules
from ._architecture import Architecture
from ._faults import ConfigError, flag, settle, whole


@dataclass(frozen=True, kw_only=True)
class _Counting(Architecture):
    """Keeps k entries a token."""

    k: int = 32
    _rule: ClassVar[Any]

    def __post_init__(self) -> None:
        settle(self, k=whole())

    def build_rule(self, d_sae: int, steps: int) -> rules.Activation:
        return self._rule(self.k)


@dataclass(frozen=True, kw_only=True)
class TopKSAE(_Counting):
    """``topk``: k latents of each token. Gao et al. 2024, arXiv:2406.04093.

    Of a crosscoder k of each source, or with ``over_sources`` k of all together.

    Raises:
        ConfigError: ``k`` is no positive int, or ``over_sources`` is set where there is one source.

    Example:
        >>> TopKSAE(k=64).tag
        'topk'
    """

    tag = "topk"
    _rule = rules.TopK
    over_sources: bool = False

    def __post_init__(self) -> None:
        settle(self, k=whole(), over_sources=flag)

    def build_rule(self, d_sae: int, steps: int) -> rules.Activation:
        return self.build_rule_of(1, d_sae, steps)

    def build_rule_of(self, sources: int, d_sae: int, steps: int) -> rules.Activation:
        if self.over_sources and sources == 1:
            raise ConfigError([("over_sources", "must be false of a single source: several share the latents of a "
                                "token, those of a crosscoder whose wiring is not joint")])  # fmt: skip
        return rules.TopKOverSources(self.k, sources) if self.over_sources else super().build_rule(d_sae, steps)


@dataclass(frozen=True, kw_only=True)
class AbsTopKSAE(_Counting):
    """``abstopk``: k latents of each token by magnitude, signed. Zhu et al. 2025, arXiv:2510.00404.

    Raises:
        ConfigError: ``k`` is no positive int.

    Example:
        >>> AbsTopKSAE().build_rule(1024, 100)
        AbsTopK(k=32)
    """

    tag = "abstopk"
    _rule = rules.AbsTopK
