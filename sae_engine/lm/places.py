"""Where a language model's weights can be skipped: found by the shapes of its layers, and proved by running them."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..acceleration._base import CannotAccelerate
from ..data.places import _blocks

# A probe compares two sums of the same numbers in different orders, which may differ by so many roundings of the
# largest number.
ROUNDINGS = 32


class NothingThere(CannotAccelerate):
    """The model has no module of the kind that was asked for."""


@dataclass(frozen=True)
class Halves:
    """How a gated MLP computes: ``down(act(gate(x)) * up(x))``, by the names of its children.

    ``up`` is None where one matrix holds both, its rows of the gate before those of W_up, or behind where
    ``up_first``. ``act`` is the name of a module or function of the MLP.
    """

    gate: str
    up: str | None
    down: str
    act: str
    up_first: bool = False

    def linears(self) -> list[str]:
        return [name for name in (self.gate, self.up, self.down) if name is not None]

    def width(self, mlp: nn.Module) -> int:
        return shape_of(getattr(mlp, self.down))[0]

    def matrices(self, mlp: nn.Module) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Weight (F, D) and bias of the gate and of W_up."""
        gate = getattr(mlp, self.gate)
        if self.up is not None:
            return by_neuron(gate), by_neuron(getattr(mlp, self.up))
        weight, bias = by_neuron(gate)
        weights, biases = weight.chunk(2), (None, None) if bias is None else bias.chunk(2)
        order = (1, 0) if self.up_first else (0, 1)
        first, second = ((weights[n], biases[n]) for n in order)
        return first, second

    def activated(self, mlp: nn.Module, gate: Tensor) -> Tensor:
        """The gate's activations, by the MLP's own functions: also the top-k of Gemma 3n, which rounds in its way."""
        if getattr(mlp, "activation_sparsity", 0.0) > 0.0 and hasattr(mlp, "_gaussian_topk"):
            gate = mlp._gaussian_topk(gate)  # type: ignore[operator]
        return getattr(mlp, self.act)(gate)


@dataclass(frozen=True)
class Found:
    """A module that can skip weights: its name, and how it computes where it is a gated MLP."""

    name: str
    module: nn.Module
    halves: Halves | None = None

    @property
    def down(self) -> nn.Module:
        """The linear layer whose columns are skipped."""
        return self.module if self.halves is None else getattr(self.module, self.halves.down)

    @property
    def width(self) -> int:
        """F, the number of entries."""
        return shape_of(self.down)[0]

    @property
    def device(self) -> torch.device:
        """Of the weights, and of what is learned about them."""
        return by_input(self.down).device


def is_linear(module: nn.Module) -> bool:
    """Whether it is exactly a linear layer as torch or transformers (GPT-2's Conv1D) has it, and no subclass."""
    kind = type(module).__dict__.get("_plain", type(module))
    return kind is nn.Linear or _is_conv1d(kind)


def _poses_as_linear(module: nn.Module) -> bool:
    """Whether it is one, or stands in the place of one, as quantised layers and adapters do."""
    return is_linear(module) or all(isinstance(getattr(module, name, None), int) for name in _SIZES)


_SIZES = ("in_features", "out_features")


def _is_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def holds_inputs_first(linear: nn.Module) -> bool:
    """Whether the weight is (in, out), as Conv1D has it."""
    return _is_conv1d(type(linear).__dict__.get("_plain", type(linear)))


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(in, out)."""
    if not is_linear(linear):
        return tuple(getattr(linear, name) for name in _SIZES)  # type: ignore[return-value]
    rows, columns = linear.weight.shape  # type: ignore[union-attr, misc]
    return (rows, columns) if holds_inputs_first(linear) else (columns, rows)


def by_neuron(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight as (out, in) and bias."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return (weight.T if holds_inputs_first(linear) else weight), linear.bias  # type: ignore[return-value]


def by_input(linear: nn.Module) -> Tensor:
    """Weight as (in, out): a row for each entry that can be skipped."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight if holds_inputs_first(linear) else weight.T


