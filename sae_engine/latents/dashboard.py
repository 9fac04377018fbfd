"""A static page of an autoencoder's latents: index.html beside scripts with the data, so that it works from a disk.

Files cannot be fetched from file://, but scripts can be loaded: ``data-N.js`` hold the latents, a few each, and are
loaded when one of them is asked for. What comes from a text reaches the page as JSON in ASCII without <, > and &, and
is put into it as text, never as HTML.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from .._checks import integer_in
from .._files import replace_file
from ..autoencoder import SparseAutoencoder
from ..data.contexts import check_int
from ..data.models import LanguageModel, memory_sha256
from ..data.store import folder_in
from .contexts import max_activating
from .lens import IN_THE_STREAM, Lens, logit_lens
from .stored import Features

SIZE = 32  # latents in a file
BARS = 24
NEIGHBOURS = LENS = 8


def write_dashboard(
    features: Features,
    sae: SparseAutoencoder,
    folder: str | Path,
    *,
    lm: LanguageModel | None = None,
    latents: int | Sequence[int] | None = 1000,
    contexts: int = 10,
    window: int = 40,
    title: str | None = None,
) -> Path:
    """Write a page that shows what latents fire on, to be opened in a browser as a file or put on any web server.

    Of each latent: on how many tokens it fires and how strongly, the contexts in which it fires most, the tokens that
    its direction raises and lowers (:func:`logit_lens`), the latents whose decoder rows are nearest, and the cosine
    between its encoder and its decoder. Latents that fire most often come first.

    Args:
        features: what :func:`~sae_engine.latents.collect` wrote.
        sae: the autoencoder of these features.
        folder: made when missing; a page that is there is replaced.
        lm: the language model of these features. None: no logit lens, and tokens are shown as numbers.
        latents: how many, of those that fire most often, or which; None is all, dead ones too. A page holds about
            10 kB for each.
        contexts: of each latent.
        window: tokens of a context.
        title: by default model and site.

    Returns:
        ``folder / "index.html"``.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; ``sae`` or ``lm`` is not that of the
            features, or no latent fires.

    Example:
        >>> import tempfile
        >>> lm = se.data.load_language_model()
        >>> sae, place = se.SparseAutoencoder(lm.d_model, 512, se.TopK(8)), {"layer": 2, "site": "resid_post"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     features = se.latents.collect(sae, lm, ["A text."], folder, progress=False, **place)
        ...     page = se.latents.write_dashboard(features, sae, folder + "/page", lm=lm, latents=3)
        ...     sorted(file.name for file in page.parent.iterdir())
        ['data-0.js', 'index.html', 'latents.js']
    """
    _check(features, sae, lm)
    contexts, window = check_int("contexts", contexts, 0), check_int("window", window, 1)
    chosen = _chosen(features, latents)
    target = folder_in("folder", folder)
    target.mkdir(parents=True, exist_ok=True)
    words = _Words(None if lm is None else lm.tokenizer)
    lens, why_not = _lens(features, sae, lm, chosen)
    number = -1
    for number, part in enumerate(_parts(chosen)):
        entries = [_entry(features, latent, contexts, window, words) for latent in part]
        geometry = _geometry(sae, torch.tensor(part))
        for row, entry in enumerate(entries):
            entry |= {name: values[row] for name, values in geometry.items()}
            place = number * SIZE + row
            entry |= {"u": None, "l": None} if lens is None else _lens_entry(lens, place, words)
        _write(target / f"data-{number}.js", f"saeChunk({number}, {_json(entries)});\n")
    overview = {"shown": chosen, "counts": features.counts().tolist(), "encoded": features.manifest["encoded"],
                "size": SIZE}  # fmt: skip
    _write(target / "latents.js", f"window.saeLatents = {_json(overview)};\n")
    while (left := target / f"data-{(number := number + 1)}.js").is_file():  # of a larger page that was there before
        left.unlink()
    _write(target / "index.html", _page(features, sae, title, why_not))
    return target / "index.html"


write = write_dashboard


def _check(features: Features, sae: SparseAutoencoder, lm: LanguageModel | None) -> None:
    if not isinstance(features, Features):
        raise TypeError(f"features must be Features, got {type(features).__name__}")
    if not isinstance(sae, SparseAutoencoder):
        raise TypeError(f"sae must be a SparseAutoencoder, got {type(sae).__name__}")
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


def _chosen(features: Features, latents: int | Sequence[int] | None) -> list[int]:
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


def _parts(chosen: list[int]) -> Iterator[list[int]]:
    return (chosen[first : first + SIZE] for first in range(0, len(chosen), SIZE))


# ------------------------------------------------------------------------------------------- what is said of a latent


class _Words:
    """Token ids as text, each decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = f"[{token}]" if self._tokenizer is None else self._tokenizer.decode([token])
        return self._known[token]


def _entry(features: Features, latent: int, contexts: int, window: int, words: _Words) -> dict[str, Any]:
    """Histogram and contexts, in the short names that page.js reads."""
    values = features.by_latent(latent).values.float()
    bars = None
    if len(values):
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        bars = {"low": _short(low), "high": _short(high),
                "counts": torch.histc(values, BARS, low, high).long().tolist()}  # fmt: skip
    return {
        "h": bars,
        "c": [{
            "t": [words(token) for token in context.token_ids.tolist()],
            "a": [_short(value) for value in context.activations.tolist()],
            "p": context.peak, "f": int(context.positions[0]), "d": context.document, "k": context.token,
        } for context in (max_activating(features, latent, contexts, window=window) if contexts else ())],
    }  # fmt: skip


@torch.no_grad()
def _geometry(sae: SparseAutoencoder, latents: Tensor) -> dict[str, list[Any]]:
    """Of each latent, the nearest decoder rows, and the cosine between encoder and decoder."""
    latents = latents.to(sae.W_dec.device)
    rows = torch.nn.functional.normalize(sae.W_dec.float(), dim=1)
    cosines = rows[latents] @ rows.T
    cosines[torch.arange(len(latents), device=latents.device), latents] = -torch.inf
    nearest = cosines.topk(min(NEIGHBOURS, sae.d_sae - 1))
    pairs = zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)
    own: list[Any] = [None] * len(latents)
    if not _is_transcoder(sae):
        encoder = torch.nn.functional.normalize(sae.W_enc.float()[:, latents], dim=0)
        own = [_short(value) for value in (encoder.T * rows[latents]).sum(1).tolist()]
    return {"n": [[(i, _short(v)) for i, v in zip(*pair, strict=True)] for pair in pairs], "e": own}


