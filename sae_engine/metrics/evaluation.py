"""Everything at once: an autoencoder on the activations of a language model, and in their place."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import functional
from ..autoencoder import LAYER_NORM_EPS, SparseAutoencoder, decoder_norms
from ..codes import SparseCodes
from .decoder import decoder_similarity
from .language import NextTokenLoss, loss_recovered
from .norms import EpsilonLBO, TailTruncation
from .reconstruction import Reconstruction
from .sparsity import Sparsity

if TYPE_CHECKING:
    from ..data import LanguageModel, Site

NORMALIZATIONS = {
    "none": "raw",
    "token": f"per-token normalized: (x - mean) / (std_unbiased + {LAYER_NORM_EPS:g})",
}
TAIL_QUANTILES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


class Normalization:
    """Between the model's activations and the space in which an autoencoder was trained."""

    def __init__(self, kind: str) -> None:
        if kind not in NORMALIZATIONS:
            raise ValueError(f"normalize must be one of {tuple(NORMALIZATIONS)}, got {kind!r}")
        self.kind, self.space = kind, NORMALIZATIONS[kind]

    def into(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x (tokens, d) in the autoencoder's space, and what :meth:`back` needs."""
        if self.kind == "none":
            return x, None
        mean, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + LAYER_NORM_EPS
        return (x - mean) / scale, (mean, scale)

    def back(self, x_hat: Tensor, info: tuple[Tensor, Tensor] | None) -> Tensor:
        return x_hat if info is None else x_hat * info[1] + info[0]


@torch.no_grad()
def evaluate(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    texts: Iterable[str],
    *,
    layer: int | None = None,
    site: str | Site = "resid_pre",
    target_layer: int | None = None,
    target_site: str | Site | None = None,
    normalize: str = "none",
    context_length: int | None = None,
    batch_size: int = 8,
    drop_first: bool = True,
    max_tokens: int | None = None,
    centre: Tensor | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """All metrics of an autoencoder on texts: three forward passes of the language model and one of the autoencoder.

    Texts are packed as :func:`sae_engine.data.stream_activations` packs them. The reconstruction, or zeros, take the
    activations' place at ``layer`` and ``site`` at all positions that are measured, and later layers go on from there.
    A transcoder is measured against, and put in the place of, its target's activations.

    Args:
        sae: in eval mode during the call, afterwards as before; as wide as the model is at its places.
        lm: from :func:`sae_engine.data.load_language_model`, on the device of ``sae``.
        texts, layer, site, context_length, batch_size: as :func:`sae_engine.data.stream_activations`.
        target_layer, target_site: of a transcoder, the place of its output; by default ``layer``, and none.
        normalize: what the autoencoder's input is: ``"none"``, the model's activations; ``"token"``, each token
            minus its mean over its standard deviation (unbiased) + 1e-5. Errors are measured in that space, and the
            reconstruction is brought back before it takes its place. (An autoencoder with
            ``normalize_activations="layer_norm"`` does this itself, and is measured in raw space.) Not for transcoders.
        drop_first: leave each context's first position as it is in all runs, and out of all metrics.
        max_tokens: stop after exactly so many measured tokens; None is all.
        centre: (d,), as :class:`Reconstruction` has it.
        progress: show a bar on standard error.

    Returns:
        Plain numbers, strings and lists by section: ``setting``, ``reconstruction``, ``sparsity``, ``decoder``,
        ``norms`` (:class:`EpsilonLBO`, with F and f as the rule sees them and z in the space that the encoder sees;
        None for a transcoder, whose code has no reason to be as long as its input),
        ``tail`` (CETT at quantiles of the first batch's contributions), ``language`` (cross-entropies, loss recovered,
        KL divergences).

    Raises:
        TypeError, ValueError: an argument is not as above; names it. TypeError also where the rule needs what an
            autoencoder does not know (``GradientTopK``: evaluate it with ``TopK`` as its activation).
        RuntimeError: the rule has no threshold yet (names ``threshold``), or the texts hold no token.

    Example:
        >>> from sae_engine.data import evaluation_text, load_language_model
        >>> lm = load_language_model()
        >>> sae, options = se.SparseAutoencoder(lm.d_model, 512, se.TopK(8)), {"layer": 2, "max_tokens": 32}
        >>> found = evaluate(sae, lm, evaluation_text()[:1], context_length=32, **options)
        >>> found["reconstruction"]["tokens"]
        32
    """
    splice = _Splice(sae, lm, (site, layer), (target_site, target_layer), normalize, drop_first)
    batches = splice.batches(texts, context_length, batch_size, max_tokens)
    measures = _Measures(sae, splice.normalization, centre, is_transcoder=splice.is_transcoder)
    runs: dict[str, tuple[NextTokenLoss, Replace]] = {
        "spliced": (NextTokenLoss(), measures.update), "ablated": (NextTokenLoss(), lambda _, y: torch.zeros_like(y))
    }  # fmt: skip
    clean_loss = NextTokenLoss()
    with _in_eval_mode(sae), splice.progress_bar(progress, max_tokens) as bar:
        for ids in batches:
            clean = splice.logits(ids, lambda _, y: y)
            clean_loss.update(clean, splice.measured(ids))
            for loss, replace in runs.values():
                loss.update(splice.logits(ids, replace), splice.measured(ids), clean=clean)
            bar.update(splice.measured(ids).numel())
    clean_run, spliced, ablated = clean_loss.compute(), *(loss.compute() for loss, _ in runs.values())
    language = {
        "ce_clean": clean_run["ce"], "ce_spliced": spliced["ce"], "ce_ablated": ablated["ce"],
        "loss_recovered": loss_recovered(clean_run["ce"], spliced["ce"], ablated["ce"]),
        "kl_spliced": spliced["kl"], "kl_ablated": ablated["kl"], "predicted": clean_run["predicted"],
    }  # fmt: skip
    setting = {
        "model": lm.name, "revision": lm.revision, "sha256": lm.sha256, "d": sae.d_in,
        "layer": splice.place.layer, "site": splice.place.place,
        "context_length": splice.context_length, "first_positions": "dropped" if drop_first else "kept",
        "activation": repr(sae.activation), "d_sae": sae.d_sae,
    }  # fmt: skip
    if splice.is_transcoder:
        setting |= {"target_layer": splice.target.layer, "target_site": splice.target.place}
    return {"setting": setting, **measures.compute(), "language": language}


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
    context_length: int | None = None,
    batch_size: int = 8,
    drop_first: bool = True,
    max_tokens: int | None = None,
    steps: int = 10,
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
    splice = _Splice(sae, lm, (site, layer), (target_site, target_layer), normalize, drop_first)
    ids = list(splice.batches(texts, context_length, batch_size, max_tokens))
    with _in_eval_mode(sae):
        low, high = splice.contribution_range(ids)
        whole = splice.truncated(ids, sys.float_info.min)  # drops nothing
        best = {**whole, "threshold": 0.0}
        allowed = whole["ce"] + math.log1p(rise)
        low, high = math.log(low), math.log(high)
        for _ in range(steps):
            middle = (low + high) / 2
            found = splice.truncated(ids, math.exp(middle))
            low, high, best = (middle, high, found) if found["ce"] <= allowed else (low, middle, best)
    return {"rise": rise, "ce_whole": whole["ce"], **best}


@contextmanager
def _in_eval_mode(sae: SparseAutoencoder) -> Iterator[None]:
    training = [module for module in sae.modules() if module.training]
    sae.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


Replace = Callable[[Tensor, Tensor], Tensor]  # (input rows, target rows) → what takes the target's place


class _Splice:
    """A language model with something in the place of one site's activations: the input's, or a transcoder's target."""

    def __init__(
        self, sae: SparseAutoencoder, lm: LanguageModel, place: tuple[str | Site, int | None],
        target: tuple[str | Site | None, int | None], normalize: str, drop_first: bool,
    ) -> None:  # fmt: skip
        from ..data.places import find_place
        from ..data.sites import SITES, Site

        self.normalization = Normalization(normalize)
        if not isinstance(sae, SparseAutoencoder):
            raise TypeError(f"sae must be a SparseAutoencoder, got {type(sae).__name__}")
        self.sae, self.lm, self.first = sae, lm, int(drop_first)
        self.place = self.target = Site.of(*place)
        target_site, target_layer = target
        if target_site is None and target_layer is not None:
            raise ValueError(f"target_site must be given with target_layer={target_layer!r}")
        if target_site is not None:
            beside = target_layer is None and target_site in SITES
            self.target = Site.of(target_site, self.place.layer if beside else target_layer)
        self.is_transcoder = self.target != self.place
        if self.is_transcoder and normalize != "none":
            raise ValueError(f"normalize must be 'none' for a transcoder, got {normalize!r}")
        if sae.d_in != sae.d_out and not self.is_transcoder:
            raise ValueError(
                f"target_site must be given: sae is a transcoder, with d_in = {sae.d_in} and d_out = {sae.d_out}"
            )
        for name, width, site in (("d_in", sae.d_in, self.place), ("d_out", sae.d_out, self.target)):
            there = find_place(lm.model, site).width
            if width != there:
                raise ValueError(f"sae must have {name} = {there}, the width of {lm.name!r} at {site}, got {width}")
        device = next(lm.model.parameters()).device
        if sae.W_dec.device != device:
            raise ValueError(f"sae must be on the device of the language model, {device}, got {sae.W_dec.device}")
        self._inputs: tuple[Tensor, Tensor] | None = None  # token ids and what the transcoder is given for them

    def batches(
        self, texts: Iterable[str], context_length: int | None, batch_size: int, max_tokens: int | None
    ) -> Iterator[Tensor]:
        """Token ids on the device; arguments are checked now, texts are read when asked for."""
        from ..data.activations import check_stream
        from ..data.contexts import context_batches

        contexts, limit = check_stream(
            self.lm, texts, None, self.place, max_tokens, context_length=context_length, batch_size=batch_size,
            drop_first=bool(self.first),
        )  # fmt: skip
        self.context_length = contexts.length
        found = context_batches(self.lm, texts, contexts.length, contexts.batch_size)
        return (ids.to(self.sae.W_dec.device) for ids in _limited(found, self.first, limit))

    @staticmethod
    def progress_bar(show: bool, total: int | None) -> Any:
        from ..data.activations import progress_bar

        return progress_bar(show, total)

    def measured(self, ids: Tensor) -> Tensor:
        return ids[:, self.first :]

    def logits(self, ids: Tensor, replace: Replace) -> Tensor:
        """Logits of the measured positions, with ``replace`` of input and target rows in the target's place."""
        from ..data.activations import run_with_replacement

        def on_site(hidden: Tensor) -> Tensor:
            y = self._rows(hidden)
            new = replace(self._input(ids) if self.is_transcoder else y, y).view(*ids.shape[:1], -1, y.shape[1])
            return torch.cat([hidden[:, : self.first], new.to(hidden.dtype)], 1)

        return self.measured(run_with_replacement(self.lm.model, ids, on_site, site=self.target))

    def _rows(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.first :].to(torch.promote_types(hidden.dtype, torch.float32)).flatten(0, 1)

    def _input(self, ids: Tensor) -> Tensor:
        """What a transcoder is given, once for all runs over these ids: nothing before its target is replaced."""
        from ..data.activations import read_activations

        if self._inputs is None or self._inputs[0] is not ids:
            self._inputs = ids, self._rows(read_activations(self.lm.model, ids, site=self.place))
        return self._inputs[1]

    def contribution_range(self, batches: list[Tensor]) -> tuple[float, float]:
        """Norms of the smallest and the largest contribution in the first batch that has any."""
        norms, _ = _contributing_rows(self.sae)
        for ids in batches:
            found: list[Tensor] = []

            def look(x: Tensor, y: Tensor, found=found) -> Tensor:
                codes = self.sae.encode(self.normalization.into(x)[0])
                found.append((codes.values * functional.at_latents(norms, codes)).abs())
                return y

            self.logits(ids, look)
            positive = found[0][found[0] > 0].double()
            if len(positive):
                return positive.min().item(), positive.max().item()
        raise RuntimeError("nothing was measured: no latent fires on these texts")

    def truncated(self, batches: list[Tensor], threshold: float) -> dict[str, Any]:
        """The spliced run in which contributions below ``threshold`` are left out."""
        norms, rows = _contributing_rows(self.sae)
        loss, tail = NextTokenLoss(), TailTruncation(rows, [threshold])

        def reconstruct(x: Tensor, _target: Tensor) -> Tensor:
            z, info = self.normalization.into(x)
            (codes,), encoded, _ = self.sae.encode_with(z)
            tail.update(codes)
            dropped = (codes.values * functional.at_latents(norms, codes)).abs() < threshold
            codes = codes.replace(values=torch.where(dropped, 0.0, codes.values))
            return self.normalization.back(self.sae.decode(codes, encoded), info)

        for ids in batches:
            loss.update(self.logits(ids, reconstruct), self.measured(ids))
        found = tail.compute()
        return {
            "threshold": threshold, "ce": loss.compute()["ce"], "cett": found["cett"][0], "l0": found["l0"],
            "l0_kept": found["l0_kept"][0], "off": found["off"][0],
        }  # fmt: skip


def _contributing_rows(sae: SparseAutoencoder) -> tuple[Tensor, Tensor]:
    """Norms (F,) and rows (F, d) that the values of the codes multiply."""
    rows = sae.W_dec.detach()
    norms = decoder_norms(rows)
    if sae.rescale_acts_by_decoder_norm:  # the codes hold the norms
        rows = (rows / torch.where(norms == 0, 1.0, norms)[:, None]).to(rows.dtype)
        norms = torch.ones_like(norms)
    return norms, rows


def _limited(batches: Iterator[Tensor], first: int, max_tokens: int | None) -> Iterator[Tensor]:
    """Batches of contexts that hold exactly ``max_tokens`` positions after the first ``first`` of each context."""
    left = max_tokens
    for ids in batches:
        run = ids.shape[1] - first
        if left is None or ids.shape[0] * run <= left:
            yield ids
            left = None if left is None else left - ids.shape[0] * run
        else:
            whole, rest = divmod(left, run)
            if whole:
                yield ids[:whole]
            if rest:
                yield ids[whole : whole + 1, : first + rest]
            return
        if left == 0:
            return


class _Measures:
    """The metrics that need the autoencoder alone."""

    def __init__(
        self, sae: SparseAutoencoder, norm: Normalization, centre: Tensor | None, *, is_transcoder: bool
    ) -> None:
        self.sae, self.norm = sae, norm
        self.norms, self.rows = _contributing_rows(sae)
        self.reconstruction = Reconstruction(space=norm.space, centre=centre)
        self.sparsity = Sparsity(sae.d_sae)
        self.epsilon = None if is_transcoder else EpsilonLBO(self.norms, sae.b_dec.detach())
        self.tail: TailTruncation | None = None

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """Measures what is made of x (tokens, d) against x, or a transcoder's against its target's y; returns it."""
        z, info = self.norm.into(x)
        (codes,), encoded, _ = self.sae.encode_with(z)
        z_hat = self.sae.decode(codes, encoded)
        self.reconstruction.update(z_hat, z if self.epsilon is not None else y)
        self.sparsity.update(codes)
        self._update_tail(codes)
        if self.epsilon is not None:
            scale = None if info is None else info[1]
            if encoded.mean is not None and encoded.std is not None:  # the encoder's own layer norm
                scale = encoded.std + LAYER_NORM_EPS
                z = (z - encoded.mean) / scale
            self.epsilon.update(codes, z, scale=None if scale is None else scale[:, 0])
        return self.norm.back(z_hat, info)

    def _update_tail(self, codes: SparseCodes) -> None:
        if self.tail is None:
            contributions = (codes.values * functional.at_latents(self.norms, codes)).abs()
            contributions = contributions[contributions > 0].double()
            if not len(contributions):
                return
            ranks = [int(q * (len(contributions) - 1)) for q in TAIL_QUANTILES]
            self.tail = TailTruncation(self.rows, contributions.sort().values[ranks].unique().tolist())
        self.tail.update(codes)

    def compute(self) -> dict[str, Any]:
        return {
            "reconstruction": self.reconstruction.compute(), "sparsity": self.sparsity.compute(),
            "decoder": decoder_similarity(self.sae.W_dec),
            "norms": None if self.epsilon is None else self.epsilon.compute(),
            "tail": None if self.tail is None else self.tail.compute(),
        }  # fmt: skip

