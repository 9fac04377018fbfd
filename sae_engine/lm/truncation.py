"""How many neurons a language model can do without: one CETT for all layers, as high as the perplexity allows."""
from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..codes import SparseCodes
from ..data.models import LanguageModel, load_language_model
from ..metrics.norms import TailTruncation
from .fit import counted, fitted_on, plain, quantile, scales_of, token_ids, watched_pass
from .layers import skipping
from .places import Found, by_input, find
from .reporting import perplexity
from .switching import restore, sparsify
from .weighed import Threshold

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.97, 0.99)
CETT_TOKENS = 8192  # from which each layer's curve is taken: one sum of neurons a token for each share


@torch.no_grad()
def ppl_sparsity(
    lm: LanguageModel | nn.Module, texts: Iterable[Any], *, rise: float = 0.01, layers: Iterable[int] | None = None,
    tokens: int | None = None, context_length: int | None = None, batch_size: int = 8, steps: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """PPL-p% activation sparsity: how many neurons may be left out before the model's perplexity rises by p %.

    Neuron j contributes ``h_j * w_j`` to an MLP, w_j its column of W_down. What a layer leaves out are contributions
    whose norm is at most a threshold; CETT (cumulative errors of tail truncation) is the norm of what is left out over
    that of the MLP's output, mean over tokens. One CETT holds for all layers, each of which has the threshold that
    leads to it; the CETT is bisected, ``steps`` times.

    Args:
        lm: not one that skips weights already.
        texts, layers, tokens, context_length, batch_size: as :meth:`Threshold.fit`; the same texts are measured.
        rise: p as a share, 0.01 for 1 %.
        steps: of the bisection, a pass over the texts each.

    Returns:
        ``cett``; ``density``, the share of neurons kept, mean over layers; ``densities`` by module; ``perplexity`` and
        ``perplexity_whole``; ``rule``, the :class:`Threshold` that does it, for :func:`sparsify`.

    Raises:
        CannotAccelerate (a TypeError): there is no MLP that can be taken so, or the model skips weights already.
        ValueError, TypeError: an argument is out of range; names it.
        RuntimeError: the texts hold no token.

    Source: Luo et al. 2024, arXiv:2411.02335 (Sparsing Law).

    Example:
        >>> from sae_engine.data import evaluation_text, load_language_model
        >>> found = ppl_sparsity(load_language_model(), evaluation_text()[:1], tokens=64, context_length=32, steps=2)
        >>> found["perplexity"] <= 1.01 * found["perplexity_whole"]
        True
    """
    rise, steps = check.positive("rise", rise), check.integer_k(steps, name="steps")
    lm = plain(lm if isinstance(lm, LanguageModel) else load_language_model(lm))
    found, _ = find(lm.model, "hidden", layers)
    batches = token_ids(lm, texts, tokens, context_length, batch_size)
    learned = fitted_on(found)
    for name, scale in scales_of("down", lm, found, batches).items():
        learned[name].scale = scale
    few = _at_most(batches, CETT_TOKENS)
    counts = counted(lm, found, few, learned)
    curves = _curves(lm, found, few, {name: [quantile(c, share) for share in SHARES] for name, c in counts.items()})
    rule = Threshold(0.0, weigh="down")
    rule.layers, rule.at = learned, "hidden"
    whole = perplexity(lm, batches)
    low, high = 0.0, min(cett[-1] for _, cett in curves.values())
    best: dict[str, Any] = {"cett": 0.0, "perplexity": whole, "thresholds": dict.fromkeys(curves, 0.0)}
    for _ in range(steps):
        middle = (low + high) / 2
        thresholds = {name: _threshold_at(middle, *curve) for name, curve in curves.items()}
        with_it = _perplexity_with(rule, thresholds, lm, batches)
        if with_it <= whole * (1 + rise):
            low, best = middle, {"cett": middle, "perplexity": with_it, "thresholds": thresholds}
        else:
            high = middle
    _set(rule, best.pop("thresholds"))
    densities = _densities(counts, rule)
    for name, density in densities.items():
        learned[name].density = density
    rule.sparsity = 1 - sum(densities.values()) / len(densities)
    rule.model = {"name": lm.name, "revision": lm.revision, "sha256": lm.sha256,
                  "tokens": sum(ids.numel() for ids in batches)}  # fmt: skip
    return {**best, "rise": rise, "perplexity_whole": whole, "density": 1 - rule.sparsity, "densities": densities,
            "rule": rule}  # fmt: skip


def _at_most(batches: list[Tensor], tokens: int) -> list[Tensor]:
    taken, few = 0, []
    for ids in batches:
        few.append(ids)
        taken += ids.numel()
        if taken >= tokens:
            break
    return few


def _curves(
    lm: LanguageModel, found: list[Found], batches: list[Tensor], thresholds: dict[str, list[Tensor]]
) -> dict[str, tuple[list[float], list[float]]]:
    """By module: thresholds, ascending, and the CETT of each."""
    tails = {}
    for one in found:
        ascending = sorted({float(t) for t in thresholds[one.name]} - {0.0})
        tails[one.name] = TailTruncation(by_input(one.down), ascending or [torch.finfo(torch.float32).tiny])

    def look(name: str, p: Tensor, u: Tensor | None) -> None:
        tails[name].update(SparseCodes.from_dense(p))

    watched_pass(lm, found, batches, look)
    return {name: (tail.thresholds, tail.compute()["cett"]) for name, tail in tails.items()}


def _threshold_at(cett: float, thresholds: list[float], cetts: list[float]) -> float:
    """Straight between the points that were measured, from 0 at 0."""
    before = (0.0, 0.0)
    for threshold, reached in zip(thresholds, cetts, strict=True):
        if reached >= cett:
            share = (cett - before[1]) / (reached - before[1]) if reached > before[1] else 1.0
            return before[0] + share * (threshold - before[0])
        before = threshold, reached
    return thresholds[-1]


def _set(rule: Threshold, thresholds: dict[str, float]) -> None:
    for name, threshold in thresholds.items():
        scale = rule.layers[name].scale
        assert scale is not None
        rule.layers[name].threshold = scale.new_full((), threshold)


def _perplexity_with(
    rule: Threshold, thresholds: dict[str, float], lm: LanguageModel, batches: list[Tensor]
) -> float:
    _set(rule, thresholds)
    sparsify(lm, rule)
    try:
        return perplexity(lm, batches)
    finally:
        restore(lm)
        assert not skipping(lm.model)


def _densities(counts: dict[str, Tensor], rule: Threshold) -> dict[str, float]:
    """Shares of scores above the thresholds, to within a bin."""
    found = {}
    for name, bins in counts.items():
        threshold = rule.layers[name].threshold
        assert threshold is not None
        place = int(threshold.cpu().view(torch.int32)) >> 15
        found[name] = float(bins[place + 1 :].sum()) / max(float(bins.sum()), 1.0)
        if math.isclose(float(threshold), 0.0):
            found[name] = float(bins[1:].sum()) / max(float(bins.sum()), 1.0)
    return found
