"""One source of a crosscoder as a transcoder of its own, which features, pages and exports are made from."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as checks
from ..autoencoder import SparseAutoencoder
from ..crosscoder import Crosscoder
from ..data.sites import Site
from ..provenance import Provenance


def of_source(coder: Crosscoder, number: int) -> SparseAutoencoder:
    """The latents of one source of a crosscoder or cross-layer transcoder, to be looked at where that source reads.

    :func:`collect`, :func:`write_dashboard`, :func:`write_delphi` and :func:`write_neuronpedia` take it. Its codes are
    those of the crosscoder's source in eval mode. ``decode`` gives what these latents alone add to the sites that the
    source writes, side by side: biases and skips, which belong to all sources, are left out. Weights are shared.

    Args:
        coder: whose source ``number`` reads one site. Its ``provenance`` says which; without one the place is
            given to :func:`collect`.
        number: among the sources, from 0.

    Returns:
        In eval mode, d_in the width of the site that is read, d_out that of all those written together.

    Raises:
        TypeError: ``coder`` is no :class:`~sae_engine.Crosscoder`, ``number`` no int.
        ValueError: there is no such source, it reads several sites, its latents are cut over a mesh, or its rule ranks
            by a sum of the norms at several sites.

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
    if len(source.read_sites) != 1:
        raise ValueError(
            f"coder must read one site with source {chosen}, which a pass of the model can show, got "
            f"{len(source.read_sites)}: {list(source.read_sites)}"
        )
    if coder.shards is not None:
        raise ValueError("coder must not be cut over a mesh: load the whole of it from its files")
    summed = coder.rescale_acts_by_decoder_norm and coder.decoder_norm == "sum" and len(source.written_sites) > 1
    if summed:
        raise ValueError("coder.decoder_norm must be 'joint' where the rule ranks by norms, got 'sum'")
    made = SparseAutoencoder(
        source.d_in, source.d_sae, copy.deepcopy(source.activation), d_out=source.d_out, device="meta",
        apply_b_dec_to_input=False, rescale_acts_by_decoder_norm=coder.rescale_acts_by_decoder_norm,
        dtype=coder.b_dec.dtype,
    )  # fmt: skip
    made.activation = copy.deepcopy(source.activation)  # the first copy went where no memory is
    made.W_enc, made.W_dec = _shared(source.W_enc), _shared(source.W_dec)
    made.b_enc, made.b_dec = _shared(source.b_enc), _shared(torch.zeros_like(coder.b_dec[source.writes]))
    made.provenance = _provenance(coder.provenance, source)
    return made.eval()


def _shared(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach(), requires_grad=False)


def _provenance(whole: Provenance | None, source: Any) -> Provenance | None:
    """The source's own place; a target of several sites has no name."""
    if whole is None or whole.sites is None:
        return None
    (read,), written = source.read_sites, list(source.written_sites)
    targets = whole.sites if whole.target_sites is None else whole.target_sites
    place, model = Site.of(whole.sites[read]), whole.model if whole.models is None else whole.models[read]
    said: dict[str, Any] = {"target_site": "unknown"}
    if len(written) == 1:
        target = Site.of(targets[written[0]])
        said = {"target_layer": target.layer, "target_site": target.place}
    return replace(
        whole, model=model, sites=None, target_sites=None, models=None, layer=place.layer, site=place.place,
        d=source.d_in, d_target=source.d_out, **said,
    )  # fmt: skip


def refuse_crosscoder(sae: object) -> None:
    """What looks at one place of a model takes one source of a crosscoder.

    Raises:
        TypeError: ``sae`` is a whole one.
    """
    if isinstance(sae, Crosscoder):
        raise TypeError("sae must read one site, got a Crosscoder: pass latents.of_source(coder, number), one source")
