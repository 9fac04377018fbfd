"""What every format is read into and written from: named tensors in our orientation, and how they are used."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import rules as act
from .._checks import FLOATS
from .._files import replace_files
from ..provenance import Provenance
from . import _places as places
from ._reading import WeightFile
from .card import CENTRED, UNKNOWN, SourceCard

# One letter a dimension: d = d_in, F = d_sae, o = d_out.
DIMENSIONS = {
    "W_enc": "dF", "W_dec": "Fo", "b_enc": "F", "b_dec": "o", "W_skip": "od", "threshold": "F",
    "b_gate": "F", "b_mag": "F", "r_mag": "F",
}  # fmt: skip
SIZES = {"d": "d_in", "F": "d_sae", "o": "d_out"}
WEIGHTS = frozenset({"W_enc", "W_dec", "b_enc", "b_dec", "W_skip"})  # all other tensors are the rule's


@dataclass(frozen=True)
class Files:
    """The files of one checkpoint, as :mod:`.formats` chose them."""

    weights: WeightFile
    config_file: Path | None
    config: dict[str, Any] | None


@dataclass(frozen=True)
class Checkpoint:
    """An autoencoder as files hold it. ``tensors`` go by our names: the weights, and what is the rule's."""

    activation: type[act.Activation]
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    card: SourceCard | None
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    provenance: Provenance | None = None

    def taking_raw_residuals(self) -> Checkpoint:
        """The same for raw residual streams: one that was trained on mean-centred ones then centres its input."""
        same_width = self.tensors["W_enc"].shape[0] == self.tensors["W_dec"].shape[1]
        if self.card is None or self.card.residual != CENTRED or self.normalize_activations != "none" or not same_width:
            return self
        before = self.card.normalization
        said = "center" if before == "none" else f"{before}; each token minus its mean, added back after decoding"
        return replace(self, normalize_activations="center", card=replace(self.card, normalization=said))


def take(
    weights: WeightFile, tensors: Mapping[str, Any], layout: dict[str, tuple[str, str]],
    sizes: dict[str, Any] | None = None, *, ignored: tuple[str, ...] = (),
) -> dict[str, Tensor]:  # fmt: skip
    """``tensors`` of a file under our names and in our orientation, cut to the latents that are asked for.

    Args:
        layout: their name → (ours, their dimensions), for example ``{"encoder.weight": ("W_enc", "Fd")}``.
        sizes: letter → size, where the configuration says it; the first tensor with a letter says it otherwise.
        ignored: names that may be there and mean nothing here.
    """
    known, file = dict(sizes or {}), weights.path
    for letter, size in known.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{file}: {SIZES[letter]} must be a positive integer in its configuration, got {size!r}")
    taken = {}
    for name, (ours, dims) in layout.items():
        if name not in tensors:
            raise ValueError(f"{file} lacks {name}; it holds {sorted(tensors)}")
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{file}: {name} must be a tensor of a floating-point dtype, got {got}")
        if tensor.dim() > len(dims) and ours in ("W_enc", "W_dec"):
            raise ValueError(
                f"{file}: {name} has shape {tuple(tensor.shape)}: this is a crosscoder or cross-layer transcoder, and "
                "reads or writes several places at a time; only one of each is held here"
            )
        if tensor.dim() == len(dims):
            for letter, size in zip(dims, tensor.shape, strict=True):
                known.setdefault(letter, size)
        if tuple(tensor.shape) != tuple(known.get(letter) for letter in dims):
            wanted = ", ".join(f"{SIZES[letter]} = {known.get(letter, 'any')}" for letter in dims)
            raise ValueError(f"{file}: {name} must have shape ({wanted}), got {tuple(tensor.shape)}")
        taken[ours] = _transposed(tensor, ours, dims)
        if weights.cut is not None and "F" in dims:
            mine = weights.cut(known["F"])
            dim = DIMENSIONS[ours].index("F")
            taken[ours] = taken[ours].narrow(dim, mine.start, mine.stop - mine.start)
    unknown = tensors.keys() - layout.keys() - set(ignored)
    if unknown:
        raise ValueError(f"{file} holds what no such SAE has: {sorted(unknown)}; expected {sorted(layout)}")
    return taken


def scalar(file: Path, tensors: Mapping[str, Any], name: str) -> float | int:
    """The one number in a tensor of one element."""
    value = tensors.get(name)
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        raise ValueError(f"{file}: {name} must be one number, got {getattr(value, 'shape', value)!r}")
    return value.item()


