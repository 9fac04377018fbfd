"""OpenAI's checkpoint layout (``sparse_autoencoder``, GPT-2): one file ``{layer}.pt``.

Keys: pre_bias (d_in,), encoder.weight (d_sae, d_in), latent_bias (d_sae,), decoder.weight (d_in, d_sae), ``activation``
("ReLU", "TopK") and ``activation_state_dict`` {k, postact_fn}, beside running statistics. The input is layer-normed
exactly where the activation is TopK.
"""
from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from .. import rules as act
from ..provenance import Provenance
from . import _folding as folding
from ._checkpoint import Checkpoint, Files, laid_out, refuse, single_file, take, torch_writer, write_files
from .card import RAW, SourceCard

NAME, KIND = "openai", "torch"
CONFIG, WEIGHTS = None, "autoencoder.pt"
CONFIG_REQUIRED = False
LAYOUT = {"pre_bias": ("b_dec", "o"), "encoder.weight": ("W_enc", "Fd"), "latent_bias": ("b_enc", "F"),
          "decoder.weight": ("W_dec", "oF")}  # fmt: skip
# The names of its releases' folders for the sites.
_LOCATIONS = {"resid_post_attn": "resid_mid", "resid_post_mlp": "resid_post", "resid_delta_attn": "attn_out",
              "resid_delta_mlp": "mlp_out", "mlp_post_act": "mlp_post"}  # fmt: skip
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def owns_weights(names: frozenset[str]) -> bool:
    return {"pre_bias", "latent_bias", "encoder.weight"} <= names


def owns_config(config: dict[str, Any]) -> bool:
    return False


def load(files: Files) -> Checkpoint:
    held, file = files.weights.read(), files.weights.path
    tensors = take(files.weights, held, LAYOUT, ignored=(*STATISTICS, "activation", "activation_state_dict"))
    if tensors["W_enc"].shape[0] != tensors["W_dec"].shape[1]:
        raise ValueError(f"{file}: encoder.weight and decoder.weight must have the same width")
    name, state = held.get("activation", "ReLU"), held.get("activation_state_dict", {})
    if name not in ("ReLU", "TopK"):
        raise ValueError(f"{file}: activation {name!r} is not supported; supported: 'ReLU', 'TopK'")
    normalize = "layer_norm" if name == "TopK" else "none"
    card, place = SourceCard(NAME, name, normalization=normalize, residual=RAW), _place(file)
    if name == "ReLU":
        return Checkpoint(act.ReLU, {}, tensors, card, provenance=place)
    if not isinstance(state, dict) or "k" not in state:
        raise ValueError(f"{file}: activation_state_dict lacks k, which TopK needs")
    if state.get("postact_fn", "ReLU") != "ReLU":
        raise ValueError(f"{file}: postact_fn {state['postact_fn']!r} is not supported; supported: 'ReLU'")
    return Checkpoint(
        act.TopK, {"k": state["k"]}, tensors, card, normalize_activations=normalize, provenance=place
    )


def _place(file: Path) -> Provenance | None:
    """The file is named by its layer, and a folder above it by the place, as ``resid_post_mlp_v5_32k``."""
    if not file.stem.isdecimal():
        return None
    named = (re.fullmatch(rf"({'|'.join(_LOCATIONS)})(_v\d.*)?", part) for part in reversed(file.parts[:-1]))
    place = next((found[1] for found in named if found), None)
    model = "openai-community/gpt2" if "gpt2-small" in file.parts else None
    return Provenance(model=model, layer=int(file.stem), site=place and _LOCATIONS[place])


def save(c: Checkpoint, path: str | PathLike) -> None:
    """Writes one file: ``path`` if it ends in .pt, else ``autoencoder.pt`` in the folder ``path``."""
    d_in, d_sae = c.tensors["W_enc"].shape
    if c.activation not in (act.ReLU, act.TopK):
        refuse(NAME, f"the rule {c.activation.__name__}, only ReLU and TopK")
    wanted = "layer_norm" if c.activation is act.TopK else "none"
    if c.normalize_activations != wanted:
        what = f"normalize_activations={c.normalize_activations!r} with {c.activation.__name__}"
        refuse(NAME, f"{what} (it means {wanted!r} there)")
    if "W_skip" in c.tensors or c.tensors["W_dec"].shape[1] != d_in:
        refuse(NAME, "a transcoder or skip connection")
    c = folding.subtract_b_dec(folding.fold_decoder_norms(c), True)
    contents: dict[str, Any] = laid_out(c, LAYOUT)
    nowhere = torch.zeros(d_sae, device="cpu")
    never = (nowhere.long(), torch.ones_like(nowhere), nowhere.clone())
    contents |= dict(zip(STATISTICS, never, strict=True))
    contents["activation"] = c.activation.__name__
    contents["activation_state_dict"] = {**c.options, "postact_fn": "ReLU"} if c.activation is act.TopK else {}
    file = single_file(path, ".pt", WEIGHTS)
    write_files(file.parent, {file.name: torch_writer(contents)})
