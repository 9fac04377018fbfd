"""Autoencoders as a repository of the Hugging Face hub: a folder for each hook that SAELens loads, and a card.

``blocks.8.hook_resid_pre/cfg.json``, ``sae_weights.safetensors`` and, where it is known, ``sparsity.safetensors``, as
SAELens names them, which Neuronpedia loads too. Other layouts lie in folders of their own beside them:

``saebench``        ``saebench/HOOK/ae.pt`` and ``config.json``: dictionary_learning's files, with the ``trainer_class``
                    and ``layer`` that SAEBench's runner for repositories asks for (adamkarvonen/SAEBench, 8042bb3).
``circuit-tracer``  ``circuit-tracer/layer_0.safetensors`` … and ``config.yaml``: transcoders of an MLP, of every layer
                    from the first on (decoderesearch/circuit-tracer, 4bb8c0e).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .._files import write_tensors
from ..autoencoder import SparseAutoencoder
from ..checkpoints import _folding as folding
from ..checkpoints import dictionary_learning, saelens
from ..checkpoints._checkpoint import Checkpoint, laid_out, of, words
from ..checkpoints._places import hub_name, spelled
from ..inference import inference_form
from ..provenance import Provenance
from ..rules import BatchTopK, JumpReLU, LogJumpReLU, ReLU, TopK
from ._card import card
from ._repository import Published, check_destination, published

LAYOUTS = ("saelens", "saebench", "circuit-tracer")
# SAELens' registry of what can be loaded for inference; the rules that it knows and we write.
_LOADABLE = ("standard", "topk", "jumprelu", "gated", "abstopk", "transcoder", "skip_transcoder", "jumprelu_transcoder",
             "jumprelu_skip_transcoder")  # fmt: skip
_TRAINERS = {ReLU: "StandardTrainer", TopK: "TopKTrainer", BatchTopK: "BatchTopKTrainer", JumpReLU: "JumpReluTrainer"}
_HOOKS = {"resid_mid": "hook_resid_mid", "mlp_in": "mlp.hook_in", "mlp_out": "hook_mlp_out"}
_TRACED = {"W_enc": ("W_enc", "Fd"), "b_enc": ("b_enc", "F"), "W_dec": ("W_dec", "Fo"), "b_dec": ("b_dec", "o")}


def push(
    saes: SparseAutoencoder | Sequence[SparseAutoencoder] | Mapping[str, SparseAutoencoder],
    repo_id: str,
    *,
    folder: str | Path | None = None,
    dry_run: bool = False,
    layouts: Sequence[str] = ("saelens",),
    sparsity: Mapping[str, Tensor] | None = None,
    description: str = "",
    license: str | None = None,
    private: bool = False,
    api: Any = None,
) -> Published:
    """Write autoencoders as a repository, a folder for each hook and a card, and upload it to the Hugging Face hub.

    Batch rules are written with the thresholds that they learned, as the JumpReLU that SAELens loads. Nothing is
    uploaded before all of it is written.

    Args:
        saes: one or several, whose ``provenance`` says the model and the hook, which names the folder; or names of
            folders and autoencoders, for several at one hook: ``{"blocks.8.hook_resid_pre/k_32": sae}``.
        repo_id: ``owner/repository``; made when missing.
        folder: where to write it, empty or not there yet; None is a temporary folder.
        dry_run: write ``folder`` and upload nothing; no network is needed.
        layouts: one or more of ``"saelens"``, ``"saebench"``, ``"circuit-tracer"``.
        sparsity: by folder, (d_sae,) the share of tokens on which each latent fires: ``features.counts() /
            features.manifest["encoded"]``. Written as SAELens has it, log10 of that.
        description: Markdown for the card.
        license: of the hub's identifiers, as ``"mit"``; None says nothing.
        private: whether a repository that is made is private.
        api: a ``huggingface_hub.HfApi``, with a token; by default one with the token that is stored here.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: SAELens, or another layout, cannot hold an autoencoder (says why); one does not say its hook, two
            have the same; ``repo_id`` is no name, a layout is unknown, ``dry_run`` comes without ``folder``.
        RuntimeError: a rule has learned no threshold yet.
        FileExistsError: ``folder`` holds something.
        Errors of huggingface_hub come as they are; the folder, where one was given, then holds all of it.

    Example:
        >>> import tempfile
        >>> sae = se.SparseAutoencoder(4, 16, se.TopK(2))
        >>> sae.provenance = se.Provenance(model="openai-community/gpt2", layer=8, site="resid_pre")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(push(sae, "me/my-saes", folder=folder, dry_run=True).files)
        ['README.md', 'blocks.8.hook_resid_pre/cfg.json', 'blocks.8.hook_resid_pre/sae_weights.safetensors']
    """
    check_destination(repo_id, folder, dry_run, private)
    if isinstance(layouts, str) or not layouts or not all(layout in LAYOUTS for layout in layouts):
        raise ValueError(f"layouts must be a sequence of {', '.join(LAYOUTS)}, got {layouts!r}")
    named = {name: _Named(name, _form(sae), of(sae)) for name, sae in _named(saes).items()}
    shares = _sparsity(sparsity or {}, named)

    def write(root: Path) -> None:
        for name, one in named.items():
            if "saelens" in layouts:
                _saelens(one, root / name, shares.get(name))
            if "saebench" in layouts:
                _saebench(one, root / "saebench" / name)
        if "circuit-tracer" in layouts:
            _circuit_tracer(list(named.values()), root / "circuit-tracer", f"{repo_id}//circuit-tracer")
        text = card({name: one.form for name, one in named.items()}, repo_id, layouts, description, license, shares)
        (root / "README.md").write_text(text, encoding="utf-8")

    return published(write, repo_id, folder=folder, dry_run=dry_run, private=private, api=api)


class _Named(NamedTuple):
    """One autoencoder as it is run, with thresholds for batch rules, and as it was trained."""

    name: str
    form: Checkpoint
    training: Checkpoint


# ---------------------------------------------------------------------------------------------------------- layouts


def _saelens(one: _Named, folder: Path, sparsity: Tensor | None) -> None:
    architecture = saelens.architecture_of(one.form)
    transcodes = "W_skip" in one.form.tensors or one.form.tensors["W_enc"].shape != one.form.tensors["W_dec"].T.shape
    if transcodes and "transcoder" not in architecture:
        raise ValueError(f"saes: {one.name}: SAELens has no transcoder with the rule {one.form.activation.__name__}")
    if architecture not in _LOADABLE:
        raise ValueError(
            f"saes: {one.name}: SAELens has no rule {one.form.activation.__name__} ({architecture}), so it cannot load "
            "it; save_pretrained keeps it for this library"
        )
    saelens.save(one.form, folder)
    if sparsity is not None:
        saelens.save_sparsity(sparsity, folder)


def _saebench(one: _Named, folder: Path) -> None:
    c = one.training if one.training.activation in (TopK, BatchTopK) else one.form
    trainer, known = _TRAINERS.get(c.activation), c.provenance
    if trainer is None or known is None or known.layer is None or known.model is None:
        why = f"the rule {c.activation.__name__}" if trainer is None else "one without model and layer"
        raise ValueError(f"saes: {one.name}: SAEBench's runner cannot take {why}")
    c = folding.subtract_b_dec(c, c.activation is not JumpReLU)
    c = folding.unit_decoder_rows(c) if c.activation in (ReLU, JumpReLU) else folding.fold_decoder_norms(c)
    d_sae, d_in = c.tensors["W_dec"].shape
    if d_sae < d_in or not _has_unit_rows(c.tensors["W_dec"]):
        why = "fewer latents than dimensions" if d_sae < d_in else "decoder rows whose norm is not 1"
        raise ValueError(f"saes: {one.name}: SAEBench's runner cannot take {why}")
    dictionary_learning.save(c, folder)
    file = folder / dictionary_learning.CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config["trainer"]["trainer_class"] = trainer
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _form(sae: SparseAutoencoder) -> Checkpoint:
    return of(inference_form(sae) if isinstance(sae.activation, (BatchTopK, LogJumpReLU)) else sae)


def _has_unit_rows(W_dec: Tensor) -> bool:
    return bool((W_dec.double().norm(dim=1) - 1).abs().max() < 1e-3)


def _circuit_tracer(named: list[_Named], folder: Path, scan: str) -> None:
    """A set of transcoders, one for each layer. Theirs never subtract ``b_dec``; decoder norms are folded."""
    by_layer: dict[int, Checkpoint] = {}
    places, kinds = set(), set()
    for one in named:
        c, known = one.form, one.form.provenance or Provenance()
        layer, into, out = known.layer, _HOOKS.get(known.site or ""), _HOOKS.get(known.target_site or "")
        why = None
        if layer is None or into is None or out is None or known.target_layer not in (None, layer):
            why = f"what is no transcoder within a block, from and to {', '.join(_HOOKS)}"
        elif c.activation not in (ReLU, JumpReLU):  # its top-k keeps negative pre-activations too
            why = f"the rule {c.activation.__name__}"
        elif c.normalize_activations != "none":
            why = f"normalize_activations={c.normalize_activations!r}"
        elif layer in by_layer:
            why = f"two transcoders of layer {layer}"
        if why is not None or layer is None:
            raise ValueError(f"saes: {one.name}: circuit-tracer cannot take {why}")
        by_layer[layer] = folding.subtract_b_dec(folding.fold_decoder_norms(c), False)
        places.add((hub_name(known.model), into, out))
        kinds.add((c.activation, tuple(c.tensors["W_enc"].shape), "W_skip" in c.tensors))
    if sorted(by_layer) != list(range(len(by_layer))):
        raise ValueError(f"saes: circuit-tracer needs every layer from 0 on, got {sorted(by_layer)}")
    if len(places) > 1 or len(kinds) > 1:
        raise ValueError(f"saes: circuit-tracer needs one model, hook, rule and width for all, got {places}, {kinds}")
    ((model, into, out),), ((kind, _, has_skip),) = places, kinds
    config = {"model_name": model, "model_kind": "transcoder_set", "feature_input_hook": into,
              "feature_output_hook": out, "scan": scan}  # fmt: skip
    config |= {"activation": "relu"} if kind is ReLU else {}
    folder.mkdir(parents=True)
    # JSON's strings and numbers are YAML's.
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in config.items())
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    for layer, c in by_layer.items():
        tensors = laid_out(c, _TRACED)
        if kind is JumpReLU:
            tensors["activation_function.threshold"] = c.tensors["threshold"]
        if has_skip:
            tensors["W_skip"] = c.tensors["W_skip"]
        write_tensors(folder / f"layer_{layer}.safetensors", tensors)


# ------------------------------------------------------------------------------------------------ names and sparsity


def _named(saes: Any) -> dict[str, SparseAutoencoder]:
    if isinstance(saes, SparseAutoencoder):
        saes = [saes]
    if isinstance(saes, Mapping):
        found = dict(saes)
    elif isinstance(saes, Sequence) and not isinstance(saes, str):
        found = {}
        for number, sae in enumerate(saes):
            name = hook_of(sae, f"saes[{number}]")
            if name in found:
                raise ValueError(f"saes: two belong at {name}: give a mapping that names a folder for each")
            found[name] = sae
    else:
        raise TypeError(f"saes must be autoencoders or a mapping of names to them, got {type(saes).__name__}")
    if not found:
        raise ValueError("saes must hold at least one autoencoder, got none")
    for name, sae in found.items():
        parts = name.split("/") if isinstance(name, str) else [""]
        if any(not part or part.startswith(".") or "\\" in part for part in parts) or parts[0] in LAYOUTS:
            raise ValueError(f"saes: {name!r} cannot be the name of a folder in the repository")
        if not isinstance(sae, SparseAutoencoder):
            raise TypeError(f"saes: {name} must be a SparseAutoencoder, got {type(sae).__name__}")
        hook_of(sae, f"saes: {name}")
    return found


def hook_of(sae: Any, name: str) -> str:
    """Where an autoencoder belongs, as TransformerLens spells it; ``name`` is what an error calls it."""
    if not isinstance(sae, SparseAutoencoder):
        raise TypeError(f"{name} must be a SparseAutoencoder, got {type(sae).__name__}")
    known = sae.provenance
    hook = words(of(sae))[1] if known is None else spelled(known.layer, known.site)
    if hook is None:
        raise ValueError(f"{name} does not say where it belongs: set its provenance, as Provenance(model=…, layer=…)")
    return hook


def _sparsity(given: Mapping[str, Tensor], named: Mapping[str, _Named]) -> dict[str, Tensor]:
    for name, share in given.items():
        if name not in named:
            raise ValueError(f"sparsity: {name!r} is none of {', '.join(named)}")
        d_sae = named[name].form.tensors["W_dec"].shape[0]
        if not isinstance(share, Tensor) or share.shape != (d_sae,) or not bool(((share >= 0) & (share <= 1)).all()):
            raise ValueError(f"sparsity: {name} must be ({d_sae},) of shares in 0..1, got {share!r:.80}")
    return {name: share.detach().cpu() for name, share in given.items()}