# --- finding ---------------------------------------------------------------------------------------------------------


def find(model: nn.Module, at: str, layers: Iterable[int] | None) -> tuple[list[Found], list[str]]:
    """What can skip weights at a place, in the order of the blocks; and the names of experts, which stay dense.

    Raises:
        CannotAccelerate: nothing is there, or something stands in the way.
        ValueError: a layer is out of range.
    """
    path, blocks = _blocks(model)
    found: list[Found] = []
    experts: list[str] = []
    without: list[int] = []
    for number in _checked_layers(layers, len(blocks)):
        inside = list(_in_block(f"{path}.{number}", blocks[number], at, experts))
        found += inside
        if not inside:
            without.append(number)
    if layers is not None and found and without:  # without numbers, the blocks that have one are meant
        raise NothingThere(f"layers: block {without[0]} has nothing that can skip weights at={at!r}, as others have")
    if not found:
        what = {"gate": "no gated MLP", "hidden": "no MLP of two or three linear layers", "inputs": "no linear layer"}
        also = f"; experts stay dense: {', '.join(experts)}" if experts else ""
        otherwise = '; at="hidden" or "inputs" takes others' if at == "gate" else ""
        raise NothingThere(f"{type(model).__name__} has {what[at]} that can skip weights{otherwise}{also}")
    found = list({id(one.module): one for one in reversed(found)}.values())[::-1]  # blocks may share modules
    for one in found:
        refuse_what_would_break(one)
    return found, experts


def _checked_layers(layers: Iterable[int] | None, number: int) -> list[int]:
    if layers is None:
        return list(range(number))
    chosen = sorted(set(layers))
    for layer in chosen:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise TypeError(f"layers must be numbers of blocks, got {layer!r}")
        if not 0 <= layer < number:
            raise ValueError(f"layers must lie in 0..{number - 1}, got {layer}")
    if not chosen:
        raise ValueError("layers must name at least one block, or be None for all, got none")
    return chosen


def _in_block(name: str, module: nn.Module, at: str, experts: list[str]) -> Iterator[Found]:
    """Depth first. What lies in a list of modules inside a block are experts."""
    if isinstance(module, nn.ModuleList) or "expert" in name.rpartition(".")[2]:
        experts.append(name)
        return
    if at == "inputs" and _poses_as_linear(module):
        refuse_linear(name, module)
        yield Found(name, module)
        return
    if at != "inputs" and (mlp := _mlp(name, module, at)) is not None:
        yield mlp
        return
    for child, inner in module.named_children():
        yield from _in_block(f"{name}.{child}", inner, at, experts)


def _mlp(name: str, module: nn.Module, at: str) -> Found | None:
    """The MLP whose linear layers are children of ``module``, as a gate or as its last matrix."""
    linears = {child: shape_of(m) for child, m in module.named_children() if _poses_as_linear(m)}
    last = [child for child, (width, _) in linears.items()
            if any(other != child and out in (width, 2 * width) and into == linears[child][1]
                   for other, (into, out) in linears.items())]  # fmt: skip
    narrowing = [child for child in last if linears[child][0] > linears[child][1]]
    if len(linears) not in (2, 3) or len(narrowing) != 1:
        return None
    down = narrowing[0]
    if len(linears) == 2 and down != list(linears)[-1]:  # it narrows first, as adapters do
        return None
    for child in linears if at == "gate" else [down]:
        refuse_linear(f"{name}.{child}", getattr(module, child))
    if at == "hidden":
        return Found(f"{name}.{down}", getattr(module, down))
    halves = halves_of(module, down, [child for child in linears if child != down])
    return None if halves is None else Found(name, module, halves)


