"""Between a format's words for a model and a place in it, and :class:`~sae_engine.Provenance`."""
from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ..data.sites import Site
from ..provenance import Provenance
from .card import UNKNOWN

# TransformerLens' short names of models that have another name on the Hugging Face hub.
_GPT2 = {"gpt2-small": "gpt2", **{f"gpt2-{size}": f"gpt2-{size}" for size in ("medium", "large", "xl")}}
_OWNERS = (("EleutherAI", re.compile(r"pythia-\d+(\.\d+)?[mb](-deduped)?(-v0)?")),
           ("google", re.compile(r"gemma-(2-|3-)?\d+b(-it|-pt)?")))  # fmt: skip
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def split(name: str) -> tuple[int | None, str]:
    """Layer and site of a spelled place: ``blocks.3.hook_resid_pre``. Any other name is a site that says its layer."""
    try:
        site = Site.of(name)
    except ValueError:  # what a file says is kept, even where nothing of ours can be read there
        found = _IN_BLOCK.fullmatch(name)
        return (None, name) if found is None else (int(found[1]), found[2])
    return site.layer, site.place


def spelled(layer: int | None, site: str | None) -> str | None:
    """What :func:`split` takes apart, as TransformerLens and SAELens write it."""
    if layer is None or site is None:
        return site
    try:
        return str(Site.of(site, layer))
    except ValueError:
        return f"blocks.{layer}.{site}"


def said(
    model: str | None, hook: str | None, *, target: str | None = None, layer: object = None, **others: Any
) -> Provenance | None:
    """What a configuration's own fields say; None where they say nothing. ``layer`` counts where ``hook`` has none."""
    known: dict[str, Any] = {name: value for name, value in others.items() if value is not None}
    if model is not None:
        known["model"] = model
    if hook is not None:
        known["layer"], known["site"] = split(hook)
    if known.get("layer") is None and isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0:
        known["layer"] = layer
    if target is not None:
        known["target_layer"], known["target_site"] = split(target)
    return Provenance(**known) if known else None


def agreed(ours: Provenance | None, theirs: Provenance | None) -> Provenance | None:
    """What we recorded, unless the format's own fields say another model or place: then somebody has edited those."""
    if ours is None or theirs is None:
        return ours or theirs
    changed: dict[str, Any] = {}
    if theirs.model not in (None, ours.model):
        changed |= {"model": theirs.model, "revision": None, "sha256": None}
    for layer, site in (("layer", "site"), ("target_layer", "target_site")):
        place = getattr(theirs, layer), getattr(theirs, site)
        recorded = getattr(ours, layer), getattr(ours, site)
        if any(new not in (None, UNKNOWN, old) for new, old in zip(place, recorded, strict=True)):
            changed |= {layer: place[0], site: place[1]}
    return replace(ours, **changed)


def hub_name(model: str | None) -> str | None:
    """``model`` as the hub has it, where it is one of TransformerLens' short names."""
    if model in _GPT2:
        return f"openai-community/{_GPT2[model]}"
    owner = next((owner for owner, names in _OWNERS if model is not None and names.fullmatch(model)), None)
    return f"{owner}/{model}" if owner else model
