"""The operators as our own code calls them: past PyTorch's dispatcher where nobody there has to see the call.

A call through ``torch.ops`` packs its arguments twice and asks a Python autograd kernel: about 40 µs, a good part of
what decoding a small batch takes. An eager call that needs no gradient gets nothing for that, and goes straight to the
registered function. Compilers, profilers, modes, transforms (``vmap``), subclasses and gradients see the operator.
"""
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled

_C: Any = torch._C  # its stubs lack some of what is asked here

PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _is_observed() -> bool:
    """Whether somebody watches or transforms the operators that run now."""
    return (
        _C._len_torch_dispatch_stack() > 0
        or _C._len_torch_function_stack() > 0
        or _C._functorch.peek_interpreter_stack() is not None
        or _C._get_tracing_state() is not None
        or _profiler_enabled()
    )


def _goes_straight(args: tuple) -> bool:
    """Whether an eager call with these arguments may leave the dispatcher out."""
    for a in args:
        kind = type(a)
        if kind is list or (kind not in PLAIN and isinstance(a, Tensor)):  # lists hold tensors, subclasses their rules
            return False
        if kind in PLAIN and a.is_meta:
            return False
    return not (_is_observed() or (torch.is_grad_enabled() and _C._any_requires_grad(*args)))


def _straight(operator, implementation: Callable) -> Callable:
    def call(*args):
        if torch.compiler.is_compiling() or not _goes_straight(args):
            return operator(*args)
        with _C._AutoDispatchBelowAutograd():  # as the dispatcher calls it
            return implementation(*args)

    call.__dict__["default"] = operator  # as torch.ops names it
    return call


class Operators(types.SimpleNamespace):
    """``torch.ops.sae_engine``, whose functional operators take the short way where it is open."""

    def add(self, name: str, implementation: Callable) -> None:
        operator = getattr(torch.ops.sae_engine, name)
        writes = operator.default._schema.is_mutable
        setattr(self, name, operator if writes else _straight(operator.default, implementation))
