"""SAELens' checkpoint layout: ``cfg.json`` beside ``sae_weights.safetensors``.

Keys: W_enc (d_in, d_sae), W_dec (d_sae, d_out), b_enc, b_dec; ``threshold`` (d_sae,) of JumpReLU; ``topk_threshold``,
a float64 scalar, of BatchTopK in training form; gated: b_gate, b_mag, r_mag. What SAELens has no field for stands under
``metadata.sae_engine``. A rule that SAELens does not have is an architecture of its own name, with its tensors beside
the weights; SAELens refuses such files. Configurations of versions before 6 are read too. The factor that a training
run's activations were scaled by lies beside them, in ``activation_scaler.json``, and in ``sparsity.safetensors`` how
often each latent fires: (d_sae,) ``sparsity``, log10 of the share of tokens, to which 1e-10 is added.
"""
from __future__ import annotations

import json
import warnings
from dataclasses import replace
from math import inf
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from .. import _checks as check
from .. import rules
from .. import rules as act
from .._files import replace_file, write_tensors
from ..provenance import Provenance
from . import _folding as folding
from ._checkpoint import WEIGHTS as OF_THE_AUTOENCODER
from ._checkpoint import Checkpoint, Files, own_section, recorded, take, text, text_writer, words, write_files
from ._places import said
from ._reading import read_json
from .card import CENTRED, RAW, UNKNOWN, SourceCard, residual_of

NAME, KIND = "saelens", "safetensors"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
METADATA = {"format": "pt"}
CONFIG_REQUIRED = True
SCALER, SPARSITY = "activation_scaler.json", "sparsity.safetensors"
LAYOUT = "6.54.12"  # the version of SAELens whose layout this is: without one it assumes that of version 5
# Architecture → rule. Matryoshka differs from BatchTopK in its training loss alone.
ARCHITECTURES: dict[str, type[act.Activation]] = {
    "standard": act.ReLU, "topk": act.TopK, "abstopk": act.AbsTopK, "batchtopk": act.BatchTopK,
    "matryoshka_batchtopk": act.BatchTopK, "jumprelu": act.JumpReLU, "gated": act.JumpReLU, "topafa": act.TopAFA,
    "transcoder": act.ReLU, "skip_transcoder": act.ReLU, "jumprelu_transcoder": act.JumpReLU,
    "jumprelu_skip_transcoder": act.JumpReLU,
}  # fmt: skip
WRITTEN: dict[type[act.Activation], str] = {
    act.TopK: "topk", act.AbsTopK: "abstopk", act.BatchTopK: "batchtopk", act.MutualChoice: "batchtopk",
    act.JumpReLU: "jumprelu", act.ReLU: "standard", act.TopAFA: "topafa", rules.Gated: "gated",
    rules.MatryoshkaBatchTopK: "matryoshka_batchtopk",
}  # fmt: skip
BATCH = ("batchtopk", "matryoshka_batchtopk")
_NEVER = 1e-10  # added to a share before the logarithm: what stands for a latent that never fires
OURS = "sae_engine."  # architectures that SAELens does not have: this, and the name of our rule, or of a user's
# SAELens rescales by decoder norms where it counts entries, nowhere else.
COUNTING = ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")
_RENAMED = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}  # before version 6
_BIASES = {"b_enc": ("b_enc", "F"), "b_dec": ("b_dec", "o")}
# What stands under "metadata" since version 6, and beside the sizes before.
_METADATA = ("model_name", "hook_name", "hook_layer", "hook_name_out", "dataset_path", "context_size",
             "model_from_pretrained_kwargs", "prepend_bos", "sequence_separator_token")  # fmt: skip
_OPTIONS = {"threshold_lr": "topk_threshold_lr", "bandwidth": "jumprelu_bandwidth"}  # ours → of their training classes


def owns_weights(names: frozenset[str]) -> bool:
    return {"W_enc", "W_dec"} <= names and "activation_function.threshold" not in names  # which is circuit-tracer's


