"""What a page and an export say of latents: which of them, their neighbours, their logit lens, their tokens as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import integer_in
from ..autoencoder import SparseAutoencoder
from ..data.contexts import check_int
from ..data.models import LanguageModel, memory_sha256
from .lens import IN_THE_STREAM, Lens, logit_lens
from .sources import refuse_crosscoder
from .stored import Features

NEIGHBOURS = LENS = 8
BARS = 24


def check(features: Features, sae: SparseAutoencoder, lm: LanguageModel | None) -> None:
    if not isinstance(features, Features):
        raise TypeError(f"features must be Features, got {type(features).__name__}")
    if not isinstance(sae, SparseAutoencoder):
        raise TypeError(f"sae must be a SparseAutoencoder, got {type(sae).__name__}")
    refuse_crosscoder(sae)
    if lm is not None and not isinstance(lm, LanguageModel):
        raise TypeError(f"lm must be a LanguageModel or None, got {type(lm).__name__}")
    manifest = features.manifest
    if memory_sha256(sae) != manifest["sae_sha256"]:
        raise ValueError(f"sae is not the autoencoder whose features lie in {str(features.path)!r}: other weights")
    if lm is not None and lm.sha256 != manifest["sha256"]:
        raise ValueError(
            f"lm is not the model whose features lie in {str(features.path)!r}: that was {manifest['model']!r} with "
            f"weights of sha256 {manifest['sha256']}, this is {lm.name!r} with {lm.sha256}"
        )


def chosen_latents(features: Features, latents: int | Sequence[int] | None) -> list[int]:
    """Which latents, the most frequent first, and of those that fire equally often the lowest."""
    counts = features.counts()
    if latents is None:
        return counts.sort(descending=True, stable=True).indices.tolist()
    if (number := integer_in(latents)) is not None:
        number = check_int("latents", number, 1)
        alive = int((counts > 0).sum())
        if not alive:
            raise ValueError("features: no latent fires on any of their tokens")
        return counts.sort(descending=True, stable=True).indices[: min(number, alive)].tolist()
    if isinstance(latents, str) or not isinstance(latents, Sequence):
        raise TypeError(f"latents must be a number, a sequence of latents or None, got {latents!r}")
    named = sorted({check_int("latents", latent, 0, features.d_sae - 1) for latent in latents})
    if not named:
        raise ValueError("latents must name at least one latent, got none")
    return sorted(named, key=lambda latent: -int(counts[latent]))


class Words:
    """Token ids as text, each decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = f"[{token}]" if self._tokenizer is None else self._tokenizer.decode([token])
        return self._known[token]


def histogram(values: Tensor) -> tuple[list[int], float, float]:
    """How many activations lie in each of some bars, and where the first begins and the last ends; 0 is in it."""
    if not len(values):
        return [0] * BARS, 0.0, 0.0
    values = values.float()
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    return torch.histc(values, BARS, low, high).long().tolist(), low, high


@torch.no_grad()
def geometry(sae: SparseAutoencoder, latents: Tensor) -> dict[str, list[Any]]:
    """Of each latent, the nearest decoder rows, and the cosine between encoder and decoder."""
    latents = latents.to(sae.W_dec.device)
    rows = torch.nn.functional.normalize(sae.W_dec.float(), dim=1)
    cosines = rows[latents] @ rows.T
    cosines[torch.arange(len(latents), device=latents.device), latents] = -torch.inf
    nearest = cosines.topk(min(NEIGHBOURS, sae.d_sae - 1))
    pairs = zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)
    own: list[Any] = [None] * len(latents)
    if not is_transcoder(sae):
        encoder = torch.nn.functional.normalize(sae.W_enc.float()[:, latents], dim=0)
        own = [short(value) for value in (encoder.T * rows[latents]).sum(1).tolist()]
    return {"n": [[(i, short(v)) for i, v in zip(*pair, strict=True)] for pair in pairs], "e": own}


def is_transcoder(sae: SparseAutoencoder) -> bool:
    return sae.d_in != sae.d_out or (sae.provenance is not None and sae.provenance.target_site is not None)


def lens_of(
    features: Features, sae: SparseAutoencoder, lm: LanguageModel | None, chosen: list[int]
) -> tuple[Lens | None, str]:
    """The logit lens of the chosen latents, or None and why there is none."""
    if lm is None:
        return None, "no language model was given"
    site = features.manifest["site"]
    if is_transcoder(sae):
        site = None if sae.provenance is None else sae.provenance.target_site
    if site not in IN_THE_STREAM or sae.d_out != lm.d_model:
        return None, f"decoder rows are directions at {site or 'a place that is not named'}, not in the residual stream"
    return logit_lens(lm, sae.W_dec.detach()[torch.tensor(chosen, device=sae.W_dec.device)], LENS), ""


def short(value: float) -> float:
    return float(f"{value:.4g}")
