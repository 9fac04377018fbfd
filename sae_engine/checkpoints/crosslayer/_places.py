"""Between a format's words for a model and its places, and the :class:`~sae_engine.Provenance` of a crosscoder."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...data.sites import Site
from ...provenance import Provenance
from .._checkpoint import text
from .._places import hub_name
from ..card import SourceCard
from ._record import Record, Rule, refuse

if TYPE_CHECKING:
    from ...crosscoder import Crosscoder

Places = tuple[tuple[str, ...], tuple[str, ...]]


def of_layers(config: Mapping[str, Any], layers: int) -> Places | None:
    """The sites that ``feature_input_hook`` and ``feature_output_hook`` name in every layer; None where they do not."""
    found = []
    for side in ("input", "output"):
        hook = text(config.get(f"feature_{side}_hook"))
        if hook is None:
            return None
        names = [hook.replace("{layer}", str(s)) if hook.startswith("blocks.") else f"blocks.{s}.{hook}"
                 for s in range(layers)]  # fmt: skip
        found.append(tuple(spelled(name) for name in names))
    return found[0], found[1]


def spelled(name: str) -> str:
    """A place as we spell it; what a file says is kept, even where nothing of ours can be read there."""
    try:
        return str(Site.of(name))
    except ValueError:
        return name


def said(model: str | None, places: Places | None) -> Provenance | None:
    """What a configuration's own fields say; None where they say nothing."""
    if model is None and places is None:
        return None
    if places is None:
        return Provenance(model=model)
    return Provenance(model=model, sites=places[0], target_sites=places[1] if places[1] != places[0] else None)


def hooks(coder: Crosscoder, name: str) -> tuple[str, str, str | None]:
    """The two hooks, without their layers, and the model, as circuit-tracer names them for all layers at once.

    Raises:
        ValueError: the sites are not said, or not the same place in layers 0, 1, 2, …
    """
    known = coder.provenance
    if known is None or known.sites is None:
        raise ValueError(
            f"format {name!r} has to name the places in the model, which the crosscoder does not say: set its "
            "provenance, as Provenance(model=…, sites=[…], target_sites=[…])"
        )
    found = []
    for sites in (known.sites, known.target_sites or known.sites):
        inside = {spelled(site).removeprefix(f"blocks.{layer}.") for layer, site in enumerate(sites)}
        if len(inside) > 1 or not spelled(sites[0]).startswith("blocks.0."):
            refuse(name, f"the sites {', '.join(sites)}, only one place in layers 0, 1, 2, …")
        found.append(inside.pop())
    return found[0], found[1], hub_name(known.model)


def own_section(coder: Crosscoder) -> dict[str, Any]:
    """What no other library has a field for, as JSON under the key ``sae_engine``."""
    rules = [source.activation for source in coder.sources]
    section: dict[str, Any] = {"rules": [[type(rule).__name__, rule.options()] for rule in rules]}
    if coder.card is not None:
        section["card"] = coder.card.to_dict()
    if coder.provenance is not None:
        section["provenance"] = coder.provenance.to_dict()
    return section


def recorded(r: Record, section: object) -> Record:
    """``r`` with what :func:`own_section` recorded, unless the format's own fields say another model or other places:
    then somebody has edited those."""
    if not isinstance(section, dict):
        return r
    r = replace(r, rules=_with_options(r.rules, section.get("rules")))
    ours, theirs = Provenance.from_dict(section.get("provenance")), r.provenance
    if ours is not None and theirs is not None:
        same_place = theirs.sites in (None, ours.sites) and theirs.target_sites in (None, ours.target_sites)
        if theirs.model not in (None, ours.model):
            ours = replace(ours, model=theirs.model, revision=None, sha256=None)
        if not same_place:
            ours = replace(ours, sites=theirs.sites, target_sites=theirs.target_sites, models=None)
    return replace(r, card=SourceCard.from_dict(section.get("card")) or r.card, provenance=ours or theirs)


def _with_options(rules: Sequence[Rule], recorded: object) -> Sequence[Rule]:
    """Rules with the options that were recorded of the same ones; what the format says itself wins."""
    if not isinstance(recorded, list) or len(recorded) != len(rules):
        return rules
    found = []
    for (kind, options), one in zip(rules, recorded, strict=True):
        is_same = isinstance(one, list) and len(one) == 2 and one[0] == kind.__name__ and isinstance(one[1], dict)
        found.append((kind, {**one[1], **options} if is_same else options))
    return found
