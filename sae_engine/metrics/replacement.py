"""A language model with a crosscoder's reconstructions in the places that it writes, and what is measured of both.

With a cross-layer transcoder this is the replacement model: every MLP's output is what the latents write there, and a
latent reads the stream that the latents before it have left. Codes are then those of the replaced run, not of the
model's own activations, as far as the wiring allows: a site is replaced once all the sources that write it have read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import functional
from .._wiring import columns_of
from ..crosscoder import Crosscoder
from .language import NextTokenLoss, loss_recovered
from .place import contexts_for
from .sites import SiteReconstruction, cross_layer_share, relative_norms
from .sparsity import SourceSparsity
from .splice import Batch, batches_of, in_eval_mode, predicted

if TYPE_CHECKING:
    from ..data import LanguageModel, Site

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
REPLACED, CLEAN = "of the replaced run", "of the model's own activations"


class Replacement:
    """One or several language models, and a crosscoder at sites of theirs.

    ``places[m]`` is, of model m, each site with the numbers of the sites that are read and written there.
    """

    def __init__(
        self, coder: Crosscoder, lm: LanguageModel, sites: Sequence[str | Site],
        target_sites: Sequence[str | Site] | None,
    ) -> None:  # fmt: skip
        from ..data.places import find_place
        from ..data.shared import check_same_tokens
        from ..data.sites import Site

        if not isinstance(coder, Crosscoder):
            raise TypeError(f"coder must be a Crosscoder, got {type(coder).__name__}")
        self.coder, self.lms = coder, [lm, *lm.others]
        check_same_tokens(self.lms)
        self.reads = [Site.of(site) for site in _listed("sites", sites, len(coder.read_widths))]
        written = sites if target_sites is None else target_sites
        self.writes = [Site.of(site) for site in
                       _listed("target_sites" if target_sites is not None else "sites", written,
                               len(coder.written_widths))]  # fmt: skip
        self.places: list[dict[Site, tuple[list[int], list[int]]]] = [{} for _ in self.lms]
        for side, numbered, widths in ((0, self.reads, coder.read_widths), (1, self.writes, coder.written_widths)):
            for number, (site, width) in enumerate(zip(numbered, widths, strict=True)):
                owner = lm.of(site)
                there = find_place(owner.model, site).width
                if there != width:
                    name = f"{'sites' if side == 0 else 'target_sites'}[{number}]"
                    raise ValueError(f"coder must have width {there} at {name}, that of {owner.name!r} at {site}, "
                                     f"got {width}")  # fmt: skip
                place = self.places[site.model].setdefault(site, ([], []))
                if place[side]:
                    raise ValueError(f"{'sites' if side == 0 else 'target_sites'} must name each place once, got "
                                     f"{site} twice")  # fmt: skip
                place[side].append(number)
        if empty := [each.name for each, places in zip(self.lms, self.places, strict=True) if not places]:
            raise ValueError(f"sites must name a site of each model, {empty[0]!r} has none")
        self.is_causal: bool | None = None  # known once a batch has passed
        # What a layer keeps then hangs on all later ones, which in a replaced run come after it.
        self.ranks_sources = getattr(coder.activation, "sources", 1) > 1

    @property
    def reason(self) -> str:
        """Why a rule has no codes of the replaced run, to be read after :data:`CLEAN`; "" where it could have."""
        if not self.ranks_sources:
            return ""
        rule = type(self.coder.activation).__name__
        return f" ({rule} ranks the latents of all sources together, the later of which a replaced run has not got to)"

    def clean(self, batch: Batch) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Logits of each model, and the rows (tokens, width) of all sites that are read, and of those written."""
        x: dict[int, Tensor] = {}
        y: dict[int, Tensor] = {}
        order: list[tuple[int, int]] = []

        def look(reads: list[int], writes: list[int], hidden: Tensor) -> None:
            rows = self._rows(hidden, batch)
            for side, numbers, kept in ((0, reads, x), (1, writes, y)):
                for number in numbers:
                    kept[number] = rows
                    order.append((side, number))

        logits = [self._run(model, batch, look) for model in range(len(self.lms))]
        if self.is_causal is None:
            self.is_causal = not self.ranks_sources and self._allows(order)
        return logits, [x[n] for n in range(len(x))], [y[n] for n in range(len(y))]

    def replaced(self, batch: Batch, x: list[Tensor]) -> list[Tensor]:
        """Logits of each model with reconstructions in place. ``x``: of :meth:`clean`, for wirings that need it all."""
        running = _Reconstruction(self.coder, len(batch.rows), x[0])
        if self.ranks_sources:
            running.read_together(x)
        elif not self.is_causal:
            for number, rows in enumerate(x):
                running.read(number, rows)

        def replace(reads: list[int], writes: list[int], hidden: Tensor) -> Tensor | None:
            if self.is_causal:
                for number in reads:
                    running.read(number, self._rows(hidden, batch))
            return self._put(hidden, batch, running.written(writes[0])) if writes else None

        return [self._run(model, batch, replace) for model in range(len(self.lms))]

    def ablated(self, batch: Batch) -> list[Tensor]:
        """Logits of each model with zeros at the sites that are written."""

        def zeros(_reads: list[int], writes: list[int], hidden: Tensor) -> Tensor | None:
            return self._put(hidden, batch, hidden.new_zeros(len(batch.rows), hidden.shape[-1])) if writes else None

        return [self._run(model, batch, zeros) for model in range(len(self.lms))]

    def _run(self, model: int, batch: Batch, use: Any) -> Tensor:
        from ..data.places import input_device
        from ..data.replacing import run_with_replacements

        lm = self.lms[model]
        device = input_device(lm.model)
        uses: dict[Any, Any] = {site: partial(use, *numbers) for site, numbers in self.places[model].items()}
        mask = None if batch.mask is None else batch.mask.to(device)
        return run_with_replacements(lm.model, batch.ids.to(device), uses, attention_mask=mask)

    def _rows(self, hidden: Tensor, batch: Batch) -> Tensor:
        found = hidden.flatten(0, 1)[batch.rows.to(hidden.device)]
        return found.to(self.coder.b_dec.device, torch.promote_types(hidden.dtype, torch.float32))

    def _put(self, hidden: Tensor, batch: Batch, new: Tensor) -> Tensor:
        flat, new = hidden.flatten(0, 1), new.to(hidden.device, hidden.dtype)
        return flat.index_copy(0, batch.rows.to(hidden.device), new).view(hidden.shape)

    def _allows(self, order: list[tuple[int, int]]) -> bool:
        """Whether, in the order in which the model gets to its sites, each is replaced after what it is made of."""
        read: set[int] = set()
        for side, number in order:
            if side == 0:
                read.add(number)
                continue
            needed = {t for source in self.coder.sources if number in source.written_sites for t in source.read_sites}
            needed |= {number} if self.coder.W_skip is not None else set()
            if not needed <= read:
                return False
        return True


