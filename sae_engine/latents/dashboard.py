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

from .._files import replace_file
from ..autoencoder import SparseAutoencoder
from ..data.contexts import check_int
from ..data.models import LanguageModel
from ..data.store import folder_in
from ._shown import SiteLens, Words, check, chosen_latents, geometry, histogram, lenses_of, short
from .contexts import max_activating
from .stored import Features

SIZE = 32  # latents in a file


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

    A latent that writes to several sites (:func:`of_source`) has the lens of each, beside what share of its squared
    decoder norm lies there. Shown first is the sum of all where each is added to the stream of one model (``mlp_out``,
    ``attn_out``), which is what the latent does to the logits by itself; else the last site's.

    Args:
        features: what :func:`~sae_engine.latents.collect` wrote.
        sae: the autoencoder of these features.
        folder: made when missing; a page that is there is replaced.
        lm: the language model of these features. None: no logit lens, and tokens are shown as numbers.
        latents: how many, of those that fire most often, or which; None is all, dead ones too. A page holds about
            10 kB for each, and 0.5 kB more for each further site that is written.
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
    check(features, sae, lm)
    contexts, window = check_int("contexts", contexts, 0), check_int("window", window, 1)
    chosen = chosen_latents(features, latents)
    target = folder_in("folder", folder)
    target.mkdir(parents=True, exist_ok=True)
    words = Words(None if lm is None else lm.tokenizer)
    lenses, why_not = lenses_of(features, sae, lm, chosen)
    number = -1
    for number, part in enumerate(_parts(chosen)):
        entries = [_entry(features, latent, contexts, window, words) for latent in part]
        found = geometry(sae, torch.tensor(part, device="cpu"))
        for row, entry in enumerate(entries):
            entry |= {name: values[row] for name, values in found.items()}
            place = number * SIZE + row
            entry["w"] = [_lens_entry(lens, place, words) for lens in lenses]
        _write(target / f"data-{number}.js", f"saeChunk({number}, {_json(entries)});\n")
    overview = {"shown": chosen, "counts": features.counts().tolist(), "encoded": features.manifest["encoded"],
                "size": SIZE, "lenses": [lens.name for lens in lenses]}  # fmt: skip
    _write(target / "latents.js", f"window.saeLatents = {_json(overview)};\n")
    while (left := target / f"data-{(number := number + 1)}.js").is_file():  # of a larger page that was there before
        left.unlink()
    _write(target / "index.html", _page(features, sae, title, why_not, bool(lenses)))
    return target / "index.html"


write = write_dashboard


def _parts(chosen: list[int]) -> Iterator[list[int]]:
    return (chosen[first : first + SIZE] for first in range(0, len(chosen), SIZE))


# ------------------------------------------------------------------------------------------- what is said of a latent


def _entry(features: Features, latent: int, contexts: int, window: int, words: Words) -> dict[str, Any]:
    """Histogram and contexts, in the short names that page.js reads."""
    counts, low, high = histogram(features.by_latent(latent).values)
    return {
        "h": {"low": short(low), "high": short(high), "counts": counts} if sum(counts) else None,
        "c": [{
            "t": [words(token) for token in context.token_ids.tolist()],
            "a": [short(value) for value in context.activations.tolist()],
            "p": context.peak, "f": int(context.positions[0]), "d": context.document, "k": context.token,
        } for context in (max_activating(features, latent, contexts, window=window) if contexts else ())],
    }  # fmt: skip


def _lens_entry(of_site: SiteLens, row: int, words: Words) -> dict[str, Any]:
    lens = of_site.lens

    def pairs(tokens: Tensor, values: Tensor) -> list[Any]:
        return [(words(t), short(v)) for t, v in zip(tokens[row].tolist(), values[row].tolist(), strict=True)]

    return {"s": short(of_site.shares[row]), "u": pairs(lens.raised, lens.raised_by),
            "l": pairs(lens.lowered, lens.lowered_by)}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ files


def _page(features: Features, sae: SparseAutoencoder, title: str | None, why_not: str, has_lens: bool) -> str:
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
        f"Logit lens: none, since {why_not}." if not has_lens else
        "Logit lens: a decoder row, scaled to the norm √d_model, in the place of the last block's output, through the "
        "model's final norm and unembedding; what zeros give there is subtracted. All that later blocks do is left out."
        + (f" Some sites have none: {why_not}." if why_not else "")
    )  # fmt: skip
    context = (
        f"Contexts: of each context that the model saw ({m['context_length']} tokens), the token with the largest "
        "activation and its surroundings. Colour is the activation, relative to the first; hover for numbers."
    )
    version = f"Made by sae-engine from features of {m['dtype']}."
    return Template(read["index.html"]).substitute(
        title=html.escape(title or f"{m['model']} {_where(m)}"),
        facts=html.escape(facts), last=sae.d_sae - 1, style=read["style.css"], script=read["page.js"],
        footer="".join(f"<p>{html.escape(text)}</p>" for text in (lens, context, version)),
    )  # fmt: skip


def _where(manifest: dict[str, Any]) -> str:
    sites = manifest.get("sites")
    return f"{manifest['site']}, layer {manifest['layer']}" if sites is None else f"{sites[0]} … {sites[-1]}"


def _json(value: Any) -> str:
    """JSON in ASCII that can stand in a script, and in HTML, whatever strings it holds."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _write(path: Path, text: str) -> None:
    replace_file(path, partial(Path.write_text, data=text, encoding="utf-8"))
