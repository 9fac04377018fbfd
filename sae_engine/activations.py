"""Activation modules: one selection rule each.

``forward(pre, **context)`` returns a dense tensor: a drop-in for ``nn.ReLU()`` and its like, for any leading
dimensions. ``select(pre, backend="auto", **context)`` returns :class:`SparseCodes`: what the engine itself uses.

A rule that needs more than the pre-activations names it in ``context_keys``; an autoencoder supplies it.
"""
from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import _checks as check
from . import functional
from ._backend import capturing
from .codes import SparseCodes

__all__ = [
    "AbsTopK", "Activation", "AuxTopK", "BatchTopK", "JumpReLU", "MutualChoice", "ReLU", "TopAFA", "TopK",
]


PER_TOKEN = frozenset({"target_norm", "attribution"})  # context with a row for each token; other context is per latent


def kept_values(self, pre: Tensor, codes: SparseCodes, **context) -> Tensor:
    """``entry_values`` of rules that keep the pre-activation: a stored 0 passes no gradient, as after a ReLU."""
    return torch.where(codes.values == 0, 0.0, pre)


def has_gate(rule: Activation) -> bool:
    """Whether the rule keeps pre-activations as they are and only stops the gradient at stored zeros."""
    return type(rule).entry_values is kept_values or (type(rule) is AuxTopK and rule.relu)


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

    ``scope`` names what competes: entries of a ``"row"`` (or no others), of the whole ``"batch"`` or of a ``"latent"``.
    For a batch that is worked through in chunks of rows, a rule of the latter kinds says in ``candidates(pre, tokens)``
    which entries of a chunk may be kept of a batch of ``tokens``, and in ``total(tokens)`` or
    ``latent_budgets(tokens)`` (F,) how many are: those with the largest values, ties to the lowest flat index.
    ``encoder_bias`` is False for rules under which an autoencoder's ``b_enc`` stays 0. ``settled`` is False while what
    the rule does may still change by a count of forwards, which a CUDA graph cannot follow.
    """

    context_keys: ClassVar[frozenset[str]] = frozenset()
    scope: str = "row"
    encoder_bias: ClassVar[bool] = True
    settled: bool = True
    entry_values: Callable[..., Tensor] | None = None
    candidates: Callable[..., SparseCodes] | None = None
    total: Callable[[int], int]
    latent_budgets: Callable[[int], Tensor]

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__module__.partition(".")[0] == __package__
        known = RULES.get(cls.__name__)
        if own or known is None or known.__module__.partition(".")[0] != __package__:
            RULES[cls.__name__] = cls  # checkpoints name rules: a user's is known once its module is imported
        if {"select", "_select"} & cls.__dict__.keys():  # what was said of the former selection no longer holds
            for name in {"entry_values", "candidates"} - cls.__dict__.keys():
                setattr(cls, name, None)

    def forward(self, pre: Tensor, **context) -> Tensor:
        """Dense activations with the shape and dtype of ``pre``."""
        self._check_context(context)
        return self._dense(pre, **context)

    def select(self, pre: Tensor, *, backend: str = "auto", **context) -> SparseCodes:
        """The same activations as codes."""
        self._check_context(context)
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
        for name in constructor_arguments(type(self)).keys() - {"device", "dtype", "group"}:
            if not hasattr(self, name):
                raise TypeError(f"{type(self).__name__} has no attribute {name}, which its constructor takes: it must "
                                "override options() to be saved")  # fmt: skip
            if not isinstance(value := getattr(self, name), Tensor):
                found[name] = value
        return dict(sorted(found.items()))

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


class ReLU(Activation):
    """Keeps what is positive. Codes of a NaN hold it, as ``nn.ReLU`` does."""

    entry_values = kept_values

    def needs(self) -> dict[str, str]:
        return {"sparsity": "a sparsity loss, such as losses.L1(coefficient)"}

    def _dense(self, pre: Tensor) -> Tensor:
        return torch.relu(pre)

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        return functional.threshold(pre, 0.0, capacity=_captured_size(pre), backend=backend)


class TopK(Activation):
    """k entries of each token, then ReLU. Gao et al. 2024, arXiv:2406.04093."""

    entry_values = kept_values

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = check.integer_k(k)

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        return functional.topk(pre, self.k, backend=backend)


class AbsTopK(TopK):
    """k entries of each token with the largest magnitude, sign kept. Zhu et al. 2025, arXiv:2510.00404."""

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        return functional.topk(pre, self.k, magnitude=True, backend=backend)

    def entry_values(self, pre: Tensor, codes: SparseCodes) -> Tensor:
        return pre  # signed: a kept 0 passes its gradient


class AuxTopK(Activation):
    """k entries of each token among dead latents: what AuxK reconstructs the residual with. Gao et al. 2024.

    Context: ``dead_mask`` (F,), True for dead latents. Where fewer than k are dead, others are stored at value 0 and
    get no gradient. ``relu=False`` keeps negative pre-activations too, as SAELens does.
    """

    context_keys = frozenset({"dead_mask"})

    def __init__(self, k: int, *, relu: bool = True) -> None:
        super().__init__()
        self.k = check.integer_k(k)
        self.relu = check.flag("relu", relu)

    def _select(self, pre: Tensor, backend: str, *, dead_mask: Tensor) -> SparseCodes:
        return functional.topk(pre, self.k, mask=dead_mask, relu=self.relu, backend=backend)

    def entry_values(self, pre: Tensor, codes: SparseCodes, *, dead_mask: Tensor) -> Tensor:
        if self.relu:
            return kept_values(self, pre, codes)
        return torch.where(dead_mask[codes.indices.long()], pre, 0.0)


class TopAFA(Activation):
    """As many entries of each token as bring the code's norm nearest to the input's. Lee et al. 2025, arXiv:2503.24277.

    Context: ``target_norm`` (*batch_shape,), the norm of the centred input; ``weight_norm`` (F,), the norms of the
    decoder rows. ``capacity`` as in :func:`functional.norm_match`. ``target_scale`` multiplies the target: below 1 it
    keeps fewer entries. The authors have no such factor; it is ours, as is :func:`init_sparse`, which starts sparse.
    """

    context_keys = frozenset({"target_norm", "weight_norm"})
    encoder_bias = False
    entry_values = kept_values

    def __init__(self, *, capacity: int | None = None, target_scale: float = 1.0) -> None:
        super().__init__()
        self.capacity = check.capacity_of(capacity)
        self.target_scale = check.positive("target_scale", target_scale)

    def _select(self, pre: Tensor, backend: str, *, target_norm: Tensor, weight_norm: Tensor) -> SparseCodes:
        capacity = _captured_size(pre) if self.capacity is None else self.capacity
        if self.target_scale != 1:
            target_norm = target_norm * self.target_scale
        return functional.norm_match(pre, target_norm, weight_norm=weight_norm, capacity=capacity, backend=backend)


class BatchTopK(Activation):
    """``int(k * tokens)`` entries of the batch in training, a learned threshold afterwards.

    In ``.train()`` each forward under grad moves ``threshold`` towards its smallest positive kept value: the first
    sets it, later ones move it by ``threshold_lr``. ``.eval()`` keeps ``pre > threshold``; before anything was
    learned that raises RuntimeError. The threshold is saved with the module, -1 while unset, and stays float64.
    Under activation checkpointing use ``use_reentrant=False``: the reentrant kind runs its forward without grad, which
    learns nothing.

    Args:
        k: average entries per token, int or float.
        threshold_lr: weight of the newest batch in the running mean, which lags about ``1 / threshold_lr`` forwards
            behind a cut that moves while the autoencoder learns. :func:`calibrate_threshold` finds it anew.
        threshold_start: training forwards that teach the threshold nothing.
        initial_threshold: where the mean starts; None: at the first batch's value, and unset until then.
        group: a ``torch.distributed`` process group to select over; see :func:`functional.batch_topk`. Shared by
            copies, left out of pickles.
        device: of the threshold; an autoencoder takes its rule along to its own.

    SAELens' convention is ``threshold_lr=0.01, initial_threshold=0.0``; dictionary_learning's is ``threshold_lr=0.001,
    threshold_start=1001`` (it learns once its step, counted from 0, exceeds 1000). After a few hundred forwards
    these still hold much of the first ones, and eval keeps a quarter fewer entries than k; hence our default. In all of
    them a batch that keeps nothing positive moves nothing.

    Bussmann et al. 2024, arXiv:2412.06410.
    """

    threshold: Tensor
    forwards: Tensor
    scope = "batch"
    entry_values = kept_values
    _exact: tuple[str, ...] = ("threshold",)  # buffers that no cast of the module touches

    def __init__(
        self, k: float, *, threshold_lr: float = 0.1, threshold_start: int = 0, initial_threshold: float | None = None,
        group=None, device=None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.k = check.number_k(k)
        self.threshold_lr = check.positive("threshold_lr", threshold_lr)
        if self.threshold_lr > 1:
            raise ValueError(f"threshold_lr must satisfy 0 < threshold_lr <= 1, got {threshold_lr}")
        self.threshold_start = check.count("threshold_start", threshold_start)
        if initial_threshold is not None:
            initial_threshold = check.from_zero("initial_threshold", initial_threshold)
        self.initial_threshold = initial_threshold
        self.group = group
        first = -1.0 if initial_threshold is None else float(initial_threshold)
        self.register_buffer("threshold", torch.full((), first, dtype=torch.float64, device=device))
        if threshold_start:
            self._count_forwards()
        self._seen: tuple[int, int] | None = None  # the threshold last read: eval waits for the device once

    def _count_forwards(self) -> None:
        self.register_buffer("forwards", torch.zeros_like(self.threshold))
        self._exact = (*self._exact, "forwards")

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        if self.training:
            return functional.batch_topk(pre, self.k, group=self.group, backend=backend)
        self._require_threshold()
        return functional.threshold(pre, self.threshold, capacity=_captured_size(pre), backend=backend)

    def total(self, tokens: int) -> int:
        """Entries kept of a training batch."""
        return int(self.k * tokens)

    def candidates(self, pre: Tensor, tokens: int, *, backend: str = "auto") -> SparseCodes:
        """Entries of a part of a training batch of ``tokens`` that may be among those kept of it."""
        if self.group is not None:
            raise RuntimeError("BatchTopK(group=...) needs each rank's batch whole: raise memory_budget")
        return functional.largest(pre, self.total(tokens), backend=backend)

    def _dense(self, pre: Tensor) -> Tensor:
        if self.training:
            return super()._dense(pre)
        self._require_threshold()
        return _above(pre, self.threshold)

    def update(self, codes: SparseCodes) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        with torch.no_grad():
            teaches = None
            if "forwards" in self._exact:
                functional.move_threshold(self.forwards, self.forwards + 1, 1.0)
                teaches = self.forwards > self.threshold_start
            self.move_thresholds(codes, self.threshold_lr, teaches)

    def move_thresholds(self, codes: SparseCodes, rate: float, teaches: Tensor | None = None) -> None:
        """Moves what is learned from a batch by ``rate`` towards what cut this one, unless ``teaches`` () is False."""
        values = codes.values.detach().double()
        smallest = torch.where(values > 0, values, torch.inf)
        smallest = smallest.min() if smallest.shape[0] else self.threshold.new_full((), torch.inf)
        if self.group is not None:
            torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN, group=self.group)
        if teaches is not None:
            smallest = torch.where(teaches, smallest, torch.inf)
        functional.move_threshold(self.threshold, smallest, rate)

    def _require_threshold(self) -> None:
        message = "threshold is unset: train first, load a trained module, or call .train() for the batch rule"
        if torch.compiler.is_compiling():
            torch._assert_async(self.threshold >= 0, message)
            return
        seen = None if self.threshold.is_inference() else (id(self.threshold), self.threshold._version)
        if seen is None or seen != self._seen:
            if capturing(self.threshold):  # where the host cannot ask: the replay does
                torch._assert_async(self.threshold >= 0, message)
                return
            if not bool(self.threshold >= 0):
                raise RuntimeError(message)
            self._seen = seen

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._seen = None  # a new tensor may have the old one's identity and version
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "group": None}  # a process group belongs to its process

    def __deepcopy__(self, memo: dict) -> BatchTopK:
        memo[id(self.group)] = self.group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _apply(self, fn, recurse: bool = True):
        return _apply_but(self._exact, self, super()._apply, fn, recurse)


class MutualChoice(BatchTopK):
    """Token-feature matches chosen under one budget for the batch: the selection rule of :class:`BatchTopK`.

    Ayonrinde 2024, arXiv:2411.02124.
    """


class JumpReLU(Activation):
    """Keeps what exceeds a threshold per latent. Rajamanoharan et al. 2024, arXiv:2407.14435.

    Args:
        d_sae: number of latents.
        threshold: initial value, >= 0. The parameter ``threshold`` (d_sae,) stays fp32 whatever the module's dtype.
        bandwidth: width of the rectangle that gives the threshold its gradient.
    """

    threshold: Tensor

    def __init__(self, d_sae: int, *, threshold: float = 0.01, bandwidth: float = 0.05, device=None) -> None:
        super().__init__()
        self.d_sae = check.integer_k(d_sae, name="d_sae")
        first = float(check.from_zero("threshold", threshold))
        self.bandwidth = check.positive("bandwidth", bandwidth)
        self.threshold = nn.Parameter(torch.full((self.d_sae,), first, dtype=torch.float32, device=device))

    def _learns(self) -> bool:
        return self.training and torch.is_grad_enabled() and self.threshold.requires_grad

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        bandwidth = self.bandwidth if self._learns() else None
        return functional.threshold(
            pre, self._theta(), bandwidth=bandwidth, capacity=_captured_size(pre), backend=backend
        )

    def needs(self) -> dict[str, str]:
        if not any(p.requires_grad for p in self.parameters()):
            return {}
        return {"sparsity": "a sparsity loss, such as losses.StepL0(coefficient) or losses.TanhL0(coefficient)"}

    def _theta(self) -> Tensor:
        """The threshold as it is used: an optimizer may have pushed it below 0."""
        return self.threshold.clamp(min=0)

    def entry_values(self, pre: Tensor, codes: SparseCodes) -> Tensor:
        values = kept_values(self, pre, codes)
        if not self._learns():
            return values
        # A term that is 0 and carries the rectangle estimator: d(value) = -(theta / bandwidth) d(theta) in the window.
        theta = functional.at_latents(self._theta(), codes)
        fixed = theta.detach()
        inside = (pre.detach() - fixed).abs() < self.bandwidth / 2
        slope = torch.where(inside, -fixed / self.bandwidth, 0.0)
        return values + (slope * (theta - fixed)).to(values.dtype)

    def _dense(self, pre: Tensor) -> Tensor:
        if self._learns():
            return super()._dense(pre)
        if pre.shape[-1] != self.d_sae:
            raise ValueError(f"pre must have {self.d_sae} latents (the length of threshold), got {tuple(pre.shape)}")
        return _above(pre, self._theta())

    def _apply(self, fn, recurse: bool = True):
        return _apply_but(("threshold",), self, super()._apply, fn, recurse)


def _above(pre: Tensor, theta: Tensor) -> Tensor:
    """pre where it exceeds theta (compared as :func:`functional.threshold` does) or is NaN, else 0."""
    check.floating("pre", pre)
    theta = functional._theta(theta.detach(), pre)
    return torch.where((pre > theta) | pre.isnan(), pre, 0.0)


def _captured_size(pre: Tensor) -> int | None:
    """Room for every entry while a CUDA graph is captured, where the host cannot ask how many there are."""
    return pre.numel() if capturing(pre) else None


def _apply_but(names: Sequence[str], module: nn.Module, apply, fn, recurse: bool) -> nn.Module:
    """``Module._apply`` that moves the named buffers and parameters between devices and leaves their dtypes alone."""
    exact = {name: getattr(module, name).detach().clone() for name in names}
    apply(fn, recurse)
    for name, tensor in exact.items():
        moved = getattr(module, name)
        if moved.dtype != tensor.dtype:
            moved.data = tensor.to(moved.device)
            if moved.grad is not None:
                moved.grad.data = moved.grad.to(tensor.dtype)
    return module
