"""circuit-tracer's transcoder sets: ``layer_0.safetensors``, ``layer_1.safetensors``, … beside one ``config.yaml``.

Keys: W_enc (d_sae, d), transposed against SAELens', W_dec (d_sae, d), b_enc, b_dec; perhaps W_skip (d, d) for
``x @ W_skip.T``, and ``activation_function.threshold`` (d_sae,) of a JumpReLU; without that it is a ReLU. Nothing is
subtracted from the input. A file is one transcoder, so it is named: the folder holds many. Older sets have their
settings in ``wandb-config.yaml`` alone. Not held: cross-layer transcoders, and the activation ``topk``, which keeps the
k largest pre-activations, negative ones too.
"""
from __future__ import annotations

import re
from typing import Any

from .. import rules
from ._checkpoint import Checkpoint, Files, take, text
from ._places import said
from .card import UNKNOWN, SourceCard

NAME, KIND = "circuit_tracer", "safetensors"
CONFIG, WEIGHTS = "config.yaml", "layer_0.safetensors"
CONFIG_REQUIRED = True
LAYOUT = {"W_enc": ("W_enc", "Fd"), "W_dec": ("W_dec", "Fo"), "b_enc": ("b_enc", "F"), "b_dec": ("b_dec", "o")}
OPTIONAL = {"W_skip": ("W_skip", "od"), "activation_function.threshold": ("threshold", "F")}
_LAYER = re.compile(r"layer_(\d+)\.safetensors")


def owns_weights(names: frozenset[str]) -> bool:
    return LAYOUT.keys() <= names


def owns_config(config: dict[str, Any]) -> bool:
    return "feature_input_hook" in config or "d_feature" in config  # the second: wandb-config.yaml's


def load(files: Files) -> Checkpoint:
    held, cfg, file = files.weights.read(), files.config or {}, files.config_file
    present = {name: ours for name, ours in OPTIONAL.items() if name in held}
    tensors = take(files.weights, held, LAYOUT | present, ignored=("k",))  # which the refusal below is about
    has_threshold, activation = "threshold" in tensors, cfg.get("activation")
    if activation == "topk":
        raise ValueError(
            f"{file}: activation 'topk' keeps negative pre-activations too, which no rule here does; to have it "
            "without them, build SparseAutoencoder(d_in, d_sae, TopK(k), apply_b_dec_to_input=False) and copy the "
            "tensors"
        )
    if activation not in (("jumprelu", None) if has_threshold else ("relu", None)):
        said_by_weights = "with" if has_threshold else "without"
        raise ValueError(f"{file}: activation {activation!r} is not that of weights {said_by_weights} thresholds")
    found = _LAYER.fullmatch(files.weights.path.name)
    layer = None if found is None else int(found[1])
    site, target = (_in_block(text(cfg.get(f"feature_{side}_hook")), layer) for side in ("input", "output"))
    model = text(cfg.get("model_name"))
    card = SourceCard(NAME, "SingleLayerTranscoder", model_name=model, hook_name=site)
    return Checkpoint(
        rules.JumpReLU if has_threshold else rules.ReLU, {}, tensors, card, apply_b_dec_to_input=False,
        provenance=said(model, site, target=target or UNKNOWN, layer=layer),
    )  # fmt: skip


def _in_block(hook: str | None, layer: int | None) -> str | None:
    """``mlp.hook_in`` of a layer, which some write as ``blocks.{layer}.mlp.hook_in``, as TransformerLens names it."""
    if hook is None or layer is None:
        return hook
    return hook.replace("{layer}", str(layer)) if hook.startswith("blocks.") else f"blocks.{layer}.{hook}"
