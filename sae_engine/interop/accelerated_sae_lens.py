"""SAELens' autoencoders on sae_engine's operations; what :func:`accelerate` turns them into. Written for sae-lens 6.54.

Encode, decode, forward and the training forward pass follow SAELens' own, step by step: the same conversions, hook
points, norms and losses, with the selection exact, the decoder sparse, and gradients that follow the codes.

What stays dense, and why. The encoder's matrix product and ``hidden_pre``: the output of a training step has it.
``feature_acts``, a dense matrix as in SAELens: the trainer counts what fires on it. With SAELens' own
``use_sparse_activations=True`` (TopK) it is a sparse COO tensor instead, and no matrix but ``hidden_pre`` is made.
Neither is on the way of the reconstruction's gradient in a training step. Where somebody listens at
``hook_sae_acts_pre``, SAELens' own code runs between there and the activations. ReLU and JumpReLU run SAELens' dense
formula from more than 1/16 of active latents on. Their other auxiliary terms (``lp_norm`` other than 1,
``pre_act_loss``) are SAELens' own, on the dense matrices.

AuxK here has no ReLU and no ``b_dec``; it takes min(d_in // 2, dead) dead latents of each token, is scaled by
min(dead / (d_in // 2), 1), and shares its backward pass with the activations. It asks the device how many are dead,
as SAELens does.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sae_lens.saes import abstopk_sae, batchtopk_sae, jumprelu_sae, matryoshka_batchtopk_sae, standard_sae, topk_sae
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from .. import functional
from ..codes import SparseCodes
from . import _accelerated as core

Theirs: Any = Any if TYPE_CHECKING else nn.Module  # with the root of their classes, ``__class__`` can be assigned

NORMALIZED = ("constant_norm_rescale", "layer_norm")  # SAELens has no AuxK for these, and says so itself


class _SparseSAE(Theirs):
    """What all architectures share. A subclass says which codes it keeps (:meth:`_rule`)."""

    _activation: type | None  # what activation_fn must be for _rule to mean the same; None: it is not used

    def _rule(self, tokens: int) -> Any:
        raise NotImplementedError

    def _scale(self) -> Tensor | None:
        """Decoder norms (F,) where pre-activations are multiplied by them."""
        return self.W_dec.norm(dim=-1) if getattr(self.cfg, "rescale_acts_by_decoder_norm", False) else None

    def _watches_pre(self) -> bool:
        """Whether somebody listens to the pre-activations."""
        own = isinstance(self.activation_fn, nn.Module) and core.listened(self.activation_fn)
        return own or core.listened(self.hook_sae_acts_pre)

    def _watches(self) -> bool:
        """Whether somebody listens to any of the dense matrices."""
        return self._watches_pre() or core.listened(self.hook_sae_acts_post)

    def _input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``process_sae_in`` before it subtracts ``b_dec``, and what is to be subtracted."""
        x = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        return self.run_time_activation_norm_fn_in(x), self.b_dec if self.cfg.apply_b_dec_to_input else None

    def _pre(self, x: Tensor, b_dec: Tensor | None) -> Tensor:
        """Pre-activations without gradient. SAELens' dtype: autocast's result plus a bias that autocast leaves alone."""
        check_activation(self, self._activation)
        with torch.no_grad():
            wide = torch.promote_types(functional._linear_dtype(x, self.W_enc), self.b_enc.dtype)
            return functional.linear(x if b_dec is None else x - b_dec, self.W_enc, self.b_enc, result_dtype=wide)

    def _codes(self, x: Tensor, scale: Tensor | None, extra: tuple = ()) -> tuple[tuple[SparseCodes, ...], Tensor]:
        """The codes of :meth:`_rule` and of ``extra`` rules, and ``hidden_pre``."""
        x, b_dec = self._input(x)
        pre = self._pre(x, b_dec)
        rules = [self._rule(x.shape[:-1].numel()), *extra]
        codes, pre = functional.encode(
            x, self.W_enc, self.b_enc, b_dec=b_dec, scale=scale, select=rules, pre=pre, return_pre=True
        )
        return codes, core.pre_activations(pre.detach(), x, self.W_enc, self.b_enc, b_dec, scale)

    def _activations(self, codes: SparseCodes) -> Tensor:
        """``feature_acts`` as SAELens returns them, shown to whoever listens."""
        if getattr(self.activation_fn, "use_sparse_activations", False):
            dense = _coo(codes)
        else:
            dense = codes.to_dense()
        core.remember(dense, codes)
        return self.hook_sae_acts_post(dense) if core.listened(self.hook_sae_acts_post) else dense

    def _output(self, reconstruction: Tensor) -> Tensor:
        reconstruction = self.hook_sae_recons(reconstruction)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(reconstruction), self.d_head)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        (codes,), hidden_pre = self._codes(x, self._scale())
        return self._activations(codes), hidden_pre

    def _forward(self, x: Tensor) -> Tensor:
        scale = self._scale()
        (codes,), _ = self._codes(x, scale)
        return self._output(core.decode(codes, self.W_dec, self.b_dec, None if scale is None else 1 / scale))

    def decode(self, feature_acts: Tensor) -> Tensor:
        codes = core.codes_of(feature_acts)
        if codes is None:
            return super().decode(feature_acts)
        scale = self._scale()
        inverse = None if scale is None else 1 / scale
        return self._output(core.decode_dense(feature_acts, codes, self.W_dec, self.b_dec, inverse))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_error_term or self._watches():
            return super().forward(x)
        return self.hook_sae_output(self._forward(x))

    def extra_repr(self) -> str:
        return "accelerated by sae_engine"


