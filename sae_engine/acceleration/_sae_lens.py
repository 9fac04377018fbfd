"""What SAELens' architectures share: see :mod:`.sae_lens`."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from .. import functional
from .._encoder import linear_dtype
from ..codes import SparseCodes
from . import _base as core

Theirs: Any = Any if TYPE_CHECKING else nn.Module  # with the root of their classes, ``__class__`` can be assigned


class SparseSAE(Theirs):
    """What all architectures share. A subclass says which codes it keeps (:meth:`_rule`)."""

    _activation: Any  # what activation_fn must be for _rule to mean the same; None: it is not used

    def _rule(self, tokens: int) -> Any:
        raise TypeError(f"{type(self).__name__} must define _rule")

    def _scale(self) -> Tensor | None:
        """Decoder norms (F,) where pre-activations are multiplied by them."""
        return self.W_dec.norm(dim=-1) if getattr(self.cfg, "rescale_acts_by_decoder_norm", False) else None

    def _watches_pre(self) -> bool:
        """Whether somebody listens to the pre-activations, or looks into the whole."""
        own = isinstance(self.activation_fn, nn.Module) and core.listened(self.activation_fn)
        return own or core.listened(self.hook_sae_acts_pre) or core.plain_wanted()

    def _watches(self) -> bool:
        """Whether somebody listens to any of the dense matrices."""
        return self._watches_pre() or core.listened(self.hook_sae_acts_post)

    def _input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``process_sae_in`` before it subtracts ``b_dec``, and what is to be subtracted."""
        x = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        return self.run_time_activation_norm_fn_in(x), self.b_dec if self.cfg.apply_b_dec_to_input else None

    def _pre(self, x: Tensor, b_dec: Tensor | None) -> Tensor:
        """Pre-activations without gradient, in SAELens' dtype: autocast's, promoted by a bias that it leaves alone."""
        check_activation(self, self._activation)
        with torch.no_grad():
            wide = torch.promote_types(linear_dtype(x, self.W_enc), self.b_enc.dtype)
            return functional.linear(x if b_dec is None else x - b_dec, self.W_enc, self.b_enc, result_dtype=wide)

    def _codes(
        self, x: Tensor, scale: Tensor | None, extra: tuple = (), *, cancels: bool = False
    ) -> tuple[tuple[SparseCodes, ...], Tensor]:
        """The codes of :meth:`_rule` and of ``extra`` rules, and ``hidden_pre``.

        With ``cancels`` the norms ``scale`` are constant for the codes: whoever divides by them again has the gradient,
        since theirs is then zero but for rounding. :meth:`_with_norms` puts it back.
        """
        x, b_dec = self._input(x)
        pre = self._pre(x, b_dec)
        if scale is not None:
            pre *= scale.detach()
        rules = [self._rule(x.shape[:-1].numel()), *extra]
        given = scale.detach() if scale is not None and cancels else scale
        encoded = functional.encode_with(
            x, self.W_enc, self.b_enc, b_dec=b_dec, scale=given, select=rules, pre=pre
        )
        return encoded.codes, core.pre_activations(pre, x, self.W_enc, self.b_enc, b_dec, scale)

    def _with_norms(self, codes: SparseCodes, scale: Tensor | None) -> SparseCodes:
        """Codes as functions of the norms too."""
        if scale is None or not torch.is_grad_enabled():
            return codes
        fixed = scale.detach()
        ratio = scale / torch.where(fixed == 0, 1.0, fixed)
        return codes.replace(values=codes.values * functional.at_latents(ratio, codes))

    def _activations(self, codes: SparseCodes) -> Tensor:
        """``feature_acts`` as SAELens returns them, shown to whoever listens."""
        sparse = getattr(self.activation_fn, "use_sparse_activations", False)
        dense = core.remember(_coo(codes) if sparse else codes.to_dense(), codes)
        return self.hook_sae_acts_post(dense) if core.listened(self.hook_sae_acts_post) else dense

    def _output(self, reconstruction: Tensor) -> Tensor:
        reconstruction = self.hook_sae_recons(reconstruction)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(reconstruction), self.d_head)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        (codes,), hidden_pre = self._codes(x, self._scale())
        return self._activations(codes), hidden_pre

    def _forward(self, x: Tensor) -> Tensor:
        scale = self._scale()
        (codes,), _ = self._codes(x, scale, cancels=True)
        return self._output(core.decode(codes, self.W_dec, self.b_dec, inverse_of(scale)))

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


class Inference(SparseSAE):
    def encode(self, x: Tensor) -> Tensor:
        if self._watches_pre():
            return super().encode(x)
        return self._encode(x)[0]


class Training(SparseSAE):
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


def inverse_of(scale: Tensor | None) -> Tensor | None:
    """What undoes constant norms."""
    return None if scale is None else 1 / scale.detach()


def _coo(codes: SparseCodes) -> Tensor:
    """Codes with k entries a row as a sparse COO tensor of the same shape."""
    rows = torch.arange(codes.rows, device=codes.device).repeat_interleave(codes.k or 0)
    leading = torch.unravel_index(rows, codes.batch_shape) if codes.batch_shape else ()
    indices = torch.stack([*leading, codes.indices.long()])
    return torch.sparse_coo_tensor(indices, codes.values, codes.shape, is_coalesced=True, check_invariants=False)


def check_activation(sae: Any, expected: type | None) -> None:
    if expected is not None and type(sae.activation_fn) is not expected:
        raise core.refuse(
            sae, f"its activation_fn is {sae.activation_fn!r}, not the {expected.__name__} of its architecture"
        )