def text(value: object) -> str | None:
    """A configuration's string, None for anything else."""
    return value if isinstance(value, str) and value else None


@torch.inference_mode(False)  # parameters made in that mode could never be trained
def build(
    cls, c: Checkpoint, file: Path, *, device=None, dtype: torch.dtype | None = None, d_sae: int | None = None,
    mesh: Any = None,
):  # fmt: skip
    """The autoencoder of class ``cls`` that a checkpoint describes. ``file`` is named in errors.

    With a ``mesh``, ``c`` holds this rank's of ``d_sae`` latents.
    """
    W_enc, W_dec = c.tensors["W_enc"], c.tensors["W_dec"]
    threshold = c.tensors.get("threshold")
    if threshold is not None:
        unset = issubclass(c.activation, act.BatchTopK) and bool(threshold == -1)
        # JumpReLU takes a threshold below 0, where an optimizer may have pushed it, for 0
        below = bool((threshold < 0).any()) and not issubclass(c.activation, act.JumpReLU)
        if bool(threshold.isnan().any()) or (below and not unset):
            raise ValueError(f"{file}: threshold must not be negative or NaN")
    options, d_sae = dict(c.options), W_enc.shape[1] if d_sae is None else d_sae
    if "d_sae" in act.base.constructor_arguments(c.activation):
        options["d_sae"] = d_sae
    stored = W_enc.dtype
    for name in WEIGHTS & c.tensors.keys():
        stored = torch.promote_types(stored, c.tensors[name].dtype)
    try:
        rule = c.activation(**options)
        begun = dict(rule.state_dict())
        sae = cls(
            W_enc.shape[0], d_sae, rule,
            d_out=W_dec.shape[1], skip="W_skip" in c.tensors,
            apply_b_dec_to_input=c.apply_b_dec_to_input,
            normalize_activations=c.normalize_activations,
            rescale_acts_by_decoder_norm=c.rescale_acts_by_decoder_norm,
            **({"dtype": stored, "device": "meta"} if mesh is None else
               {"dtype": stored if dtype is None else dtype, "device": device, "mesh": mesh}),
        )  # fmt: skip
        mine = sae if mesh is None else sae.share
        begun = begun if mesh is None else mine.activation.state_dict()
        state = {name: c.tensors.get(name, tensor) for name, tensor in begun.items()}
        for name, tensor in begun.items():
            if state[name].shape != tensor.shape:
                raise ValueError(f"{name} must have shape {tuple(tensor.shape)}, got {tuple(state[name].shape)}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} describes an autoencoder that cannot be built: {error}") from error
    if mesh is None:
        sae.to_empty(device=device or torch.get_default_device())
    with torch.no_grad():
        for name, parameter in mine.named_parameters():
            if name.startswith("activation."):
                continue
            if name in c.tensors:
                parameter.copy_(c.tensors[name])
            else:
                parameter.zero_()  # b_enc of rules that have none
        mine.activation.load_state_dict(state)
    sae.card, sae.provenance = c.card, _fitting(c.provenance, sae)
    return sae if dtype is None or mesh is not None else sae.to(dtype)


def _fitting(provenance: Provenance | None, sae) -> Provenance | None:
    """``provenance`` without widths that are not the autoencoder's: the weights know better than words about them."""
    if provenance is None:
        return None
    d = provenance.d if provenance.d == sae.d_in else None
    return replace(provenance, d=d, d_target=provenance.d_target if provenance.d_target == sae.d_out else None)


def of(sae) -> Checkpoint:
    """The checkpoint of an autoencoder, on the CPU.

    Raises:
        TypeError: its rule has options that JSON cannot hold, or none of the names that it is built from.
    """
    rule = sae.activation
    tensors = {n: p.detach().cpu().contiguous() for n, p in sae.named_parameters() if not n.startswith("activation.")}
    tensors |= {name: tensor.detach().cpu().contiguous() for name, tensor in rule.state_dict().items()}
    options = rule.options()
    try:
        options = json.loads(json.dumps(options))
    except (TypeError, ValueError) as error:
        raise TypeError(f"activation {type(rule).__name__} has options that no checkpoint holds: {error}") from None
    card, known = sae.card, sae.provenance
    if card is not None and card.model_name is None and known is not None:  # said since the card was read
        card = replace(card, model_name=known.model)
    return Checkpoint(
        activation=type(rule),
        options=options,
        tensors=tensors,
        card=card,
        apply_b_dec_to_input=sae.apply_b_dec_to_input,
        normalize_activations=sae.normalize_activations,
        rescale_acts_by_decoder_norm=sae.rescale_acts_by_decoder_norm,
        provenance=sae.provenance,
    )


