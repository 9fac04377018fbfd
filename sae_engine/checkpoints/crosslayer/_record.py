"""What every format of a crosscoder is read into: its wiring, and each source's tensors when they are asked for."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor

from ... import rules
from ..._checks import FLOATS
from ...provenance import Provenance
from .._reading import WeightFile
from ..card import SourceCard

if TYPE_CHECKING:
    from ...crosscoder import Crosscoder

Cut = Callable[[int], slice]  # from the number of latents to those that are to be read
Rule = tuple[type[rules.Activation], dict[str, Any]]
RULE = "rule."  # before the names of a rule's own tensors


@dataclass(frozen=True)
class Record:
    """A crosscoder as files hold it.

    ``source(s)`` reads the tensors of a source, in our orientation: ``W_enc`` (width read, d_sae), ``W_dec`` (d_sae,
    width written), ``b_enc`` (d_sae,) and, behind ``"rule."``, those of its rule. Sources are read one after the other,
    so that no more than one is in memory beside the crosscoder. ``rules`` are one for each source or, with
    ``one_rule``, a single one that serves all, whose tensors are ``shared``.

    Where a rank of a mesh reads, ``source(s)`` has its latents alone, and ``d_sae`` is the number of all. What follows
    from all latents together then follows from what each rank has ``seen``: ``settle`` makes the record of that.
    """

    reads: Sequence[int]
    writes: Sequence[int]
    wiring: Any
    d_sae: int
    sources: int
    source: Callable[[int], Mapping[str, Tensor]]
    b_dec: Tensor
    rules: Sequence[Rule]
    card: SourceCard | None
    one_rule: bool = False
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    skips: Sequence[Tensor] | None = None  # (width written, width read) each
    decoder_norm: str = "joint"
    rescale_acts_by_decoder_norm: bool = False
    provenance: Provenance | None = None
    seen: Any = None  # of JSON's types
    settle: Callable[[Record, Sequence[Any]], Record] | None = None

    def settled(self, seen: Sequence[Any]) -> Record:
        """With what every rank has seen; where one process reads all, that is what it has."""
        return self if self.settle is None else self.settle(self, seen)


@torch.inference_mode(False)  # parameters made in that mode could never be trained
def build(
    cls: type[Crosscoder], r: Record, file: Path, *, device: Any = None, dtype: torch.dtype | None = None,
    mesh: Any = None,
) -> Crosscoder:  # fmt: skip
    """The crosscoder of class ``cls`` that a record describes. ``file`` is named in errors.

    With a ``mesh``, the record's sources have this rank's latents, and all ranks call it.
    """
    first = r.source(0)
    stored = first["W_enc"].dtype
    try:
        made = [kind(**_with_latents(kind, options, r.d_sae)) for kind, options in r.rules]
        coder = cls(
            r.reads, r.writes, r.d_sae, made[0] if r.one_rule else made,
            wiring=r.wiring, skip=r.skips is not None, decoder_norm=r.decoder_norm,
            rescale_acts_by_decoder_norm=r.rescale_acts_by_decoder_norm,
            **({"dtype": stored, "device": "meta"} if mesh is None else
               {"dtype": stored if dtype is None else dtype, "device": device, "mesh": mesh}),
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} describes a crosscoder that cannot be built: {error}") from error
    if mesh is None:
        coder.to_empty(device=device or torch.get_default_device())
    mine = cast("Crosscoder", coder.share)
    with torch.no_grad():
        for number, source in enumerate(mine.sources):
            held = first if number == 0 else r.source(number)
            first = {}
            for name in ("W_enc", "W_dec", "b_enc"):
                _fill(file, f"{name} of source {number}", getattr(source, name), held[name])
            if not r.one_rule:
                state = {name.removeprefix(RULE): t for name, t in held.items() if name.startswith(RULE)}
                _load_rule(file, source.activation, state)
        if r.one_rule:
            _load_rule(file, mine.activation, dict(r.shared))
        _fill(file, "b_dec", mine.b_dec, r.b_dec)
        for number, (weight, held_skip) in enumerate(zip(mine.W_skip or (), r.skips or (), strict=True)):
            _fill(file, f"W_skip of site {number}", weight, held_skip)
    coder.card, coder.provenance = r.card, _fitting(r.provenance, coder)
    return coder if dtype is None or mesh is not None else coder.to(dtype)


def _with_latents(kind: type[rules.Activation], options: dict[str, Any], d_sae: int) -> dict[str, Any]:
    takes = "d_sae" in rules.base.constructor_arguments(kind)
    return {**options, "d_sae": d_sae} if takes else options


def _fill(file: Path, name: str, parameter: Tensor, held: Tensor) -> None:
    if held.shape != parameter.shape:
        raise ValueError(f"{file}: {name} must have shape {tuple(parameter.shape)}, got {tuple(held.shape)}")
    parameter.copy_(held)


def _load_rule(file: Path, rule: rules.Activation, state: dict[str, Tensor]) -> None:
    own = rule.state_dict()
    for name, tensor in own.items():
        if name not in state or state[name].shape != tensor.shape:
            got = tuple(state[name].shape) if name in state else "none"
            kind = type(rule).__name__
            raise ValueError(f"{file}: {name} of {kind} must have shape {tuple(tensor.shape)}, got {got}")
        if name == "threshold":
            is_unset = isinstance(rule, rules.BatchTopK) and bool((state[name] == -1).all())
            # JumpReLU takes a threshold below 0, where an optimizer may have pushed it, for 0
            below = bool((state[name] < 0).any()) and not isinstance(rule, rules.JumpReLU)
            if bool(state[name].isnan().any()) or (below and not is_unset):
                raise ValueError(f"{file}: threshold must not be negative or NaN")
    if unknown := sorted(state.keys() - own.keys()):
        raise ValueError(f"{file} holds what {type(rule).__name__} does not have: {unknown}")
    rule.load_state_dict(state)


def _fitting(provenance: Provenance | None, coder: Crosscoder) -> Provenance | None:
    """``provenance`` without widths that are not the crosscoder's: the weights know better than words about them."""
    if provenance is None:
        return None
    d = provenance.d if provenance.d == coder.d_in else None
    return replace(provenance, d=d, d_target=provenance.d_target if provenance.d_target == coder.d_out else None)


