"""dictionary_learning's crosscoders (the fork of science-of-finetuning): ``ae.pt``, or ``model.safetensors``.

Keys: encoder.weight (sites, d, d_sae), encoder.bias (d_sae,), decoder.weight (sites, d_sae, d), decoder.bias (sites, d)
and code_normalization_id, what a latent is multiplied by before latents compete: the sum of its decoder rows' norms
(CROSSCODER), the norm of all of them (SAE), or nothing (NONE). With k and threshold it is a BatchTopKCrossCoder, else a
ReLU. Activations may have been centred and scaled, by activation_mean (sites, d) and activation_global_scale (sites,):
that is folded into the weights here. Where the sites' scales differ, norms of the folded rows are not those that
latents competed by, and a batch rule is read as the thresholds that it has come to, one a latent.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import rules
from .._checkpoint import scalar, text_writer, torch_writer, write_files
from .._reading import WeightFile, look_at, read_json
from ..card import RAW, SourceCard
from ._places import own_section, recorded
from ._record import RULE, Cut, Record, Rule, biases, checked, cut_along, layered, refuse, same, tensor_of

if TYPE_CHECKING:
    from ...crosscoder import Crosscoder

NAME = "dictionary_learning_crosscoder"
CONFIG, WEIGHTS = "config.json", "ae.pt"
_NORMALIZATIONS = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}
_IDS = {"sum": 1, "joint": 2, None: 4}
_DIMS = {"encoder.weight": 3, "encoder.bias": 1, "decoder.weight": 3, "decoder.bias": 2}
_NORMALIZER = {"activation_mean", "activation_std", "activation_global_scale", "target_rms"}
_EPS = 1e-8  # added to what their output is divided by


def owns(folder: Path) -> bool:
    return _weights(folder) is not None


def _weights(folder: Path) -> WeightFile | None:
    found = [w for w in look_at(folder).weights if _DIMS.keys() <= w.names]
    found = [w for w in found if getattr(w.read()["encoder.weight"], "ndim", 0) == 3]
    if len(found) > 1:
        raise ValueError(f"{folder} holds several crosscoders, {sorted(w.path.name for w in found)}: name one")
    return found[0] if found else None


def load(folder: Path, cut: Cut | None = None) -> tuple[Record, Path]:
    file = _weights(folder)
    assert file is not None
    if cut is not None and file.kind == "npz":
        raise ValueError(f"mesh must be None: {file.path} cannot be read by slices; save it as safetensors first")
    held, path = file.read(), file.path
    checked(file, {*_DIMS, *_NORMALIZER, "code_normalization_id", "k", "threshold"})
    W_enc, b_enc, W_dec, b_dec = (tensor_of(file, name, dims) for name, dims in _DIMS.items())
    sites, d, d_sae = W_enc.shape
    for name, tensor, shape in (("encoder.bias", b_enc, (d_sae,)), ("decoder.weight", W_dec, (sites, d_sae, d)),
                                ("decoder.bias", b_dec, (sites, d))):  # fmt: skip
        same(path, f"the shape of {name}", tuple(tensor.shape), shape)
    W_enc, b_enc, W_dec = cut_along(W_enc, 2, cut), cut_along(b_enc, 0, cut), cut_along(W_dec, 1, cut)
    number = int(scalar(path, held, "code_normalization_id")) if "code_normalization_id" in held else 1
    kind = _NORMALIZATIONS.get(number)
    is_batch = "k" in held and "threshold" in held
    if kind is None or (is_batch and kind in ("MIXED", "DECOUPLED")):
        what = f"code_normalization_id {number} ({kind}) is not supported"
        raise ValueError(f"{path}: {what}: it must be 1 (CROSSCODER), 2 (SAE) or 4 (NONE)")
    decoder_norm = "sum" if kind == "CROSSCODER" else "joint"
    mean, scale = _normalizer(file, sites, d)
    plain = bool((scale == 1).all()) and not bool(mean.any())
    new_b_dec = b_dec if plain else b_dec.double() / _divisor(scale)[:, None] + mean
    notes: tuple[str, ...] = ()
    rule: Rule = (rules.ReLU, {})
    shared: dict[str, Tensor] = {}
    of_latents: dict[str, Tensor] = {}
    rescale = is_batch and kind != "NONE"
    if is_batch:
        theta, k = float(scalar(path, held, "threshold")), int(scalar(path, held, "k"))
        if plain or kind == "NONE":
            rule = (rules.BatchTopK, {"k": k})
            shared = _batch_state(theta)
        else:
            if theta < 0:
                raise ValueError(f"{path}: threshold was never learned, and activations were scaled: such a crosscoder "
                                 "has no thresholds of its own")  # fmt: skip
            rows = W_dec.double().norm(dim=2)
            norms = rows.sum(0) if kind == "CROSSCODER" else rows.square().sum(0).sqrt()
            rule, rescale = (rules.JumpReLU, {}), False
            of_latents = {f"{RULE}threshold": (theta / norms).float()}
            notes = (f"BatchTopK(k={k}) by its threshold, since its activations were scaled in training.",)

    def source(_: int) -> Mapping[str, Tensor]:
        if plain:
            joined = {"W_enc": W_enc.flatten(0, 1), "W_dec": W_dec.transpose(0, 1).flatten(1), "b_enc": b_enc}
            return joined | of_latents
        scaled = W_enc.double() * scale[:, None, None]
        folded = {
            "W_enc": scaled.flatten(0, 1),
            "W_dec": (W_dec.double() / _divisor(scale)[:, None, None]).transpose(0, 1).flatten(1),
            "b_enc": b_enc.double() - _sum_of_rows((scaled * mean[:, :, None]).flatten(0, 1)),
        }  # fmt: skip
        return {name: t.to(W_enc.dtype) for name, t in folded.items()} | of_latents

    card = SourceCard(NAME, "BatchTopKCrossCoder" if is_batch else "CrossCoder", residual=RAW, notes=notes)
    r = Record(
        [d] * sites, [d] * sites, "joint", d_sae, 1, source, new_b_dec.flatten().to(b_dec.dtype), [rule], card,
        one_rule=not of_latents, shared=shared, decoder_norm=decoder_norm, rescale_acts_by_decoder_norm=rescale,
    )  # fmt: skip
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return recorded(r, config.get("sae_engine")), path


def _sum_of_rows(rows: Tensor) -> Tensor:
    """The sum over the first dimension, as a tree: of some columns it has the bits that it has of all."""
    while len(rows) > 1:
        half = len(rows) // 2
        rows = torch.cat([rows[:half] + rows[half : 2 * half], rows[2 * half :]])
    return rows[0]


def _batch_state(theta: float) -> dict[str, Tensor]:
    state = rules.BatchTopK(1).state_dict()
    return {**state, "threshold": torch.full_like(state["threshold"], theta if theta >= 0 else -1.0)}


def _normalizer(file: WeightFile, sites: int, d: int) -> tuple[Tensor, Tensor]:
    """Mean (sites, d) and scale (sites,), which are 0 and 1 where nothing was normalized."""
    held = file.read()
    exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    none = torch.zeros(sites, d, **exact), torch.ones(sites, **exact)
    if "activation_mean" not in held:
        return none
    mean, std = tensor_of(file, "activation_mean", 2).double(), tensor_of(file, "activation_std", 2).double()
    same(file.path, "the shape of activation_mean", tuple(mean.shape), (sites, d))
    if bool(mean.isnan().any()) or bool(std.isnan().any()):  # how they say that there is none
        return none
    scale = tensor_of(file, "activation_global_scale", 1).double()
    same(file.path, "the shape of activation_global_scale", tuple(scale.shape), (sites,))
    if not bool(((scale > 0) & scale.isfinite()).all()) or not bool(mean.isfinite().all()):
        raise ValueError(f"{file.path}: activation_global_scale must be positive and activation_mean finite")
    return mean, scale


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 1, scale, scale + _EPS)


def save(coder: Crosscoder, folder: Path) -> None:
    """Writes both files, for sites of one width and wiring ``"joint"``."""
    d = layered(coder, NAME, "joint")
    if coder.read_widths != coder.written_widths:
        refuse(NAME, f"{len(coder.read_widths)} sites that are read and {len(coder.written_widths)} that are written")
    if coder.W_skip is not None:
        refuse(NAME, "a skip connection")
    rule, (source,) = coder.sources[0].activation, coder.sources
    if type(rule) not in (rules.ReLU, rules.BatchTopK):
        refuse(NAME, f"the rule {type(rule).__name__}, only ReLU and BatchTopK")
    norm = coder.decoder_norm if coder.rescale_acts_by_decoder_norm else None
    sites = len(coder.read_widths)
    unknown = torch.full((sites, d), torch.nan, device="cpu")  # so they say that nothing is normalized
    state: dict[str, Any] = {
        "encoder.weight": source.W_enc.detach().cpu().reshape(sites, d, coder.d_sae).contiguous(),
        "encoder.bias": source.b_enc.detach().cpu().clone(),
        "decoder.weight": source.W_dec.detach().cpu().view(coder.d_sae, sites, d).transpose(0, 1).contiguous(),
        "decoder.bias": torch.stack(biases(coder)), "code_normalization_id": torch.tensor(_IDS[norm], device="cpu"),
        "activation_mean": unknown, "activation_std": unknown.clone(),
        "activation_global_scale": torch.ones(sites, device="cpu"), "target_rms": torch.tensor(1.0, device="cpu"),
    }  # fmt: skip
    if isinstance(rule, rules.BatchTopK):
        if not float(rule.k).is_integer():
            refuse(NAME, f"k={rule.k}, only whole numbers")
        state |= {"k": torch.tensor(int(rule.k), dtype=torch.int, device="cpu"),
                  "threshold": rule.threshold.detach().cpu()}  # fmt: skip
    config = {"dict_class": "BatchTopKCrossCoder" if "k" in state else "CrossCoder", "activation_dim": d,
              "dict_size": coder.d_sae, "num_layers": sites, "sae_engine": own_section(coder)}  # fmt: skip
    write_files(folder, {
        WEIGHTS: torch_writer(state), CONFIG: text_writer(json.dumps(config, indent=2)),
    })  # fmt: skip
