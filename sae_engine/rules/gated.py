"""Gated: one set of directions decides what fires, rescaled ones say how strongly."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import functional
from .._running import RunningThreshold
from ..codes import SparseCodes
from .base import Activation, apply_but, captured_size


class Gated(Activation):
    """Keeps ``relu(exp(r_mag) * pre + b_mag)`` where ``pre + b_gate > 0``.

    ``pre`` is ``(x - b_dec) @ W_enc``: an autoencoder's ``b_enc`` stays 0, ``b_gate``, ``b_mag`` and ``r_mag`` (d_sae,)
    take its place, named as SAELens does. Comparisons and sums are made in fp32 or wider. NaN is kept.

    The gate itself gets no gradient from the reconstruction. :attr:`gate` is the rule ``relu(pre + b_gate)`` that
    :func:`losses.gated` trains it with, out of the same matrix product:
    ``(codes, gate), *_ = sae.encode_with(x, select=[sae.activation, sae.activation.gate])``.

    Rajamanoharan et al. 2024, arXiv:2404.16014.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> rule = Gated(3)
        >>> _ = torch.nn.init.constant_(rule.b_gate, -1.0)
        >>> rule(torch.tensor([[0.5, 2.0, 1.5]])).detach()
        tensor([[0.0000, 2.0000, 1.5000]])
    """

    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor
    encoder_bias = False
    selects_over_shards = True

    def __init__(self, d_sae: int, *, device=None) -> None:
        super().__init__()
        self.d_sae = check.integer_k(d_sae, name="d_sae")
        device = check.device_or_default(device)
        for name in ("b_gate", "b_mag", "r_mag"):
            self.register_parameter(name, nn.Parameter(torch.zeros(d_sae, dtype=torch.float32, device=device)))

    @property
    def gate(self) -> GateOf:
        """The rule whose codes are ``relu(pre + b_gate)``; its parameter is this module's."""
        return GateOf(self)

    def needs(self) -> dict[str, str]:
        return {"gate": "losses.GateLoss(l1)"} if self.b_gate.requires_grad else {}

    def _dense(self, pre: Tensor) -> Tensor:
        self._check_width(pre)
        wide = pre.to(torch.promote_types(pre.dtype, torch.float32))
        kept = (wide > -self.b_gate.detach()) | wide.isnan()
        return torch.where(kept, (wide * self.r_mag.to(wide.dtype).exp() + self.b_mag).relu(), 0.0).to(pre.dtype)

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        codes = self._open(pre, backend)
        return codes.replace(values=self.entry_values(codes.values, codes))

    def _open(self, pre: Tensor, backend: str) -> SparseCodes:
        """The pre-activations of open gates; ``pre > -b_gate`` says the same as ``pre + b_gate > 0``."""
        self._check_width(pre)
        return functional.threshold(pre, -self.b_gate.detach(), capacity=captured_size(pre), backend=backend)

    def running(self, tokens: int, num_latents: int, *, backend: str = "auto", values=None) -> RunningThreshold:
        theta, values = -self.b_gate.detach(), self.entry_values if values is None else values
        return RunningThreshold(tokens, num_latents, backend, theta, values=values, capacity=captured_size)

    def _check_width(self, pre: Tensor) -> None:
        check.pre_activations(pre)
        if pre.shape[-1] != self.d_sae:
            raise ValueError(f"pre must have d_sae = {self.d_sae} latents, got shape {tuple(pre.shape)}")

    def entry_values(self, pre: Tensor, codes: SparseCodes) -> Tensor:
        wide = torch.promote_types(pre.dtype, self.r_mag.dtype)  # the exponential too: of fp64 it is exact to fp64
        scale, shift = (functional.at_latents(p, codes) for p in (self.r_mag.to(wide).exp(), self.b_mag))
        return (pre.to(wide) * scale + shift).relu().to(pre.dtype)

    def _apply(self, fn, recurse: bool = True):
        return apply_but(("b_gate", "b_mag", "r_mag"), self, super()._apply, fn, recurse)


class GateOf(Activation):
    """``relu(pre + b_gate)`` of a :class:`Gated` rule."""

    encoder_bias = False
    selects_over_shards = True

    def __init__(self, gated: Gated) -> None:
        super().__init__()
        self._gated = (gated,)  # in a tuple: its parameters are not this module's to count

    def learned_parameters(self) -> list[nn.Parameter]:
        return [self._gated[0].b_gate]  # type: ignore[list-item]

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        codes = self._gated[0]._open(pre, backend)
        return codes.replace(values=self.entry_values(codes.values, codes))

    def running(self, tokens: int, num_latents: int, *, backend: str = "auto") -> RunningThreshold:
        return self._gated[0].running(tokens, num_latents, backend=backend, values=self.entry_values)

    def entry_values(self, pre: Tensor, codes: SparseCodes) -> Tensor:
        shift = functional.at_latents(self._gated[0].b_gate, codes)
        return (pre.to(torch.promote_types(pre.dtype, shift.dtype)) + shift).to(pre.dtype)