def owns_config(config: dict[str, Any]) -> bool:
    return "d_in" in config and ("d_sae" in config or "architecture" in config)


def load(files: Files, *, activation_scale: float | None = None) -> Checkpoint:
    """The checkpoint; ``expected_average_only_in`` is folded into the weights, by the argument or the file's factor."""
    assert files.config is not None and files.config_file is not None
    cfg = _current(files.config, files.config_file)
    architecture, file = cfg["architecture"], files.weights.path
    section = cfg["metadata"].get("sae_engine")
    held = dict(files.weights.read())
    state: dict[str, torch.Tensor] = {}
    if architecture.startswith(OURS):
        kind = _registered(architecture.removeprefix(OURS), files.config_file)
        state = {name: held.pop(name) for name in held.keys() - OF_THE_AUTOENCODER}
        if (cut := files.weights.cut) is not None:
            of_latents = {name: t for name, t in state.items() if t.dim() and len(t) == cfg["d_sae"]}
            state |= {name: t[cut(cfg["d_sae"])] for name, t in of_latents.items()}
    elif architecture == "gated" and isinstance(section, dict) and section.get("activation") == "Gated":
        kind = rules.Gated
    else:
        kind = ARCHITECTURES[architecture]
    _drop_scaling_factor(held, file)
    layout = {"W_enc": ("W_enc", "dF"), "W_dec": ("W_dec", "Fo"), **_BIASES}
    if "W_skip" in held:
        layout["W_skip"] = ("W_skip", "od")
    if kind is act.TopAFA and "b_enc" not in held:
        del layout["b_enc"]
    if architecture == "gated":
        del layout["b_enc"]
        layout |= {name: (name, "F") for name in ("b_gate", "b_mag", "r_mag")}
    elif kind is act.JumpReLU:
        if "log_threshold" in held:  # of training files before version 6
            held["threshold"] = held.pop("log_threshold").double().exp().float()
        layout["threshold"] = ("threshold", "F")
    elif kind is act.BatchTopK:
        layout["topk_threshold"] = ("threshold", "")
    tensors = take(files.weights, held, layout, {"d": cfg["d_in"], "F": cfg["d_sae"]})
    if architecture == "gated" and kind is not rules.Gated:
        tensors = folding.gated_as_jumprelu(tensors)
    elif "b_enc" not in tensors:
        tensors["b_enc"] = torch.zeros(len(tensors["W_dec"]), dtype=tensors["W_enc"].dtype, device="cpu")
    if isinstance(section, dict) and isinstance(counters := section.get("state"), dict):
        exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        state |= {name: torch.tensor(float(value), **exact) for name, value in counters.items()}
    c = Checkpoint(
        activation=kind,
        options=_options(cfg, kind, files.config_file),
        tensors=tensors | state,
        card=_card(cfg, architecture, cfg["metadata"]),
        apply_b_dec_to_input=cfg.get("apply_b_dec_to_input", True),
        normalize_activations=cfg["normalize_activations"],
        rescale_acts_by_decoder_norm=cfg.get("rescale_acts_by_decoder_norm", False),
        provenance=_provenance(cfg["metadata"], architecture),
    )
    c = _scaled(c, activation_scale, files.config_file)
    return recorded(c, section)


def _registered(name: str, file: Path) -> type[act.Activation]:
    if name not in act.base.RULES:
        raise ValueError(
            f"{file}: the rule {name!r} is not known here: import the module that defines it before loading; "
            f"known: {sorted(act.base.RULES)}"
        )
    return act.base.RULES[name]


def save(c: Checkpoint, path: str | PathLike) -> None:
    """Writes both files under temporary names, then renames them."""
    tensors, content = prepared(c)
    write_files(Path(path), {
        WEIGHTS: lambda name: write_tensors(name, tensors, METADATA),
        CONFIG: text_writer(content),
    })  # fmt: skip


