"""circuit-tracer's cross-layer transcoders: ``W_enc_0.safetensors``, ``W_dec_0.safetensors``, …, ``config.yaml``.

Keys: W_enc_{s} (d_sae, d), b_enc_{s}, b_dec_{s} (d,) of layer s and, of a JumpReLU, threshold_{s} (d_sae,), in the
first file of a layer; W_dec_{s} (d_sae, layers - s, d) in the second. Without thresholds it is a ReLU. These files
know neither a top-k nor a skip connection. In memory all tensors lie as they do in the files.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._files import write_tensors
from .._checkpoint import text, text_writer, write_files
from .._reading import WeightFile, read_yaml
from ..card import RAW, SourceCard
from ._places import hooks, of_layers, own_section, recorded, said
from ._record import (
    RULE,
    Cut,
    Record,
    biases,
    checked,
    folded,
    layered,
    numbered,
    of_mine,
    refuse,
    same,
    tensor_of,
    threshold_rules,
    thresholds_of,
)  # fmt: skip

if TYPE_CHECKING:
    from ...crosscoder import Crosscoder

NAME = "circuit_tracer_clt"
CONFIG = "config.yaml"
_ENCODER, _DECODER = r"W_enc_(\d+)\.safetensors", r"W_dec_(\d+)\.safetensors"


def owns(folder: Path) -> bool:
    return any(folder.glob("W_enc_*.safetensors")) or any(folder.glob("W_dec_*.safetensors"))


def load(folder: Path, cut: Cut | None = None) -> tuple[Record, Path]:
    encoders = {s: WeightFile(file, "safetensors") for s, file in numbered(folder, _ENCODER).items()}
    decoders = {s: WeightFile(file, "safetensors") for s, file in numbered(folder, _DECODER).items()}
    for s in range(max(len(encoders), len(decoders))):
        for kind, files in (("W_enc", encoders), ("W_dec", decoders)):
            if s not in files:
                file = folder / f"{kind}_{s}.safetensors"
                raise ValueError(f"{file} is missing: the other file of layer {s} is there")
    first = encoders[0]
    d_sae, d = tensor_of(first, "W_enc_0", 2).shape
    layers = tensor_of(decoders[0], "W_dec_0", 3).shape[1]
    if layers != len(encoders):
        file = folder / f"W_enc_{len(encoders)}.safetensors" if layers > len(encoders) else decoders[0].path
        what = "is missing" if layers > len(encoders) else f"does not fit {len(encoders)} layers"
        raise ValueError(f"{file} {what}: W_dec_0 writes {layers} layers")
    has_threshold = "threshold_0" in first.names

    def source(s: int) -> Mapping[str, Tensor]:
        one, other = WeightFile(encoders[s].path, "safetensors"), WeightFile(decoders[s].path, "safetensors")
        names = {f"W_enc_{s}", f"b_enc_{s}", f"b_dec_{s}"} | ({f"threshold_{s}"} if has_threshold else set())
        checked(one, names)
        checked(other, {f"W_dec_{s}"})
        W_dec = tensor_of(other, f"W_dec_{s}", 3)
        same(other.path, f"the shape of W_dec_{s}", tuple(W_dec.shape), (d_sae, layers - s, d))
        found = {"W_enc": tensor_of(one, f"W_enc_{s}", 2).T, "W_dec": W_dec.flatten(1),
                 "b_enc": tensor_of(one, f"b_enc_{s}", 1)}  # fmt: skip
        if has_threshold:
            # A JumpReLU takes a threshold below 0, where an optimizer may have pushed it, for 0.
            found[f"{RULE}threshold"] = tensor_of(one, f"threshold_{s}", 1).clamp(min=0)
        return of_mine(other.path, found, d_sae, cut)

    file = folder / CONFIG
    config = read_yaml(file) if file.is_file() else {}
    model, places = text(config.get("model_name")), of_layers(config, layers)
    card = SourceCard(NAME, "CrossLayerTranscoder", model_name=model, hook_name=text(config.get("feature_input_hook")),
                      residual=RAW)  # fmt: skip
    r = Record(
        [d] * layers, [d] * layers, "causal", d_sae, layers, source,
        torch.cat([tensor_of(encoders[s], f"b_dec_{s}", 1) for s in range(layers)]), card=card,
        provenance=said(model, places), **threshold_rules(has_threshold, layers),
    )  # fmt: skip
    return recorded(r, config.get("sae_engine")), first.path


def save(coder: Crosscoder, folder: Path) -> None:
    """Writes two files for each layer. Decoder norms are folded."""
    d = layered(coder, NAME, "causal")
    if coder.W_skip is not None:
        refuse(NAME, "a skip connection")
    thresholds, b_dec, layers = thresholds_of(coder, NAME), biases(coder), len(coder.sources)
    into, out, model = hooks(coder, NAME)
    config = {"model_name": model, "model_kind": "cross_layer_transcoder", "feature_input_hook": into,
              "feature_output_hook": out, "sae_engine": own_section(coder)}  # fmt: skip

    def encoder(s: int) -> dict[str, Tensor]:
        W_enc, _, b_enc = folded(coder, s)
        found = {f"W_enc_{s}": W_enc.T.contiguous(), f"b_enc_{s}": b_enc.clone(), f"b_dec_{s}": b_dec[s]}
        return found if thresholds is None else {**found, f"threshold_{s}": thresholds[s].to(torch.float32)}

    def decoder(s: int) -> dict[str, Tensor]:
        return {f"W_dec_{s}": folded(coder, s)[1].view(coder.d_sae, layers - s, d).contiguous()}

    writes: dict[str, Any] = {}
    for s in range(layers):
        writes[f"W_enc_{s}.safetensors"] = lambda file, s=s: write_tensors(file, encoder(s))
        writes[f"W_dec_{s}.safetensors"] = lambda file, s=s: write_tensors(file, decoder(s))
    # JSON's values are YAML's.
    writes[CONFIG] = text_writer("".join(f"{name}: {json.dumps(value)}\n" for name, value in config.items()))
    write_files(folder, writes)
