"""circuit-tracer's transcoder sets, whole: ``layer_0.safetensors``, ``layer_1.safetensors``, … beside ``config.yaml``.

What one file holds is said in :mod:`sae_engine.checkpoints.circuit_tracer`, which reads one of them as an autoencoder.
Here all of them are one crosscoder of wiring ``"local"``: source s reads and writes layer s.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._files import write_tensors
from ...rules import JumpReLU
from .. import circuit_tracer as single
from .._checkpoint import Checkpoint, Files, text, text_writer, write_files
from .._reading import WeightFile, read_yaml
from ..card import SourceCard
from ._places import hooks, of_layers, own_section, recorded, said
from ._record import RULE, Cut, Record, biases, folded, layered, numbered, same, threshold_rules, thresholds_of

if TYPE_CHECKING:
    from ...crosscoder import Crosscoder

NAME = "transcoder_set"
CONFIG = "config.yaml"
_LAYER = r"layer_(\d+)\.safetensors"


def owns(folder: Path) -> bool:
    return any(folder.glob("layer_*.safetensors")) and (folder / CONFIG).is_file()


def load(folder: Path, cut: Cut | None = None) -> tuple[Record, Path]:
    file = folder / CONFIG
    config, files = read_yaml(file), numbered(folder, _LAYER)

    numbers: list[int] = []

    def mine(latents: int) -> slice:
        numbers.append(latents)
        return slice(0, latents) if cut is None else cut(latents)

    def one(s: int) -> Checkpoint:
        return single.load(Files(WeightFile(files[s], "safetensors", mine), file, config))

    def shape(c: Checkpoint) -> Any:
        return tuple(c.tensors["W_enc"].shape), tuple(c.tensors["W_dec"].shape), c.activation, "W_skip" in c.tensors

    first = one(0)
    wanted = shape(first)
    b_dec, skips = [first.tensors["b_dec"]], [first.tensors.get("W_skip")]
    for s in range(1, len(files)):
        c = one(s)
        same(files[s], "widths, rule and skip connection", shape(c), wanted)
        b_dec.append(c.tensors["b_dec"])
        skips.append(c.tensors.get("W_skip"))
    ((d_in, _), (_, d_out), kind, has_skip), d_sae = wanted, numbers[0]
    same(files[0], "the numbers of latents", sorted({*numbers}), [d_sae])

    def source(s: int) -> Mapping[str, Tensor]:
        held = one(s).tensors
        found = {name: held[name] for name in ("W_enc", "W_dec", "b_enc")}
        if "threshold" in held:
            found[f"{RULE}threshold"] = held["threshold"].clamp(min=0)
        return found

    layers, model = len(files), text(config.get("model_name"))
    card = SourceCard(NAME, "TranscoderSet", model_name=model, hook_name=text(config.get("feature_input_hook")))
    r = Record(
        [d_in] * layers, [d_out] * layers, "local", d_sae, layers, source, torch.cat(b_dec),
        card=card, skips=skips if has_skip else None,  # type: ignore[arg-type]
        provenance=said(model, of_layers(config, layers)), **threshold_rules(kind is JumpReLU, layers),
    )  # fmt: skip
    return recorded(r, config.get("sae_engine")), files[0]


def save(coder: Crosscoder, folder: Path) -> None:
    """Writes a file for each layer. Decoder norms are folded."""
    layered(coder, NAME, "local")
    thresholds, b_dec, skips = thresholds_of(coder, NAME), biases(coder), coder.W_skip
    into, out, model = hooks(coder, NAME)
    config: dict[str, Any] = {"model_name": model, "model_kind": "transcoder_set", "feature_input_hook": into,
              "feature_output_hook": out} | ({"activation": "relu"} if thresholds is None else {})  # fmt: skip
    config["sae_engine"] = own_section(coder)

    def tensors(s: int) -> dict[str, Tensor]:
        W_enc, W_dec, b_enc = folded(coder, s)
        found = {"W_enc": W_enc.T.contiguous(), "W_dec": W_dec.contiguous(), "b_enc": b_enc.clone(), "b_dec": b_dec[s]}
        if thresholds is not None:
            found["activation_function.threshold"] = thresholds[s]
        if skips is not None:
            found["W_skip"] = skips[s].detach().cpu().contiguous()
        return found

    writes: dict[str, Any] = {
        f"layer_{s}.safetensors": lambda file, s=s: write_tensors(file, tensors(s)) for s in range(len(coder.sources))
    }
    writes[CONFIG] = text_writer("".join(f"{name}: {json.dumps(value)}\n" for name, value in config.items()))
    write_files(folder, writes)

