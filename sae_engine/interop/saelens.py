"""SAELens' checkpoint layout: ``cfg.json`` beside ``sae_weights.safetensors``.

Keys: W_enc (d_in, d_sae), W_dec (d_sae, d_out), b_enc, b_dec; ``threshold`` (d_sae,) of JumpReLU; ``topk_threshold``,
a float64 scalar, of BatchTopK in training form. What SAELens has no field for stands under ``metadata.sae_engine``.
"""
from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import activations as act
from .._files import replace_file

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES: dict[type, str] = {
    act.TopK: "topk", act.AbsTopK: "abstopk", act.BatchTopK: "batchtopk", act.MutualChoice: "batchtopk",
    act.JumpReLU: "jumprelu", act.ReLU: "standard", act.TopAFA: "topafa",
}  # fmt: skip
OPTIONS = ("k", "threshold_lr", "bandwidth", "capacity")  # of the activations, as their constructors name them
THRESHOLD_KEYS = {"batchtopk": "topk_threshold", "jumprelu": "threshold"}


def save(sae, path: str | PathLike) -> None:
    """Writes both files under temporary names, then renames them, weights first."""
    from safetensors.torch import save_file

    kind = type(sae.activation)
    if kind not in ARCHITECTURES:
        known = [t.__name__ for t in ARCHITECTURES]
        raise TypeError(f"activation {kind.__name__} has no checkpoint form; known: {known}")
    architecture = ARCHITECTURES[kind]
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().cpu().contiguous() for n, p in sae.named_parameters() if not n.startswith("activation.")}
    if architecture in THRESHOLD_KEYS:
        tensors[THRESHOLD_KEYS[architecture]] = sae.activation.threshold.detach().cpu().contiguous()
    replace_file(folder / WEIGHTS, lambda name: save_file(tensors, name, metadata={"format": "pt"}))
    text = json.dumps(_config(sae, architecture), indent=2)
    replace_file(folder / CONFIG, lambda name: name.write_text(text))


def load(cls, path: str | PathLike, *, device=None, dtype: torch.dtype | None = None):
    """An autoencoder of class ``cls`` from ``path``."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"path must be a folder with {CONFIG} and {WEIGHTS}; there is none at {str(folder)!r}")
    cfg = _read_config(folder / CONFIG)
    tensors = _read_weights(folder / WEIGHTS)
    ours = cfg.get("metadata", {}).get("sae_engine", {})
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    activation = _activation(cfg, ours, tensors, folder)
    stored = tensors["W_enc"].dtype if "W_enc" in tensors else None
    try:
        sae = cls(
            d_in, d_sae, activation,
            d_out=cfg.get("d_out"), skip="W_skip" in tensors,
            apply_b_dec_to_input=cfg.get("apply_b_dec_to_input", True),
            normalize_activations=cfg.get("normalize_activations", "none"),
            rescale_acts_by_decoder_norm=cfg.get("rescale_acts_by_decoder_norm", False),
            dtype=stored, device="meta",
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} describes an autoencoder that cannot be built: {error}") from error
    expected = {n: tuple(p.shape) for n, p in sae.named_parameters() if not n.startswith("activation.")}
    if "b_enc" not in tensors and cfg["architecture"] == "topafa":
        tensors["b_enc"] = torch.zeros(d_sae, dtype=stored)
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"{folder / WEIGHTS} lacks {name}; it holds {sorted(tensors)}")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{folder / WEIGHTS}: {name} must have shape {shape} by {CONFIG}, got {tuple(tensors[name].shape)}"
            )
    unknown = tensors.keys() - expected.keys() - {THRESHOLD_KEYS.get(cfg["architecture"])}
    if unknown:
        raise ValueError(f"{folder / WEIGHTS} holds tensors that no {cfg['architecture']} SAE has: {sorted(unknown)}")
    sae.to_empty(device=device or "cpu")
    with torch.no_grad():
        for name in expected:
            getattr(sae, name).copy_(tensors[name])
        if cfg["architecture"] in THRESHOLD_KEYS:
            threshold = tensors[THRESHOLD_KEYS[cfg["architecture"]]]
            target = sae.activation.threshold
            if threshold.shape != target.shape:
                raise ValueError(
                    f"{folder / WEIGHTS}: threshold must have shape {tuple(target.shape)}, got {tuple(threshold.shape)}"
                )
            target.copy_(threshold)
    return sae if dtype is None else sae.to(dtype)


def _config(sae, architecture: str) -> dict[str, Any]:
    activation = sae.activation
    options = {name: getattr(activation, name) for name in OPTIONS if hasattr(activation, name)}
    own = {"activation": type(activation).__name__, "options": options}
    cfg = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": sae.normalize_activations,
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": sae.rescale_acts_by_decoder_norm,
        "metadata": {"sae_engine": own},
    }
    if sae.d_out != sae.d_in:
        cfg["d_out"] = sae.d_out
    if hasattr(activation, "k"):
        cfg["k"] = activation.k
    return cfg


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        cfg = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(cfg, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(cfg).__name__}")
    for key in ("architecture", "d_in", "d_sae"):
        if key not in cfg:
            raise ValueError(f"{file} lacks {key!r}: not a SAELens (version 6 or newer) configuration")
    if cfg["architecture"] not in ARCHITECTURES.values():
        known = sorted(set(ARCHITECTURES.values()))
        raise ValueError(f"{file}: architecture {cfg['architecture']!r} is not supported; supported: {known}")
    return cfg


def _read_weights(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


def _activation(cfg: dict, ours: dict, tensors: dict[str, Tensor], folder: Path) -> act.Activation:
    """The rule that the configuration names, by our name where one is recorded."""
    architecture, options = cfg["architecture"], dict(ours.get("options", {}))
    names = {kind.__name__: kind for kind, name in ARCHITECTURES.items() if name == architecture}
    kind = names.get(str(ours.get("activation")), next(iter(names.values())))
    if architecture in ("topk", "abstopk", "batchtopk"):
        if "k" not in cfg:
            raise ValueError(f"{folder / CONFIG} lacks 'k', which a {architecture} SAE needs")
        options["k"] = cfg["k"]
    if architecture in THRESHOLD_KEYS and THRESHOLD_KEYS[architecture] not in tensors:
        raise ValueError(f"{folder / WEIGHTS} lacks {THRESHOLD_KEYS[architecture]}, which a {architecture} SAE needs")
    if architecture == "jumprelu":
        options["d_sae"] = cfg["d_sae"]
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} describes an activation that cannot be built: {error}") from error
