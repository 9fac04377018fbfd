"""Which implementation of an operation runs, and how it is called. Imports torch only.

Every operator's last argument names the back end: ``"auto"`` (CUDA: Triton, otherwise torch), ``"triton"``, ``"torch"``
or ``"reference"``. It is resolved here and nowhere else, by the tensors that the operation gets: asked for explicitly a
back end runs or raises, and never falls back. An implementation is imported when it is first called, which is why a
machine without Triton can import this file.
"""
import functools
import importlib
import importlib.util
import os
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled, forward_ad

from .device import _autotune
from .operations import Operation
from .stock import densified

BACKENDS = ("triton", "torch", "reference")

_C: Any = torch._C  # its stubs lack some of what is asked here

# --- the back end ----------------------------------------------------------------------------------------------------


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported here; nothing is imported to find out."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a blocked module
        return False


def interprets_triton() -> bool:
    """Whether Triton runs its kernels on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("0", "", "off", "false")


def resolve(backend: str, *tensors: Tensor | None) -> str:
    """The back end's name for an operation on ``tensors``.

    ``"auto"`` is ``SAE_BACKEND`` where that is set, otherwise Triton for CUDA tensors (not where one is fp64, which
    Triton does not take) and torch for all others.

    Raises:
        ValueError: ``backend`` is unknown.
        RuntimeError: Triton was asked for and cannot run on the tensors.
        TypeError: Triton was asked for and one of the tensors is fp64.
    """
    if backend == "auto":
        backend = os.environ.get("SAE_BACKEND") or "auto"
    if backend in ("torch", "reference"):
        return backend
    present = [t for t in tensors if t is not None]
    is_wide = any(t.dtype == torch.float64 for t in present)
    if backend == "auto":
        return "triton" if present[0].is_cuda and not is_wide and has_triton() else "torch"
    if backend != "triton":
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    if not has_triton():
        raise RuntimeError('backend="triton" needs the package triton, which is not installed')
    if not (present[0].is_cuda or interprets_triton()):
        raise RuntimeError(
            f'backend="triton" needs a CUDA tensor, got one on {present[0].device}; '
            "set TRITON_INTERPRET=1 before triton is imported to run its kernels on a CPU (slowly)"
        )
    if is_wide:
        raise TypeError('backend="triton" takes float32, bfloat16 and float16, got float64: use backend="torch"')
    return backend


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured that operations on ``tensor`` go into: the host cannot read it then."""
    if torch.compiler.is_compiling():  # what is traced runs later, and a size that is decided then is in no graph
        return False
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


# --- the implementation ----------------------------------------------------------------------------------------------


@functools.cache
def _implementation(name: str, launcher: str, backend: str) -> Callable:
    stem, function = launcher.split(".")
    if backend == "triton":
        return getattr(importlib.import_module(f".device.{stem}", __package__), function)
    if backend == "torch":
        return getattr(importlib.import_module(f".stock.{stem}", __package__), name)
    return getattr(importlib.import_module(".reference", __package__), name)


def _tensors(args: tuple) -> Iterator[Tensor]:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, list):
            yield from (t for t in a if isinstance(t, Tensor))


def dispatch(operation: Operation, *args):
    """Calls the implementation of ``operation`` by the back end that the last argument names."""
    first = next(_tensors(args))
    kind = first.device.type
    if torch.is_autocast_enabled(kind):  # dtypes were decided by the caller; a GEMM in here must not decide anew
        with torch.autocast(kind, enabled=False):
            return dispatch(operation, *args)
    inputs = args[:-1]
    backend = resolve(args[-1], *_tensors(inputs))
    if operation.packed_vectors:
        inputs = tuple(a.contiguous() if isinstance(a, Tensor) and a.dim() == 1 else a for a in inputs)
    if backend != "reference" and densified.pays(operation.name, inputs):
        return getattr(densified, operation.name)(*inputs)
    run = _implementation(operation.name, operation.launcher, backend)
    if backend != "triton":
        return run(*inputs)
    if _autotune.is_on():
        run = functools.partial(_autotune.run, operation.launcher, run)
    if first.is_cuda and first.get_device() != torch.cuda.current_device():  # on which Triton launches
        with torch.cuda.device_of(first):
            return run(*inputs)
    return run(*inputs)


# --- the call --------------------------------------------------------------------------------------------------------

# A call through ``torch.ops`` packs its arguments twice and asks a Python autograd kernel: about 40 µs, a good part of
# what decoding a small batch takes. An eager call that needs no gradient gets nothing for that, and goes straight to
# the registered function. Compilers, profilers, modes, subclasses and gradients see the operator; ``torch.func`` sees
# plain PyTorch (``reference.py``).

NO_TORCHSCRIPT = "{} cannot take {}, whose sizes follow the batch and the data: use torch.export or torch.compile"

PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def transforming() -> bool:
    """Whether a transform of ``torch.func``, or forward-mode AD, looks into what runs now."""
    return _C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# torch.compile, left to trace it, takes the empty stack for one. torch.compiler.assume_constant_result sets just this,
# and imports the compiler.
transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_observed() -> bool:
    """Whether somebody watches the operators that run now."""
    return (
        _C._len_torch_dispatch_stack() > 0
        or _C._len_torch_function_stack() > 0
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


def _recordable(args: tuple) -> tuple:
    """The arguments, with copies of those that inference mode made where autograd will keep them."""
    if not torch.is_grad_enabled():
        return args
    return tuple(a.clone() if isinstance(a, Tensor) and a.is_inference() else a for a in args)


def _straight(operator, implementation: Callable, plain: Callable) -> Callable:
    def call(*args):
        if transforming():
            return plain(*args)
        if torch.compiler.is_compiling():
            return operator(*args)
        if not _goes_straight(args):
            if _C._get_tracing_state() is not None:
                raise RuntimeError(NO_TORCHSCRIPT.format("torch.jit.trace", operator))
            return operator(*_recordable(args))
        with _C._AutoDispatchBelowAutograd():  # as the dispatcher calls it
            return implementation(*args)

    call.__dict__["default"] = operator  # as torch.ops names it
    return call


class Operators(types.SimpleNamespace):
    """``torch.ops.sae_engine``, whose functional operators take the short way where it is open."""

    def add(self, name: str, implementation: Callable, plain: Callable | None) -> None:
        operator = getattr(torch.ops.sae_engine, name)
        short = _straight(operator.default, implementation, plain or operator)
        setattr(self, name, operator if operator.default._schema.is_mutable else short)


library = torch.library.Library("sae_engine", "DEF")
ops = Operators()
IMPLEMENTED: dict[str, Callable] = {}  # what an operation runs, by name, for who wants to look into it


def implement(name: str, run: Callable, plain: Callable | None = None) -> None:
    """Registers what an operation does, on every device.

    ``plain`` does the same in functions that ``torch.func`` and forward-mode AD know, and runs in its place inside
    their transforms. Without it the operator itself does, which no gradient may be asked of there.
    """
    IMPLEMENTED[name] = run
    library.impl(name, run, "CompositeExplicitAutograd")
    ops.add(name, run, plain)
