"""Launches that are prepared once, since a call's Python can take longer than its kernels.

A launcher has two parts. Its plan is a function of layouts and numbers: it chooses groups, tiles and flags, and makes a
:class:`Launch` of each kernel. :func:`planned` keeps what it returns, for every layout that it has met. What is left of
a call is to allocate, and to hand each launch its tensors.
"""
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.driver import driver

from . import _autotune, _tuning
from ._device import at_most

PLANS_KEPT = 1024  # of each launcher; batches whose number of tokens always differs cost no more memory than this


class Layout(NamedTuple):
    """What kernels are told of a tensor beside its address."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def layout(tensor: torch.Tensor | None) -> Layout | None:
    return None if tensor is None else Layout(tensor.shape, tensor.stride(), tensor.dtype)


def mask_layout(mask: torch.Tensor | None, matrix: torch.Tensor) -> Layout | None:
    """Of a mask (F,) or (B, F) as it lies over ``matrix`` (B, F)."""
    return None if mask is None else layout(mask.expand(matrix.shape))


def with_unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """Itself where its rows are contiguous, else a copy: for kernels that take one stride of a matrix."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


_NO_STRIDES = 0, 0


def strides_of(some: Layout | None) -> tuple[int, ...]:
    """Those of a matrix, zeros where there is none."""
    return _NO_STRIDES if some is None else some.strides


_forget: list[Callable[[], None]] = []


def planned(build: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a plan: a function of hashable arguments alone, built once for each of them.

    Configurations from a table belong to its session; while a search tries one after the other nothing is kept.
    """
    kept = functools.lru_cache(PLANS_KEPT)(lambda session, *args: build(*args))
    _forget.append(kept.cache_clear)

    @functools.wraps(build)
    def plan(*args: Any) -> Any:
        session = _autotune.settled_session()
        return build(*args) if session is None else kept(session, *args)

    return plan


def forget_plans() -> None:
    """For tests that change what plans follow from."""
    for forget in _forget:
        forget()


class Launch:
    """A kernel, its grid, and all arguments that follow its pointers; called with the pointers, in the kernel's order.

    Triton finds the binary for its arguments at every launch, which takes most of a launch's time. Here it is asked
    once for each combination of what may still differ from call to call (:func:`_specialized`) and each device. The
    binary that it has found is launched directly from then on, with all of the kernel's arguments.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], *, warps: int, most_registers: int | None = None, **following: Any
    ) -> None:
        self.kernel, self.grid, self.following = kernel, grid, following
        self.options, self.most_registers = _tuning.options(warps), most_registers
        # An interpreted kernel has no binaries, nor parameters that would say so.
        self._unspecialized = tuple(p.do_not_specialize for p in getattr(kernel, "params", ()))
        self._binaries: dict[tuple, Any] = {}
        self._in_order: tuple = ()

    def __call__(self, *pointers: Any, grid: tuple[int, ...] | None = None) -> None:
        """Numbers that differ from call to call may end the pointers. ``grid``: where it does; no binary knows it."""
        grid = self.grid if grid is None else grid
        if not isinstance(self.kernel, triton.JITFunction):  # interpreted: there are no binaries
            self.kernel[grid](*pointers, **self.following, **self.options)
            return
        active = driver.active
        key = active, active.get_current_device(), *map(_specialized, pointers, self._unspecialized)
        binary = self._binaries.get(key)
        if binary is not None:
            binary[(*grid, 1, 1)[:3]](*pointers, *self._in_order)
            return
        limit = {} if self.most_registers is None else at_most(self.most_registers)
        binary = self.kernel[grid](*pointers, **self.following, **self.options, **limit)
        # AMD's binaries also depend on whether a tensor has less than 2 GiB; None: it was compiled, not launched.
        if binary is not None and active.get_current_target().backend == "cuda":
            self._in_order = tuple(self.following[name] for name in self.kernel.arg_names[len(pointers) :])
            self._binaries[key] = binary


def _specialized(argument: Any, unspecialized: bool) -> Any:
    """What a binary of Triton's depends on: of tensors dtype and alignment; of integers 1, multiples of 16, width.

    Of an integer that the kernel asks not to be specialized for, the width alone.
    """
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return unspecialized or (argument == 1, argument % 16 == 0), -(2**31) <= argument < 2**31
    if isinstance(argument, tuple):
        return tuple(_specialized(one, unspecialized) for one in argument)
    return type(argument)