class _Inference(_SparseSAE):
    def encode(self, x: Tensor) -> Tensor:
        if self._watches_pre():
            return super().encode(x)
        return self._encode(x)[0]


class _Training(_SparseSAE):
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._watches_pre():
            return super().encode_with_hidden_pre(x)
        return self._encode(x)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if self._watches() or not self._takes(step_input):
            return super().training_forward_pass(step_input)
        return self._train(step_input)

    def _takes(self, step_input: TrainStepInput) -> bool:
        return True

    def _finish(self, step_input, sae_out, feature_acts, hidden_pre, aux_losses: dict[str, Tensor]) -> TrainStepOutput:
        error = self.mse_loss_fn(sae_out, step_input.sae_in)
        mse_loss = error.sum(dim=-1).mean()
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=sum(aux_losses.values(), mse_loss),
            losses={"mse_loss": mse_loss, **aux_losses},
        )


# ------------------------------------------------------------------------------------------ topk and its kin


class _TopK(Theirs):
    _activation: type = topk_sae.TopK
    _magnitude = False

    def _rule(self, tokens: int) -> Any:
        k = self.activation_fn.k
        return core.TopRule(k, relu=not self._magnitude, magnitude=self._magnitude)


class TopKSAE(_TopK, _Inference, topk_sae.TopKSAE):
    pass


class AbsTopKSAE(_TopK, _Inference, abstopk_sae.AbsTopKSAE):
    _activation = abstopk_sae.AbsTopK
    _magnitude = True


