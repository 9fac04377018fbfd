"""sparsify's ``SparseCoder`` on sae_engine's operations. Written for eai-sparsify 1.3.

Encode, decode and forward follow sparsify's own. Inputs may have any leading dimensions and live on any device,
whatever decoder sparsify chose when it was imported. What stays dense: the encoder's matrix product, and ``pre_acts``,
which ``encode`` returns; ``forward`` makes none of them visible, and selects from them for AuxK and multi-top-k.

sparsify's encoder has two gradients wrong: it passes none to ``pre_acts``, so that AuxK and multi-top-k train the
decoder alone, and it passes one through entries that its ReLU has set to 0. By default both are as in sparsify;
``accelerate(coder, exact=True)`` corrects both. ``print(coder)`` says which is in force.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sparsify.sparse_coder as theirs
import torch
from sparsify.fused_encoder import EncoderOutput
from torch import Tensor, nn

from .. import functional
from ..codes import SparseCodes
from . import _base as core

Theirs: Any = Any if TYPE_CHECKING else nn.Module  # with the root of their class, ``__class__`` can be assigned


class _SparseCoder(Theirs):
    _exact = False

    def _codes(self, x: Tensor, *others: Any) -> tuple[tuple[SparseCodes, ...], Tensor]:
        """The codes of top-k and of other rules, and the pre-activations without gradient."""
        W_enc, b_enc = self.encoder.weight.T, self.encoder.bias
        b_dec = None if self.cfg.transcode else self.b_dec
        with torch.no_grad():
            pre = functional.linear(x if b_dec is None else x - b_dec, W_enc, b_enc)
        rules = [core.TopRule(self.cfg.k, straight=not self._exact), *others]
        return functional.encode_with(x, W_enc, b_enc, b_dec=b_dec, select=rules, pre=pre).codes, pre

    def encode(self, x: Tensor) -> EncoderOutput:
        if core.plain_wanted():
            return super().encode(x)
        check_activation(self)
        (codes,), pre = self._codes(x)
        pre = core.pre_activations(
            pre.relu_(), x, self.encoder.weight.T, self.encoder.bias, None if self.cfg.transcode else self.b_dec,
            relu=True, through=self._exact,
        )  # fmt: skip
        return EncoderOutput(*core.per_row(codes), pre)

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        if core.plain_wanted():
            return super().decode(top_acts, top_indices)
        assert self.W_dec is not None, "Decoder weight was not initialized."
        codes = SparseCodes.from_topk(top_acts.to(self.dtype), top_indices, self.num_latents)
        return core.decode(codes, self.W_dec, self.b_dec)

    def _decode(self, codes: SparseCodes, b_dec: Tensor | None) -> Tensor:
        assert self.W_dec is not None, "Decoder weight was not initialized."
        return core.decode(codes.replace(values=codes.values.to(self.dtype)), self.W_dec, b_dec)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> theirs.ForwardOutput:
        if core.plain_wanted():
            return super().forward(x, y, dead_mask=dead_mask, total_variance=total_variance)
        check_activation(self)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_bf16_supported()):
            return self._forward(x, x if y is None else y, dead_mask, total_variance)

    def _forward(self, x, y, dead_mask, total_variance) -> theirs.ForwardOutput:
        num_dead = 0 if dead_mask is None else int(dead_mask.sum())
        k_aux = y.shape[-1] // 2
        aux = [core.TopRule(min(k_aux, num_dead), mask=dead_mask)] if num_dead else []
        multi = [core.TopRule(4 * self.cfg.k)] if self.cfg.multi_topk else []
        (codes, *others), _ = self._codes(x, *aux, *multi)
        if not self._exact:  # sparsify's encoder never hears of them
            others = [other.detach() for other in others]

        sae_out = self._decode(codes, self.b_dec)
        if self.W_skip is not None:
            sae_out = sae_out + x.to(self.dtype) @ self.W_skip.mT
        error = y - sae_out
        if total_variance is None:
            total_variance = (y - y.mean(0)).pow(2).sum()

        auxk_loss = multi_topk_fvu = sae_out.new_tensor(0.0)
        if aux:
            e_hat = self._decode(others[0], None)
            auxk_loss = min(num_dead / k_aux, 1.0) * (e_hat - error.detach()).pow(2).sum() / total_variance
        if multi:
            codes = others[-1]
            sae_out = self._decode(codes, self.b_dec)
            multi_topk_fvu = (sae_out - y).pow(2).sum() / total_variance
        fvu = error.pow(2).sum() / total_variance
        return theirs.ForwardOutput(sae_out, *core.per_row(codes), fvu, auxk_loss, multi_topk_fvu)

    def extra_repr(self) -> str:
        gradient = "exact" if self._exact else "as in sparsify"
        return f"accelerated by sae_engine, gradients {gradient}"


class SparseCoder(_SparseCoder, theirs.SparseCoder):
    pass


class ExactSparseCoder(_SparseCoder, theirs.SparseCoder):
    _exact = True


# ------------------------------------------------------------------------------------------ for accelerate()

CLASSES = core.table(SparseCoder)
EXACT = core.table(ExactSparseCoder)


def check_activation(coder: Any) -> None:
    if coder.cfg.activation != "topk":
        raise core.refuse(coder, f"its cfg.activation is {coder.cfg.activation!r}, and only 'topk' has an operation")


def check(coder: Any, plain: type) -> None:
    """Raises CannotAccelerate where our methods would not do what those of the object do."""
    check_activation(coder)
    names = ("encoder.weight", "encoder.bias", "b_dec", *(["W_dec"] if coder.W_dec is not None else []))
    core.check_module(coder, CLASSES[plain], names)