def prepared(c: Checkpoint, d_sae: int | None = None) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors and the text of the two files.

    ``d_sae``: how many latents there are, where ``c`` has some of them; no latent's numbers depend on another's.

    SAELens rescales by decoder norms only where it counts entries: for other rules the norms are folded into the
    encoder and the decoder's rows are written with norm 1, which computes the same. Mean-centring stands in the
    metadata: SAELens, whose activations are then centred already, sees ``normalize_activations`` "none".
    """
    architecture = architecture_of(c)
    if architecture in BATCH:
        warnings.warn(
            f"SAELens' SAE.load_from_disk refuses {architecture!r}, which only trains there: use its TrainingSAE, or "
            "save inference_form(sae)",
            stacklevel=6,
        )
    if architecture not in COUNTING and not architecture.startswith(OURS):
        c = folding.fold_decoder_norms(c)
    tensors, counters = dict(c.tensors), {}
    if architecture in BATCH:
        tensors["topk_threshold"] = tensors.pop("threshold")
        counters = {name: tensors.pop(name).item() for name in ("forwards",) if name in tensors}
    elif architecture == "gated":
        del tensors["b_enc"]  # 0: the gate's biases take its place
    return tensors, json.dumps(_config(c, architecture, counters, d_sae or len(tensors["W_dec"])), indent=2)


def save_sparsity(shares: torch.Tensor, folder: Path) -> None:
    """Writes, beside a checkpoint, the shares (d_sae,) of tokens on which its latents fire."""
    logs = torch.log10(shares.double() + _NEVER).float().cpu()
    replace_file(folder / SPARSITY, lambda name: write_tensors(name, {"sparsity": logs}))


def sparsity_in(path: str | PathLike) -> torch.Tensor | None:
    """What :func:`save_sparsity` wrote, or SAELens did; None where there is no such file."""
    file = Path(path) / SPARSITY
    if not file.is_file():
        return None
    from safetensors.torch import load_file

    logs = load_file(file).get("sparsity")
    if logs is None:
        raise ValueError(f"{file} holds no 'sparsity'")
    return (10 ** logs.double() - _NEVER).clamp(0, 1)


def architecture_of(c: Checkpoint) -> str:
    """The architecture's name. SAELens' transcoders are ReLU or JumpReLU and never subtract ``b_dec``."""
    if c.activation not in WRITTEN:
        if act.base.RULES.get(c.activation.__name__) is not c.activation:
            raise TypeError(
                f"activation {c.activation.__name__} of {c.activation.__module__} cannot be saved: another rule has "
                "its name; give it one of its own"
            )
        return OURS + c.activation.__name__
    name = WRITTEN[c.activation]
    narrow = c.tensors["W_enc"].shape[0] == c.tensors["W_dec"].shape[1]
    if c.apply_b_dec_to_input or name not in ("standard", "jumprelu"):
        return name
    if "W_skip" in c.tensors:
        return {"standard": "skip_transcoder", "jumprelu": "jumprelu_skip_transcoder"}[name]
    return name if narrow else {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}[name]


def _config(c: Checkpoint, architecture: str, counters: dict[str, float], d_sae: int) -> dict[str, Any]:
    W_dec = c.tensors["W_dec"]
    metadata: dict[str, Any] = {"sae_lens_version": LAYOUT}
    named: dict[str, Any] = dict(zip(("model_name", "hook_name", "hook_name_out"), words(c), strict=True))
    if c.provenance is not None:
        named |= {"context_size": c.provenance.context_length, "dataset_path": c.provenance.text,
                  "prepend_bos": {"none": False, "bos": True}.get(c.provenance.first_token or "")}  # fmt: skip
    metadata |= {name: value for name, value in named.items() if value is not None}
    if c.provenance is not None and c.provenance.separator is not None:
        separator = c.provenance.separator
        as_theirs: dict[str, Any] = {"none": None, "bos": "bos", "eos": "eos"}
        if separator in as_theirs or separator.isdecimal():
            metadata["sequence_separator_token"] = as_theirs[separator] if separator in as_theirs else int(separator)
    if c.card is not None and c.card.residual in (RAW, CENTRED):
        metadata["model_from_pretrained_kwargs"] = {"center_writing_weights": c.card.residual == CENTRED}
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": c.tensors["W_enc"].shape[0],
        "d_sae": d_sae,
        "dtype": str(W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": c.apply_b_dec_to_input,
        "normalize_activations": "none" if c.normalize_activations == "center" else c.normalize_activations,
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": c.rescale_acts_by_decoder_norm,
        "metadata": {**metadata, "sae_engine": own_section(c) | ({"state": counters} if counters else {})},
    }
    if "transcoder" in architecture or W_dec.shape[1] != cfg["d_in"]:
        cfg["d_out"] = W_dec.shape[1]
    if "k" in c.options:
        cfg["k"] = c.options["k"]
    if "widths" in c.options:
        cfg["matryoshka_widths"] = c.options["widths"]
    return cfg | {theirs: c.options[ours] for ours, theirs in _OPTIONS.items() if ours in c.options}


def _current(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The configuration in the form of version 6, with what older ones leave unsaid."""
    cfg = {_RENAMED.get(name, name): value for name, value in config.items()}
    for key in ("d_in", "d_sae"):
        if key not in cfg:
            raise ValueError(f"{file} lacks {key!r}: not a SAELens configuration")
    metadata = cfg.get("metadata")
    if "architecture" not in cfg or "metadata" not in cfg:
        metadata = {name: cfg[name] for name in _METADATA if name in cfg}
        cfg.setdefault("architecture", "standard")
        if "hook_z" in str(cfg.get("hook_name")):
            cfg.setdefault("reshape_activations", "hook_z")
    _take_activation_function(cfg, file)
    cfg["metadata"] = metadata if isinstance(metadata, dict) else {}
    normalize = cfg.get("normalize_activations") or "none"
    cfg["normalize_activations"] = "expected_average_only_in" if normalize is True else normalize
    if cfg.get("reshape_activations", "none") != "none":
        raise ValueError(f"{file}: reshape_activations {cfg['reshape_activations']!r} is not supported")
    known = isinstance(cfg["architecture"], str) and (
        cfg["architecture"] in ARCHITECTURES or cfg["architecture"].startswith(OURS)
    )
    if not known:
        raise ValueError(
            f"{file}: architecture {cfg['architecture']!r} is not supported; supported: {sorted(ARCHITECTURES)}"
        )
    return cfg


