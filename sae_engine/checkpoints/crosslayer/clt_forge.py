"""CLT-Forge's cross-layer transcoders, read only: ``clt_weights.safetensors`` beside ``clt_cfg.json``.

Keys: W_enc (layers, d, d_sae), b_enc, log_threshold (layers, d_sae), W_dec and b_dec of every pair of a layer and one
that it writes, (pairs, d_sae, d) and (pairs, d), in the order of ``torch.triu_indices``; what adds to a layer has its
biases summed. Without ``cross_layer_decoders`` there is one of each for a layer. Activations were multiplied by
``estimated_norm_scaling_factor_in``, and the result is divided by ``…_out``: both are folded into the weights here.
A run whose latents were dealt to several processes left ``rank0_clt_weights.safetensors``, ….
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ... import rules
from .._checkpoint import text
from .._reading import WeightFile, read_json
from ..card import UNKNOWN, SourceCard
from ._places import said
from ._record import RULE, Cut, Record, checked, numbered, same, tensor_of

NAME = "clt_forge"
CONFIG, WEIGHTS = "clt_cfg.json", "clt_weights.safetensors"
_SHARD = r"rank(\d+)_clt_weights\.safetensors"
_IGNORED = {"feature_count", "layer_mask", "l_idx", "k_idx"}  # counts of the training, and what the layout says
_SCALES = ("estimated_norm_scaling_factor_in", "estimated_norm_scaling_factor_out")


def owns(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def load(folder: Path, cut: Cut | None = None) -> tuple[Record, Path]:
    config = read_json(folder / CONFIG)
    shards = numbered(folder, _SHARD)
    if not shards and not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder / WEIGHTS} is missing: {folder / CONFIG} describes a transcoder")
    files = [WeightFile(path, "safetensors") for path in shards.values() or [folder / WEIGHTS]]
    if config.get("activation_fn", "jumprelu") != "jumprelu":
        raise ValueError(f"{folder / CONFIG}: activation_fn must be 'jumprelu', got {config['activation_fn']!r}")
    path = files[0].path
    dims = {"W_enc": 3, "b_enc": 2, "W_dec": 3, "b_dec": 2, "log_threshold": 2, **dict.fromkeys(_SCALES, 1)}
    for file in files:
        checked(file, {*dims, *_IGNORED})
    held = {name: [tensor_of(file, name, count) for file in files] for name, count in dims.items()}
    along = {"W_enc": 2, "b_enc": 1, "W_dec": 1, "log_threshold": 1}  # where latents lie; the rest is in every file
    d_sae = sum(part.shape[2] for part in held["W_enc"])
    mine = slice(0, d_sae) if cut is None else cut(d_sae)
    tensors = {
        name: _joined(path, name, parts, along[name], d_sae, mine) if name in along else parts[0]
        for name, parts in held.items()
    }
    layers, d, latents = tensors["W_enc"].shape
    crosses = bool(config.get("cross_layer_decoders", True))
    own = torch.arange(layers, device="cpu").expand(2, -1)
    reads, writes = torch.triu_indices(layers, layers, device="cpu") if crosses else own
    pairs = len(reads)
    for name, shape in (
        ("b_enc", (layers, latents)), ("log_threshold", (layers, latents)), ("W_dec", (pairs, latents, d)),
        ("b_dec", (pairs, d)), *((name, (layers,)) for name in _SCALES),
    ):  # fmt: skip
        same(path, f"the shape of {name}", tuple(tensors[name].shape), shape)
    into, out = (tensors[name].double() for name in _SCALES)
    if not bool(((into > 0) & into.isfinite()).all()) or not bool(((out > 0) & out.isfinite()).all()):
        raise ValueError(f"{path}: {' and '.join(_SCALES)} must be positive and finite")
    b_dec = torch.zeros(layers, d, dtype=torch.float64, device="cpu").index_add(0, writes, tensors["b_dec"].double())

    def source(s: int) -> Mapping[str, Tensor]:
        mine = (reads == s).nonzero().flatten()
        W_dec = tensors["W_dec"][mine].double() / out[writes[mine]][:, None, None]
        return {
            "W_enc": (tensors["W_enc"][s].double() * into[s]).to(tensors["W_enc"].dtype),
            "W_dec": W_dec.transpose(0, 1).flatten(1).to(tensors["W_dec"].dtype),
            "b_enc": tensors["b_enc"][s],
            f"{RULE}threshold": tensors["log_threshold"][s].double().exp().float(),
        }  # fmt: skip

    model = text(config.get("model_name"))
    card = SourceCard(NAME, "CLT", model_name=model, residual=UNKNOWN)
    return Record(
        [d] * layers, [d] * layers, "causal" if crosses else "local", d_sae, layers, source,
        (b_dec / out[:, None]).to(tensors["b_dec"].dtype).flatten(), [(rules.JumpReLU, {})] * layers, card,
        provenance=said(model, None),
    ), path  # fmt: skip


def _joined(path: Path, name: str, parts: Sequence[Tensor], dim: int, d_sae: int, mine: slice) -> Tensor:
    """The latents ``mine`` of a tensor that several files have some of each, next to one another along ``dim``."""
    same(path, f"the latents of {name} in all files", sum(part.shape[dim] for part in parts), d_sae)
    first, found = 0, []
    for part in parts:
        start, stop = max(mine.start - first, 0), min(mine.stop - first, part.shape[dim])
        first += part.shape[dim]
        if start < stop or len(parts) == 1:
            found.append(part.narrow(dim, start, stop - start))
    return found[0] if len(found) == 1 else torch.cat(found or [parts[0].narrow(dim, 0, 0)], dim)