# ---------------------------------------------------------------------------------------------------- writing


def refuse(name: str, what: str) -> NoReturn:
    """A format that cannot hold something says so; nothing is dropped."""
    raise ValueError(f"format {name!r} cannot hold {what}: it would be lost; format='sae_engine' keeps it")


def wiring_of(coder: Crosscoder) -> str:
    """``"joint"``, ``"causal"``, ``"each"``, ``"local"`` or ``"other"``; of a single site ``"joint"``."""
    from ..._wiring import NAMED, ranges_of

    reads, writes = len(coder.read_widths), len(coder.written_widths)
    for name in NAMED:
        if (name in ("joint", "each") or reads == writes) and ranges_of(name, reads, writes) == coder.wiring:
            return name
    return "other"


def layered(coder: Crosscoder, name: str, *wirings: str) -> int:
    """The width of every layer, where the sites are layers of one width and the wiring is one of ``wirings``."""
    widths = {*coder.read_widths, *coder.written_widths}
    if len(widths) > 1:
        refuse(name, f"sites of different widths, {sorted(widths)}")
    own = wiring_of(coder)
    if own not in wirings and not (len(coder.read_widths) == 1 == len(coder.written_widths)):
        refuse(name, f"the wiring {own!r}, only {' and '.join(map(repr, wirings))}")
    return widths.pop()


def threshold_rules(jumprelu: bool, sources: int) -> dict[str, Any]:
    """``rules`` and ``one_rule`` of a record whose sources are all JumpReLU, or all ReLU."""
    rule: Rule = (rules.JumpReLU, {}) if jumprelu else (rules.ReLU, {})
    return {"rules": [rule] * (sources if jumprelu else 1), "one_rule": not jumprelu}


def thresholds_of(coder: Crosscoder, name: str) -> list[Tensor] | None:
    """(d_sae,) of each source, None where all are ReLU; a rule that is no threshold is refused."""
    kinds = [source.activation for source in coder.sources]
    if all(type(rule) is rules.ReLU for rule in kinds):
        return None
    if all(type(rule) is rules.JumpReLU for rule in kinds):
        return [rule.threshold.detach().clamp(min=0).cpu() for rule in kinds]  # type: ignore[operator]
    found = sorted({type(rule).__name__ for rule in kinds})
    refuse(name, f"the rule {', '.join(found)}, only ReLU or JumpReLU in all sources; inference_form() makes such "
                 "thresholds of BatchTopK")  # fmt: skip


