"""Gemma Scope 2's cross-layer transcoders and crosscoders: ``params_layer_0.safetensors``, … beside ``config.json``.

Keys of a layer: w_enc (d, d_sae), w_dec (d_sae, layers, d), b_enc, threshold (d_sae,), b_dec (d,) of that layer; and
perhaps ``x @ affine_skip_connection`` (d, d). The decoder has room for every layer. That of a cross-layer transcoder is
zero for the layers before its own, which is looked at: where some layers write to earlier ones and others do not, it is
neither a cross-layer transcoder nor a crosscoder.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import rules
from ..._files import write_tensors
from .._checkpoint import text, text_writer, write_files
from .._reading import WeightFile, read_json
from ..card import RAW, SourceCard
from ._places import of_layers, own_section, recorded, said
from ._record import (
    RULE,
    Cut,
    Record,
    biases,
    checked,
    cut_along,
    folded,
    layered,
    numbered,
    of_mine,
    refuse,
    same,
    tensor_of,
    thresholds_of,
)  # fmt: skip

if TYPE_CHECKING:
    from ...crosscoder import Crosscoder

NAME = "gemma_scope_2_clt"
CONFIG = "config.json"
_LAYER, _SKIP = r"params_layer_(\d+)\.safetensors", "affine_skip_connection"
_NAMES = {"w_enc": 2, "w_dec": 3, "b_enc": 1, "b_dec": 1, "threshold": 1}


def owns(folder: Path) -> bool:
    return any(folder.glob("params_layer_*.safetensors"))


def load(folder: Path, cut: Cut | None = None) -> tuple[Record, Path]:
    files = numbered(folder, _LAYER)
    layers, backwards = len(files), []
    biases_, skips = [], []
    wanted: Any = None
    for s, path in files.items():
        file = WeightFile(path, "safetensors")
        held = {name: tensor_of(file, name, dims) for name, dims in _NAMES.items()}
        has_skip = _SKIP in file.names
        checked(file, {*_NAMES} | ({_SKIP} if has_skip else set()))
        shape = (*(tuple(held[name].shape) for name in ("w_enc", "w_dec", "b_dec")), has_skip)
        wanted = shape if wanted is None else wanted
        same(path, "the shapes of w_enc, w_dec and b_dec, and a skip connection", shape, wanted)
        same(path, "the layers that w_dec writes", held["w_dec"].shape[1], layers)
        if s:
            backwards.append(bool(cut_along(held["w_dec"], 0, cut)[:, :s].any()))
        biases_.append(held["b_dec"])
        skips.append(tensor_of(file, _SKIP, 2).T.contiguous() if has_skip else None)
    (d, d_sae), _, _, has_skip = wanted

    def source(s: int, first: int = 0) -> Mapping[str, Tensor]:
        """With what it writes from the layer ``first`` on."""
        file = WeightFile(files[s], "safetensors")
        found = {"W_enc": tensor_of(file, "w_enc", 2), "W_dec": tensor_of(file, "w_dec", 3)[:, first:],
                 "b_enc": tensor_of(file, "b_enc", 1),
                 f"{RULE}threshold": tensor_of(file, "threshold", 1).clamp(min=0)}  # fmt: skip
        mine = of_mine(file.path, found, d_sae, cut)
        return {**mine, "W_dec": mine["W_dec"].flatten(1)}

    def settle(r: Record, seen: Sequence[Sequence[bool]]) -> Record:
        backwards = [any(of_layer) for of_layer in zip(*seen, strict=True)]
        if any(backwards) and not all(backwards):
            causal, other = backwards.index(False) + 1, backwards.index(True) + 1
            raise ValueError(
                f"{files[other]}: w_dec writes layers before {other}, which layer {causal} does not: it is neither a "
                "cross-layer transcoder, whose layers write themselves and later ones, nor a crosscoder"
            )
        if layers == 1 or any(backwards):
            return r
        return replace(r, wiring="causal", source=lambda s: source(s, s))

    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    model, places = text(config.get("model_name")), of_layers(config, layers)
    # Gemma has RMSNorm: nothing centres its residual stream.
    card = SourceCard(NAME, "JumpReLUMultiLayerSAE", model_name=model, residual=RAW)
    r = Record(
        [d] * layers, [d] * layers, "each", d_sae, layers, source, torch.cat(biases_),
        [(rules.JumpReLU, {})] * layers, card, skips=skips if has_skip else None,  # type: ignore[arg-type]
        provenance=said(model, places), seen=backwards, settle=settle,
    )  # fmt: skip
    return recorded(r, config.get("sae_engine")), files[0]


def save(coder: Crosscoder, folder: Path) -> None:
    """Writes a file for each layer, with zeros where a source writes nothing. Decoder norms are folded."""
    d, layers = layered(coder, NAME, "causal", "each"), len(coder.written_widths)
    thresholds, b_dec, skips = thresholds_of(coder, NAME), biases(coder), coder.W_skip
    if thresholds is None:
        refuse(NAME, "the rule ReLU, only JumpReLU")
    sources = coder.sources
    if sources[0].written_sites != range(layers) or len(sources) != layers:
        refuse(NAME, f"{len(sources)} sources for {layers} layers, only one for each")

    def tensors(s: int) -> dict[str, Tensor]:
        W_enc, W_dec, b_enc = folded(coder, s)
        whole = torch.zeros(coder.d_sae, layers, d, dtype=W_dec.dtype, device="cpu")
        sites = sources[s].written_sites
        whole[:, sites.start : sites.stop] = W_dec.view(coder.d_sae, len(sites), d)
        found = {"w_enc": W_enc.contiguous(), "w_dec": whole, "b_enc": b_enc.clone(), "b_dec": b_dec[s],
                 "threshold": thresholds[s]}  # fmt: skip
        return found if skips is None else {**found, _SKIP: skips[s].detach().cpu().T.contiguous()}

    known = coder.provenance
    config = {"model_name": None if known is None else known.model, "sae_engine": own_section(coder)}
    writes: dict[str, Any] = {
        f"params_layer_{s}.safetensors": lambda file, s=s: write_tensors(file, tensors(s), {"format": "pt"})
        for s in range(layers)
    }
    writes[CONFIG] = text_writer(json.dumps(config, indent=2))
    write_files(folder, writes)