def _is_transcoder(sae: SparseAutoencoder) -> bool:
    return sae.d_in != sae.d_out or (sae.provenance is not None and sae.provenance.target_site is not None)


def _lens(
    features: Features, sae: SparseAutoencoder, lm: LanguageModel | None, chosen: list[int]
) -> tuple[Lens | None, str]:
    """The logit lens of the chosen latents, or None and why there is none."""
    if lm is None:
        return None, "no language model was given"
    site = features.manifest["site"]
    if _is_transcoder(sae):
        site = None if sae.provenance is None else sae.provenance.target_site
    if site not in IN_THE_STREAM or sae.d_out != lm.d_model:
        return None, f"decoder rows are directions at {site or 'a place that is not named'}, not in the residual stream"
    return logit_lens(lm, sae.W_dec.detach()[torch.tensor(chosen, device=sae.W_dec.device)], LENS), ""


def _lens_entry(lens: Lens, row: int, words: _Words) -> dict[str, Any]:
    def pairs(tokens: Tensor, values: Tensor) -> list[Any]:
        return [(words(t), _short(v)) for t, v in zip(tokens[row].tolist(), values[row].tolist(), strict=True)]

    return {"u": pairs(lens.raised, lens.raised_by), "l": pairs(lens.lowered, lens.lowered_by)}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


# ------------------------------------------------------------------------------------------------------------ files


def _page(features: Features, sae: SparseAutoencoder, title: str | None, why_not: str) -> str:
    assets = resources.files(__package__) / "page"
    read = {name: (assets / name).read_text(encoding="utf-8") for name in ("index.html", "style.css", "page.js")}
    m = features.manifest
    counts = features.counts()
    dead = int((counts == 0).sum())
    facts = (
        f"{sae.activation!r}, {sae.d_sae:,} latents ({dead:,} dead) · {features.provenance} · "
        f"{m['encoded']:,} tokens of {m['text_source'] or 'a text that is not named'} · "
        f"mean L0 {m['entries'] / max(m['encoded'], 1):.1f}"
    )
    lens = (
        f"Logit lens: none, since {why_not}." if why_not else
        "Logit lens: a decoder row, scaled to the norm √d_model, in the place of the last block's output, through the "
        "model's final norm and unembedding; what zeros give there is subtracted. All that later blocks do is left out."
    )  # fmt: skip
    context = (
        f"Contexts: of each context that the model saw ({m['context_length']} tokens), the token with the largest "
        "activation and its surroundings. Colour is the activation, relative to the first; hover for numbers."
    )
    version = f"Made by sae-engine from features of {m['dtype']}."
    return Template(read["index.html"]).substitute(
        title=html.escape(title or f"{m['model']} {features.provenance.site}, layer {m['layer']}"),
        facts=html.escape(facts), last=sae.d_sae - 1, style=read["style.css"], script=read["page.js"],
        footer="".join(f"<p>{html.escape(text)}</p>" for text in (lens, context, version)),
    )  # fmt: skip


def _json(value: Any) -> str:
    """JSON in ASCII that can stand in a script, and in HTML, whatever strings it holds."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _write(path: Path, text: str) -> None:
    replace_file(path, partial(Path.write_text, data=text, encoding="utf-8"))
