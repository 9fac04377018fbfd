"""Which entries of a layer's activations a language model goes on with: thresholds, shares, and whatever is zero."""
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks as check
from ..rules.base import Activation

PLACES = ("gate", "hidden", "inputs")
WEIGHTS = ("", "up", "up_rms", "down", "up*down")


@dataclass
class Learned:
    """What a rule has learned of one layer, in fp32, on the device of the layer's weights.

    Attributes:
        scale: (F,) what magnitudes are multiplied by before they are compared; None for 1.
        threshold: () what they have to exceed.
        mean: (F,) what a dropped entry counts as; None for 0.
        density: share of entries that were kept; None where nobody has measured it.
        fingerprint: of the layer's weights (:func:`sae_engine.lm.files.fingerprint`).
    """

    scale: Tensor | None = None
    threshold: Tensor | None = None
    mean: Tensor | None = None
    density: float | None = None
    fingerprint: str | None = None

    def to(self, device: torch.device) -> Learned:
        moved = {name: t.to(device) for name, t in self.tensors().items()}
        return Learned(**moved, density=self.density, fingerprint=self.fingerprint)

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        found = {"scale": self.scale, "threshold": self.threshold, "mean": self.mean}
        return {name: t for name, t in found.items() if t is not None}

    def score(self, p: Tensor) -> Tensor:
        """(rows, F) fp32 or wider: what is compared."""
        magnitude = p.abs().to(torch.promote_types(p.dtype, torch.float32))
        return magnitude if self.scale is None else magnitude * self.scale


class Rule(ABC):
    """Which entries of p (rows, F) are kept, the same for any cutting of the tokens into batches.

    p is, by place: the gate's activations of a gated MLP, the input of an MLP's last matrix, or the input of a linear
    layer.
    """

    layers: dict[str, Learned]  # by the module's name in the model; empty where nothing had to be learned
    at: str | None = None  # of the layers

    @abstractmethod
    def select(self, p: Tensor, learned: Learned) -> tuple[Tensor, Tensor | None]:
        """p with 0 for what is dropped, differentiable; and what is kept as bool, where dropped entries count."""

    @property
    def needs_fit(self) -> bool:
        """Whether it has to see activations before it can be used."""
        return False

    @property
    def keeps_zeros_out(self) -> bool:
        """Whether the rule drops only zeros, so that the model computes what it computed before."""
        return False

    def density_of(self, width: int) -> float | None:
        """The share that is kept of so many entries, where the rule says so itself."""
        return None


class Exact(Rule):
    """What the model itself has set to 0 is not multiplied: :func:`se.accelerate` of a language model."""

    def __init__(self) -> None:
        self.layers = {}

    def __repr__(self) -> str:
        return "Exact()"

    @property
    def keeps_zeros_out(self) -> bool:
        return True

    def select(self, p: Tensor, learned: Learned) -> tuple[Tensor, None]:
        return p, None


class ByActivation(Rule):
    """Any selection of this library, on the activations of a language model."""

    def __init__(self, activation: Activation) -> None:
        self.activation, self.layers = activation, {}

    def __repr__(self) -> str:
        return repr(self.activation)

    def select(self, p: Tensor, learned: Learned) -> tuple[Tensor, None]:
        return self.activation(p), None


@dataclass
class Weighed(Rule):
    """Rules of |p_i| times what entry i is worth. ``FITS`` says whether one always learns from texts."""

    sparsity: float
    weigh: str = field(default="", kw_only=True)
    compensate: bool = field(default=False, kw_only=True)
    straight_through: bool = field(default=False, kw_only=True)
    layers: dict[str, Learned] = field(default_factory=dict, init=False, repr=False, compare=False)
    at: str | None = field(default=None, init=False)
    model: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # which one it was fitted on, and how

    FITS: ClassVar[bool]

    def __post_init__(self) -> None:
        number = check.number_in(self.sparsity)
        if number is None:
            raise TypeError(f"sparsity must be a number, got {self.sparsity!r}")
        if not 0 <= number < 1:
            raise ValueError(f"sparsity must lie in [0, 1), the share of entries that are dropped, got {number}")
        self.sparsity = float(number)
        if self.weigh not in WEIGHTS:
            raise ValueError(f"weigh must be one of {WEIGHTS}, got {self.weigh!r}")
        self.compensate = check.flag("compensate", self.compensate)
        self.straight_through = check.flag("straight_through", self.straight_through)

    @property
    def needs_fit(self) -> bool:
        return self.FITS or self.compensate or self.weigh != ""

    def density_of(self, width: int) -> float | None:
        return 1 - self.sparsity

    def finish(self, p: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.where(kept, p, 0.0)
        if self.straight_through and torch.is_grad_enabled():
            chosen = p + (chosen - p).detach()
        return chosen, kept


def rule_of(rule: Any) -> Rule:
    """What a user names a rule by, as one."""
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, Activation):
        if rule.scope != "row" or rule.context_keys:
            raise TypeError(f"rule must decide about each token by itself, from its activations alone, got {rule!r}")
        return ByActivation(rule)
    raise TypeError(f"rule must be one of sae_engine.lm's or an activation of sae_engine, got {rule!r}")
