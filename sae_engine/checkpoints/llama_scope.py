"""Llama Scope's checkpoints, as OpenMOSS published them: ``hyperparams.json``, and ``checkpoints/final.safetensors``.

Keys: encoder.weight (d_sae, d), encoder.bias, decoder.weight (d, d_sae), decoder.bias; one threshold for all latents
stands in ``hyperparams.json``. The weights are of training, in which activations were multiplied by
sqrt(d) / (their average norm), a transcoder's input and output each by its own. The threshold is of what a latent adds
to the output as it is. Read as SAELens reads autoencoders, with latents as large as in training. Where decoder rows are
longer or shorter than 1 and ``sparsity_include_decoder_norm`` says that the threshold takes them into account, their
norms are folded into the encoder first.

That a transcoder's threshold goes by its output shows in the published numbers. All were trained to 50 latents a token.
In units of training, thresholds of autoencoders are 2.05 (L8R: 0.2021 at a norm of 6.3125), 2.10 (L15R), 1.97 (L19R)
and 1.66 (L24R, 32x). That of the transcoder L8TC, 0.1040 at norms of 64 and 3.390625, is 1.96 by its output, and by its
input 0.10, which hardly any latent misses.

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
    is_transcoder = target not in (None, site)
    counts_norms, subtracts = (cfg.get(name, default) for name, default in (
        ("sparsity_include_decoder_norm", True), ("apply_decoder_bias_to_pre_encoder", False)))  # fmt: skip
    if is_transcoder and (subtracts or not counts_norms):
        raise ValueError(
            f"{file}: a transcoder, from {site} to {target}, that subtracts its output's bias from its input, or whose "
            "threshold leaves out the norms of the decoder, was never published: what it means is not known"
        )
    if not is_transcoder:  # whose output is its input, so that some files leave the second norm out
        norms = {"out": norms.get("in"), **norms}
    if not is_transcoder and norms["out"] != norms.get("in"):
        raise ValueError(f"{file}: norms in and out differ, {norms}, of an autoencoder of {site}")
    tensors = take(files.weights, files.weights.read(), LAYOUT, {"d": cfg.get("d_model"), "F": cfg.get("d_sae")})
    d_sae, d = tensors["W_dec"].shape
    scale = target_scale = 1.0
    if cfg["norm_activation"] == "dataset-wise":
        scale, target_scale = (sqrt(d) / _positive(file, norms.get(side), f"dataset_average_activation_norm.{side}")
                               for side in ("in", "out"))  # fmt: skip
    threshold = target_scale * _positive(file, cfg["jump_relu_threshold"], "jump_relu_threshold")
    tensors["threshold"] = torch.full((d_sae,), threshold, dtype=tensors["W_dec"].dtype, device="cpu")
    card = SourceCard(NAME, "JumpReLU", hook_name=site, normalization=str(cfg["norm_activation"]), residual=RAW)
    c = Checkpoint(
        rules.JumpReLU, {}, tensors, card, apply_b_dec_to_input=bool(subtracts),
        provenance=said(None, site, target=target if is_transcoder else None),
    )  # fmt: skip
    length = tensors["W_dec"].double().norm(dim=1)
    is_unit = bool(((length - 1).abs() <= torch.finfo(tensors["W_dec"].dtype).eps).all())  # as near as it can say it
    if counts_norms and not is_unit:
        c = folding.fold_decoder_norms(replace(c, rescale_acts_by_decoder_norm=True))
    return c if scale == target_scale == 1 else folding.fold_input_scale(c, scale, target_scale)


def _positive(file: Path, value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        raise ValueError(f"{file}: {name} must be a positive number, got {value!r}")
    return float(value)