def _take_activation_function(cfg: dict[str, Any], file: Path) -> None:
    """Top-k was an activation function of "standard" before version 6, its k among the function's arguments."""
    function, kwargs = str(cfg.get("activation_fn") or "relu").lower(), cfg.get("activation_fn_kwargs")
    k = kwargs["k"] if isinstance(kwargs, dict) and "k" in kwargs else cfg.get("k")
    if function not in ("relu", "topk"):
        raise ValueError(f"{file}: activation function {function!r} is not supported; supported: relu, topk")
    if function == "topk":
        if cfg["architecture"] not in ("standard", *COUNTING):
            raise ValueError(f"{file}: activation function 'topk' contradicts architecture {cfg['architecture']!r}")
        if k is None:
            raise ValueError(
                f"{file} says top-k and not how many: put the number that it was trained with there as \"k\" "
                f"(activation_fn_kwargs is {kwargs!r})"
            )
        cfg.update(architecture="topk" if cfg["architecture"] == "standard" else cfg["architecture"], k=k)
    elif cfg["architecture"] == "standard" and k is not None:
        raise ValueError(
            f"{file} says k = {k!r} and architecture 'standard', a ReLU: put \"topk\" or another architecture of "
            f"{COUNTING} there, or take k away"
        )


def _drop_scaling_factor(held: dict[str, Any], file: Path) -> None:
    """Some versions wrote a factor per latent that is 1 unless the SAE was fine-tuned."""
    factor = held.pop("scaling_factor", None)
    if factor is not None and not bool((factor == 1).all()):
        raise ValueError(f"{file}: scaling_factor is not 1: fine-tuned factors are not supported")


