"""A language model with an autoencoder's reconstruction, or anything else, in the place of a site's activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from ..autoencoder import LAYER_NORM_EPS, SparseAutoencoder
from .language import NextTokenLoss

if TYPE_CHECKING:
    from ..data import LanguageModel, Site
    from ..data.contexts import TokenBatch

NORMALIZATIONS = {
    "none": "raw",
    "token": f"per-token normalized: (x - mean) / (std_unbiased + {LAYER_NORM_EPS:g})",
}


class Normalization:
    """Between the model's activations and the space in which an autoencoder was trained.

    ``scale`` multiplies what the autoencoder is given, and ``target_scale`` is what its output is larger by than the
    activations that it stands for: both are 1 but in training, where an autoencoder does not hold its own yet.
    """

    def __init__(self, kind: str, scale: float = 1.0, target_scale: float | None = None) -> None:
        if kind not in NORMALIZATIONS:
            raise ValueError(f"normalize must be one of {tuple(NORMALIZATIONS)}, got {kind!r}")
        self.kind, self.space = kind, NORMALIZATIONS[kind]
        self.scale = check.positive("scale", scale)
        self.target_scale = self.scale if target_scale is None else check.positive("target_scale", target_scale)

    def into(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x (tokens, d) in the autoencoder's space, and what :meth:`back` needs."""
        if self.kind == "none":
            return x if self.scale == 1 else x * self.scale, None
        mean, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + LAYER_NORM_EPS
        return (x - mean) / scale, (mean, scale)

    def back(self, x_hat: Tensor, info: tuple[Tensor, Tensor] | None) -> Tensor:
        if info is not None:
            return x_hat * info[1] + info[0]
        return x_hat if self.target_scale == 1 else x_hat / self.target_scale


@contextmanager
def in_eval_mode(sae: SparseAutoencoder) -> Iterator[None]:
    training = [module for module in sae.modules() if module.training]
    sae.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


Replace = Callable[[Tensor, Tensor], Tensor]  # (input rows, target rows) → what takes the target's place


class Batch(NamedTuple):
    """Contexts on the model's device, with what of them is measured.

    ``rows`` are the places in (contexts * tokens) that are replaced and measured, ascending. ``spans`` are the
    contexts, each with the range of its tokens that predict or are predicted, without padding.
    """

    ids: Tensor
    mask: Tensor | None
    rows: Tensor
    spans: list[tuple[slice, slice]]


class Splice:
    """A language model with something in the place of one site's activations: the input's, or a transcoder's target."""

    def __init__(
        self, sae: SparseAutoencoder, lm: LanguageModel, place: tuple[str | Site, int | None],
        target: tuple[str | Site | None, int | None], normalization: Normalization,
    ) -> None:  # fmt: skip
        from ..data.places import find_place
        from ..data.sites import SITES, Site

        self.normalization = normalization
        if not isinstance(sae, SparseAutoencoder):
            raise TypeError(f"sae must be a SparseAutoencoder, got {type(sae).__name__}")
        if sae.has_sites:
            raise TypeError("sae must be an autoencoder at one place, got a Crosscoder: evaluate_sites() measures it")
        self.sae, self.lm = sae, lm
        self.place = self.target = Site.of(*place)
        target_site, target_layer = target
        if target_site is None and target_layer is not None:
            raise ValueError(f"target_site must be given with target_layer={target_layer!r}")
        if target_site is not None:
            beside = target_layer is None and target_site in SITES
            self.target = Site.of(target_site, self.place.layer if beside else target_layer)
        self.is_transcoder = self.target != self.place
        if self.is_transcoder and normalization.kind != "none":
            raise ValueError(f"normalize must be 'none' for a transcoder, got {normalization.kind!r}")
        if sae.d_in != sae.d_out and not self.is_transcoder:
            raise ValueError(
                f"target_site must be given: sae is a transcoder, with d_in = {sae.d_in} and d_out = {sae.d_out}"
            )
        for name, width, site in (("d_in", sae.d_in, self.place), ("d_out", sae.d_out, self.target)):
            there = find_place(lm.model, site).width
            if width != there:
                raise ValueError(f"sae must have {name} = {there}, the width of {lm.name!r} at {site}, got {width}")
        self._inputs: tuple[Batch, Tensor] | None = None  # what the transcoder is given for a batch

    def batches(self, texts: Iterable[Any], max_tokens: int | None, **settings: Any) -> Iterator[Batch]:
        """As :func:`batches_of`; afterwards :attr:`words` has the settings in words."""
        self.words, found = batches_of(self.lm, self.place, texts, max_tokens, **settings)
        return found

    def logits(self, batch: Batch, replace: Replace) -> Tensor:
        """Logits with ``replace`` of input and target rows in the target's place."""
        from ..data.replacing import run_with_replacement

        def on_site(hidden: Tensor) -> Tensor:
            y = self._rows(hidden, batch)
            new = replace(self._input(batch) if self.is_transcoder else y, y)
            flat, new = hidden.flatten(0, 1), new.to(hidden.device, hidden.dtype)
            return flat.index_copy(0, batch.rows.to(hidden.device), new).view(hidden.shape)

        return run_with_replacement(self.lm.model, batch.ids, on_site, site=self.target, attention_mask=batch.mask)

    def add(self, loss: NextTokenLoss, batch: Batch, replace: Replace, *, clean: Tensor | None = None) -> Tensor:
        """Adds to ``loss`` what is predicted of ``batch``, beside a run's logits ``clean``; returns the logits."""
        return predicted(loss, batch, self.logits(batch, replace), clean)

    def _rows(self, hidden: Tensor, batch: Batch) -> Tensor:
        found = hidden.flatten(0, 1)[batch.rows.to(hidden.device)]
        return found.to(self.sae.W_dec.device, torch.promote_types(hidden.dtype, torch.float32))

    def _input(self, batch: Batch) -> Tensor:
        """What a transcoder is given, once for all runs of a batch: nothing before its target is replaced."""
        from ..data.activations import read_activations

        if self._inputs is None or self._inputs[0] is not batch:
            hidden = read_activations(self.lm.model, batch.ids, site=self.place, attention_mask=batch.mask)
            self._inputs = batch, self._rows(hidden, batch)
        return self._inputs[1]


