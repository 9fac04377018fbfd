"""Gemma Scope's checkpoint layout: one ``params.npz``.

Arrays W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_enc, b_dec, threshold (d_sae,): a JumpReLU whose input is taken as it
is. Lower-case names (``w_enc``) are read too. Dictionaries of the embedding layer were trained on embeddings that Gemma
multiplies by sqrt(d_in): give them those.
"""
from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from .. import rules as act
from ..provenance import Provenance
from . import _folding as folding
from ._checkpoint import Checkpoint, Files, laid_out, refuse, single_file, take, write_files
from .card import RAW, SourceCard

NAME, KIND = "gemma_scope", "npz"
CONFIG, WEIGHTS = None, "params.npz"
CONFIG_REQUIRED = False
LAYOUT = {"W_enc": ("W_enc", "dF"), "W_dec": ("W_dec", "Fo"), "b_enc": ("b_enc", "F"), "b_dec": ("b_dec", "o"),
          "threshold": ("threshold", "F")}  # fmt: skip

_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "z"}  # of its repositories


def owns_weights(names: frozenset[str]) -> bool:
    return {"W_enc", "W_dec", "threshold"} <= {_capital(name) for name in names}


def owns_config(config: dict[str, Any]) -> bool:
    return False


def load(files: Files) -> Checkpoint:
    held = {_capital(name): tensor for name, tensor in files.weights.read().items()}
    tensors = take(files.weights, held, LAYOUT)
    # Gemma has RMSNorm: nothing centres its residual stream.
    card = SourceCard(NAME, "JumpReLUSAE", residual=RAW)
    place = _place(files.weights.path)
    return Checkpoint(act.JumpReLU, {}, tensors, card, apply_b_dec_to_input=False, provenance=place)


def _place(file: Path) -> Provenance | None:
    """What the release's own names of repository and folder say: the file says nothing."""
    path = file.resolve().parent.as_posix()
    release = re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att)\b", path)
    layer = re.search(r"/layer_(\d+)(/|$)", path)
    if release is None or layer is None:
        return None
    size, kind, site = release.groups()
    model = f"google/gemma-2-{size}" + ("-it" if kind == "it" else "")
    return Provenance(model=model, layer=int(layer[1]), site=_SITES[site])


def save(c: Checkpoint, path: str | PathLike) -> None:
    """Writes one file: ``path`` if it ends in .npz, else ``params.npz`` in the folder ``path``.

    ``b_dec`` moves into ``b_enc`` where it is subtracted from the input. There is no place for the training bandwidth.
    """
    import numpy as np

    if c.activation is not act.JumpReLU:
        refuse(NAME, f"the rule {c.activation.__name__}, only JumpReLU")
    if c.normalize_activations != "none":
        refuse(NAME, f"normalize_activations={c.normalize_activations!r}")
    if "W_skip" in c.tensors:
        refuse(NAME, "a skip connection")
    if any(tensor.dtype == torch.bfloat16 for tensor in c.tensors.values()):
        refuse(NAME, "the dtype bfloat16 (sae.float() can be saved)")
    c = folding.subtract_b_dec(folding.fold_decoder_norms(c), False)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in laid_out(c, LAYOUT).items()}
    file = single_file(path, ".npz", WEIGHTS)

    def write(name: Path) -> None:
        with name.open("wb") as stream:  # given a name, numpy appends .npz to it
            np.savez(stream, **arrays)

    write_files(file.parent, {file.name: write})


def _capital(name: str) -> str:
    return f"W_{name[2:]}" if name.startswith("w_") else name
