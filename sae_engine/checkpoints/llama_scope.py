"""Llama Scope's checkpoints, as OpenMOSS published them: ``hyperparams.json``, and ``checkpoints/final.safetensors``.

Keys: encoder.weight (d_sae, d), encoder.bias, decoder.weight (d, d_sae), decoder.bias; one threshold for all latents
stands in ``hyperparams.json``. The weights are of training, in which activations were multiplied by
sqrt(d) / (their average norm); the threshold is of the activations as they are. Read as SAELens reads it, with latents
as large as in training. Where decoder rows are longer or shorter than 1 and ``sparsity_include_decoder_norm`` says that
the threshold counts it, their norms go to the encoder before, as in the authors' own code.

Transcoders are refused: input and output were scaled differently there, and whether the threshold then goes by the one
or the other scale, the authors' code and other readers' do not agree on.

He et al. 2024, arXiv:2410.20526 (Llama Scope).
"""
from __future__ import annotations

from dataclasses import replace
from math import inf, sqrt
from pathlib import Path
from typing import Any

import torch

from .. import rules
from . import _folding as folding
from ._checkpoint import Checkpoint, Files, take, text
from ._places import said
from .card import RAW, SourceCard

NAME, KIND = "llama_scope", "safetensors"
CONFIG, FOLDER = "hyperparams.json", "checkpoints"
WEIGHTS = f"{FOLDER}/final.safetensors"
CONFIG_REQUIRED = True
LAYOUT = {"encoder.weight": ("W_enc", "Fd"), "encoder.bias": ("b_enc", "F"), "decoder.weight": ("W_dec", "dF"),
          "decoder.bias": ("b_dec", "d")}  # fmt: skip


def owns_weights(names: frozenset[str]) -> bool:
    return LAYOUT.keys() <= names


def owns_config(config: dict[str, Any]) -> bool:
    return "jump_relu_threshold" in config


def load(files: Files) -> Checkpoint:
    assert files.config is not None and files.config_file is not None
    cfg, file = files.config, files.config_file
    known: dict[str, list] = {
        "act_fn": ["jumprelu"], "norm_activation": ["dataset-wise", "inference"], "use_glu_encoder": [False, None]
    }  # fmt: skip
    for name, values in known.items():
        if (value := cfg.get(name)) not in values:
            raise ValueError(f"{file}: {name} must be {' or '.join(map(repr, values))} to be read, got {value!r}")
    site, target = text(cfg.get("hook_point_in")), text(cfg.get("hook_point_out"))
    norms = cfg.get("dataset_average_activation_norm") or {}
    if target not in (None, site) or norms.get("in") != norms.get("out"):
        raise ValueError(
            f"{file}: a transcoder, from {site} to {target}: input and output have scales of their own, and which of "
            "them the threshold goes by is not settled; it is not read here"
        )
    tensors = take(files.weights.path, files.weights.read(), LAYOUT, {"d": cfg.get("d_model"), "F": cfg.get("d_sae")})
    d_sae, d = tensors["W_dec"].shape
    scale = 1.0
    if cfg["norm_activation"] == "dataset-wise":
        scale = sqrt(d) / _positive(file, norms.get("in"), "dataset_average_activation_norm")
    threshold = scale * _positive(file, cfg["jump_relu_threshold"], "jump_relu_threshold")
    tensors["threshold"] = torch.full((d_sae,), threshold, dtype=tensors["W_dec"].dtype)
    card = SourceCard(NAME, "JumpReLU", hook_name=site, normalization=str(cfg["norm_activation"]), residual=RAW)
    c = Checkpoint(
        rules.JumpReLU, {}, tensors, card, apply_b_dec_to_input=bool(cfg.get("apply_decoder_bias_to_pre_encoder")),
        provenance=said(None, site),
    )  # fmt: skip
    length = tensors["W_dec"].double().norm(dim=1)
    is_unit = bool(((length - 1).abs() <= torch.finfo(tensors["W_dec"].dtype).eps).all())  # as near as it can say it
    if cfg.get("sparsity_include_decoder_norm", True) and not is_unit:
        c = folding.fold_decoder_norms(replace(c, rescale_acts_by_decoder_norm=True))
    return c if scale == 1 else folding.fold_input_scale(c, scale)


def _positive(file: Path, value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        raise ValueError(f"{file}: {name} must be a positive number, got {value!r}")
    return float(value)
