"""Rules that compare with a threshold: zero, or one learned for each latent."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import functional
from .._running import RunningThreshold
from .._window import RunningWindow
from ..codes import SparseCodes
from .base import Activation, above, apply_but, captured_size, kept_values


class ReLU(Activation):
    """Keeps what is positive. Codes of a NaN hold it, as ``nn.ReLU`` does.

    Example:
        >>> ReLU().select(torch.tensor([[-1.0, 2.0, 0.0]])).indices
        tensor([1], dtype=torch.int32)
    """

    selects_over_shards = True
    entry_values = kept_values

    def needs(self) -> dict[str, str]:
        return {"sparsity": "a sparsity loss, such as losses.L1(coefficient)"}

    def _dense(self, pre: Tensor) -> Tensor:
        return nn.functional.threshold(pre, 0.0, 0.0)  # as relu, which would need its result unwritten later

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        return functional.threshold(pre, 0.0, capacity=captured_size(pre), backend=backend)

    def running(self, tokens: int, num_latents: int, *, backend: str = "auto") -> RunningThreshold:
        return RunningThreshold(tokens, num_latents, backend, 0.0, capacity=captured_size)


class JumpReLU(Activation):
    """Keeps what exceeds a threshold per latent. Rajamanoharan et al. 2024, arXiv:2407.14435.

    Args:
        d_sae: number of latents.
        threshold: initial value, >= 0. The parameter ``threshold`` (d_sae,) stays fp32 whatever the module's dtype.
        bandwidth: width of the rectangle that gives the threshold its gradient.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> JumpReLU(3, threshold=1.0)(torch.tensor([[0.5, 2.0, 1.5]])).detach()
        tensor([[0.0000, 2.0000, 1.5000]])
    """

    threshold: Tensor
    selects_over_shards = True

    def __init__(self, d_sae: int, *, threshold: float = 0.01, bandwidth: float = 0.05, device=None) -> None:
        super().__init__()
        self.d_sae = check.integer_k(d_sae, name="d_sae")
        first = float(check.from_zero("threshold", threshold))
        self.bandwidth = check.positive("bandwidth", bandwidth)
        device = check.device_or_default(device)
        self.threshold = nn.Parameter(torch.full((self.d_sae,), first, dtype=torch.float32, device=device))

    def _learns(self) -> bool:
        return self.training and torch.is_grad_enabled() and self.threshold.requires_grad

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        bandwidth = self.bandwidth if self._learns() else None
        return functional.threshold(
            pre, self._theta(), bandwidth=bandwidth, capacity=captured_size(pre), backend=backend
        )

    def running(self, tokens: int, num_latents: int, *, backend: str = "auto") -> RunningThreshold:
        bandwidth = self.bandwidth if self._learns() else None
        theta = self._theta().detach()
        return RunningThreshold(tokens, num_latents, backend, theta, bandwidth=bandwidth, capacity=captured_size)

    def running_apart(self, tokens: int, num_latents: int, *, backend: str = "auto") -> RunningWindow | None:
        if not self._learns():
            return None
        return RunningWindow(tokens, num_latents, backend, self._theta().detach(), self.bandwidth)

    def of_window(self, sums: Tensor) -> dict[Tensor, Tensor]:
        """The gradient of the rule's parameter from what its windows hold.

        Args:
            sums: (d_sae,) over each latent's window, of the gradients at the values.
        """
        with torch.enable_grad():
            theta = self._theta()
            moved = (-theta.detach() / self.bandwidth * sums.to(theta.dtype) * theta).sum()
        (learned,) = self.learned_parameters()
        return {learned: torch.autograd.grad(moved, learned)[0]}

    def needs(self) -> dict[str, str]:
        if not any(p.requires_grad for p in self.parameters()):
            return {}
        return {"sparsity": "a sparsity loss, such as losses.StepL0(coefficient) or losses.TanhL0(coefficient)"}

    def _theta(self) -> Tensor:
        """The threshold as it is used: an optimizer may have pushed it below 0."""
        return self.threshold.clamp(min=0)

    def entry_values(self, pre: Tensor, codes: SparseCodes) -> Tensor:
        values = kept_values(self, pre, codes)
        if not self._learns():
            return values
        # A term that is 0 and carries the rectangle estimator: d(value) = -(theta / bandwidth) d(theta) in the window.
        theta = functional.at_latents(self._theta(), codes)
        fixed = theta.detach()
        inside = (pre.detach() - fixed).abs() < self.bandwidth / 2
        slope = torch.where(inside, -fixed / self.bandwidth, 0.0)
        return values + (slope * (theta - fixed)).to(values.dtype)

    def _dense(self, pre: Tensor) -> Tensor:
        if self._learns():
            return super()._dense(pre)
        if pre.shape[-1] != self.d_sae:
            raise ValueError(f"pre must have {self.d_sae} latents (the length of threshold), got {tuple(pre.shape)}")
        return above(pre, self._theta())

    def _apply(self, fn, recurse: bool = True):
        return apply_but(("threshold",), self, super()._apply, fn, recurse)


class LogJumpReLU(JumpReLU):
    """:class:`JumpReLU` with the parameter ``log_threshold`` (d_sae,), fp32: the threshold is positive by construction.

    SAELens' parametrisation. The gradient reaches it through the exponential, so a step moves a threshold by a share of
    itself. ``threshold`` is a derived tensor; :func:`inference_form` gives the rule with the threshold stored.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> rule = LogJumpReLU(3, threshold=1.0)
        >>> rule(torch.tensor([[0.5, 2.0, 1.5]])).detach(), rule.log_threshold.tolist()
        (tensor([[0.0000, 2.0000, 1.5000]]), [0.0, 0.0, 0.0])
    """

    def __init__(self, d_sae: int, *, threshold: float = 0.01, bandwidth: float = 0.05, device=None) -> None:
        Activation.__init__(self)
        self.d_sae = check.integer_k(d_sae, name="d_sae")
        self.bandwidth = check.positive("bandwidth", bandwidth)
        first = math.log(check.positive("threshold", threshold))
        device = check.device_or_default(device)
        self.log_threshold = nn.Parameter(torch.full((d_sae,), first, dtype=torch.float32, device=device))

    @property
    def threshold(self) -> Tensor:
        return self.log_threshold.exp()

    def _learns(self) -> bool:
        return self.training and torch.is_grad_enabled() and self.log_threshold.requires_grad

    def _theta(self) -> Tensor:
        return self.threshold

    def _apply(self, fn, recurse: bool = True):
        return apply_but(("log_threshold",), self, super(JumpReLU, self)._apply, fn, recurse)