def laid_out(c: Checkpoint, layout: dict[str, tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors of ``c`` under their names and in their orientation: what :func:`take` undoes."""
    return {theirs: _transposed(c.tensors[ours], ours, dims).contiguous() for theirs, (ours, dims) in layout.items()}


def _transposed(tensor: Tensor, ours: str, dims: str) -> Tensor:
    """From one orientation to the other, where ``dims`` is ours backwards."""
    return tensor.T if len(dims) == 2 and dims != DIMENSIONS[ours] else tensor


def refuse(name: str, what: str) -> NoReturn:
    """A format that cannot hold something says so; nothing is dropped."""
    raise ValueError(f"format {name!r} cannot hold {what}: it would be lost; format='saelens' keeps it")


def own_section(c: Checkpoint) -> dict[str, Any]:
    """What no other library has a field for, as JSON under the key ``sae_engine``."""
    section: dict[str, Any] = {"activation": c.activation.__name__, "options": c.options}
    if c.normalize_activations == "center":
        section["normalize_activations"] = c.normalize_activations
    if c.card is not None:
        section["card"] = c.card.to_dict()
    if c.provenance is not None:
        section["provenance"] = c.provenance.to_dict()
    return section


def words(c: Checkpoint) -> tuple[str | None, str | None, str | None]:
    """The model, the place and a transcoder's target as formats name them: as they were read, or as SAELens would."""
    known = c.provenance or Provenance()
    model, hook = known.model, places.spelled(known.layer, known.site)
    if c.card is not None:
        read = c.card.hook_name
        if read is not None and (hook is None or places.split(read) == (known.layer, known.site)):
            hook = read
        model = model or c.card.model_name
    target = None if known.target_site == UNKNOWN else places.spelled(known.target_layer, known.target_site)
    return model, hook, target


def recorded(c: Checkpoint, section: object) -> Checkpoint:
    """``c`` with what :func:`own_section` recorded of it, where that is a kind of the same rule."""
    if not isinstance(section, dict):
        return c.taking_raw_residuals()
    batch = (act.BatchTopK, act.MutualChoice, act.MatryoshkaBatchTopK)  # select alike: formats have one name
    kinds = {kind.__name__: kind for kind in (batch if c.activation in batch else (c.activation,))}
    options = section.get("options")
    k = {"k": c.options["k"]} if "k" in c.options else {}
    normalize = section.get("normalize_activations", c.normalize_activations)
    if not isinstance(normalize, str):
        normalize = c.normalize_activations
    return replace(
        c,
        activation=kinds.get(str(section.get("activation")), c.activation),
        # The format's own k wins: it may have been edited, and their library reads that one.
        options={**c.options, **(options if isinstance(options, dict) else {}), **k},
        normalize_activations=normalize,
        card=SourceCard.from_dict(section.get("card")) or c.card,
        provenance=places.agreed(Provenance.from_dict(section.get("provenance")), c.provenance),
    )


def write_files(folder: Path, writes: dict[str, Callable[[Path], object]]) -> None:
    """All of these in ``folder``, or nothing: no file, and no folder that was not there."""
    made = []
    for parent in (folder, *folder.parents):
        if parent.exists():
            break
        made.append(parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_files({folder / name: write for name, write in writes.items()})
    except BaseException:
        for parent in made:
            with suppress(OSError):  # another writer may have put something there, or taken it away
                parent.rmdir()
        raise


def single_file(path: str | PathLike, suffix: str, default: str) -> Path:
    """Where a format of one file is written: ``path`` itself if it ends so, else ``default`` in the folder ``path``."""
    path = Path(path)
    return path if path.suffix == suffix and not path.is_dir() else path / default


def torch_writer(contents: dict[str, Any]) -> Callable[[Path], object]:
    def write(name: Path) -> None:
        with name.open("wb") as stream:  # given a name, torch calls the records inside after it
            torch.save(contents, stream)

    return write


def text_writer(content: str) -> Callable[[Path], object]:
    return lambda name: name.write_text(content, encoding="utf-8")
