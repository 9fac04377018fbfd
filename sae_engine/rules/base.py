"""Activation modules: one selection rule each.

``forward(pre, **context)`` returns a dense tensor: a drop-in for ``nn.ReLU()`` and its like, for any leading
dimensions. ``select(pre, backend="auto", **context)`` returns :class:`SparseCodes`: what the engine itself uses.

A rule that needs more than the pre-activations names it in ``context_keys``; an autoencoder supplies it.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sae_kernels.dispatch import capturing

from .. import _checks as check
from .._running import Running
from .._window import RunningWindow
from ..codes import SparseCodes

if TYPE_CHECKING:
    from ..distributed.shards import Shards


def kept_values(self, pre: Tensor, codes: SparseCodes, **context) -> Tensor:
    """``entry_values`` of rules that keep the pre-activation: a stored 0 passes no gradient, as after a ReLU."""
    return torch.where(codes.values == 0, 0.0, pre)


OURS = __name__.partition(".")[0]
RULES: dict[str, type[Activation]] = {}  # by the names under which checkpoints know them


def constructor_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments by name, those of base classes included where a constructor hands options on."""
    named: dict[str, inspect.Parameter] = {}
    for kind in cls.__mro__:
        if (init := kind.__dict__.get("__init__")) is None:
            continue
        arguments = [p for p in inspect.signature(init).parameters.values() if p.name != "self"]
        new = [p for p in arguments if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in named]
        named |= {p.name: p for p in new}
        if all(p.kind is not p.VAR_KEYWORD for p in arguments):
            break
    return named


class Activation(nn.Module):
    """A selection rule. Subclasses implement :meth:`_select`, and :meth:`_dense` where no codes are needed for it.

    A rule may also say how ``codes.values`` follow from the pre-activations ``pre`` (N,) at the kept entries, in
    ``entry_values(pre, codes, **context)``; the encoder's gradient is then sparse (:func:`functional.encode`). A
    subclass that changes what ``_select`` stores has to say so anew.

    ``scope`` names what competes: entries of a ``"row"`` (or no others), of a ``"token"`` over all sources of a
    crosscoder, whose number is then an attribute ``sources``, of the whole ``"batch"`` or of a ``"latent"``.
    Where the pre-activations of a batch exceed the memory that they may take, they pass by in rectangles. What the rule
    keeps of them is then up to ``running(tokens, num_latents, backend=..., **context)``, which returns a
    :class:`Running`. Without that method a rule of scope "row" is given all latents of some tokens at a time, and any
    other rule needs the whole batch at once, or is refused.
    Where latents are cut over a mesh, ``shards`` is there, and ``select`` is given the pre-activations of a rank's own
    latents, for the tokens of all ranks. A rule that then keeps what one device would says so by
    ``selects_over_shards = True``: one whose latents do not compete, or whose ``running`` or ``_select`` heeds
    ``shards``.
    ``encoder_bias`` is False for rules under which an autoencoder's ``b_enc`` stays 0. ``settled`` is False while what
    the rule does may still change by a count of forwards, which a CUDA graph cannot follow.

    Raises:
        TypeError: a call lacks something of ``context_keys``, or gives something else.

    Example:
        >>> class Largest(Activation):
        ...     def _select(self, pre, backend):
        ...         return se.functional.topk(pre, 1, backend=backend)
        >>> Largest()(torch.tensor([[1.0, 3.0, 2.0]]))
        tensor([[0., 3., 0.]])
        >>> se.SparseAutoencoder(4, 16, Largest()).encode(torch.ones(2, 4)).k
        1
    """

    context_keys: ClassVar[frozenset[str]] = frozenset()
    scope: str = "row"
    encoder_bias: ClassVar[bool] = True
    settled: bool = True
    selects_over_shards: ClassVar[bool] = False
    shards: Shards | None = None
    among: int = 1  # with ``shards``: how many sources' latents compete, whose tokens then lie below one another
    entry_values: Callable[..., Tensor] | None = None
    running: Callable[..., Running] | None = None
    running_apart: Callable[..., RunningWindow] | None = None  # in place of ``running``, in a training step

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__module__.partition(".")[0] == OURS
        known = RULES.get(cls.__name__)
        if own or known is None or known.__module__.partition(".")[0] != OURS:
            RULES[cls.__name__] = cls  # checkpoints name rules: a user's is known once its module is imported
        if {"select", "_select"} & cls.__dict__.keys():  # what the base class says of its own selection does not hold
            for name in {"entry_values", "running"} - cls.__dict__.keys():
                setattr(cls, name, None)
            cls.selects_over_shards = cls.__dict__.get("selects_over_shards", False)
        if {"select", "_select", "entry_values", "running"} & cls.__dict__.keys():
            cls.running_apart = cls.__dict__.get("running_apart")

    def forward(self, pre: Tensor, **context) -> Tensor:
        """Dense activations with the shape and dtype of ``pre``."""
        self._check_context(context)
        return self._dense(pre, **context)

    def select(self, pre: Tensor, *, backend: str = "auto", **context) -> SparseCodes:
        """The same activations as codes."""
        self._check_context(context)
        if self.shards is not None and self.running is not None:
            rows, latents = check.matrix(pre), slice(0, pre.shape[-1])
            running = self.running(len(rows), pre.shape[-1], backend=backend, **context)
            if running is not None:
                running.add(rows, slice(0, len(rows)), latents)
                return running.finish()[0]
        return self._select(pre, backend, **context)

    def _select(self, pre: Tensor, backend: str, **context) -> SparseCodes:
        raise TypeError(f"{type(self).__name__} must define _select")

    def _dense(self, pre: Tensor, **context) -> Tensor:
        codes = self._select(pre, "auto", **context)
        codes.assert_fits()
        self.update(codes)
        return codes.to_dense()

    def update(self, codes: SparseCodes) -> None:
        """Called once per training forward with what was kept; rules with learned state override it."""

    def options(self) -> dict[str, Any]:
        """The constructor's arguments as they are now, by name, for checkpoints: whatever is neither tensor nor place.

        A rule whose attributes are not named as the arguments overrides it.
        """
        found = {}
        for name in constructor_arguments(type(self)).keys() - {"device", "dtype"}:
            if not hasattr(self, name):
                raise TypeError(f"{type(self).__name__} has no attribute {name}, which its constructor takes: it must "
                                "override options() to be saved")  # fmt: skip
            if not isinstance(value := getattr(self, name), Tensor):
                found[name] = value
        return dict(sorted(found.items()))

    __prepare_scriptable__ = check.no_torchscript

    def extra_repr(self) -> str:
        """The options of the constructor, without those at their default. Reads no tensor."""
        try:
            options, known = self.options(), constructor_arguments(type(self))
        except TypeError:  # a rule that cannot be saved
            return ""
        named = [name for name in known if name in options] + [name for name in options if name not in known]
        shown = {name: repr(options[name]) for name in named}
        return ", ".join(f"{name}={text}" for name, text in shown.items()
                         if name not in known or text != repr(known[name].default))  # fmt: skip

    @property
    def has_gate(self) -> bool:
        """Whether the rule keeps pre-activations as they are and only stops the gradient at stored zeros."""
        return type(self).entry_values is kept_values

    @property
    def needs_entries(self) -> bool:
        """Whether its gradient asks for the pre-activations at the kept entries beside their values."""
        return self.entry_values is not None and not self.has_gate

    def needs(self) -> dict[str, str]:
        """What the reconstruction error alone does not teach the rule: the kind of loss, and which ones it is.

        ``losses.losses_for`` refuses to train without (see ``Loss.provides``).
        """
        return {}

    def learned_parameters(self) -> list[nn.Parameter]:
        """The parameters that a gradient of the values reaches; they may be another module's."""
        return list(self.parameters())

    def _check_context(self, context: dict) -> None:
        # Methods, not operators: torch.compile of torch 2.11 and older has none between a frozenset and a dict's keys.
        for name in self.context_keys.difference(context):
            raise TypeError(f"{type(self).__name__} needs {name}: pass it as a keyword argument")
        for name in frozenset(context).difference(self.context_keys):
            raise TypeError(f"{type(self).__name__} takes no {name}; its context is {sorted(self.context_keys)}")


