"""What tests and benchmarks share: inputs that are hard to select from, and error budgets that are derived."""
from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

HARD_KINDS = ("normal", "zeros", "ties", "negative", "special", "nan", "transposed")


def make_pre(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Tensor:
    """Pre-activations of one of ``HARD_KINDS`` on the default device, drawn on the CPU from a generator of their own.

    "ties" takes 5 values; "special" mixes NaN of both signs, +Inf, -Inf, -0 and numbers; "transposed" is normal with
    the last dimension not contiguous.
    """
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng, device="cpu")
    if kind == "zeros":
        x = torch.zeros_like(x)
    elif kind == "ties":
        x = torch.randint(-2, 3, shape, generator=rng, device="cpu").float()
    elif kind == "negative":
        x = -x.abs()
    elif kind == "special":
        draw = torch.rand(shape, generator=rng, device="cpu")
        for share, value in ((0.6, -torch.inf), (0.35, torch.inf), (0.25, -0.0), (0.2, torch.nan), (0.1, -torch.nan)):
            x = torch.where(draw < share, value, x)
    elif kind == "nan":
        x = torch.full_like(x, torch.nan)
    elif kind not in ("normal", "transposed"):
        raise ValueError(f"kind must be one of {HARD_KINDS}, got {kind!r}")
    x = x.to(dtype)
    if kind == "transposed" and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.to(torch.get_default_device())


class Allocated(NamedTuple):
    """Bytes of memory beyond what there was before a call."""

    peak: int  # at the worst moment
    kept: int  # afterwards


def allocated_by(call: Callable[[], object]) -> Allocated:
    """What ``call()`` allocates on the CPU, its result dropped: exact, from the record of torch's allocator.

    Temporaries inside operators count; what libraries such as MKL take from the system themselves does not, nor what
    Python objects take.
    """
    gc.collect()  # what others have left would be freed meanwhile, and count as memory that came back
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    assert profile.kineto_results is not None
    cpu = torch.autograd.DeviceType.CPU
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]" and e.device_type() == cpu]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return Allocated(peak, now)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and values, where NaN equals NaN and -0 equals +0."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def assert_same(actual, expected) -> None:
    """Two operations' outputs, tensors or tuples of them, agree bit for bit."""
    actual, expected = ((t,) if isinstance(t, Tensor) else t for t in (actual, expected))
    assert len(actual) == len(expected)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert same_bits(a, e), f"output {number}:\n{a}\nexpected\n{e}"


def assert_within_budget(actual: Tensor, truth: Tensor, honest: Tensor, *, rounding: torch.dtype | None = None) -> None:
    """``actual`` errs at most twice as much as an honest run in the tested dtype, plus one rounding of the output.

    Args:
        truth: the reference in fp64.
        honest: the reference in the tested dtype: the competitor whose error is the yardstick.
        rounding: the dtype whose epsilon is one rounding; default that of ``actual``.
    """
    assert actual.shape == truth.shape and actual.dtype == honest.dtype
    if actual.numel() == 0:
        return
    error, allowed = ((t.double() - truth).abs() for t in (actual, honest))
    assert error.isfinite().all()
    one_rounding = torch.finfo(rounding or actual.dtype).eps * truth.abs().max()
    for measure in (torch.max, torch.mean):
        budget = 2 * (measure(allowed) + one_rounding)
        assert measure(error) <= budget, f"{measure.__name__}: {measure(error):.3e} > {budget:.3e}"
