"""Codes in the layout that delphi caches them in, for its explainers and scorers (EleutherAI/delphi, 3c2e139).

    FOLDER/MODULE/config.json          what was cached, and the name of the model, whose tokenizer delphi loads
    FOLDER/MODULE/FIRST_LAST.safetensors
        locations    (entries, 3) uint16, or uint32 where that does not suffice: context, position, latent - FIRST
        activations  (entries,) float16
        tokens       (contexts, context_length) int64, the same in each file

FOLDER is what its ``LatentDataset(raw_dir=…)`` takes, and MODULE one of its ``modules``. Contexts are all of one length
there: shorter ones at the end of a text, and padded ones, are left out. Activations below 1e-5 are not listed there.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import replace_file
from ..data._require import require
from ..data.contexts import check_int
from ..data.sites import Site
from ..data.store import folder_in
from .stored import Features

SMALLEST = 1e-5


def write_delphi(features: Features, folder: str | Path, *, splits: int = 5, module: str | None = None) -> Path:
    """Write features as delphi's cache of latents.

    Args:
        folder: delphi's ``raw_dir``; made when missing.
        splits: into how many files the latents are divided.
        module: what delphi is to call the autoencoder, which is also the name of its folder: the site by default, as
            ``blocks.2.hook_resid_post``.

    Returns:
        the folder of the module.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range, ``module`` is not said of features of
            several sites, or no context has the whole length.

    Source: EleutherAI/delphi, ``delphi/latents/cache.py`` and ``loader.py`` as of commit 3c2e139.

    Example:
        >>> import tempfile
        >>> lm = se.data.load_language_model()
        >>> sae, options = se.SparseAutoencoder(lm.d_model, 512, se.TopK(8)), {"layer": 2, "site": "resid_post"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = ["Some text that is long enough for one context of eight tokens."]
        ...     features = se.latents.collect(sae, lm, text, folder, context_length=8, progress=False, **options)
        ...     written = se.latents.write_delphi(features, folder + "/latents", splits=2)
        ...     written.name, sorted(file.name for file in written.iterdir())
        ('blocks.2.hook_resid_post', ['0_255.safetensors', '256_511.safetensors', 'config.json'])
    """
    if not isinstance(features, Features):
        raise TypeError(f"features must be Features, got {type(features).__name__}")
    splits = check_int("splits", splits, 1, features.d_sae)
    manifest = features.manifest
    if module is None and manifest.get("sites") is not None:
        raise ValueError(f"module must be given: these features are of several sites, {manifest['sites']}")
    name = str(Site.of(manifest["site"], manifest["layer"])) if module is None else module
    if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"module must be the name of a folder, got {module!r}")
    tokens, rows, places = _contexts(features)
    target = folder_in("folder", folder) / name
    target.mkdir(parents=True, exist_ok=True)
    bounds = torch.linspace(0, features.d_sae, splits + 1, device="cpu").long().tolist()
    save = require("safetensors.torch").save
    for first, end in pairwise(bounds):
        entries = [_entries(features, latent, first, rows, places) for latent in range(first, end)]
        locations = torch.cat([entry[0] for entry in entries])
        activations = torch.cat([entry[1] for entry in entries])
        small = len(tokens) <= 2**16 and tokens.shape[1] <= 2**16 and end - first <= 2**16
        locations = locations.to(torch.uint16 if small else torch.uint32)
        data = save({"locations": locations, "activations": activations, "tokens": tokens})
        replace_file(target / f"{first}_{end - 1}.safetensors", partial(Path.write_bytes, data=data))
    text = json.dumps(_config(features, tokens, splits), indent=4)
    replace_file(target / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
    return target


def _contexts(features: Features) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the whole contexts (contexts, length), and of every token its context, -1 for none, and position."""
    length = features.manifest["context_length"]
    tokens = features.tokens()
    starts = (tokens.positions == 0).nonzero().flatten()
    lengths = torch.cat([starts, torch.tensor([len(features)], device="cpu")]).diff()
    whole = lengths == length
    if not bool(whole.any()):
        raise ValueError(f"features: no context has the whole length of {length} tokens, as delphi's all have")
    numbers = torch.where(whole, whole.cumsum(0) - 1, -1)
    rows = torch.repeat_interleave(numbers, lengths)
    return tokens.token_ids[rows >= 0].long().view(-1, length), rows, tokens.positions.long()


def _entries(features: Features, latent: int, first: int, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    at, values = features.by_latent(latent)
    kept = (rows[at] >= 0) & (values.abs() > SMALLEST)
    at = at[kept]
    return torch.stack([rows[at], places[at], torch.full_like(at, latent - first)], 1), values[kept].half()


def _config(features: Features, tokens: Tensor, splits: int) -> dict[str, Any]:
    m = features.manifest
    return {
        "dataset_repo": m["text_source"] or "not named", "dataset_split": "", "dataset_name": "",
        "dataset_column": "text", "batch_size": m["batch_size"], "cache_ctx_len": m["context_length"],
        "ctx_len": m["context_length"], "n_tokens": tokens.numel(), "n_splits": splits, "model_name": m["model"],
    }  # fmt: skip
