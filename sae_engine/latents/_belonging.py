"""Where an autoencoder belongs in a model: what the caller says, and where he says nothing, its provenance."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..autoencoder import SparseAutoencoder
from ..data.models import LanguageModel
from ..data.places import Place, find_place
from ..data.sites import SITES, Site
from ..metrics.splice import Normalization
from ..provenance import Provenance
from .sources import OneSource, refuse_crosscoder


class Belonging(NamedTuple):
    """The place that an autoencoder reads, the one that it writes to (of a transcoder another), and its input's space.

    Both were found in the model, and are as wide as the autoencoder.
    """

    model: nn.Module
    place: Place
    target: Place
    normalization: Normalization

    @property
    def is_transcoder(self) -> bool:
        return self.target is not self.place


def belonging(
    model: nn.Module | LanguageModel,
    sae: SparseAutoencoder,
    *,
    layer: int | None = None,
    site: str | Site | None = None,
    target_layer: int | None = None,
    target_site: str | Site | None = None,
    normalize: str | None = None,
    reads_only: bool = False,
) -> Belonging:
    """See :class:`Belonging`. With ``reads_only`` no target is looked for: the place stands for it.

    Raises:
        TypeError: ``model`` or ``sae`` is none.
        ValueError: neither the arguments nor ``sae.provenance`` say a place, the model has no such place, it is of
            another width or on another device than the autoencoder; names the argument.
    """
    found = model.model if isinstance(model, LanguageModel) else model
    if not isinstance(found, nn.Module):
        raise TypeError(f"model must be a LanguageModel or a causal language model, got {type(model).__name__}")
    if not isinstance(sae, SparseAutoencoder):
        raise TypeError(f"sae must be a SparseAutoencoder, got {type(sae).__name__}")
    refuse_crosscoder(sae)
    if isinstance(sae, OneSource) and len(sae.read_widths) > 1:
        raise ValueError(f"sae must read one site to be put into a model, got a source that reads {sae.read_widths}")
    said = sae.provenance or Provenance()
    if site is None:
        site = said.site
        layer = said.layer if layer is None else layer
        if site is None:
            raise ValueError(f"site must be given: the autoencoder does not say where it belongs ({said})")
    elif layer is None and site in SITES:
        layer = said.layer
    place = find_place(found, site, layer)
    normalization = Normalization(said.normalize or "none" if normalize is None else normalize)
    if sae.d_in != place.width:
        raise ValueError(f"site: the model is {place.width} wide at {place.site}, and sae has d_in = {sae.d_in}")
    weight = next(place.module.parameters(), None)
    if weight is not None and weight.device != sae.W_dec.device:
        raise ValueError(
            f"sae must be on the device of the model's {place.path}, {weight.device}, got {sae.W_dec.device}: "
            f"sae.to({str(weight.device)!r})"
        )
    if reads_only:
        return Belonging(found, place, place, normalization)
    if target_site is None and target_layer is not None:
        raise ValueError(f"target_site must be given with target_layer={target_layer!r}")
    if target_site is None and said.target_site is not None:
        target_site = said.target_site
        target_layer = place.site.layer if said.target_layer is None else said.target_layer
    elif target_layer is None and target_site in SITES:
        target_layer = place.site.layer
    is_transcoder = target_site is not None or sae.d_out != sae.d_in
    if is_transcoder and target_site in (None, "unknown"):
        raise ValueError("target_site must be given: the autoencoder is a transcoder, and does not say its target")
    target = place if target_site is None else find_place(found, target_site, target_layer)
    if sae.d_out != target.width:
        raise ValueError(f"target_site: the model is {target.width} wide at {target.site}, sae has d_out = {sae.d_out}")
    if target is not place and normalization.kind != "none":
        raise ValueError(f"normalize must be 'none' for a transcoder, got {normalization.kind!r}")
    return Belonging(found, place, target, normalization)


def read_by(
    sae: SparseAutoencoder, lm: LanguageModel, *, layer: int | None, site: str | Site | None, normalize: str | None
) -> tuple[tuple[Site, ...], Normalization]:
    """The sites whose rows an autoencoder is given, side by side, and its input's space.

    Raises:
        TypeError, ValueError: as :func:`belonging`; of a source that reads several sites, ValueError where they are
            not known, are given as one, or are normalized.
    """
    if not isinstance(sae, OneSource) or len(sae.read_widths) == 1:
        where = belonging(lm, sae, layer=layer, site=site, normalize=normalize, reads_only=True)
        return (where.place.site,), where.normalization
    if site is not None or layer is not None:
        raise ValueError(f"site: this source reads {len(sae.read_widths)} sites, which the crosscoder's provenance "
                         f"says, got {site!r} and layer {layer!r}")  # fmt: skip
    if sae.read_places is None:
        raise ValueError("sae does not say which sites it reads: give the crosscoder Provenance(sites=…), and then "
                         "take the source")  # fmt: skip
    said = normalize or (sae.provenance or Provenance()).normalize or "none"
    if said != "none":
        raise ValueError(f"normalize must be 'none' for a source that reads several sites, got {said!r}")
    for place, width in zip(sae.read_places, sae.read_widths, strict=True):
        found = find_place(lm.of(place).model, place)
        if found.width != width:
            raise ValueError(f"sae reads {width} numbers at {place}, the model is {found.width} wide there")
    return sae.read_places, Normalization("none")
