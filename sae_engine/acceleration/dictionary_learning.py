"""dictionary_learning's autoencoders on sae_engine's operations. Written for dictionary-learning 0.1.

Encode, decode and forward follow its own: ReLU before the selection, ``k * x.size(0)`` entries for batch rules, the
running ``threshold`` that its trainers keep. Trainers go on as they are.

What stays dense, and why. The encoder's matrix product, the features and the post-ReLU activations: ``encode`` returns
them. The features remember their codes, so that ``decode(features)`` is sparse, and so is its gradient once nobody
holds the features any more, as in these trainers; whoever still holds them in the backward pass can look at their
gradient, and gets it whole. The trainers' AuxK works on the dense activations themselves, by ``ae.decoder``, from the
step on at which something is dead; so does the Matryoshka trainer with ``W_dec``, at every step, and the JumpReLU
trainer, which calls none of the autoencoder's encode. Fewer than 64 tokens are decoded densely where the decoder's
weight would have to be transposed for them.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from dictionary_learning import dictionary
from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k
from torch import Tensor, nn

from .. import functional
from .._encoder import linear_dtype
from ..codes import SparseCodes
from . import _base as core

Theirs: Any = Any if TYPE_CHECKING else dictionary.Dictionary  # with their root, ``__class__`` can be assigned

FEW_TOKENS = 64  # a matrix product reads the decoder once for all of them; transposing it costs more than that


class _Dictionary(Theirs):
    """What all share. A subclass says where its weights are."""

    def _encoder(self) -> tuple[Tensor, Tensor]:
        """(d, F) and (F,)."""
        return self.W_enc, self.b_enc

    def _decoder(self) -> Tensor:
        """(F, d), each latent's row in one piece."""
        return self.W_dec.contiguous()

    def _center(self) -> Tensor | None:
        return self.b_dec

    def _pre(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
        """Pre-activations without gradient, in the dtype of a product and a sum: autocast leaves the bias alone."""
        with torch.no_grad():
            wide = torch.promote_types(linear_dtype(x, W_enc), b_enc.dtype)
            return functional.linear(x if b_dec is None else x - b_dec, W_enc, b_enc, result_dtype=wide)

    def _watches(self) -> bool:
        """Whether somebody listens to the linear layers, which only dictionary_learning's own code calls, or to all."""
        return core.plain_wanted() or any(core.listened(layer) for layer in self.children())

    def _encode(self, x: Tensor, rule: Any) -> tuple[SparseCodes, Tensor]:
        """Codes, and the pre-activations without gradient."""
        W_enc, b_enc = self._encoder()
        b_dec = self._center()
        pre = self._pre(x, W_enc, b_enc, b_dec)
        return functional.encode(x, W_enc, b_enc, b_dec=b_dec, select=rule, pre=pre), pre

    def _relu(self, x: Tensor, pre: Tensor) -> Tensor:
        """The post-ReLU activations, differentiable. Takes ``pre`` for its own."""
        return core.pre_activations(pre.relu_(), x, *self._encoder(), self._center(), relu=True)

    def _decode(self, codes: SparseCodes) -> Tensor:
        return core.decode(codes, self._decoder(), self.b_dec)

    def decode(self, x: Tensor) -> Tensor:
        codes = core.codes_of(x)
        if codes is None or codes.rows < FEW_TOKENS or self._watches():
            return super().decode(x)
        return core.decode_dense(x, codes, self._decoder(), self.b_dec)

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        if output_features or self._watches() or x.shape[:-1].numel() < FEW_TOKENS:
            return super().forward(x, output_features=output_features)
        return self._forward(x)

    def extra_repr(self) -> str:
        return "accelerated by sae_engine"


class _Linear(_Dictionary):
    """Weights in linear layers: ``encoder.weight`` (F, d), ``decoder.weight`` (d, F)."""

    def _encoder(self) -> tuple[Tensor, Tensor]:
        return self.encoder.weight.T, self.encoder.bias

    def _decoder(self) -> Tensor:
        return self.decoder.weight.T.contiguous()

    def _pre(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
        with torch.no_grad():  # autocast gives a linear layer's result its own dtype
            return functional.linear(x if b_dec is None else x - b_dec, W_enc, b_enc)


class _Thresholded(_Dictionary):
    """Inference by a threshold: codes where few latents are active, dictionary_learning's dense formula otherwise."""

    def _above(self, x: Tensor, *others: Any) -> tuple[tuple[SparseCodes, ...] | None, Tensor]:
        """Codes above the threshold and those of other rules, or None where they would not pay; pre-activations."""
        W_enc, b_enc = self._encoder()
        b_dec = self._center()
        pre = self._pre(x, W_enc, b_enc, b_dec)
        theta = self.threshold.detach().clamp(min=0)  # a ReLU comes first
        if core.too_dense(pre, theta):
            return None, pre
        rules = [core.AboveRule(theta), *others]
        return functional.encode_with(x, W_enc, b_enc, b_dec=b_dec, select=rules, pre=pre).codes, pre

    def _dense(self, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Features as dictionary_learning computes them, and the post-ReLU activations. Takes ``pre`` for its own."""
        post_relu = self._relu(x, pre)
        return post_relu * (post_relu > self.threshold), post_relu

    def _forward(self, x: Tensor) -> Tensor:
        codes, pre = self._above(x)
        return self.decode(self._dense(x, pre)[0]) if codes is None else self._decode(codes[0])


class AutoEncoderTopK(_Linear, _Thresholded, top_k.AutoEncoderTopK):
    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        if self._watches():
            return super().encode(x, return_topk=return_topk, use_threshold=use_threshold)
        top = core.TopRule(int(self.k))
        if not use_threshold:
            best, pre = self._encode(x, top)
            features = core.remember(best.to_dense(), best)
        else:
            codes, pre = self._above(x, *([top] if return_topk else []))
            if codes is None:
                features, post_relu = self._dense(x, pre)
                if not return_topk:
                    return features
                best = functional.topk(post_relu, top.k)
                return features, *core.per_row(best), post_relu
            features = core.remember(codes[0].to_dense(), codes[0])
            best = codes[-1]
        return (features, *core.per_row(best), self._relu(x, pre)) if return_topk else features

    def _forward(self, x: Tensor) -> Tensor:
        return self._decode(self._encode(x, core.TopRule(int(self.k)))[0])


class _BatchTopK(_Thresholded):
    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        if self._watches():
            return super().encode(x, return_active=return_active, use_threshold=use_threshold)
        if use_threshold:
            several, pre = self._above(x)
            codes = None if several is None else several[0]
        else:
            codes, pre = self._encode(x, core.BudgetRule(int(self.k) * x.size(0)))
        if codes is None:
            features, post_relu = self._dense(x, pre)
            features = self._within_groups(features)
        else:
            features, codes = self._features(codes)
            post_relu = self._relu(x, pre) if return_active else pre
        if not return_active:
            return features
        active = features.sum(0) > 0 if codes is None or features.dim() != 2 else _fired(codes)
        return features, active, post_relu

    def _features(self, codes: SparseCodes) -> tuple[Tensor, SparseCodes | None]:
        return core.remember(codes.to_dense(), codes), codes

    def _within_groups(self, features: Tensor) -> Tensor:
        return features


class BatchTopKSAE(_Linear, _BatchTopK, batch_top_k.BatchTopKSAE):
    pass


class MatryoshkaBatchTopKSAE(_BatchTopK, matryoshka_batch_top_k.MatryoshkaBatchTopKSAE):
    """Latents beyond the active groups are set to 0 after the selection, which may have spent some of its k on them."""

    def _limit(self) -> int:
        return int(self.group_indices[self.active_groups])

    def _features(self, codes: SparseCodes) -> tuple[Tensor, SparseCodes | None]:
        if self._limit() >= self.dict_size:
            return super()._features(codes)
        if len(codes.batch_shape) != 1:
            return self._within_groups(codes.to_dense()), None
        return super()._features(self._limited(codes))

    def _limited(self, codes: SparseCodes) -> SparseCodes:
        return codes.replace(values=torch.where(codes.indices < self._limit(), codes.values, 0.0))

    def _within_groups(self, features: Tensor) -> Tensor:
        features[:, self._limit() :] = 0  # the second dimension, whatever it is: as dictionary_learning does
        return features

    def _forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            return self.decode(self.encode(x))
        codes, pre = self._above(x)
        if codes is None:
            return self.decode(self._within_groups(self._dense(x, pre)[0]))
        return self._decode(self._limited(codes[0]))


class JumpReluAutoEncoder(_Thresholded, dictionary.JumpReluAutoEncoder):
    """Its threshold has no gradient here, in dictionary_learning either: the trainer has a JumpReLU of its own."""

    def _center(self) -> Tensor | None:
        return self.b_dec if self.apply_b_dec_to_input else None

    def _dense(self, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
        pre_jump = core.pre_activations(pre, x, *self._encoder(), self._center())
        return nn.functional.relu(pre_jump * (pre_jump > self.threshold)), pre_jump

    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Any:
        if self._watches():
            return super().encode(x, output_pre_jump=output_pre_jump)
        codes, pre = self._above(x)
        if codes is None:
            features, pre_jump = self._dense(x, pre)
            return (features, pre_jump) if output_pre_jump else features
        features = core.remember(codes[0].to_dense(), codes[0])
        if not output_pre_jump:
            return features
        return features, core.pre_activations(pre, x, *self._encoder(), self._center())


def _fired(codes: SparseCodes) -> Tensor:
    """Latents that are positive somewhere, (F,)."""
    fired = torch.zeros(codes.num_latents + 1, dtype=torch.bool, device=codes.device)
    fired[torch.where(codes.values > 0, codes.indices.long(), codes.num_latents)] = True
    return fired[:-1]


# ------------------------------------------------------------------------------------------ for accelerate()

CLASSES = core.table(AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE, JumpReluAutoEncoder)
EXACT: dict[type, type] = {}


def check(dictionary_: Any, plain: type) -> None:
    """Raises CannotAccelerate where our methods would not do what those of the object do."""
    ours = CLASSES[plain]
    linear = issubclass(ours, _Linear)
    weights = ("encoder.weight", "encoder.bias", "decoder.weight") if linear else ("W_enc", "b_enc", "W_dec")
    for name, layer in dictionary_.named_children():
        if type(layer) is not nn.Linear:
            raise core.refuse(dictionary_, f"its {name} is a {type(layer).__name__}, not an nn.Linear")
    if linear and (dictionary_.encoder.bias is None or dictionary_.decoder.bias is not None):
        raise core.refuse(dictionary_, "its encoder must have a bias, and its decoder none")
    core.check_module(dictionary_, ours, (*weights, "b_dec"))
