"""How many latents may be left out before the language model notices."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import functional
from ..autoencoder import SparseAutoencoder
from .language import NextTokenLoss
from .norms import TailTruncation, contributing_rows
from .place import contexts_for
from .splice import Batch, Normalization, Splice, in_eval_mode

if TYPE_CHECKING:
    from ..data import LanguageModel, Site


@torch.no_grad()
def ppl_sparsity(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    texts: Iterable[str],
    *,
    layer: int | None = None,
    rise: float = 0.01,
    site: str | Site = "resid_pre",
    target_layer: int | None = None,
    target_site: str | Site | None = None,
    normalize: str = "none",
    max_tokens: int | None = None,
    steps: int = 10,
    **contexts: Any,
) -> dict[str, Any]:
    """PPL-p% sparsity: how many latents may be left out before the spliced model's perplexity rises by p %.

    Contributions whose norm (``value * ||W_dec row||``) lies below one threshold are dropped. The threshold is bisected
    on a logarithmic scale, ``steps`` times, between the smallest and the largest contribution of the first batch, for
    the largest at which perplexity exceeds that of the whole codes by at most ``rise``; each step is a pass over the
    texts, whose token ids are held in memory.

    Args:
        rise: p as a fraction: 0.01 is PPL-1 %.
        the others: as :func:`evaluate`.

    Returns:
        ``rise``, ``threshold`` (0 where even the smallest is too much), ``ce`` with it, ``ce_whole``, and, as
        :class:`TailTruncation` has them, ``cett``, ``l0``, ``l0_kept`` and ``off``.

    Raises:
        As :func:`evaluate`; ValueError also where ``rise`` or ``steps`` is not positive.

    Source: Luo et al. 2024, arXiv:2411.02335 (Sparsing Law), for the MLPs of a whole model, with one CETT for all
    layers; for the single layer of an autoencoder, bisecting the CETT is bisecting its threshold.

    Example:
        >>> from sae_engine.data import evaluation_text, load_language_model
        >>> lm = load_language_model()
        >>> sae, options = se.SparseAutoencoder(lm.d_model, 512, se.TopK(8)), {"layer": 2, "max_tokens": 32}
        >>> found = ppl_sparsity(sae, lm, evaluation_text()[:1], context_length=32, steps=1, **options)
        >>> found["l0_kept"] <= found["l0"]
        True
    """
    rise, steps = check.positive("rise", rise), check.integer_k(steps, name="steps")
    splice = Splice(sae, lm, (site, layer), (target_site, target_layer), Normalization(normalize))
    batches = list(splice.batches(texts, max_tokens, **contexts_for(sae, lm, contexts)))
    with in_eval_mode(sae):
        low, high = _contribution_range(splice, batches)
        whole = _truncated(splice, batches, sys.float_info.min)  # drops nothing
        best = {**whole, "threshold": 0.0}
        allowed = whole["ce"] + math.log1p(rise)
        low, high = math.log(low), math.log(high)
        for _ in range(steps):
            middle = (low + high) / 2
            found = _truncated(splice, batches, math.exp(middle))
            low, high, best = (middle, high, found) if found["ce"] <= allowed else (low, middle, best)
    return {"rise": rise, "ce_whole": whole["ce"], **best}


def _contribution_range(splice: Splice, batches: list[Batch]) -> tuple[float, float]:
    """Norms of the smallest and the largest contribution in the first batch that has any."""
    norms, _ = contributing_rows(splice.sae)
    for batch in batches:
        found: list[Tensor] = []

        def look(x: Tensor, y: Tensor, found=found) -> Tensor:
            codes = splice.sae.encode(splice.normalization.into(x)[0])
            found.append((codes.values * functional.at_latents(norms, codes)).abs())
            return y

        splice.logits(batch, look)
        positive = found[0][found[0] > 0].double()
        if len(positive):
            return positive.min().item(), positive.max().item()
    raise RuntimeError("nothing was measured: no latent fires on these texts")


def _truncated(splice: Splice, batches: list[Batch], threshold: float) -> dict[str, Any]:
    """The spliced run in which contributions below ``threshold`` are left out."""
    norms, rows = contributing_rows(splice.sae)
    loss, tail = NextTokenLoss(), TailTruncation(rows, [threshold])

    def reconstruct(x: Tensor, _target: Tensor) -> Tensor:
        z, info = splice.normalization.into(x)
        (codes,), encoded, _ = splice.sae.encode_with(z)
        tail.update(codes)
        dropped = (codes.values * functional.at_latents(norms, codes)).abs() < threshold
        codes = codes.replace(values=torch.where(dropped, 0.0, codes.values))
        return splice.normalization.back(splice.sae.decode(codes, encoded), info)

    for batch in batches:
        splice.add(loss, batch, reconstruct)
    found = tail.compute()
    return {
        "threshold": threshold, "ce": loss.compute()["ce"], "cett": found["cett"][0], "l0": found["l0"],
        "l0_kept": found["l0_kept"][0], "off": found["off"][0],
    }  # fmt: skip
