"""Gemma Scope 2's checkpoint layout: ``params.safetensors`` beside ``config.json``.

Keys: w_enc (d_in, d_sae), w_dec (d_sae, d_out), b_enc, b_dec, threshold (d_sae,): a JumpReLU whose input is taken as it
is; transcoders may add ``x @ affine_skip_connection`` (d_in, d_out). The configuration names the model and the place;
the weights say enough without. Cross-layer transcoders, whose w_dec has three dimensions, are not held.
"""
from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from .. import rules as act
from .._files import write_tensors
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
    words,
    write_files,
)  # fmt: skip
from ._places import said
from .card import RAW, SourceCard

NAME, KIND = "gemma_scope_2", "safetensors"
CONFIG, WEIGHTS = "config.json", "params.safetensors"
CONFIG_REQUIRED = False
LAYOUT = {"w_enc": ("W_enc", "dF"), "w_dec": ("W_dec", "Fo"), "b_enc": ("b_enc", "F"), "b_dec": ("b_dec", "o"),
          "threshold": ("threshold", "F")}  # fmt: skip
SKIP = {"affine_skip_connection": ("W_skip", "do")}


def owns_weights(names: frozenset[str]) -> bool:
    return {"w_enc", "w_dec", "threshold"} <= names


def owns_config(config: dict[str, Any]) -> bool:
    return config.get("architecture") == "jump_relu" and "d_in" not in config


def load(files: Files) -> Checkpoint:
    held, cfg = files.weights.read(), files.config or {}
    tensors = take(files.weights, held, LAYOUT | (SKIP if SKIP.keys() & held.keys() else {}))
    into, out = text(cfg.get("hf_hook_point_in")), text(cfg.get("hf_hook_point_out"))
    notes = () if out is None or out == into else (f"A transcoder: its target is {out}, its input {into}.",)
    # Gemma has RMSNorm: nothing centres its residual stream.
    card = SourceCard(
        NAME, "JumpReLUSAE", model_name=text(cfg.get("model_name")), hook_name=into, residual=RAW, notes=notes
    )
    model, target = text(cfg.get("model_name")), None if not notes else _module(out)
    c = Checkpoint(
        act.JumpReLU, {}, tensors, card, apply_b_dec_to_input=False,
        provenance=said(model, _module(into), target=target),
    )  # fmt: skip
    return recorded(c, cfg.get("sae_engine"))


def _module(name: str | None) -> str | None:
    """``model.layers.3.mlp.output`` is what the module of that name returns, ``….input`` what it is given."""
    if name is None or not name.endswith((".output", ".input")):
        return name
    module, _, side = name.rpartition(".")
    return module if side == "output" else f"{module}:input"


def save(c: Checkpoint, path: str | PathLike) -> None:
    """Writes both files. Decoder norms are folded, and ``b_dec`` into ``b_enc`` where it is subtracted."""
    if c.activation is not act.JumpReLU:
        refuse(NAME, f"the rule {c.activation.__name__}, only JumpReLU")
    if c.normalize_activations != "none":
        refuse(NAME, f"normalize_activations={c.normalize_activations!r}")
    c = folding.subtract_b_dec(folding.fold_decoder_norms(c), False)
    skip = "W_skip" in c.tensors
    tensors = laid_out(c, LAYOUT | (SKIP if skip else {}))
    model, into, out = words(c)
    cfg = {
        "architecture": "jump_relu", "width": c.tensors["W_dec"].shape[0], "affine_connection": skip,
        "model_name": model, "hf_hook_point_in": into, "hf_hook_point_out": out, "sae_engine": own_section(c),
    }  # fmt: skip
    content = json.dumps(cfg, indent=2)
    write_files(Path(path), {
        WEIGHTS: lambda name: write_tensors(name, tensors, {"format": "pt"}),
        CONFIG: text_writer(content),
    })  # fmt: skip
