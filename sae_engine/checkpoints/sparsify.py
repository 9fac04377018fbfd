"""sparsify's checkpoint layout (``eai-sparsify``): ``cfg.json`` beside ``sae.safetensors``.

Keys: encoder.weight (d_sae, d_in), encoder.bias, W_dec (d_sae, d_in), b_dec, W_skip where there is a skip connection.
``num_latents`` 0 means ``expansion_factor * d_in``. The input is always taken minus b_dec, except by a transcoder. Only
top-k is held; ``groupmax`` is a rule that this library does not have.
"""
from __future__ import annotations

import json
import re
from os import PathLike
from pathlib import Path
from typing import Any

from .. import rules as act
from .._files import write_tensors
from ..provenance import Provenance
from . import _folding as folding
from ._checkpoint import (
    Checkpoint,
    Files,
    laid_out,
    own_section,
    recorded,
    refuse,
    take,
    text,
    text_writer,
    write_files,
)  # fmt: skip
from ._places import said
from ._reading import read_json
from .card import RAW, UNKNOWN, SourceCard

NAME, KIND = "sparsify", "safetensors"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
CONFIG_REQUIRED = True
LAYOUT = {"encoder.weight": ("W_enc", "Fd"), "encoder.bias": ("b_enc", "F"), "W_dec": ("W_dec", "Fo"),
          "b_dec": ("b_dec", "o")}  # fmt: skip
_HOOKPOINT = re.compile(r"(?:layers|h|layer|blocks)\.\d+(?:\.\w+)*")
SKIP = {"W_skip": ("W_skip", "od")}


def owns_weights(names: frozenset[str]) -> bool:
    return {"encoder.weight", "encoder.bias", "b_dec"} <= names


def owns_config(config: dict[str, Any]) -> bool:
    return {"d_in", "k"} <= config.keys() and "d_sae" not in config and bool(
        {"num_latents", "expansion_factor"} & config.keys()
    )


def load(files: Files) -> Checkpoint:
    """The checkpoint. ``signed``, of older versions, is top-k by magnitude."""
    cfg, file = files.config, files.config_file
    assert cfg is not None
    rule = cfg.get("activation", "topk")
    if rule != "topk":
        raise ValueError(f"{file}: activation {rule!r} is not supported; supported: 'topk'")
    for flag in ("transcode", "signed"):
        if not isinstance(cfg.get(flag, False), bool):
            raise ValueError(f"{file}: {flag} must be true or false, got {cfg[flag]!r}")
    held = files.weights.read()
    sizes = {"d": cfg["d_in"], "o": cfg["d_in"], "F": _num_latents(cfg)}
    tensors = take(files.weights, held, LAYOUT | (SKIP if "W_skip" in held else {}), sizes)
    transcode = cfg.get("transcode", False)
    kind = act.AbsTopK if cfg.get("signed", False) else act.TopK
    notes = ("A transcoder: its target is a module's output, its input that module's input.",) if transcode else ()
    card = SourceCard(NAME, "SparseCoder", residual=RAW, notes=notes)  # it hooks Hugging Face's modules
    c = Checkpoint(
        kind, {"k": cfg["k"]}, tensors, card, apply_b_dec_to_input=not transcode,
        provenance=_place(files.weights.path.parent, transcode),
    )  # fmt: skip
    return recorded(c, cfg.get("sae_engine"))


def save(c: Checkpoint, path: str | PathLike) -> None:
    """Writes both files. Decoder norms are folded."""
    d_in, d_sae = c.tensors["W_enc"].shape
    if c.activation is not act.TopK:
        refuse(NAME, f"the rule {c.activation.__name__}, only TopK")
    if c.normalize_activations != "none":
        refuse(NAME, f"normalize_activations={c.normalize_activations!r}")
    if c.tensors["W_dec"].shape[1] != d_in:
        refuse(NAME, f"d_out={c.tensors['W_dec'].shape[1]} beside d_in={d_in}")
    c = folding.fold_decoder_norms(c)
    tensors = laid_out(c, LAYOUT | (SKIP if "W_skip" in c.tensors else {}))
    cfg = {
        "activation": "topk", "expansion_factor": max(1, d_sae // d_in), "normalize_decoder": True,
        "num_latents": d_sae, "k": c.options["k"], "multi_topk": False, "skip_connection": "W_skip" in c.tensors,
        "transcode": not c.apply_b_dec_to_input, "d_in": d_in, "sae_engine": own_section(c),
    }  # fmt: skip
    content = json.dumps(cfg, indent=2)
    write_files(Path(path), {
        WEIGHTS: lambda name: write_tensors(name, tensors, {"format": "pt"}),
        CONFIG: text_writer(content),
    })  # fmt: skip


def _place(folder: Path, transcode: bool) -> Provenance | None:
    """Its folders are named by the module that was hooked, ``layers.3.mlp``; the run's settings lie beside them.

    An autoencoder's input is what that module returns; a transcoder's is what it is given, its target what it returns.
    """
    name = folder.resolve().name
    if not _HOOKPOINT.fullmatch(name):
        return said(None, None, target=UNKNOWN if transcode else None)
    run = folder.parent / "config.json"
    settings = read_json(run) if run.is_file() else {}
    model = text(settings.get("model")) if "hookpoints" in settings else None
    return said(model, f"{name}:input" if transcode else name, target=name if transcode else None)


def _num_latents(cfg: dict[str, Any]) -> Any:
    stated, factor, d_in = cfg.get("num_latents", 0), cfg.get("expansion_factor"), cfg["d_in"]
    if stated != 0:
        return stated
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in (factor, d_in))
    return factor * d_in if whole else factor
