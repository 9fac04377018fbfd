"""The layout of the BatchTopK repository and of those made from it (top-AFA): ``sae.pt`` beside ``config.json``.

Keys: W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_enc, b_dec, and jumprelu.log_threshold (d_sae,) of a JumpReLU. The
configuration names the rule (``sae_type``) and says whether the input is layer-normed (``input_unit_norm``). b_enc is
there for every rule and used by "vanilla" and "jumprelu" alone. There is no threshold for inference: BatchTopK has to
be given one by training, or used with its batch rule.
"""
from __future__ import annotations

import json
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
    take,
    text,
    text_writer,
    torch_writer,
    words,
    write_files,
)  # fmt: skip
from ._places import said, split
from .card import SourceCard, residual_of

NAME, KIND = "batchtopk", "torch"
CONFIG, WEIGHTS = "config.json", "sae.pt"
CONFIG_REQUIRED = True
LAYOUT = {"W_enc": ("W_enc", "dF"), "W_dec": ("W_dec", "Fo"), "b_enc": ("b_enc", "F"), "b_dec": ("b_dec", "o")}
LOG_THRESHOLD = "jumprelu.log_threshold"
RULES: dict[str, type[act.Activation]] = {
    "vanilla": act.ReLU, "topk": act.TopK, "batchtopk": act.BatchTopK, "jumprelu": act.JumpReLU, "topafa": act.TopAFA,
}  # fmt: skip
_BIASED = ("vanilla", "jumprelu")


def owns_weights(names: frozenset[str]) -> bool:
    return {"W_enc", "W_dec"} <= names and not {"threshold", "group_sizes"} & names


def owns_config(config: dict[str, Any]) -> bool:
    return {"act_size", "dict_size"} <= config.keys()


def load(files: Files) -> Checkpoint:
    """The checkpoint. Both repositories take activations of TransformerLens, which centres a LayerNorm model's."""
    cfg, config_file = files.config, files.config_file
    assert cfg is not None
    name = cfg.get("sae_type")
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"{config_file}: sae_type {name!r} is not supported; supported: {sorted(RULES)}")
    if cfg.get("activation", "relu") != "relu" or cfg.get("tied_weights", False):
        raise ValueError(f"{config_file}: only activation 'relu' and untied weights are supported")
    rule, held = RULES[name], files.weights.read()
    layout = LAYOUT | ({LOG_THRESHOLD: ("threshold", "F")} if name == "jumprelu" else {})
    sizes = {"d": cfg["act_size"], "o": cfg["act_size"], "F": cfg["dict_size"]}
    tensors = take(files.weights, held, layout, sizes)
    own = cfg.get("sae_engine")
    notes: list[str] = []
    options: dict[str, Any] = {}
    if name == "jumprelu":
        tensors["threshold"] = tensors["threshold"].double().exp().float()
        options |= {"bandwidth": cfg["bandwidth"]} if "bandwidth" in cfg else {}
    elif name not in _BIASED and not cfg.get("use_encoder_bias", False) and bool(tensors["b_enc"].any()):
        tensors["b_enc"] = torch.zeros_like(tensors["b_enc"])
        notes.append("Its b_enc is not 0 and not used there: 0 here.")
    if rule in (act.TopK, act.BatchTopK):
        if "top_k" not in cfg:
            raise ValueError(f"{config_file} lacks 'top_k', which a {name} SAE needs")
        options["k"] = cfg["top_k"]
    if rule is act.BatchTopK:
        threshold = own.get("threshold") if isinstance(own, dict) else None
        if isinstance(threshold, float):
            tensors["threshold"] = torch.tensor(threshold, dtype=torch.float64, device="cpu")
        else:
            notes.append("No threshold: .train() has the batch rule, .eval() needs a threshold to be learned first.")
    norm = cfg.get("input_unit_norm", False)
    if not isinstance(norm, bool):
        raise ValueError(f"{config_file}: input_unit_norm must be true or false, got {norm!r}")
    model, hook = text(cfg.get("model_name")), text(cfg.get("hook_point"))
    normalize = "layer_norm" if norm else "none"
    card = SourceCard(
        NAME, name, model_name=model, hook_name=hook, normalization=normalize,
        residual=residual_of(model, hook, None if model is None else True), notes=tuple(notes),
    )  # fmt: skip
    c = Checkpoint(
        rule, options, tensors, card, apply_b_dec_to_input=name != "jumprelu", normalize_activations=normalize,
        provenance=said(model, hook, layer=cfg.get("layer"), text=text(cfg.get("dataset_path"))),
    )  # fmt: skip
    return recorded(c, own)


def save(c: Checkpoint, path: str | PathLike) -> None:
    """Writes both files. A learned threshold goes into the section ``sae_engine``, which no one else reads.

    Raises:
        ValueError: an encoder bias that is not 0, with a rule that uses none there.
    """
    names = {rule: name for name, rule in RULES.items()} | {act.MutualChoice: "batchtopk"}
    if c.activation not in names:
        refuse(NAME, f"the rule {c.activation.__name__}")
    name = names[c.activation]
    if "W_skip" in c.tensors or c.tensors["W_enc"].shape[0] != c.tensors["W_dec"].shape[1]:
        refuse(NAME, "a transcoder or skip connection")
    if not isinstance(c.options.get("k", 1), int):
        refuse(NAME, f"a fractional k={c.options['k']}")
    c = folding.fold_decoder_norms(c)
    if name == "jumprelu":
        c = folding.subtract_b_dec(c, False)
    elif not c.apply_b_dec_to_input:
        if name not in _BIASED:
            refuse(NAME, f"apply_b_dec_to_input=False with {c.activation.__name__}")
        c = folding.subtract_b_dec(c, True)
    if name not in _BIASED and bool(c.tensors["b_enc"].any()):
        refuse(NAME, f"an encoder bias with {c.activation.__name__}")
    contents: dict[str, Any] = laid_out(c, LAYOUT)
    own = own_section(c)
    if name == "jumprelu":
        used = c.tensors["threshold"].clamp(min=0)
        contents[LOG_THRESHOLD] = used.double().log()  # in fp64 its exponential rounds back exactly
    elif name == "batchtopk" and bool(c.tensors["threshold"] >= 0):
        own["threshold"] = c.tensors["threshold"].item()
    content = json.dumps(_config(c, name) | {"sae_engine": own}, indent=2)
    write_files(Path(path), {WEIGHTS: torch_writer(contents), CONFIG: text_writer(content)})


def _config(c: Checkpoint, name: str) -> dict[str, Any]:
    d_in, d_sae = c.tensors["W_enc"].shape
    config: dict[str, Any] = {
        "sae_type": name, "act_size": d_in, "dict_size": d_sae, "dtype": str(c.tensors["W_dec"].dtype), "device": "cpu",
        "seed": 0, "input_unit_norm": c.normalize_activations == "layer_norm",
    }  # fmt: skip
    if "k" in c.options:
        config["top_k"] = c.options["k"]
    if "bandwidth" in c.options:
        config["bandwidth"] = c.options["bandwidth"]
    model, hook, _ = words(c)
    layer = c.provenance.layer if c.provenance is not None else hook and split(hook)[0]
    if (model, hook, layer) != (None, None, None):
        config |= {"model_name": model, "hook_point": hook, "layer": layer}
    return config