def halves_of(mlp: nn.Module, down: str, others: list[str]) -> Halves | None:
    """How the gated MLP computes, if it is one: the first reading that repeats its own result on two random rows."""
    width, inner = shape_of(getattr(mlp, others[0]))[0], shape_of(getattr(mlp, down))[0]
    outs = [shape_of(getattr(mlp, name))[1] for name in others]
    readings: list[Callable[[str], Halves]] = []
    if outs == [inner, inner]:
        for gate, up in (others, others[::-1]):
            readings.append(lambda act, gate=gate, up=up: Halves(gate, up, down, act))  # type: ignore[misc]
    elif outs == [2 * inner]:
        for up_first in (False, True):
            readings.append(lambda act, up_first=up_first: Halves(others[0], None, down, act, up_first))  # type: ignore[misc]
    if not readings:
        return None
    rows = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(0), device="cpu")
    weight: Tensor = getattr(mlp, down).weight
    rows = rows.to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            own = mlp(rows)
        except Exception:  # it wants something else beside hidden states, so it is no plain MLP
            return None
        if not isinstance(own, Tensor) or own.shape[:-1] != rows.shape[:-1]:
            return None
        for act in _activations(mlp):
            for reading in readings:
                if _repeats(mlp, reading(act), rows, own):
                    return reading(act)
    return None


def _activations(mlp: nn.Module) -> Iterator[str]:
    """Names of what may be the activation: children without parameters, and functions."""
    yield from (name for name, child in mlp.named_children() if next(child.parameters(), None) is None)
    yield from (name for name, value in vars(mlp).items() if callable(value) and not name.startswith("_"))


def _repeats(mlp: nn.Module, halves: Halves, rows: Tensor, own: Tensor) -> bool:
    (gate, gate_bias), (up, up_bias) = halves.matrices(mlp)
    try:
        a = halves.activated(mlp, F.linear(rows, gate, gate_bias))
    except Exception:  # some other function of the module
        return False
    if not isinstance(a, Tensor) or a.shape != (*rows.shape[:-1], halves.width(mlp)):
        return False
    ours = getattr(mlp, halves.down)(a * F.linear(rows, up, up_bias))
    if ours.shape != own.shape:
        return False
    allowed = ROUNDINGS * torch.finfo(own.dtype).eps * float(own.abs().amax())
    return bool(own.abs().amax() > 0) and float((ours - own).abs().amax()) <= allowed


# --- refusing --------------------------------------------------------------------------------------------------------


def refuse_linear(name: str, linear: nn.Module) -> None:
    """CannotAccelerate where a layer's weight is not a plain matrix in memory."""
    where = f"{name} ({type(linear).__name__})"
    if hasattr(linear, "_selection"):
        raise CannotAccelerate(f"{where} skips weights already: se.restore(model) first")
    if not is_linear(linear):
        raise CannotAccelerate(f"{where} is not exactly nn.Linear or Conv1D, as quantised layers and adapters are not")
    weight: Any = linear.weight
    if type(weight) not in (nn.Parameter, Tensor) or type(weight.data) is not Tensor or not weight.is_floating_point():
        kind = type(weight.data).__name__ if isinstance(weight, nn.Parameter) else type(weight).__name__
        raise CannotAccelerate(f"{where}: its weight is a {kind} of {weight.dtype}, not a plain floating tensor")
    if weight.is_meta:
        raise CannotAccelerate(f"{where}: its weight is on the meta device, as offloaded ones are")


def refuse_what_would_break(found: Found) -> None:
    """CannotAccelerate where a module computes otherwise than its class says, or somebody watches what will not run."""
    inside = [] if found.halves is None else [getattr(found.module, name) for name in found.halves.linears()]
    for module in (found.module, *inside):
        if "forward" in vars(module):
            where = f"{found.name} ({type(module).__name__})"
            raise CannotAccelerate(f"{where}: its forward has been replaced on the object, as offloading does")
    halves = found.halves
    if halves is None:  # the layer itself goes on being called
        return
    silent = (halves.gate if halves.up is None else halves.up, halves.down)
    for linear in (getattr(found.module, name) for name in silent):
        if any(getattr(linear, name, None) for name in _HOOKS):
            raise CannotAccelerate(f"{found.name}: hooks on {type(linear).__name__} would not fire; remove them first")


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