class _Reconstruction:
    """The reconstruction of all sites of some tokens, as far as their sources have been read."""

    def __init__(self, coder: Crosscoder, tokens: int, like: Tensor) -> None:
        self.coder = coder
        self.x: dict[int, Tensor] = {}
        self.left = {source.number: set(source.read_sites) for source in coder.sources}
        b_dec = coder.share.b_dec.detach()
        self.out = b_dec.to(torch.promote_types(like.dtype, b_dec.dtype)).expand(tokens, -1).clone()

    def read_together(self, x: list[Tensor]) -> None:
        """All sites, of which one rule chooses."""
        self.x = dict(enumerate(x))
        codes = self.coder.encode(torch.cat(x, 1))
        self.out += self.coder._all_sums(codes)

    def read(self, site: int, rows: Tensor) -> None:
        self.x[site] = rows
        for source in self.coder.sources:
            if site not in self.left[source.number]:
                continue
            self.left[source.number].discard(site)
            if not self.left[source.number]:
                self._add(source)

    def _add(self, source: Any) -> None:
        x = torch.cat([self.x[site] for site in source.read_sites], 1)
        self.out[:, source.writes] += self.coder._sums_of(source.number, x)

    def written(self, site: int) -> Tensor:
        columns = columns_of(self.coder.written_widths, range(site, site + 1))
        found = self.out[:, columns]
        if (skips := self.coder.share.W_skip) is not None:
            found = found + functional.linear(self.x[site], skips[site].T)
        return found


def _listed(name: str, sites: Any, count: int) -> Sequence[Any]:
    if isinstance(sites, str) or not isinstance(sites, Sequence):
        raise TypeError(f"{name} must be a sequence of sites, got {sites!r}")
    if len(sites) != count:
        raise ValueError(f"{name} must name the {count} sites of the crosscoder, got {len(sites)}")
    return sites


