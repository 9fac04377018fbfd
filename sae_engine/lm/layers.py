"""The modules of a language model that skip weights: a gated MLP, and a linear layer, each as a class beside its own.

A few tokens, without gradients, are multiplied only by the rows of the weights that they keep. More tokens, and tokens
that keep too much for that to pay, run the module's dense code with 0 for what is dropped: the same function to
rounding, so that a prompt can be read at once or token by token.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .places import Found, Halves, by_input
from .rules import Learned, Rule

MOST_ROWS = 8  # more tokens keep too many different entries
GPU_DENSE = 0.6  # share of entries that a batch keeps together, above which a GPU's dense code is faster


def densest(numbers: int) -> float:
    """Share of kept entries up to which a CPU is faster with their rows alone, of a matrix of so many numbers.

    What is not read of a small one does not pay for the calls.
    """
    return 0.45 if numbers >= 1 << 22 else 0.2 if numbers >= 1 << 20 else 0.0


class Seen(Protocol):
    """Who wants to know what was kept."""

    def __call__(self, kept: Tensor) -> None: ...


@dataclass
class Selection:
    """What a module that skips weights knows beside its parameters.

    It holds no parameter and no buffer, so a model saves, and ``.to(dtype)`` rounds, nothing but the model's own.
    """

    rule: Rule
    learned: Learned
    halves: Halves | None = None
    always_dense: bool = False  # for training
    restrided: bool = False  # whether W_down lay in memory row by row before
    backend: str = "auto"
    is_on: bool = True
    seen: Seen | None = None
    _folded: tuple[Any, Tensor | None] = field(default=(None, None), repr=False)

    def kept(self, p: Tensor) -> tuple[Tensor, Tensor | None]:
        """p with 0 for what is dropped, and what is kept where dropped entries count."""
        kept, mask = self.rule.select(p, self.learned)
        if self.seen is not None:
            self.seen(kept != 0 if mask is None else mask)
        return kept, mask if self.learned.mean is not None else None

    def skips(self, kept: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
        """Whether only the kept rows of ``weight`` (F, D) are to be read.

        Sizes and the measured density decide; on a CPU also what this call keeps, since looking waits for nothing.
        """
        rows = kept.shape[0]
        if self.always_dense or rows > MOST_ROWS or rows == 0:
            return False
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (kept, weight, *others)):
            return False
        density = self.learned.density
        if kept.is_cpu:
            most = densest(weight.numel())
            return most > 0 and (int(kept.count_nonzero()) / kept.numel() if density is None else density) <= most
        return density is None or 1 - (1 - density) ** rows <= GPU_DENSE

    def bias(self, down: nn.Module) -> Tensor | None:
        """The bias of the last matrix plus what dropped entries count as; computed again when weights have changed."""
        own: Tensor | None = down.bias  # type: ignore[assignment]
        mean = self.learned.mean
        if mean is None:
            return own
        weight = by_input(down)
        made_of = tuple((t.data_ptr(), t._version, t.dtype, t.device) for t in (weight, own) if t is not None)
        if self._folded[0] != made_of:
            with torch.no_grad():
                total = mean @ weight.to(mean.dtype)
                self._folded = made_of, (total if own is None else total + own).to(weight.dtype)
        return self._folded[1]


def _rows_of(weight: Tensor) -> Tensor:
    """``weight`` (F, D) with its rows, which are what is skipped, one behind the other in memory."""
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        raise RuntimeError(
            "a weight whose columns are skipped is no longer laid out for it, as after load_state_dict(assign=True): "
            "se.restore(model), then sparsify or accelerate it again"
        )
    return weight


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (rows, D) times weight (F, D)."""
    return functional.one_row(x, weight, bias) if x.shape[0] == 1 and x.is_cpu else F.linear(x, weight, bias)


class _SkipsWeights:
    """What both kinds share: the selection moves with the module, and the module can be copied and pickled."""

    _selection: Selection

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # type: ignore[misc]
        weight = next(self.parameters())  # type: ignore[attr-defined]
        self._selection.learned = self._selection.learned.to(weight.device)
        return self

    def __reduce_ex__(self, protocol):
        plain = type(self)._plain  # type: ignore[attr-defined]
        return _rebuilt, (type(self).__mro__[1], plain), self.__dict__

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]
        return f"{own}, skips by {self._selection.rule!r}".removeprefix(", ")