def _options(cfg: dict[str, Any], kind: type[act.Activation], file: Path) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if kind in (act.TopK, act.AbsTopK, act.BatchTopK):
        if "k" not in cfg:
            raise ValueError(f"{file} lacks 'k', which a {cfg['architecture']} SAE needs")
        options["k"] = cfg["k"]
    if kind is act.BatchTopK:
        options["threshold_lr"] = cfg.get("topk_threshold_lr", 0.01)  # SAELens' default
    if kind is act.JumpReLU and "jumprelu_bandwidth" in cfg:
        options["bandwidth"] = cfg["jumprelu_bandwidth"]
    return options


def _card(cfg: dict[str, Any], architecture: str, metadata: dict[str, Any]) -> SourceCard:
    kwargs = metadata.get("model_from_pretrained_kwargs")
    centred = kwargs.get("center_writing_weights") if isinstance(kwargs, dict) else None
    model, hook = text(metadata.get("model_name")), text(metadata.get("hook_name"))
    notes = {
        "gated": ("Read as the JumpReLU that a gated SAE is at inference.",),
        "matryoshka_batchtopk": (f"Nested widths in training: {cfg.get('matryoshka_widths')}.",),
    }
    return SourceCard(
        NAME, architecture, model_name=model, hook_name=hook, normalization=str(cfg["normalize_activations"]),
        residual=residual_of(model, hook, centred if isinstance(centred, bool) else None),
        notes=notes.get(architecture, ()),
    )  # fmt: skip


def _provenance(metadata: dict[str, Any], architecture: str) -> Provenance | None:
    """A transcoder whose target is not named has an unknown one, which is not the same as none."""
    target = text(metadata.get("hook_name_out")) or (UNKNOWN if "transcoder" in architecture else None)
    size, begins = metadata.get("context_size"), metadata.get("prepend_bos")
    separator = metadata.get("sequence_separator_token", "sep")  # a token that tokenizers of ours do not have
    if separator is None:
        separator = "none"
    return said(
        text(metadata.get("model_name")), text(metadata.get("hook_name")), target=target,
        layer=metadata.get("hook_layer"), text=text(metadata.get("dataset_path")),
        context_length=size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None,
        first_token=("bos" if begins else "none") if isinstance(begins, bool) else None,
        separator=None if separator == "sep" else str(separator),
    )  # fmt: skip


def _scaled(c: Checkpoint, scale: float | None, file: Path) -> Checkpoint:
    if c.normalize_activations != "expected_average_only_in":
        if scale is not None:
            raise ValueError(f"activation_scale must be None: {file} says nothing of scaled activations; got {scale!r}")
        return c
    scaler = file.with_name(SCALER)
    if scale is None and scaler.is_file():
        scale = read_json(scaler).get("scaling_factor")
        if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < inf):
            raise ValueError(f"{scaler}: scaling_factor must be a positive number or null, got {scale!r}")
    if scale is None:
        raise ValueError(
            f"{file}: the SAE was trained on scaled activations (normalize_activations 'expected_average_only_in'), "
            f"and neither it nor {SCALER} says by how much: pass activation_scale = "
            "sqrt(d_in) / (mean norm of the activations)"
        )
    scale = check.positive("activation_scale", scale)
    assert c.card is not None
    said = f"expected_average_only_in: {scale!r} times the activations, folded into the weights; takes them as they are"
    c = replace(c, normalize_activations="none", card=replace(c.card, normalization=said))
    return folding.fold_input_scale(c, scale)