@torch.no_grad()
def evaluate_sites(
    coder: Crosscoder,
    lm: LanguageModel,
    texts: Iterable[Any],
    *,
    sites: Sequence[str | Site],
    target_sites: Sequence[str | Site] | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
    **contexts: Any,
) -> dict[str, Any]:
    """All metrics of a crosscoder on texts: errors by site, sparsity by source, what its replacement model predicts.

    Three forward passes of the language model. Errors and sparsity are those of the model's own activations. In the
    replacement model all sites that are written are replaced at once, in all rows; ``setting`` says of which run the
    codes are: of the replaced one where each site comes after all that is read for it (cross-layer transcoders,
    transcoder sets), else of the model's own activations: acausal crosscoders, and coders whose rule ranks the latents
    of all sources together (:class:`~sae_engine.rules.TopKOverSources`), which no replaced run can choose.

    Args:
        coder: in eval mode during the call, afterwards as before; as wide as the model is at its sites.
        lm: from :func:`sae_engine.data.load_language_model`; of a crosscoder of several models what
            :func:`sae_engine.data.together` makes of them, whose sites then say which one they are in.
        texts: as :func:`sae_engine.data.stream_activations`.
        sites: the places that are read, each with its block, in the order of the crosscoder's.
        target_sites: the places that are written; None: those that are read.
        max_tokens: stop after exactly so many rows; None is all.
        progress: show a bar on standard error.
        contexts: as :func:`evaluate` takes them.

    Returns:
        Plain numbers, strings and lists by section, as :func:`evaluate`: ``setting``; ``reconstruction``
        (:class:`SiteReconstruction`); ``sparsity`` (:class:`SourceSparsity`); ``decoder``: of several sources that each
        write their own layer :func:`cross_layer_share`, of two sites quantiles of :func:`relative_norms`; ``language``,
        with ``models`` of each where there are several, and the first one's numbers.

    Raises:
        TypeError, ValueError: an argument is not as above; names it.
        RuntimeError: a rule has no threshold yet, or the texts hold no token.

    Example:
        >>> from sae_engine.data import evaluation_text, load_language_model
        >>> lm = load_language_model()
        >>> clt = se.Crosscoder.clt(2, lm.d_model, 64, se.TopK(4))
        >>> places = {"sites": ["resid_mid_layer_0", "resid_mid_layer_1"],
        ...           "target_sites": ["mlp_out_layer_0", "mlp_out_layer_1"]}
        >>> found = evaluate_sites(clt, lm, evaluation_text()[:1], context_length=32, max_tokens=64, **places)
        >>> found["sparsity"]["l0"], len(found["reconstruction"]["sites"]), found["setting"]["codes"]
        (8.0, 2, 'of the replaced run')
    """
    from ..data.activations import progress_bar

    replacement = Replacement(coder, lm, sites, target_sites)
    words, batches = batches_of(lm, replacement.reads[0], texts, max_tokens, **contexts_for(coder, lm, contexts))
    reconstruction = SiteReconstruction(coder.written_widths)
    sparsity = SourceSparsity(len(coder.sources), coder.d_sae)
    losses = [{run: NextTokenLoss() for run in ("clean", "spliced", "ablated")} for _ in replacement.lms]
    with in_eval_mode(coder), progress_bar(progress, max_tokens) as bar:
        for batch in batches:
            clean, x, y = replacement.clean(batch)
            codes, info, _ = coder.encode_with(torch.cat(x, -1))
            sparsity.update(codes[0])
            reconstruction.update(coder.decode(codes[0], info), torch.cat(y, -1))
            runs = {"clean": clean, "spliced": replacement.replaced(batch, x), "ablated": replacement.ablated(batch)}
            for run, logits in runs.items():
                for loss, of_run, of_clean in zip(losses, logits, clean, strict=True):
                    predicted(loss[run], batch, of_run, None if run == "clean" else of_clean)
            bar.update(len(batch.rows))
    language = [_language(each) for each in losses]
    setting = {
        "model": lm.name, "revision": lm.revision, "sha256": lm.sha256, "d": coder.d_in,
        "sites": [str(site) for site in replacement.reads],
        "target_sites": None if target_sites is None else [str(site) for site in replacement.writes],
        "models": [each.name for each in replacement.lms],
        "context_length": words["context_length"],
        "first_positions": "dropped" if words["drop_first"] else "kept",
        **{name: words[name] for name in ("separator", "first_token", "exclude_tokens", "exclude_positions")},
        "activation": repr(coder.activation), "d_sae": coder.d_sae, "sources": len(coder.sources),
        "codes": REPLACED if replacement.is_causal else CLEAN + replacement.reason,
    }  # fmt: skip
    found = {"setting": setting, "reconstruction": reconstruction.compute(), "sparsity": sparsity.compute(),
             "decoder": _decoder(coder), "language": language[0]}  # fmt: skip
    return found if len(language) == 1 else {**found, "language": {**language[0], "models": language}}


