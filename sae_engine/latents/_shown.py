"""What a page and an export say of latents: which of them, their neighbours, their logit lens, their tokens as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import integer_in
from ..autoencoder import SparseAutoencoder
from ..data.contexts import check_int
from ..data.models import LanguageModel, memory_sha256
from ..data.sites import Site
from ..provenance import Provenance
from .lens import ADDED, IN_THE_STREAM, Lens, logit_lens
from .sources import OneSource, refuse_crosscoder
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
    others = manifest.get("other_sha256", [])
    if lm is not None and others != [other.sha256 for other in lm.others][: len(others)]:
        raise ValueError(f"lm must be together() of the models whose features lie in {str(features.path)!r}")


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


class SiteLens(NamedTuple):
    """What latents write to one site, or to all: its name, and of each latent the share of its squared decoder norm."""

    name: str
    lens: Lens
    shares: list[float]


def written_by(features: Features, sae: SparseAutoencoder) -> list[tuple[Site | None, slice]]:
    """The sites that decoder rows write, as far as they are known, and the columns of each."""
    if isinstance(sae, OneSource) and len(sae.written_widths) > 1:
        sites = sae.written_places or (None,) * len(sae.written_widths)
        return list(zip(sites, sae.written_columns, strict=True))
    layer, site = features.manifest["layer"], features.manifest["site"]
    if is_transcoder(sae):
        known = sae.provenance or Provenance()
        site, layer = known.target_site, layer if known.target_layer is None else known.target_layer
    return [(None if site in (None, "unknown") else Site.of(site, layer), slice(0, sae.d_out))]


def lenses_of(
    features: Features, sae: SparseAutoencoder, lm: LanguageModel | None, chosen: list[int], *, first_only: bool = False
) -> tuple[list[SiteLens], str]:
    """The logit lens of the chosen latents at each site that they write, the one to be shown first before the others.

    Beside them, why there is none, or not of all sites.
    """
    if lm is None:
        return [], "no language model was given"
    written = written_by(features, sae)
    fitting, why_not = [], ""
    for site, columns in written:
        if site is not None and site.model > len(lm.others):
            why_not = f"the model of {site} was not given"
            continue
        width = lm.d_model if site is None else lm.of(site).d_model
        if site is None or site.name not in IN_THE_STREAM or columns.stop - columns.start != width:
            said = "a place that is not named" if site is None else site.place if len(written) == 1 else site
            why_not = f"decoder rows are directions at {said}, not in the residual stream"
        else:
            fitting.append((str(site), lm.of(site), site, [columns]))
    fitting.reverse()  # the last site first
    added = [site for _, _, site, _ in fitting if site.name in ADDED]
    if len(fitting) > 1 and len(added) == len(written) and len({site.model for site in added}) == 1:
        both = [columns for *_, (columns,) in fitting]
        fitting.insert(0, (f"the sum of all {len(added)} sites", fitting[0][1], fitting[0][2], both))
    rows = sae.W_dec.detach()[torch.tensor(chosen, device=sae.W_dec.device)].float()
    whole = rows.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    found = []
    for name, own, _, parts in fitting[:1] if first_only else fitting:
        own_rows = torch.stack([rows[:, part] for part in parts])
        shares = own_rows.square().sum((0, 2)) / whole
        found.append(SiteLens(name, logit_lens(own, own_rows.sum(0), LENS), shares.tolist()))
    return found, why_not


def short(value: float) -> float:
    return float(f"{value:.4g}")