class _TopKTraining(_TopK, _Training):
    def _takes(self, step_input: TrainStepInput) -> bool:
        return self.cfg.normalize_activations not in NORMALIZED  # AuxK of these raises in SAELens: let it

    def _dead_rules(self, step_input: TrainStepInput) -> list[tuple[float, Any]]:
        """Scale and rule of each AuxK term."""
        k_aux = step_input.sae_in.shape[-1] // 2
        return list(_dead_rule(step_input.dead_neuron_mask, k_aux, self._magnitude))

    def _aux_loss(self, codes: SparseCodes, residual: Tensor, inverse: Tensor | None) -> Tensor:
        """Squared error of what the dead latents make of the residual."""
        recons = self.reshape_fn_out(core.decode(codes, self.W_dec, None, inverse), self.d_head)
        return (recons - residual).pow(2).sum(dim=-1).mean()

    def _train(self, step_input: TrainStepInput) -> TrainStepOutput:
        scale = self._scale()
        inverse = None if scale is None else 1 / scale
        dead = self._dead_rules(step_input)
        (codes, *aux_codes), hidden_pre = self._codes(step_input.sae_in, scale, tuple(rule for _, rule in dead))
        sae_out = self._output(core.decode(codes, self.W_dec, self.b_dec, inverse))
        residual = (step_input.sae_in - sae_out).detach()
        aux_loss = sae_out.new_tensor(0.0)
        if dead:
            terms = [s * self._aux_loss(c, residual, inverse) for (s, _), c in zip(dead, aux_codes, strict=True)]
            aux_loss = self.cfg.aux_loss_coefficient * sum(terms)
        output = self._finish(
            step_input, sae_out, self._activations(codes), hidden_pre, {"auxiliary_reconstruction_loss": aux_loss}
        )
        self._after(output, codes, step_input)
        return output

    def _after(self, output: TrainStepOutput, codes: SparseCodes, step_input: TrainStepInput) -> None:
        pass


class TopKTrainingSAE(_TopKTraining, topk_sae.TopKTrainingSAE):
    pass


class AbsTopKTrainingSAE(_TopKTraining, abstopk_sae.AbsTopKTrainingSAE):
    _activation = abstopk_sae.AbsTopK
    _magnitude = True


class _BatchTopKTraining(_TopKTraining):
    _activation = batchtopk_sae.BatchTopK

    def _rule(self, tokens: int) -> Any:
        return core.BudgetRule(int(self.activation_fn.k * tokens))

    def _after(self, output: TrainStepOutput, codes: SparseCodes, step_input: TrainStepInput) -> None:
        self.update_topk_threshold(codes.values)  # SAELens' own update: it looks at positive values alone
        output.metrics["topk_threshold"] = self.topk_threshold


class BatchTopKTrainingSAE(_BatchTopKTraining, batchtopk_sae.BatchTopKTrainingSAE):
    pass


class MatryoshkaBatchTopKTrainingSAE(_BatchTopKTraining, matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE):
    """Each level's codes are decoded once; the reconstructions of the nested prefixes are running sums of theirs."""

    def _dead_rules(self, step_input: TrainStepInput) -> list[tuple[float, Any]]:
        if not self.cfg.use_matryoshka_aux_loss:
            return super()._dead_rules(step_input)
        k_aux, rules, start = step_input.sae_in.shape[-1] // 2, [], 0
        for width in self.cfg.matryoshka_widths:
            mask = step_input.dead_neuron_mask
            if mask is not None:
                mask = mask.clone()
                mask[:start], mask[width:] = False, False
            rules += _dead_rule(mask, k_aux, False) or [(0.0, None)]
            start = width
        return rules

    def _train(self, step_input: TrainStepInput) -> TrainStepOutput:
        scale = self._scale()
        inverse = None if scale is None else 1 / scale
        dead = self._dead_rules(step_input)
        (codes, *aux_codes), hidden_pre = self._codes(
            step_input.sae_in, scale, tuple(rule for _, rule in dead if rule is not None)
        )
        levels, start, total = [], 0, self.b_dec
        for width in self.cfg.matryoshka_widths:
            total = core.decode(core.of_latents(codes, start, width), self.W_dec, None, inverse) + total
            levels.append(total)
            start = width
        sae_out = self._output(total)
        targets = levels if self.cfg.use_matryoshka_aux_loss else [sae_out]  # a term for each level's own error
        terms, pending = [], iter(aux_codes)
        for (share, rule), target in zip(dead, targets, strict=False):
            if rule is not None:
                terms.append(share * self._aux_loss(next(pending), (step_input.sae_in - target).detach(), inverse))
        aux_loss = self.cfg.aux_loss_coefficient * sum(terms) if terms else sae_out.new_tensor(0.0)

        output = self._finish(
            step_input, sae_out, self._activations(codes), hidden_pre, {"auxiliary_reconstruction_loss": aux_loss}
        )
        self._after(output, codes, step_input)
        for width, reconstruction in zip(self.cfg.matryoshka_widths[:-1], levels, strict=False):
            loss = self.mse_loss_fn(reconstruction, step_input.sae_in).sum(dim=-1).mean()
            output.losses[f"inner_mse_loss_{width}"] = loss
            output.loss = output.loss + loss
        return output