def above(pre: Tensor, theta: Tensor) -> Tensor:
    """pre where it exceeds theta (compared as :func:`functional.threshold` does) or is NaN, else 0."""
    check.floating("pre", pre)
    theta = check.theta(theta.detach(), pre, pre.shape[-1])
    return torch.where((pre > theta) | pre.isnan(), pre, 0.0)


def captured_size(pre: Tensor) -> int | None:
    """The ``capacity`` with which a rule that keeps an unknown number of entries can be captured in a CUDA graph.

    Room for every entry while ``pre`` is captured, where the host cannot ask how many there are; else None: the size
    follows the data.

    Example:
        >>> captured_size(torch.ones(2, 3)) is None
        True
    """
    return pre.numel() if capturing(pre) else None


def apply_but(names: Sequence[str], module: nn.Module, apply, fn, recurse: bool) -> nn.Module:
    """``Module._apply`` that moves the named buffers and parameters between devices and leaves their dtypes alone."""
    exact = {name: getattr(module, name).detach().clone() for name in names}
    apply(fn, recurse)
    for name, tensor in exact.items():
        moved = getattr(module, name)
        if moved.dtype == tensor.dtype:
            continue
        grad = None if moved.grad is None else moved.grad.to(tensor.dtype)
        if hasattr(moved, "placements"):  # .data does not set those of a DTensor
            kept = tensor.to(moved.device)
            is_buffer = name in module._buffers
            torch.utils.swap_tensors(moved, kept if is_buffer else nn.Parameter(kept, moved.requires_grad))
        else:
            moved.data = tensor.to(moved.device)
        moved.grad = grad
    return module
