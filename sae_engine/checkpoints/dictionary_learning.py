"""dictionary_learning's checkpoint layout: ``ae.pt`` beside ``config.json``.

Its classes differ in their keys: encoder.weight (d_sae, d_in), encoder.bias and decoder.weight (d_in, d_sae), with
``bias`` (AutoEncoder), decoder.bias (AutoEncoderNew), or b_dec, ``k``, ``threshold`` (AutoEncoderTopK, BatchTopKSAE);
W_enc (d_in, d_sae), W_dec, b_enc, b_dec and a threshold, with ``k`` and ``group_sizes`` (MatryoshkaBatchTopKSAE) or
without (JumpReluAutoEncoder); gate_bias, mag_bias, r_mag and decoder_bias (GatedAutoEncoder). AutoEncoderTopK and
BatchTopKSAE are told apart by ``trainer.dict_class`` alone. A threshold of -1 is one that was never learned. Files of
2024 have no ``threshold``, and older ones no ``k`` either: it stands in the configuration.
"""
from __future__ import annotations

import json
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from .. import rules as act
from . import _folding as folding
from ._checkpoint import (
    Checkpoint,
    Files,
    laid_out,
    own_section,
    recorded,
    refuse,
    scalar,
    take,
    text,
    text_writer,
    torch_writer,
    words,
    write_files,
)  # fmt: skip
from ._places import said, split
from .card import RAW, SourceCard

NAME, KIND = "dictionary_learning", "torch"
CONFIG, WEIGHTS = "config.json", "ae.pt"
CONFIG_REQUIRED = False
_LINEAR = {"encoder.weight": ("W_enc", "Fd"), "encoder.bias": ("b_enc", "F"), "decoder.weight": ("W_dec", "oF")}
_PLAIN = {"W_enc": ("W_enc", "dF"), "b_enc": ("b_enc", "F"), "W_dec": ("W_dec", "Fo"), "b_dec": ("b_dec", "o")}
_COUNTED = {**_LINEAR, "b_dec": ("b_dec", "o"), "threshold": ("threshold", "")}
_GATES = {"gate_bias": ("b_gate", "F"), "mag_bias": ("b_mag", "F"), "r_mag": ("r_mag", "F")}
LAYOUTS = {
    "AutoEncoder": {**_LINEAR, "bias": ("b_dec", "o")},
    "AutoEncoderNew": {**_LINEAR, "decoder.bias": ("b_dec", "o")},
    "AutoEncoderTopK": _COUNTED,
    "BatchTopKSAE": _COUNTED,
    "MatryoshkaBatchTopKSAE": {**_PLAIN, "threshold": ("threshold", "")},
    "JumpReluAutoEncoder": {**_PLAIN, "threshold": ("threshold", "F")},
    "GatedAutoEncoder": {"encoder.weight": ("W_enc", "Fd"), "decoder.weight": ("W_dec", "oF"),
                         "decoder_bias": ("b_dec", "o"), **_GATES},
}  # fmt: skip
RULES: dict[str, type[act.Activation]] = {
    "AutoEncoder": act.ReLU, "AutoEncoderNew": act.ReLU, "AutoEncoderTopK": act.TopK, "BatchTopKSAE": act.BatchTopK,
    "MatryoshkaBatchTopKSAE": act.BatchTopK, "JumpReluAutoEncoder": act.JumpReLU, "GatedAutoEncoder": act.JumpReLU,
}  # fmt: skip
_RAW_INPUT = ("AutoEncoderNew", "JumpReluAutoEncoder")  # these never take b_dec from the input
_MARKS = {"bias": "AutoEncoder", "decoder.bias": "AutoEncoderNew", "group_sizes": "MatryoshkaBatchTopKSAE",
          "gate_bias": "GatedAutoEncoder"}  # fmt: skip
_MISSPELT = {"MatroyshkaBatchTopKSAE": "MatryoshkaBatchTopKSAE"}  # its name there until 2025


def owns_weights(names: frozenset[str]) -> bool:
    linear = {"encoder.weight", "decoder.weight"} <= names and "pre_bias" not in names
    return linear or ({"W_enc", "W_dec"} <= names and bool({"threshold", "group_sizes"} & names))


def owns_config(config: dict[str, Any]) -> bool:
    return "dict_class" in _trainer(config)


