"""A language model with an autoencoder's reconstruction, or anything else, in the place of a site's activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as check
from ..autoencoder import LAYER_NORM_EPS, SparseAutoencoder
from .language import NextTokenLoss

if TYPE_CHECKING:
    from ..data import LanguageModel, Site
    from ..data.contexts import Contexts

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


class Splice:
    """A language model with something in the place of one site's activations: the input's, or a transcoder's target."""

    def __init__(
        self, sae: SparseAutoencoder, lm: LanguageModel, place: tuple[str | Site, int | None],
        target: tuple[str | Site | None, int | None], normalization: Normalization,
    ) -> None:  # fmt: skip
        from ..data.places import find_place, input_device
        from ..data.sites import SITES, Site

        self.normalization = normalization
        if not isinstance(sae, SparseAutoencoder):
            raise TypeError(f"sae must be a SparseAutoencoder, got {type(sae).__name__}")
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
        self._device = input_device(lm.model)
        self._inputs: tuple[Tensor, Tensor] | None = None  # token ids and what the transcoder is given for them

    def batches(self, texts: Iterable[Any], max_tokens: int | None, **settings: Any) -> Iterator[Tensor]:
        """Token ids on the model's device; arguments are checked now, texts are read when asked for.

        ``settings`` are those of :func:`sae_engine.data.stream_activations`. What they exclude stays as it is in every
        run and is no row, but what it predicts is measured, except of each context's first position.
        """
        from ..data.activations import check_stream
        from ..data.contexts import unpadded

        contexts, limit = check_stream(self.lm, texts, None, self.place, max_tokens, **settings)
        self.first = int(0 in contexts.excluded_positions)
        self.words = contexts.words
        self._tokens = torch.tensor(contexts.excluded_tokens, dtype=torch.int64, device=self._device)
        self._positions = [position for position in contexts.excluded_positions if position]
        return (ids.to(self._device) for ids in _limited(unpadded(self.lm, texts, contexts), contexts, limit))

    def measured(self, ids: Tensor) -> Tensor:
        return ids[:, self.first :]

    def logits(self, ids: Tensor, replace: Replace) -> Tensor:
        """Logits of the measured positions, with ``replace`` of input and target rows in the target's place."""
        from ..data.activations import run_with_replacement

        rows = self._row_numbers(ids)

        def on_site(hidden: Tensor) -> Tensor:
            y = self._rows(hidden, rows)
            new = replace(self._input(ids, rows) if self.is_transcoder else y, y)
            flat, new = hidden.flatten(0, 1), new.to(hidden.device, hidden.dtype)
            return flat.index_copy(0, rows.to(hidden.device), new).view(hidden.shape)

        return self.measured(run_with_replacement(self.lm.model, ids, on_site, site=self.target))

    def add(self, loss: NextTokenLoss, ids: Tensor, replace: Replace, *, clean: Tensor | None = None) -> Tensor:
        """Adds to ``loss`` what :meth:`logits` predicts of ``ids``; returns the logits."""
        logits = self.logits(ids, replace)
        loss.update(logits, self.measured(ids).to(logits.device), clean=clean)
        return logits

    def _row_numbers(self, ids: Tensor) -> Tensor:
        """Which positions of (contexts * length) are rows, ascending."""
        rows = self.measured(torch.arange(ids.numel(), device=ids.device).view(ids.shape))
        if not len(self._tokens) and not self._positions:  # nothing waits for the device to say how many there are
            return rows.flatten()
        keep = ~torch.isin(ids, self._tokens)
        keep[:, [position for position in self._positions if position < ids.shape[1]]] = False
        return rows[self.measured(keep)]

    def _rows(self, hidden: Tensor, rows: Tensor) -> Tensor:
        found = hidden.flatten(0, 1)[rows.to(hidden.device)]
        return found.to(self.sae.W_dec.device, torch.promote_types(hidden.dtype, torch.float32))

    def _input(self, ids: Tensor, rows: Tensor) -> Tensor:
        """What a transcoder is given, once for all runs over these ids: nothing before its target is replaced."""
        from ..data.activations import read_activations

        if self._inputs is None or self._inputs[0] is not ids:
            self._inputs = ids, self._rows(read_activations(self.lm.model, ids, site=self.place), rows)
        return self._inputs[1]


def _limited(batches: Iterator[Tensor], contexts: Contexts, max_tokens: int | None) -> Iterator[Tensor]:
    """Batches of contexts that hold exactly ``max_tokens`` rows."""
    left = max_tokens
    for ids in batches:
        if left is not None:
            positions = torch.arange(ids.shape[1]).expand(ids.shape)
            kept = contexts.kept(ids, positions, torch.ones_like(ids, dtype=torch.bool))
            if len(kept) >= left:
                whole, rest = divmod(int(kept[left - 1]) + 1, ids.shape[1])
                if whole:
                    yield ids[:whole]
                if rest:
                    yield ids[whole : whole + 1, :rest]
                return
            left -= len(kept)
        yield ids
