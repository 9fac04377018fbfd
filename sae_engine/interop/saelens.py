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
from .._checks import FLOATS
from .._files import replace_files

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES: dict[type, str] = {
    act.TopK: "topk", act.AbsTopK: "abstopk", act.BatchTopK: "batchtopk", act.MutualChoice: "batchtopk",
    act.JumpReLU: "jumprelu", act.ReLU: "standard", act.TopAFA: "topafa",
}  # fmt: skip
OPTIONS = ("k", "threshold_lr", "bandwidth", "capacity")  # of the activations, as their constructors name them
COUNTING = ("topk", "abstopk", "batchtopk")
LAYOUT = "6.54.12"  # the version of SAELens whose layout this is: without one it assumes that of version 5
THRESHOLD_KEYS = {"batchtopk": "topk_threshold", "jumprelu": "threshold"}


def save(sae, path: str | PathLike) -> None:
    """Writes both files under temporary names, then renames them.

    SAELens rescales by decoder norms only where it counts entries: for other rules the norms are folded into the
    encoder and the decoder's rows are written with norm 1, which computes the same.
    """
    from safetensors.torch import save_file

    kind = type(sae.activation)
    if kind not in ARCHITECTURES:
        known = [t.__name__ for t in ARCHITECTURES]
        raise TypeError(f"activation {kind.__name__} has no checkpoint form; known: {known}")
    architecture = ARCHITECTURES[kind]
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach() for n, p in sae.named_parameters() if not n.startswith("activation.")}
    rescaled = sae.rescale_acts_by_decoder_norm
    if rescaled and architecture not in COUNTING:
        tensors, rescaled = _folded(tensors), False
    tensors = {n: t.cpu().contiguous() for n, t in tensors.items()}
    if architecture in THRESHOLD_KEYS:
        tensors[THRESHOLD_KEYS[architecture]] = sae.activation.threshold.detach().cpu().contiguous()
    text = json.dumps(_config(sae, architecture, rescaled), indent=2)
    replace_files({
        folder / WEIGHTS: lambda name: save_file(tensors, name, metadata={"format": "pt"}),
        folder / CONFIG: lambda name: name.write_text(text, encoding="utf-8"),
    })  # fmt: skip


def _folded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same autoencoder with decoder rows of norm 1."""
    wide = {n: t.to(torch.promote_types(t.dtype, torch.float32)) for n, t in tensors.items()}
    norms = wide["W_dec"].norm(dim=1)
    wide["W_dec"] = wide["W_dec"] / torch.where(norms == 0, 1.0, norms)[:, None]
    wide["W_enc"], wide["b_enc"] = wide["W_enc"] * norms, wide["b_enc"] * norms
    return {n: t.to(tensors[n].dtype) for n, t in wide.items()}


@torch.inference_mode(False)  # parameters made in that mode could never be trained
def load(cls, path: str | PathLike, *, device=None, dtype: torch.dtype | None = None):
    """An autoencoder of class ``cls`` from ``path``."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"path must be a folder with {CONFIG} and {WEIGHTS}; there is none at {str(folder)!r}")
    cfg = _read_config(folder / CONFIG)
    tensors = _read_weights(folder / WEIGHTS)
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    _check_weights(folder / WEIGHTS, cfg, tensors)
    activation = _activation(cfg, tensors, folder)
    stored = torch.promote_types(tensors["W_enc"].dtype, tensors["W_dec"].dtype)
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
    sae.to_empty(device=device or torch.get_default_device())
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


def _check_weights(file: Path, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """What must hold before anything of the configuration's size is made."""
    for name, dim in (("W_enc", 1), ("W_dec", 0)):
        if name not in tensors:
            raise ValueError(f"{file} lacks {name}; it holds {sorted(tensors)}")
        if tensors[name].dim() != 2 or tensors[name].shape[dim] != cfg["d_sae"]:
            raise ValueError(
                f"{file}: {name} must have shape (d_in, d_sae) or (d_sae, d_out) with d_sae = {cfg['d_sae']!r} "
                f"by {CONFIG}, got {tuple(tensors[name].shape)}"
            )
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{file}: {name} must be of a floating-point dtype, got {tensor.dtype}")
        if "threshold" in name and bool((tensor < 0).any()) and name != "topk_threshold":
            raise ValueError(f"{file}: {name} must not be negative")


def _config(sae, architecture: str, rescaled: bool) -> dict[str, Any]:
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
        "rescale_acts_by_decoder_norm": rescaled,
        "metadata": {"sae_lens_version": LAYOUT, "sae_engine": own},
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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(cfg, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(cfg).__name__}")
    for key in ("architecture", "d_in", "d_sae"):
        if key not in cfg:
            raise ValueError(f"{file} lacks {key!r}: not a SAELens (version 6 or newer) configuration")
    if cfg.get("reshape_activations", "none") != "none":
        raise ValueError(f"{file}: reshape_activations {cfg['reshape_activations']!r} is not supported")
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


def _activation(cfg: dict, tensors: dict[str, Tensor], folder: Path) -> act.Activation:
    """The rule that the configuration names, by our name where one is recorded."""
    metadata = cfg.get("metadata")
    ours = metadata.get("sae_engine") if isinstance(metadata, dict) else None
    ours = ours if isinstance(ours, dict) else {}
    recorded = ours.get("options")
    architecture, options = cfg["architecture"], dict(recorded) if isinstance(recorded, dict) else {}
    names = {kind.__name__: kind for kind, name in ARCHITECTURES.items() if name == architecture}
    kind = names.get(str(ours.get("activation")), next(iter(names.values())))
    if architecture in ("topk", "abstopk", "batchtopk"):
        if "k" not in cfg:
            raise ValueError(f"{folder / CONFIG} lacks 'k', which a {architecture} SAE needs")
        options["k"] = cfg["k"]
    if architecture in THRESHOLD_KEYS and THRESHOLD_KEYS[architecture] not in tensors:
        raise ValueError(f"{folder / WEIGHTS} lacks {THRESHOLD_KEYS[architecture]}, which a {architecture} SAE needs")
    if architecture == "jumprelu":
        options.update(d_sae=cfg["d_sae"], device="meta")
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} describes an activation that cannot be built: {error}") from error