def _dead_rule(mask: Tensor | None, k_aux: int, magnitude: bool) -> list[tuple[float, Any]]:
    """Scale and rule of an AuxK term over the latents of ``mask``; none where none is dead. Reads the device."""
    dead = 0 if mask is None else int(mask.sum())
    if dead == 0:
        return []
    return [(min(dead / k_aux, 1.0), core.TopRule(min(k_aux, dead), relu=False, magnitude=magnitude, mask=mask))]


# ------------------------------------------------------------------------------------------ rules that follow the data


class _Thresholded(Theirs):
    """ReLU and JumpReLU: codes where few latents are active, SAELens' dense formula otherwise."""

    _activation = nn.ReLU

    def _theta(self) -> Tensor | float:
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
        raise NotImplementedError


class StandardSAE(_Thresholded, _Inference, standard_sae.StandardSAE):
    pass


class StandardTrainingSAE(_Thresholded, _Training, standard_sae.StandardTrainingSAE):
    def _sparse_losses(self, step_input, codes, rule, hidden_pre) -> dict[str, Tensor] | None:
        if self.cfg.lp_norm != 1:
            return None
        weighted = codes.values * functional.at_latents(self.W_dec.norm(dim=1), codes)
        return {"l1_loss": (step_input.coefficients["l1"] * _row_sums(codes, weighted.abs())).mean()}


class JumpReLUSAE(_Thresholded, _Inference, jumprelu_sae.JumpReLUSAE):
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
        # A term of value 0 carries the estimator: -1 / bandwidth to theta inside the window, with ste its negative to p.
        distance = (known - fixed) / self.bandwidth
        slope = torch.where((distance > -0.5) & (distance < 0.5), -1 / self.bandwidth, 0.0).to(known.dtype)
        estimator = slope * ((theta - fixed) - (pre - known if self.ste else 0.0))
        self.steps = active.to(known.dtype) + estimator
        return torch.where(active, pre, 0.0) + fixed * estimator


class JumpReLUTrainingSAE(_Thresholded, _Training, jumprelu_sae.JumpReLUTrainingSAE):
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


def _coo(codes: SparseCodes) -> Tensor:
    """Codes with k entries a row as a sparse COO tensor of the same shape."""
    rows = torch.arange(codes.rows, device=codes.device).repeat_interleave(codes.k or 0)
    leading = torch.unravel_index(rows, codes.batch_shape) if codes.batch_shape else ()
    indices = torch.stack([*leading, codes.indices.long()])
    return torch.sparse_coo_tensor(indices, codes.values, codes.shape, is_coalesced=True, check_invariants=False)


# ------------------------------------------------------------------------------------------ for accelerate()

CLASSES = core.table(
    TopKSAE, TopKTrainingSAE, AbsTopKSAE, AbsTopKTrainingSAE, BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE,
    JumpReLUSAE, JumpReLUTrainingSAE, StandardSAE, StandardTrainingSAE,
)  # fmt: skip
EXACT: dict[type, type] = {}


def check_activation(sae: Any, expected: type | None) -> None:
    if expected is not None and type(sae.activation_fn) is not expected:
        raise core.refuse(
            sae, f"its activation_fn is {sae.activation_fn!r}, not the {expected.__name__} of its architecture"
        )


def check(sae: Any, plain: type) -> None:
    """Raises CannotAccelerate where our methods would not do what those of ``sae`` do."""
    ours = CLASSES[plain]
    core.check_module(sae, ours, ("W_enc", "W_dec", "b_enc", "b_dec"))
    check_activation(sae, ours._activation)  # type: ignore[attr-defined]
