"""What every contract is written with: the library, dispatch by back end, gradients. Imports torch only.

An operation lives once in ``torch.library`` under ``sae_engine::``; its last argument names the back end, so the
choice is visible to the compiler and never guessed from the device. The implementation is imported when it is
first called, which is why a machine without Triton can import this file. ``reference.py`` says what each means.
"""
import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from . import densified
from ._direct import Operators
from .device import _autotune

BACKENDS = ("triton", "torch", "reference")

library = torch.library.Library("sae_engine", "DEF")
ops = Operators()


@functools.cache
def _implementation(name: str, launcher: str, backend: str):
    stem, function = launcher.split(".")
    if backend == "triton":
        return getattr(importlib.import_module(f".device.{stem}", __package__), function)
    if backend == "torch":
        return getattr(importlib.import_module(f".stock.{stem}", __package__), name)
    return getattr(importlib.import_module(".reference", __package__), name)


def is_dense(name: str, args: tuple) -> bool:
    """Whether an operation on codes does better as a GEMM: decided by shapes alone, hence alike on every run."""
    if name in ("decode", "decode_error"):
        values, _, offsets, weight = args[:4]
        name, multiplied = "decode", (values, weight)
        rows, columns = offsets.numel() - 1, weight.shape[0]
    elif name == "decode_backward_values":
        grad, values, _, _, weight = args[:5]
        multiplied = grad, weight
        rows, columns = grad.shape[0], weight.shape[0]
    elif name == "decode_backward_weight":
        grad, values, latent_offsets = args[:3]
        multiplied = grad, values
        rows, columns = grad.shape[0], latent_offsets.numel() - 1
    else:
        return False
    return densified.is_dense(name, values.numel(), rows, columns, values.device.type, *(t.dtype for t in multiplied))


# Their kernels take the arrays of a code's entries without strides.
ON_ENTRIES = {
    "decode", "decode_error", "decode_backward_values", "decode_backward_weight", "to_dense", "gather", "by_latent",
}  # fmt: skip


def dispatch(name: str, launcher: str, *args):
    """Calls the implementation of ``name`` by the back end that the last argument names."""
    first = args[0][0] if isinstance(args[0], list) else args[0]
    kind = first.device.type
    if torch.is_autocast_enabled(kind):  # dtypes were decided by the caller; a GEMM in here must not decide anew
        with torch.autocast(kind, enabled=False):
            return dispatch(name, launcher, *args)
    backend, inputs = args[-1], args[:-1]
    if name in ON_ENTRIES:
        inputs = tuple(a.contiguous() if isinstance(a, Tensor) and a.dim() == 1 else a for a in inputs)
    if backend != "reference" and is_dense(name, inputs):
        return getattr(densified, name)(*inputs)
    run = _implementation(name, launcher, backend)
    if backend != "triton":
        return run(*inputs)
    if _autotune.is_on():
        run = functools.partial(_autotune.run, launcher, run)
    if first.is_cuda and first.get_device() != torch.cuda.current_device():  # on which Triton launches
        with torch.cuda.device_of(first):
            return run(*inputs)
    return run(*inputs)


IMPLEMENTED: dict[str, Callable] = {}  # what an operation runs, by name, for who wants to look into it


def implement(name: str, run: Callable) -> None:
    """Registers what an operation does, on every device."""
    IMPLEMENTED[name] = run
    library.impl(name, run, "CompositeExplicitAutograd")
    ops.add(name, run)


def define(signature: str, launcher: str):
    """Registers ``signature`` (its `str backend` is appended) and returns the decorator for its fake."""
    name, arguments = signature.split("(", 1)
    library.define(f"{name}({arguments.replace(') ->', ', str backend) ->', 1)}")
    implement(name, functools.partial(dispatch, name, launcher))
    return torch.library.register_fake(f"sae_engine::{name}", lib=library)


def differentiable(name: str, setup_context, backward) -> None:
    """Registers the gradient of an operation."""
    torch.library.register_autograd(f"sae_engine::{name}", backward, setup_context=setup_context, lib=library)


def not_differentiable(name: str, why: str) -> None:
    """Differentiating the operation raises, where it would otherwise return zeros."""

    def backward(ctx, *grads):
        raise RuntimeError(f"sae_engine::{name} {why}")

    differentiable(name, lambda ctx, inputs, output: None, backward)


def once_differentiable(name: str) -> None:
    """Refuses to differentiate a gradient again."""
    not_differentiable(name, "is itself a gradient and cannot be differentiated again")


def stored_entries(count: int | None):
    """The number of entries that a data-dependent rule stores: its capacity, or unknown until it has run."""
    return torch.library.get_ctx().new_dynamic_size() if count is None else count


def empty_rows(pre: Tensor, count):
    """Values, indices and offsets of compressed rows of ``pre`` (B, F) with ``count`` entries, for fakes."""
    indices = pre.new_empty(count, dtype=torch.int32)
    return pre.new_empty(count), indices, pre.new_empty(pre.shape[0] + 1, dtype=torch.int64)


def uniform_offsets(rows: int, k: int, device: torch.device) -> Tensor:
    """Offsets (rows + 1,) of rows that hold ``k`` entries each."""
    if k == 0:
        return torch.zeros(rows + 1, dtype=torch.int64, device=device)
    return torch.arange(0, rows * k + 1, k, dtype=torch.int64, device=device)


def sum_by_latent(entries, by_latent, rows, dtype, backend):
    """(F,) sums of ``entries`` (N,) over each latent's entries, in a fixed order: index_put's order varies."""
    ones = entries.new_ones(rows, 1)
    return ops.decode_backward_weight(ones, entries, *by_latent, dtype, backend)[:, 0]