def folded(coder: Crosscoder, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """W_enc, W_dec and b_enc of a source on the CPU, without ``rescale_acts_by_decoder_norm``.

    Norms go to the encoder and are taken out of the decoder, so that the rule sees the same pre-activations and
    thresholds stay. Products are taken in fp64 and rounded once.
    """
    source = coder.sources[number]
    held = [tensor.detach().cpu() for tensor in (source.W_enc, source.W_dec, source.b_enc)]
    if not coder.rescale_acts_by_decoder_norm:
        return held[0], held[1], held[2]
    norms = coder.norms_of(source).detach().cpu().double()
    divisor = torch.where(norms == 0, 1.0, norms)
    wide = held[0].double() * norms, held[1].double() / divisor[:, None], held[2].double() * norms
    first, second, third = (new.to(old.dtype) for new, old in zip(wide, held, strict=True))
    return first, second, third


def biases(coder: Crosscoder) -> list[Tensor]:
    """``b_dec`` of each site, on the CPU."""
    return [part.clone() for part in coder.b_dec.detach().cpu().split(list(coder.written_widths))]


# ---------------------------------------------------------------------------------------------------- reading


def numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """Files by the number in their names, of which none may be missing between 0 and the last.

    Raises:
        ValueError: one is missing; names it.
    """
    found = {int(match[1]): file for file in folder.iterdir() if (match := re.fullmatch(pattern, file.name))}
    for number in range(max(found, default=-1) + 1):
        if number not in found:
            name = pattern.replace(r"(\d+)", str(number)).replace("\\", "")
            raise ValueError(f"{folder / name} is missing: there is one of layer {max(found)}")
    return dict(sorted(found.items()))


def tensor_of(file: WeightFile, name: str, dims: int) -> Tensor:
    """A floating-point tensor of so many dimensions.

    Raises:
        ValueError: there is none; names the file and the tensor.
    """
    held = file.read()
    if name not in held:
        raise ValueError(f"{file.path} lacks {name}; it holds {sorted(held)}")
    tensor = held[name]
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS or tensor.dim() != dims:
        got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{file.path}: {name} must be a floating-point tensor of {dims} dimensions, got {got}")
    return tensor


def of_mine(file: Path, held: Mapping[str, Tensor], d_sae: int, cut: Cut | None) -> Mapping[str, Tensor]:
    """What :class:`Record` has of a source of ``d_sae`` latents, of those that ``cut`` says: views of ``held``.

    Raises:
        ValueError: a tensor has other latents.
    """
    if cut is None:
        return held
    found = {}
    for name, tensor in held.items():
        dim = 1 if name == "W_enc" else 0
        if name.startswith(RULE) and tensor.shape[:1] != (d_sae,):
            found[name] = tensor
            continue
        if tensor.shape[dim] != d_sae:
            raise ValueError(f"{file}: {name} must be of {d_sae} latents, got {tensor.shape[dim]}")
        found[name] = cut_along(tensor, dim, cut)
    return found


def cut_along(tensor: Tensor, dim: int, cut: Cut | None) -> Tensor:
    """Of a tensor of all latents along ``dim``, those that ``cut`` says: a view."""
    if cut is None:
        return tensor
    mine = cut(tensor.shape[dim])
    return tensor.narrow(dim, mine.start, mine.stop - mine.start)


def checked(file: WeightFile, known: set[str]) -> None:
    """ValueError where a file holds what the format does not have."""
    if unknown := sorted(file.read().keys() - known):
        raise ValueError(f"{file.path} holds what the format does not have: {unknown}")


def same(file: Path, what: str, got: Any, wanted: Any) -> None:
    if got != wanted:
        raise ValueError(f"{file}: {what} must be {wanted}, got {got}")


def edges(widths: Sequence[int]) -> list[int]:
    return list(accumulate(widths, initial=0))
