"""SAELens' JumpReLU and ReLU, rules that keep as many latents as the data says: see :mod:`.sae_lens`."""
from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes import jumprelu_sae, standard_sae
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from .. import functional
from ..codes import SparseCodes
from . import _base as core
from ._sae_lens import Inference, Theirs, Training


class _Thresholded(Theirs):
    """ReLU and JumpReLU: codes where few latents are active, SAELens' dense formula otherwise."""

    _activation: Any = nn.ReLU

    def _theta(self) -> Any:
        """What pre-activations have to exceed to be stored, constant."""
        return 0.0

    def _rule(self, tokens: int) -> Any:
        return core.AboveRule(self._theta())

    def _dense(self, hidden_pre: Tensor) -> Tensor:
        """SAELens' activations of differentiable pre-activations."""
        return self.activation_fn(hidden_pre)

    def _sparse(self, x: Tensor) -> tuple[SparseCodes | None, Any, Tensor]:
        """The codes and the rule that made them, or None where codes would not pay, and ``hidden_pre``."""
        x, b_dec = self._input(x)
        pre = self._pre(x, b_dec)
        codes = rule = None
        if not core.too_dense(pre, self._theta()):
            rule = self._rule(x.shape[:-1].numel())
            codes = functional.encode(x, self.W_enc, self.b_enc, b_dec=b_dec, select=rule, pre=pre)
        return codes, rule, core.pre_activations(pre, x, self.W_enc, self.b_enc, b_dec)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, _, hidden_pre = self._sparse(x)
        if codes is None:
            return self.hook_sae_acts_post(self._dense(hidden_pre)), hidden_pre
        return self._activations(codes), hidden_pre

    def _forward(self, x: Tensor) -> Tensor:
        codes, _, hidden_pre = self._sparse(x)
        if codes is None:
            return self.decode(self._dense(hidden_pre))
        return self._output(core.decode(codes, self.W_dec, self.b_dec))

    def _train(self, step_input: TrainStepInput) -> TrainStepOutput:
        codes, rule, hidden_pre = self._sparse(step_input.sae_in)
        if codes is None:
            feature_acts = self.hook_sae_acts_post(self._dense(hidden_pre))
            sae_out = self.decode(feature_acts)
        else:
            feature_acts = self._activations(codes)
            sae_out = self._output(core.decode(codes, self.W_dec, self.b_dec))
        losses = None if codes is None else self._sparse_losses(step_input, codes, rule, hidden_pre)
        if losses is None:
            losses = self.calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        return self._finish(step_input, sae_out, feature_acts, hidden_pre, losses)

    def _sparse_losses(self, step_input, codes, rule, hidden_pre) -> dict[str, Tensor] | None:
        """SAELens' auxiliary losses from the codes; None where only its own dense code has them."""
        raise TypeError(f"{type(self).__name__} must define _sparse_losses")


class StandardSAE(_Thresholded, Inference, standard_sae.StandardSAE):
    pass


class StandardTrainingSAE(_Thresholded, Training, standard_sae.StandardTrainingSAE):
    def _sparse_losses(self, step_input, codes, rule, hidden_pre) -> dict[str, Tensor] | None:
        if self.cfg.lp_norm != 1:
            return None
        weighted = codes.values * functional.at_latents(self.W_dec.norm(dim=1), codes)
        return {"l1_loss": (step_input.coefficients["l1"] * _row_sums(codes, weighted.abs())).mean()}


class JumpReLUSAE(_Thresholded, Inference, jumprelu_sae.JumpReLUSAE):
    def _theta(self) -> Tensor:
        return self.threshold.detach().clamp(min=0)  # what a ReLU leaves of it

    def _dense(self, hidden_pre: Tensor) -> Tensor:
        return self.activation_fn(hidden_pre) * (hidden_pre > self.threshold).to(hidden_pre.dtype)


class _JumpRule(core.AboveRule):
    """JumpReLU with the rectangle estimator of its threshold's gradient, of the pre-activations' too with ``ste``.

    Stores every p > theta - bandwidth / 2. Afterwards ``steps`` (N,) are 1[p > theta] with Step's gradient.
    """

    steps: Tensor

    def __init__(self, theta: Tensor, bandwidth: float, ste: bool) -> None:
        self.theta, self.bandwidth, self.ste = theta, bandwidth, ste

    def select(self, pre: Tensor, *, backend: str = "auto") -> SparseCodes:
        return functional.threshold(pre, self.theta.detach(), bandwidth=self.bandwidth, backend=backend)

    def entry_values(self, pre: Tensor, codes: SparseCodes) -> Tensor:
        theta, known = functional.at_latents(self.theta, codes), pre.detach()
        fixed = theta.detach()
        active = ~(known <= fixed)
        # A term of value 0 carries the estimator: -1 / bandwidth to theta in the window, with ste its negative to p.
        distance = (known - fixed) / self.bandwidth
        slope = torch.where((distance > -0.5) & (distance < 0.5), -1 / self.bandwidth, 0.0).to(known.dtype)
        estimator = slope * ((theta - fixed) - (pre - known if self.ste else 0.0))
        self.steps = active.to(known.dtype) + estimator
        return torch.where(active, pre, 0.0) + fixed * estimator


class JumpReLUTrainingSAE(_Thresholded, Training, jumprelu_sae.JumpReLUTrainingSAE):
    _activation = None

    def _theta(self) -> Tensor:
        return self.threshold.detach() - self.bandwidth / 2  # the estimator's window is stored too

    def _rule(self, tokens: int) -> _JumpRule:
        theta = self.threshold.to(torch.promote_types(self.dtype, self.b_enc.dtype))
        return _JumpRule(theta, self.bandwidth, self.cfg.jumprelu_ste_to_input)

    def _dense(self, hidden_pre: Tensor) -> Tensor:
        theta = self.threshold.to(hidden_pre.dtype)
        return jumprelu_sae.JumpReLU.apply(hidden_pre, theta, self.bandwidth, self.cfg.jumprelu_ste_to_input)

    def _train(self, step_input: TrainStepInput) -> TrainStepOutput:
        with torch.no_grad():
            self.threshold.data.clamp_(min=0.0)
        return super()._train(step_input)

    def _sparse_losses(self, step_input, codes, rule, hidden_pre) -> dict[str, Tensor] | None:
        mode, W_dec_norm = self.cfg.jumprelu_sparsity_loss_mode, self.W_dec.norm(dim=1)
        if mode == "tanh":
            weighted = codes.values * functional.at_latents(W_dec_norm, codes)
            per_item = _row_sums(codes, torch.tanh(self.cfg.jumprelu_tanh_scale * weighted))
        else:
            per_item = _row_sums(codes, rule.steps)
            if mode == "quadratic":
                per_item = 2 / self.cfg.target_l0 * (per_item - self.cfg.target_l0) ** 2
        losses = {"l0_loss": (step_input.coefficients["l0"] * per_item).mean()}
        if self.cfg.pre_act_loss_coefficient is not None:
            losses["pre_act_loss"] = jumprelu_sae.calculate_pre_act_loss(
                self.cfg.pre_act_loss_coefficient, self.threshold.to(hidden_pre.dtype), hidden_pre,
                step_input.dead_neuron_mask, W_dec_norm,
            )  # fmt: skip
        return losses


def _row_sums(codes: SparseCodes, entries: Tensor) -> Tensor:
    """Sum of each row's ``entries`` (N,), differentiable: (*batch_shape,)."""
    return core.decode(codes.replace(values=entries), entries.new_ones(codes.num_latents, 1), None)[..., 0]
