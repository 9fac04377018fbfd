"""Everything at once: an autoencoder on the activations of a language model, and in their place."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import functional
from ..autoencoder import LAYER_NORM_EPS, SparseAutoencoder
from ..codes import SparseCodes
from .decoder import decoder_similarity
from .language import NextTokenLoss, loss_recovered
from .norms import EpsilonLBO, TailTruncation, contributing_rows
from .place import contexts_for
from .reconstruction import Reconstruction
from .sparsity import Sparsity
from .splice import Batch, Normalization, Replace, Splice, in_eval_mode

if TYPE_CHECKING:
    from ..data import LanguageModel, Site

TAIL_QUANTILES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


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
    max_tokens: int | None = None,
    centre: Tensor | None = None,
    progress: bool = False,
    **contexts: Any,
) -> dict[str, Any]:
    """All metrics of an autoencoder on texts: three forward passes of the language model and one of the autoencoder.

    Texts are packed as :func:`sae_engine.data.stream_activations` packs them, and rows are its rows. The
    reconstruction, or zeros, take the activations' place at ``layer`` and ``site`` in all rows, and later layers go on
    from there.
    A transcoder is measured against, and put in the place of, its target's activations.

    Args:
        sae: in eval mode during the call, afterwards as before; as wide as the model is at its places.
        lm: from :func:`sae_engine.data.load_language_model`, on the device of ``sae``.
        texts, layer, site: as :func:`sae_engine.data.stream_activations`.
        target_layer, target_site: of a transcoder, the place of its output; by default ``layer``, and none.
        normalize: what the autoencoder's input is: ``"none"``, the model's activations; ``"token"``, each token
            minus its mean over its standard deviation (unbiased) + 1e-5. Errors are measured in that space, and the
            reconstruction is brought back before it takes its place. (An autoencoder with
            ``normalize_activations="layer_norm"`` does this itself, and is measured in raw space.) Not for transcoders.
        max_tokens: stop after exactly so many rows; None is all.
        centre: (d,), as :class:`Reconstruction` has it.
        progress: show a bar on standard error.
        contexts: any of :class:`sae_engine.data.ContextSettings`, by name; by default what ``sae.provenance`` says of
            them. Excluded rows stay as they are in all runs and count in no metric, except that the model's losses are
            taken there too (not at a first position that is dropped).

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
    from ..data.activations import progress_bar

    splice = Splice(sae, lm, (site, layer), (target_site, target_layer), Normalization(normalize))
    batches = splice.batches(texts, max_tokens, **contexts_for(sae, lm, contexts))
    measures = _Measures(sae, splice, centre)
    runs = {"clean": _same, "spliced": measures.update, "ablated": _zeros}
    with in_eval_mode(sae), progress_bar(progress, max_tokens) as bar:
        losses = _losses(splice, batches, runs, divergence=True, seen=bar.update)
    clean, spliced, ablated = (losses[run]["ce"] for run in ("clean", "spliced", "ablated"))
    language = {
        "ce_clean": clean, "ce_spliced": spliced, "ce_ablated": ablated,
        "loss_recovered": loss_recovered(clean, spliced, ablated), "kl_spliced": losses["spliced"]["kl"],
        "kl_ablated": losses["ablated"]["kl"], "predicted": losses["clean"]["predicted"],
    }  # fmt: skip
    words = splice.words
    setting = {
        "model": lm.name, "revision": lm.revision, "sha256": lm.sha256, "d": sae.d_in,
        "layer": splice.place.layer, "site": splice.place.place, "context_length": words["context_length"],
        "first_positions": "dropped" if words["drop_first"] else "kept",
        **{name: words[name] for name in ("separator", "first_token", "exclude_tokens", "exclude_positions")},
        "activation": repr(sae.activation), "d_sae": sae.d_sae,
    }  # fmt: skip
    if splice.is_transcoder:
        setting |= {"target_layer": splice.target.layer, "target_site": splice.target.place}
    return {"setting": setting, **measures.compute(), "language": language}


