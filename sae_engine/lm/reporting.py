"""What a language model that skips weights keeps, reads, and loses."""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.models import LanguageModel, load_language_model
from ..metrics import NextTokenLoss
from .fit import run, token_ids
from .layers import MOST_ROWS, skipping
from .places import shape_of


@dataclass(frozen=True)
class LayerReport:
    """One module.

    Attributes:
        name: of the module in the model.
        density: share of its entries that a token keeps, on average.
        union: share that any of 8 tokens of different contexts or places keeps: what a batch of 8 reads.
        bytes_read: of the module's weights, as a share, for one token.
    """

    name: str
    density: float
    union: float
    bytes_read: float


@dataclass(frozen=True)
class Report:
    """A model on texts, by layer and as a whole.

    Attributes:
        layers: of the modules that skip weights, in their order.
        tokens: that were looked at, all positions.
        perplexity_before, perplexity_after: of the plain model, and of the one that skips.
    """

    layers: tuple[LayerReport, ...]
    tokens: int
    perplexity_before: float
    perplexity_after: float

    @property
    def rise(self) -> float:
        """Of the perplexity, as a share of what it was."""
        return self.perplexity_after / self.perplexity_before - 1

    def __str__(self) -> str:
        """A table in Markdown."""
        rows = [f"| {one.name} | {one.density:.1%} | {one.union:.1%} | {1 - one.bytes_read:.1%} |"
                for one in self.layers]  # fmt: skip
        return "\n".join([
            f"| module | kept | kept by any of {MOST_ROWS} tokens | bytes skipped |", "|---|---|---|---|", *rows, "",
            f"perplexity {self.perplexity_before:.3f} → {self.perplexity_after:.3f} ({self.rise:+.2%}) "
            f"on {self.tokens:,} tokens",
        ])  # fmt: skip


@torch.no_grad()
def report(
    lm: LanguageModel | nn.Module, texts: Iterable[Any], *, tokens: int | None = None,
    context_length: int | None = None, batch_size: int = 8,
) -> Report:  # fmt: skip
    """Runs a model that skips weights on texts, with and without that.

    Args:
        lm: after :func:`sparsify` or :func:`se.accelerate`; with its tokenizer, or a model where texts are token ids.
        texts: not those that the rule was fitted on.
        tokens: of the texts, all positions; default all.
        context_length, batch_size: as :func:`sae_engine.data.stream_activations`.

    Raises:
        ValueError, TypeError: the model skips nothing, or an argument is out of range.
        RuntimeError: the texts hold no token.

    Example:
        >>> from sae_engine.data import evaluation_text, load_language_model
        >>> lm = se.lm.sparsify(load_language_model(), se.lm.TopShare(0.5), at="hidden")
        >>> found = se.lm.report(lm, evaluation_text()[:1], tokens=64, context_length=32)
        >>> round(found.layers[0].density, 2)
        0.5
    """
    lm = lm if isinstance(lm, LanguageModel) else load_language_model(lm)
    modules = skipping(lm.model)
    if not modules:
        raise ValueError("lm skips no weights: sparsify or accelerate it first")
    batches = token_ids(lm, texts, tokens, context_length, batch_size)
    meters = {name: _Meter() for name in modules}
    with _turned(modules, on=False):
        before = perplexity(lm, batches)
    for name, module in modules.items():
        module._selection.seen = meters[name]  # type: ignore[union-attr]
    try:
        after = perplexity(lm, batches)
    finally:
        for module in modules.values():
            module._selection.seen = None  # type: ignore[union-attr]
    layers = tuple(_of_layer(name, module, meters[name]) for name, module in modules.items())
    return Report(layers, sum(ids.numel() for ids in batches), before, after)


def perplexity(lm: LanguageModel, batches: Iterable[Tensor]) -> float:
    """Of the next tokens, all positions of each context."""
    loss = NextTokenLoss()
    for ids, logits in run(lm, batches):
        loss.update(logits, ids)
    return math.exp(loss.compute()["ce"])


@contextmanager
def _turned(modules: dict[str, nn.Module], *, on: bool) -> Iterator[None]:
    selections: list[Any] = [module._selection for module in modules.values()]
    before = [selection.is_on for selection in selections]
    for selection in selections:
        selection.is_on = on
    try:
        yield
    finally:
        for selection, was in zip(selections, before, strict=True):
            selection.is_on = was


class _Meter:
    """Counts, on the device, what tokens keep each and together."""

    def __init__(self) -> None:
        self.kept: Any = 0
        self.entries = 0
        self.together: Any = 0
        self.possible = 0

    def __call__(self, kept: Tensor) -> None:
        self.kept = self.kept + kept.sum()
        self.entries += kept.numel()
        rows = len(kept) // MOST_ROWS * MOST_ROWS
        if rows:  # one union is of tokens far apart, as the tokens of a batch are
            together = kept[:rows].view(MOST_ROWS, -1, kept.shape[1]).any(0)
            self.together = self.together + together.sum()
            self.possible += together.numel()


def _of_layer(name: str, module: Any, meter: _Meter) -> LayerReport:
    density = float(meter.kept) / max(meter.entries, 1)
    union = float(meter.together) / meter.possible if meter.possible else float("nan")
    halves = module._selection.halves
    if halves is None:
        return LayerReport(name, density, union, density)
    linears = [getattr(module, child) for child in halves.linears()]
    whole = sum(math.prod(shape_of(linear)) for linear in linears)
    width, out = shape_of(linears[-1])
    skippable = width * (out + shape_of(linears[0])[0])  # W_down, and as many rows of W_up
    return LayerReport(name, density, union, 1 - (1 - density) * skippable / whole)