class GatedMLP(_SkipsWeights):
    """``down(act(gate(x)) * up(x))``, where what the gate drops is read neither of W_up nor of W_down."""

    def forward(self, x: Tensor) -> Tensor:
        state = self._selection
        if not state.is_on:
            return super().forward(x)  # type: ignore[misc]
        halves = state.halves
        assert halves is not None
        mlp: Any = self
        rows = x.reshape(-1, x.shape[-1])
        (gate, gate_bias), (up, up_bias) = halves.matrices(mlp)
        fires = halves.up is not None and _is_watched(getattr(mlp, halves.gate))
        a = halves.activated(mlp, getattr(mlp, halves.gate)(rows) if fires else _product(rows, gate, gate_bias))
        kept, mask = state.kept(a)
        linear = getattr(mlp, halves.down)
        down = by_input(linear)
        if state.skips(kept, down, rows, up, up_bias, linear.bias):
            out = functional.sparse_mlp(
                rows.to(kept.dtype), kept, up, _rows_of(down), up_bias, state.bias(linear), backend=state.backend
            )
            if mask is not None:  # a kept entry counts as itself, and no longer as the mean
                mean = torch.where(mask, -state.learned.mean, 0.0).to(kept.dtype)  # type: ignore[operator]
                out = out + functional.sparse_mlp(None, mean, None, down, backend=state.backend)
        elif state.rule.keeps_zeros_out:
            return super().forward(x)  # type: ignore[misc]
        else:
            h = kept * _product(rows, up, up_bias)
            if mask is not None:
                h = torch.where(mask, h, state.learned.mean.to(h.dtype))  # type: ignore[union-attr]
            out = linear(h)
        return out.view(*x.shape[:-1], out.shape[-1])


class SparseInput(_SkipsWeights):
    """A linear layer that does not read what the dropped entries of its input multiply."""

    def forward(self, x: Tensor) -> Tensor:
        state = self._selection
        if not state.is_on:
            return super().forward(x)  # type: ignore[misc]
        linear: Any = self
        rows = x.reshape(-1, x.shape[-1])
        kept, mask = state.kept(rows)
        weight = by_input(linear)
        if not state.skips(kept, weight, linear.bias):
            if state.rule.keeps_zeros_out:
                return super().forward(x)  # type: ignore[misc]
            if mask is not None:
                kept = torch.where(mask, kept, state.learned.mean.to(kept.dtype))  # type: ignore[union-attr]
            return super().forward(kept.view(x.shape))  # type: ignore[misc]
        if mask is not None:
            kept = torch.where(mask, kept - state.learned.mean.to(kept.dtype), 0.0)  # type: ignore[union-attr]
        if torch.is_autocast_enabled(kept.device.type):  # as it does with a linear layer
            kept = kept.to(torch.get_autocast_dtype(kept.device.type))
        out = functional.sparse_mlp(
            None, kept, None, _rows_of(weight), None, state.bias(linear), backend=state.backend
        )
        return out.view(*x.shape[:-1], out.shape[-1])


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


# --- swapping --------------------------------------------------------------------------------------------------------

_classes: dict[tuple[type, type], type] = {}


def _class_of(kind: type, plain: type) -> type:
    """A subclass of a module's own class, under its name."""
    if (kind, plain) not in _classes:
        names = {"_plain": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
        _classes[kind, plain] = type(plain.__name__, (kind, plain), names)
    return _classes[kind, plain]


def _rebuilt(kind: type, plain: type) -> nn.Module:
    """An object without attributes, which copy and pickle fill."""
    cls: Any = _class_of(kind, plain)
    return cls.__new__(cls)


def swap(found: Found, selection: Selection) -> None:
    """From now on the module skips weights. Nothing of it is copied but W_down, to another layout in its place; not
    where an optimizer is to step on it, whose fused kernels look at memory and not at strides."""
    down: Any = found.down
    if not selection.always_dense and by_input(down).stride(1) != 1:
        down.weight.data = down.weight.data.T.contiguous().T
        selection.restrided = True
    kind = GatedMLP if found.halves is not None else SparseInput
    module: Any = found.module
    module._selection = selection
    module.__class__ = _class_of(kind, type(module))


def unswap(module: nn.Module) -> None:
    """The module as it was, strides included."""
    selection: Any = module._selection
    down: Any = module if selection.halves is None else getattr(module, selection.halves.down)
    if selection.restrided:
        down.weight.data = down.weight.data.contiguous()
    module.__class__ = type(module)._plain  # type: ignore[attr-defined]
    del module._selection


def skipping(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that skip weights, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "_selection")}