@torch.no_grad()
def evaluate_during(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    documents: Sequence[Any],
    *,
    site: str | Site,
    target_site: str | Site | None = None,
    packing: bool = True,
    max_tokens: int | None = None,
    scale: float = 1.0,
    target_scale: float | None = None,
    baselines: dict[Hashable, float] | None = None,
    **contexts: Any,
) -> dict[str, float]:
    """What one looks at while an autoencoder is trained: one forward pass of the language model, no divergences.

    The numbers are those that :func:`evaluate` has under its own names for the same documents and settings.

    Args:
        sae, lm, max_tokens: as :func:`evaluate`.
        documents: strings, or token ids in one dimension, which no autoencoder was trained on.
        site, target_site: of the input, and of a transcoder's output, layer and all (``"blocks.3.hook_resid_post"``).
        packing: False: each document has contexts of its own, padded; padding is neither measured nor seen.
        scale, target_scale: what the autoencoder's input, and a transcoder's target, are multiplied by in training;
            ``target_scale`` None is ``scale``.
        baselines: the caller's dictionary, in which the cross-entropies of the clean and of the ablated model are
            kept. They need no autoencoder: of N autoencoders at one site, measured at M steps, only the first call
            computes them (two passes more). The dictionary is for one ``lm`` and one set of documents. None: they are
            computed in each call.
        contexts: any of :class:`sae_engine.data.ContextSettings`, by name. Rows that training does not see are not
            measured and stay as they are in every run.

    Returns:
        ``evaluation/fvu``, ``l0``, ``dead`` (a share of the latents), ``ce_clean``, ``ce_spliced``, ``ce_ablated``
        (nats a token) and ``ce_recovered``, all below ``evaluation/``, and the last once more as SAELens calls it,
        ``model_performance_preservation/ce_loss_score``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`evaluate`.

    Example:
        >>> from sae_engine.data import evaluation_text, load_language_model
        >>> lm, kept = load_language_model(), {}
        >>> sae = se.SparseAutoencoder(lm.d_model, 512, se.TopK(8))
        >>> options = {"site": "blocks.2.hook_resid_pre", "context_length": 32, "max_tokens": 64}
        >>> found = evaluate_during(sae, lm, evaluation_text()[:1], baselines=kept, **options)
        >>> found["evaluation/l0"], len(kept)
        (8.0, 2)
    """
    splice = Splice(sae, lm, (site, None), (target_site, None), Normalization("none", scale, target_scale))
    batches = splice.batches(documents, max_tokens, packing=packing, **contexts)
    measures, kept = _Errors(sae, splice), {} if baselines is None else baselines
    said = (max_tokens, packing, str(splice.words))
    keys: dict[str, Hashable] = {"clean": ("clean", *said), "ablated": ("ablated", str(splice.target), *said)}
    wanted = {"clean": _same, "ablated": _zeros}
    runs = {run: replace for run, replace in wanted.items() if keys[run] not in kept} | {"spliced": measures.update}
    with in_eval_mode(sae):
        ce = {run: loss["ce"] for run, loss in _losses(splice, batches, runs).items()}
    kept |= {keys[run]: ce[run] for run in ce.keys() & keys.keys()}
    clean, spliced, ablated = kept[keys["clean"]], ce["spliced"], kept[keys["ablated"]]
    found, recovered = measures.compute(), loss_recovered(clean, spliced, ablated)
    numbers = {
        "fvu": found["reconstruction"]["fvu"], "l0": found["sparsity"]["l0"],
        "dead": found["sparsity"]["dead_fraction"], "ce_clean": clean, "ce_spliced": spliced, "ce_ablated": ablated,
        "ce_recovered": recovered,
    }  # fmt: skip
    score = {"model_performance_preservation/ce_loss_score": recovered}
    return {f"evaluation/{name}": value for name, value in numbers.items()} | score


def _same(_: Tensor, y: Tensor) -> Tensor:
    return y


def _zeros(_: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(y)


def _losses(
    splice: Splice, batches: Iterable[Batch], runs: Mapping[str, Replace], *, divergence: bool = False,
    seen: Callable[[int], object] = lambda tokens: None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """What :class:`NextTokenLoss` says of each run; with ``divergence`` all but the first are compared with that."""
    losses = {name: NextTokenLoss() for name in runs}
    for batch in batches:
        first: Tensor | None = None
        for name, replace in runs.items():
            logits = splice.add(losses[name], batch, replace, clean=first)
            first = logits if divergence and first is None else first
        seen(len(batch.rows))
    return {name: loss.compute() for name, loss in losses.items()}


class _Errors:
    """Measurements of every autoencoder: its errors and its sparsity."""

    def __init__(self, sae: SparseAutoencoder, splice: Splice, centre: Tensor | None = None) -> None:
        self.sae, self.norm, self.is_transcoder = sae, splice.normalization, splice.is_transcoder
        self.reconstruction = Reconstruction(space=self.norm.space, centre=centre)
        self.sparsity = Sparsity(sae.d_sae)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """Measures what is made of x (tokens, d) against x, or a transcoder's against its target's y; returns it."""
        z, info = self.norm.into(x)
        (codes,), encoded, _ = self.sae.encode_with(z)
        z_hat = self.sae.decode(codes, encoded)
        self.sparsity.update(codes)
        y_hat = self.norm.back(z_hat, info)
        self.reconstruction.update(*((y_hat, y) if self.is_transcoder else (z_hat, z)))
        self.further(codes, z, encoded, info)
        return y_hat

    def further(self, codes: SparseCodes, z: Tensor, encoded: Any, info: tuple[Tensor, Tensor] | None) -> None:
        """What else there is to measure."""

    def compute(self) -> dict[str, Any]:
        return {"reconstruction": self.reconstruction.compute(), "sparsity": self.sparsity.compute()}


class _Measures(_Errors):
    """Those, and the ones that cost more: norms, tails, the decoder."""

    def __init__(self, sae: SparseAutoencoder, splice: Splice, centre: Tensor | None) -> None:
        super().__init__(sae, splice, centre)
        self.norms, self.rows = contributing_rows(sae)
        self.epsilon = None if self.is_transcoder else EpsilonLBO(self.norms, sae.b_dec.detach())
        self.tail: TailTruncation | None = None

    def further(self, codes: SparseCodes, z: Tensor, encoded: Any, info: tuple[Tensor, Tensor] | None) -> None:
        self._update_tail(codes)
        if self.epsilon is not None:
            scale = None if info is None else info[1]
            if encoded.mean is not None and encoded.std is not None:  # the encoder's own layer norm
                scale = encoded.std + LAYER_NORM_EPS
                z = (z - encoded.mean) / scale
            self.epsilon.update(codes, z, scale=None if scale is None else scale[:, 0])

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
            **super().compute(), "decoder": decoder_similarity(self.sae.W_dec),
            "norms": None if self.epsilon is None else self.epsilon.compute(),
            "tail": None if self.tail is None else self.tail.compute(),
        }  # fmt: skip
