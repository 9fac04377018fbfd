"""The forward half of a step: each rule's codes of a batch, and what the decoder makes of them."""
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _passes, functional
from ..autoencoder import SparseAutoencoder
from ..codes import SparseCodes
from ..functional import EncodeInfo
from ..rules.base import PER_TOKEN, Activation
from .chunks import Parts, PreActivations
from .dead import DeadLatents


class Weights(NamedTuple):
    """The weights in the dtype of the computation: the parameters themselves, or copies of them."""

    decoder: Tensor  # (F, d_out)
    encoder: Tensor  # (F, d_in): W_enc transposed


@dataclass
class Kept:
    """What one rule kept of the batch."""

    rule: Activation
    context: dict[str, Tensor]
    codes: SparseCodes
    values: Tensor  # (N,) what the decoder multiplies: codes.values, with decoder norms divided out
    entries: Tensor | None  # (N,) pre-activations that the rule saw, where its values have a derivative of their own
    pre: Tensor | None  # (B, F) of them, where the rule's gradient is dense


@dataclass
class Forward:
    """A batch on its way through the autoencoder. Objectives read it."""

    sae: SparseAutoencoder
    weights: Weights
    norms: Tensor | None  # (F,) of the decoder's rows, where rules see pre-activations times norms
    x: Tensor  # (B, d_in) as the encoder sees it, before b_dec
    target: Tensor  # (B, d_out), fp32 or wider
    info: EncodeInfo
    counters: DeadLatents
    buffer: PreActivations
    backend: str
    kept: list[Kept] = field(default_factory=list)
    runs: dict[int, SparseCodes] = field(default_factory=dict)  # (B, widths): codes cut at nested prefixes' widths
    _residuals: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @functools.cached_property
    def dead(self) -> Tensor:
        """(F,) bool, as before this batch."""
        return self.counters.mask

    @functools.cached_property
    def encoded(self) -> Tensor:
        """(B, d_in) what the encoder multiplies, in the dtype of the computation."""
        x = self.x - self.sae.b_dec if self.sae.apply_b_dec_to_input else self.x
        return x.to(self.weights.encoder.dtype)

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums: fp32, or fp64 where the computation is."""
        return torch.promote_types(self.weights.decoder.dtype, torch.float32)

    def encode(self, rules: Sequence[Activation], context: dict[str, Any], chunk_rows: int) -> None:
        """Fills ``kept``, rule by rule, from the pre-activations of ``chunk_rows`` tokens at a time."""
        given = {**self.sae._context(self.x, list(rules)), **context}
        if any("dead_mask" in rule.context_keys for rule in rules):
            given.setdefault("dead_mask", self.dead)
        contexts = [{name: given[name] for name in rule.context_keys & given.keys()} for rule in rules]
        for name in context.keys() - frozenset().union(*(rule.context_keys for rule in rules)):
            raise TypeError(f"no rule of this step takes {name}")
        parts = [Parts(rule, self.tokens, self.sae.d_sae, self.backend) for rule in rules]
        pre = None
        for start in range(0, self.tokens, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, self.tokens))
            del pre  # before the next chunk's is made
            of_chunk = [{name: t[chunk] if name in PER_TOKEN else t for name, t in c.items()} for c in contexts]
            pre = self._pre_activations(chunk)
            for part, context in zip(parts, of_chunk, strict=True):
                part.add(pre, start, context)
        for rule, whole, part in zip(rules, contexts, parts, strict=True):
            codes, entries = part.merged()
            values = codes.values
            if self.norms is not None:
                values = (values / self.norms_at(codes)).to(values.dtype)
            self.kept.append(Kept(rule, whole, codes, values, entries, pre if rule.entry_values is None else None))

    def _pre_activations(self, rows: slice) -> Tensor:
        """(rows, F) that the rules see, in the dtype of the computation."""
        pre = self.buffer.product(self.encoded[rows], self.weights.encoder.T, self.sae._encoder_bias)
        return pre if self.norms is None else pre.mul_(self.norms)

    @property
    def divisors(self) -> Tensor:
        """The norms, or 1 where they are 0: such a row decodes to 0, whatever it is divided by."""
        assert self.norms is not None
        return torch.where(self.norms == 0, 1.0, self.norms)

    def norms_at(self, codes: SparseCodes) -> Tensor:
        """(N,) divisors, read at the codes."""
        return functional.at_latents(self.divisors, codes)

    def decode(self, number: int) -> Tensor:
        """(B, d_out) weighted sums of decoder rows, for the codes of that number, in fp32 or wider; no b_dec."""
        kept = self.kept[number]
        return _passes.decode(kept.codes, kept.values, self.weights.decoder, self.wide, self.backend)

    def residual(self, number: int) -> tuple[Tensor, Tensor]:
        """(B, d_out) the autoencoder's output for those codes minus the target; its squared norm (B,). Once."""
        if number not in self._residuals:
            kept, info = self.kept[number], self.info
            skips = self.sae.W_skip is not None and info.skipped is not None
            if info.std is None and info.mean is None and not skips:
                self._residuals[number] = _passes.decode_error(
                    kept.codes, kept.values, self.weights.decoder, self.sae.b_dec, self.target, self.backend
                )
            else:
                residual = self._output(number).sub_(self.target)
                self._residuals[number] = residual, torch.linalg.vecdot(residual, residual)
        return self._residuals[number]

    def nested_residuals(self, number: int, widths: Sequence[int]) -> Tensor:
        """(B, widths, d_out) the output of each prefix of the latents minus the target; the last is the residual."""
        kept = self.kept[number]
        runs = self.runs[number] = kept.codes.split_latents(widths)
        parts = _passes.decode(runs, kept.values, self.weights.decoder, self.wide, self.backend)
        prefixes = parts.view(self.tokens, len(widths), -1).cumsum(1)
        residuals = self._finished(prefixes.add_(self.sae.b_dec)).sub_(self.target[:, None])
        last = residuals[:, -1].contiguous()
        self._residuals[number] = last, torch.linalg.vecdot(last, last)
        return residuals

    def _output(self, number: int) -> Tensor:
        """(B, d_out) b_dec, layer norm and skip included."""
        return self._finished(self.decode(number).add_(self.sae.b_dec)[:, None])[:, 0]

    def _finished(self, out: Tensor) -> Tensor:
        """(B, any, d_out) with layer norm undone and the skip connection added."""
        if self.info.std is not None:
            out = out * self.info.std[:, None]
        if self.info.mean is not None:
            out = out + self.info.mean[:, None]
        if self.sae.W_skip is not None and self.info.skipped is not None:
            out = out + (self.info.skipped.to(self.wide) @ self.sae.W_skip.T.to(self.wide))[:, None]
        return out