def _language(losses: Mapping[str, NextTokenLoss]) -> dict[str, Any]:
    found = {run: loss.compute() for run, loss in losses.items()}
    clean, spliced, ablated = (found[run]["ce"] for run in ("clean", "spliced", "ablated"))
    return {
        "ce_clean": clean, "ce_spliced": spliced, "ce_ablated": ablated,
        "loss_recovered": loss_recovered(clean, spliced, ablated), "kl_spliced": found["spliced"]["kl"],
        "kl_ablated": found["ablated"]["kl"], "predicted": found["clean"]["predicted"],
    }  # fmt: skip


def _decoder(coder: Crosscoder) -> dict[str, Any] | None:
    """What the decoder's norms by site say, where the wiring makes it a question."""
    sources, norms = coder.sources, coder.site_norms()
    if len(sources) > 1 and all(source.number in source.written_sites for source in sources):
        share = cross_layer_share(norms)
        return {"cross_layer_share": share["share"], "cross_layer_by_source": share["sources"],
                "cross_layer_latents": share["latents_above"]}  # fmt: skip
    if len(sources) == 1 and norms.shape[-1] == 2:
        between = relative_norms(norms[0]).double()
        quantiles = between.nanquantile(torch.tensor(QUANTILES, dtype=torch.float64, device=between.device)).tolist()
        return {"relative_norm_quantiles": dict(zip(QUANTILES, quantiles, strict=True))}
    return None


def evaluate_sites_during(
    coder: Crosscoder, lm: LanguageModel, documents: Sequence[Any], **options: Any
) -> dict[str, float]:
    """What one looks at while a crosscoder is trained: numbers of :func:`evaluate_sites`, which takes the ``options``.

    Returns:
        ``evaluation/fvu``, ``l0``, ``dead``, ``ce_clean``, ``ce_spliced``, ``ce_ablated``, ``ce_recovered`` and ``kl``
        of the replacement model; ``fvu_0`` … of each site; of cross-layer transcoders ``cross_layer``, the share of the
        decoder's squared norms that lies in later layers. All below ``evaluation/``.

    Raises:
        As :func:`evaluate_sites`.

    Example:
        >>> from sae_engine.data import evaluation_text, load_language_model
        >>> lm, sites = load_language_model(), ["resid_pre_layer_1", "resid_pre_layer_2"]
        >>> both = se.Crosscoder([lm.d_model] * 2, [lm.d_model] * 2, 64, se.TopK(4))
        >>> options = {"sites": sites, "max_tokens": 64, "context_length": 32}
        >>> numbers = evaluate_sites_during(both, lm, evaluation_text()[:1], **options)
        >>> numbers["evaluation/l0"]
        4.0
    """
    found = evaluate_sites(coder, lm, documents, **options)
    language = found["language"]
    numbers = {
        "fvu": found["reconstruction"]["fvu"], "l0": found["sparsity"]["l0"],
        "dead": found["sparsity"]["dead_fraction"],
        "ce_clean": language["ce_clean"], "ce_spliced": language["ce_spliced"], "ce_ablated": language["ce_ablated"],
        "ce_recovered": language["loss_recovered"], "kl": language["kl_spliced"],
        **{f"fvu_{number}": fvu for number, fvu in enumerate(found["reconstruction"]["fvu_by_site"])},
    }  # fmt: skip
    if (decoder := found["decoder"]) is not None and "cross_layer_share" in decoder:
        numbers["cross_layer"] = decoder["cross_layer_share"]
    return {f"evaluation/{name}": value for name, value in numbers.items()}
