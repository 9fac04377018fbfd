"""One source of a crosscoder as a transcoder of its own, which features, pages and exports are made from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as checks
from .._decoder_rows import norms_by_site
from .._wiring import columns_of
from ..autoencoder import SparseAutoencoder
from ..crosscoder import Crosscoder
from ..data.sites import Site
from ..provenance import Provenance


class OneSource(SparseAutoencoder):
    """What :func:`of_source` returns: an autoencoder that knows the sites side by side in its input and its output.

    Attributes:
        read_widths, written_widths: of the sites.
        read_places, written_places: which they are, of models numbered from the first that is read; None where the
            crosscoder does not say.
    """

    read_widths: tuple[int, ...]
    written_widths: tuple[int, ...]
    read_places: tuple[Site, ...] | None = None
    written_places: tuple[Site, ...] | None = None
    decoder_norm = "joint"

    @property
    def written_columns(self) -> tuple[slice, ...]:
        """Where each site that is written lies in a decoder row."""
        return tuple(columns_of(self.written_widths, range(t, t + 1)) for t in range(len(self.written_widths)))

    def _norms_of(self, source: Any) -> Tensor:
        if self.decoder_norm == "joint":
            return super()._norms_of(source)
        return norms_by_site(self.W_dec, self.written_widths).sum(1)

    def save_pretrained(self, path: str | PathLike, format: str | None = None) -> None:
        """Refused where files of an autoencoder would lack the sites or the norm.

        Raises:
            ValueError: several sites are read or written.
        """
        if len(self.read_widths) > 1 or len(self.written_widths) > 1:
            raise ValueError(f"sae must read and write one site to be saved as an autoencoder, got {self.read_widths} "
                             f"to {self.written_widths}: save the crosscoder")  # fmt: skip
        super().save_pretrained(path, format)


def of_source(coder: Crosscoder, number: int) -> OneSource:
    """The latents of one source of a crosscoder or cross-layer transcoder, to be looked at where that source reads.

    :func:`collect`, :func:`write_dashboard`, :func:`write_delphi` and :func:`write_neuronpedia` take it. Its codes are
    those of the crosscoder's source in eval mode. ``decode`` gives what these latents alone add to the sites that the
    source writes, side by side: biases and skips, which belong to all sources, are left out. Weights are shared.

    Args:
        coder: its ``provenance`` says which sites they are. Where source ``number`` reads one, that place may be given
            to :func:`collect` instead; several, those of a ``"joint"`` crosscoder, are read side by side in one pass.
        number: among the sources, from 0.

    Returns:
        In eval mode, d_in the width of the sites that are read, d_out that of all those written together. Models are
        numbered anew from the first that is read, so that a source that reads one model needs no other.

    Raises:
        TypeError: ``coder`` is no :class:`~sae_engine.Crosscoder`, ``number`` no int.
        ValueError: there is no such source, or its latents are cut over a mesh.

    Example:
        >>> clt, x = se.Crosscoder.clt(3, 4, 16, se.TopK(2)).eval(), torch.randn(5, 3, 4)
        >>> middle = se.latents.of_source(clt, 1)
        >>> torch.equal(middle.encode(x[:, 1]).to_dense(), clt.encode(x).to_dense()[1])
        True
        >>> middle.d_out  # of sites 1 and 2
        8
    """
    if not isinstance(coder, Crosscoder):
        raise TypeError(f"coder must be a Crosscoder, got {type(coder).__name__}")
    if (chosen := checks.integer_in(number)) is None:
        raise TypeError(f"number must be that of a source, an int, got {number!r}")
    if not 0 <= chosen < len(coder.sources):
        raise ValueError(f"number must lie in 0..{len(coder.sources) - 1}, one for each source, got {chosen}")
    source = coder.sources[chosen]
    if coder.shards is not None:
        raise ValueError("coder must not be cut over a mesh: load the whole of it from its files")
    made = OneSource(
        source.d_in, source.d_sae, copy.deepcopy(source.activation), d_out=source.d_out, device="meta",
        apply_b_dec_to_input=False, rescale_acts_by_decoder_norm=coder.rescale_acts_by_decoder_norm,
        dtype=coder.b_dec.dtype,
    )  # fmt: skip
    made.activation = copy.deepcopy(source.activation)  # the first copy went where no memory is
    made.W_enc, made.W_dec = _shared(source.W_enc), _shared(source.W_dec)
    made.b_enc, made.b_dec = _shared(source.b_enc), _shared(torch.zeros_like(coder.b_dec[source.writes]))
    made.decoder_norm = coder.decoder_norm
    made.read_widths = tuple(coder.read_widths[site] for site in source.read_sites)
    made.written_widths = tuple(coder.written_widths[site] for site in source.written_sites)
    whole = coder.provenance
    if whole is not None and whole.sites is not None:
        targets = whole.sites if whole.target_sites is None else whole.target_sites
        read = [Site.of(whole.sites[site]) for site in source.read_sites]
        written = [Site.of(targets[site]) for site in source.written_sites]
        models = {site.model: whole.model for site in read}
        if whole.models is not None:
            models = {site.model: whole.models[number] for site, number in zip(read, source.read_sites, strict=True)}
        numbers = list(dict.fromkeys([site.model for site in (*read, *written)]))  # those that are read come first
        made.read_places, made.written_places = (
            tuple(replace(site, model=numbers.index(site.model)) for site in sites) for sites in (read, written)
        )
        made.provenance = _provenance(whole, made, list(models.values()))
    return made.eval()


def _shared(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach(), requires_grad=False)


def _provenance(whole: Provenance, made: OneSource, models: Sequence[str | None]) -> Provenance:
    """The source's own places; a target of several sites has no name as one."""
    read, written = made.read_places or (), made.written_places or ()
    said: dict[str, Any] = {"layer": read[0].layer, "site": read[0].place, "sites": None, "models": None}
    if len(read) > 1:
        of_sites = [models[site.model] for site in read]
        named = len(models) > 1 and None not in of_sites
        said = {"layer": None, "site": None, "sites": tuple(map(str, read)),
                "models": tuple(of_sites) if named else None}  # fmt: skip
    target: dict[str, Any] = {"target_sites": None}
    if written != read:
        target |= {"target_site": "unknown", "d_target": made.d_out}
        if len(written) == 1:
            target |= {"target_layer": written[0].layer, "target_site": written[0].place}
        elif len(read) > 1:
            target["target_sites"] = tuple(map(str, written))
    return replace(whole, model=models[0], d=made.d_in, **{"d_target": None, **said, **target})


def refuse_crosscoder(sae: object) -> None:
    """What looks at latents takes one source of a crosscoder.

    Raises:
        TypeError: ``sae`` is a whole one.
    """
    if isinstance(sae, Crosscoder):
        raise TypeError("sae must be one source, got a whole Crosscoder: pass latents.of_source(coder, number)")