def load(files: Files) -> Checkpoint:
    held, file = files.weights.read(), files.weights.path
    trainer = _trainer(files.config or {})
    name = _dict_class(held, trainer, files)
    rule = RULES[name]
    options: dict[str, Any] = {}
    counted = rule in (act.TopK, act.BatchTopK)
    if counted:
        held = {"threshold": torch.tensor(-1.0, device="cpu"), **held}
    tensors = take(files.weights, held, LAYOUTS[name], ignored=("k", "group_sizes") if counted else ())
    if tensors["W_enc"].shape[0] != tensors["W_dec"].shape[1]:
        raise ValueError(f"{file}: encoder and decoder must have the same width")
    notes: list[str] = []
    if counted:
        options["k"] = scalar(file, held, "k") if "k" in held else trainer.get("k")
        if options["k"] is None:
            raise ValueError(f"{file} holds no k: put it into {CONFIG} beside it, as trainer.k")
        if trainer.get("k", options["k"]) != options["k"]:
            raise ValueError(f"{file} says k = {options['k']} and {files.config_file} says {trainer['k']!r}")
    if rule is act.TopK:
        learned = tensors.pop("threshold").item()
        if learned >= 0:
            notes.append(f"Its threshold {learned:.6g} is not used: it keeps k entries of each token.")
    elif rule is act.BatchTopK:
        beta = trainer.get("threshold_beta", 0.999)
        if not isinstance(beta, int | float) or not 0 <= beta < 1:
            raise ValueError(f"{files.config_file}: threshold_beta must satisfy 0 <= threshold_beta < 1, got {beta!r}")
        options["threshold_lr"] = round(1 - beta, 12)  # 1 - 0.999 is not 0.001
        if tensors["threshold"].item() < 0:
            tensors["threshold"] = torch.tensor(-1.0, device="cpu")
    elif name == "GatedAutoEncoder":
        tensors = folding.gated_as_jumprelu(tensors)
        notes.append("Read as the JumpReLU that a gated SAE is at inference.")
    if isinstance(held.get("group_sizes"), torch.Tensor):
        notes.append(f"Nested groups in training: {held['group_sizes'].tolist()}.")
    if isinstance(trainer.get("norm_factor"), int | float):
        factor = trainer["norm_factor"]
        notes.append(f"Trained on activations over {factor:.6g}; its trainer has scaled the biases back.")
    c = Checkpoint(
        rule, options, tensors, _card(name, trainer, notes), apply_b_dec_to_input=name not in _RAW_INPUT,
        provenance=said(text(trainer.get("lm_name")), text(trainer.get("submodule_name")), layer=trainer.get("layer")),
    )  # fmt: skip
    return recorded(c, (files.config or {}).get("sae_engine"))


def save(c: Checkpoint, path: str | PathLike) -> None:
    """Writes both files. Decoder norms are folded, and for JumpReLU ``b_dec`` into ``b_enc``.

    A learned threshold is written in fp64, as it is: their classes round it to fp32 when they load it.
    """
    if c.normalize_activations != "none":
        refuse(NAME, f"normalize_activations={c.normalize_activations!r}")
    if "W_skip" in c.tensors or c.tensors["W_enc"].shape[0] != c.tensors["W_dec"].shape[1]:
        refuse(NAME, "a transcoder or skip connection")
    names: dict[type[act.Activation], str] = {
        act.TopK: "AutoEncoderTopK", act.BatchTopK: "BatchTopKSAE", act.MutualChoice: "BatchTopKSAE",
        act.JumpReLU: "JumpReluAutoEncoder", act.ReLU: "AutoEncoder" if c.apply_b_dec_to_input else "AutoEncoderNew",
    }  # fmt: skip
    if c.activation not in names:
        refuse(NAME, f"the rule {c.activation.__name__}")
    name = names[c.activation]
    if not isinstance(c.options.get("k", 1), int):
        refuse(NAME, f"a fractional k={c.options['k']}")
    c = folding.subtract_b_dec(folding.fold_decoder_norms(c), name not in _RAW_INPUT)
    if c.activation is act.TopK:
        c = replace(c, tensors={**c.tensors, "threshold": torch.tensor(-1.0, device="cpu")})
    contents: dict[str, Any] = laid_out(c, LAYOUTS[name])
    if "k" in c.options:
        contents["k"] = torch.tensor(c.options["k"], dtype=torch.int, device="cpu")
    config = {"trainer": _trainer_of(c, name), "buffer": {}, "sae_engine": own_section(c)}
    content = json.dumps(config, indent=2)
    write_files(Path(path), {WEIGHTS: torch_writer(contents), CONFIG: text_writer(content)})


def _trainer(config: dict[str, Any]) -> dict[str, Any]:
    trainer = config.get("trainer")
    return trainer if isinstance(trainer, dict) else {}


def _dict_class(held: dict[str, Any], trainer: dict[str, Any], files: Files) -> str:
    """The class whose keys these are: by the keys, and where they leave it open by the configuration."""
    said = trainer.get("dict_class")
    said = _MISSPELT.get(said, said) if isinstance(said, str) else said
    if said is not None and said not in LAYOUTS:
        raise ValueError(f"{files.config_file}: dict_class {said!r} is not supported; supported: {sorted(LAYOUTS)}")
    by_keys = next((name for mark, name in _MARKS.items() if mark in held), None)
    if by_keys is None and "W_enc" in held:
        by_keys = "JumpReluAutoEncoder"
    if by_keys is not None and said is not None and said != by_keys:
        raise ValueError(f"{files.config_file} says {said}, and {files.weights.path} has the keys of {by_keys}")
    name = by_keys or said
    if name is None:
        raise ValueError(
            f"{files.weights.path} may be an AutoEncoderTopK or a BatchTopKSAE, whose keys are the same: put its "
            f"{CONFIG} beside it"
        )
    return name


def _card(name: str, trainer: dict[str, Any], notes: list[str]) -> SourceCard:
    model, hook = text(trainer.get("lm_name")), text(trainer.get("submodule_name"))
    return SourceCard(NAME, name, model_name=model, hook_name=hook, residual=RAW, notes=tuple(notes))


def _trainer_of(c: Checkpoint, name: str) -> dict[str, Any]:
    d_in, d_sae = c.tensors["W_enc"].shape
    trainer: dict[str, Any] = {"dict_class": name, "activation_dim": d_in, "dict_size": d_sae}
    if "k" in c.options:
        trainer["k"] = c.options["k"]
    if "threshold_lr" in c.options:
        trainer["threshold_beta"] = 1 - c.options["threshold_lr"]
    model, hook, _ = words(c)
    layer = c.provenance.layer if c.provenance is not None else hook and split(hook)[0]
    if (model, hook, layer) != (None, None, None):
        trainer |= {"lm_name": model, "submodule_name": hook, "layer": layer}
    return trainer