def batches_of(
    lm: LanguageModel, site: Site, texts: Iterable[Any], max_tokens: int | None, **settings: Any
) -> tuple[dict[str, Any], Iterator[Batch]]:
    """Contexts on the model's device; arguments are checked now, texts are read when asked for.

    ``settings`` are those of :func:`sae_engine.data.stream_activations`, and ``packing``, which come back in words.
    Tokens that they exclude stay as they are in every run and give no row, but what they predict is measured, except at
    each context's first position.
    """
    from ..data.activations import check_stream
    from ..data.contexts import token_batches
    from ..data.places import input_device

    contexts, limit = check_stream(lm, texts, None, site, max_tokens, **settings)
    first, device = int(0 in contexts.excluded_positions), input_device(lm.model)
    found = _limited(token_batches(lm, texts, contexts), limit)
    return contexts.words, (_placed(device, ids, mask, rows, first) for ids, mask, rows in found)


def _placed(device: torch.device, ids: Tensor, mask: Tensor | None, rows: Tensor, first: int) -> Batch:
    if mask is None:
        spans = [(slice(None), slice(first, ids.shape[1]))]
    else:
        begins, counts = mask.int().argmax(1).tolist(), mask.sum(1).tolist()
        spans = [(slice(n, n + 1), slice(begin + first, begin + count))
                 for n, (begin, count) in enumerate(zip(begins, counts, strict=True)) if count > first]  # fmt: skip
        mask = mask.to(device)
    return Batch(ids.to(device), mask, rows.to(device), spans)


def predicted(loss: NextTokenLoss, batch: Batch, logits: Tensor, clean: Tensor | None = None) -> Tensor:
    """Adds to ``loss`` what ``logits`` predict of ``batch``, beside those of another run; returns them."""
    ids = batch.ids.to(logits.device)
    for span in batch.spans:
        loss.update(logits[span], ids[span], clean=None if clean is None else clean[span])
    return logits


def _limited(batches: Iterator[TokenBatch], left: int | None) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Token ids, masks and numbers of rows of batches that have ``left`` rows, in whole contexts and one part."""
    for batch in batches:
        ids, mask, kept = batch.input_ids, batch.attention_mask, batch.kept
        if left is None or len(kept) < left:
            yield ids, mask, kept
            left = None if left is None else left - len(kept)
            continue
        kept, length = kept[:left], ids.shape[1]
        whole, rest = divmod(int(kept[-1]) + 1, length)
        for contexts, tokens in ((slice(0, whole), length), (slice(whole, whole + 1), rest)):
            if contexts.start < contexts.stop and tokens:
                here = kept[(kept >= contexts.start * length) & (kept < contexts.stop * length)]
                of_mask = None if mask is None else mask[contexts, :tokens]
                yield ids[contexts, :tokens], of_mask, here - contexts.start * length
        return
