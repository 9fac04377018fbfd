"""JumpReLU whose threshold is learned as a logarithm."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..activations import Activation, JumpReLU, _apply_but


class LogJumpReLU(JumpReLU):
    """:class:`JumpReLU` with the parameter ``log_threshold`` (d_sae,), fp32: the threshold is positive by construction.

    SAELens' parametrisation. The gradient reaches it through the exponential, so a step moves a threshold by a share of
    itself. ``threshold`` is a derived tensor; :func:`inference_form` gives the rule with the threshold stored.
    """

    def __init__(self, d_sae: int, *, threshold: float = 0.01, bandwidth: float = 0.05, device=None) -> None:
        Activation.__init__(self)
        self.d_sae = check.integer_k(d_sae, name="d_sae")
        self.bandwidth = check.positive("bandwidth", bandwidth)
        first = math.log(check.positive("threshold", threshold))
        self.log_threshold = nn.Parameter(torch.full((d_sae,), first, dtype=torch.float32, device=device))

    @property
    def threshold(self) -> Tensor:
        return self.log_threshold.exp()

    def _learns(self) -> bool:
        return self.training and torch.is_grad_enabled() and self.log_threshold.requires_grad

    def _theta(self) -> Tensor:
        return self.threshold

    def _apply(self, fn, recurse: bool = True):
        return _apply_but(("log_threshold",), self, super(JumpReLU, self)._apply, fn, recurse)
