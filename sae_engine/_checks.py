"""Argument checks. Shapes, dtypes and host values always; values inside device tensors under ``SAE_CHECK=1``."""
import os
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from sae_kernels.dispatch import NO_TORCHSCRIPT

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def deep() -> bool:
    """Whether checks that read device tensors are on."""
    return os.environ.get("SAE_CHECK", "0") not in ("0", "") and not torch.compiler.is_compiling()


def integer_in(value) -> int | None:
    """The int that ``value`` is, also where NumPy made it; None where it is none, as a boolean."""
    if isinstance(value, int):  # first: torch.compile follows this, and no abstract class
        return None if isinstance(value, bool) else value
    return int(value) if isinstance(value, Integral) else None


def number_in(value) -> int | float | None:
    """The int or float that ``value`` is, also where NumPy made it; None where it is none, as a boolean."""
    if isinstance(value, float):
        return float(value)  # NumPy's float64 is one, and would be written as such
    if (integer := integer_in(value)) is not None or isinstance(value, bool) or not isinstance(value, Real):
        return integer
    return float(value)


def no_torchscript(module) -> None:
    """As a module's ``__prepare_scriptable__``: refuses ``torch.jit.script`` before it reads any source."""
    raise RuntimeError(NO_TORCHSCRIPT.format("torch.jit.script", type(module).__name__))


def floating(name: str, t: Tensor, *, dims: int | None = None) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}")
    if dims is None and t.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar")
    if dims is not None and t.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimension(s), got shape {tuple(t.shape)}")
    return t


def pre_activations(pre: Tensor) -> Tensor:
    """(*batch_shape, F) with at least one latent."""
    floating("pre", pre)
    if pre.shape[-1] == 0:
        raise ValueError(f"pre must have at least one latent in its last dimension, got shape {tuple(pre.shape)}")
    return pre


def shaped(name: str, t: Tensor, shape: tuple[int, ...], like: Tensor, *, why: str) -> Tensor:
    """``t`` has exactly this shape and lives where ``like`` does."""
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)} ({why}), got {tuple(t.shape)}")
    return same_device(name, t, like)


def same_device(name: str, t: Tensor, like: Tensor) -> Tensor:
    if t.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {t.device}")
    return t


def _integer(name: str, value) -> int:
    if (number := integer_in(value)) is None:
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    return number


def integer_k(k, num_latents: int | None = None, name: str = "k") -> int:
    """An int with 1 <= k (<= F where that is known)."""
    number = _integer(name, k)
    if number < 1 or (num_latents is not None and number > num_latents):
        upper = "" if num_latents is None else f" <= {num_latents} (the number of latents)"
        raise ValueError(f"{name} must satisfy 1 <= {name}{upper}, got {k}")
    return number


def number_k(k, num_latents: int | None = None, name: str = "k") -> float:
    """An int or float with 0 < k (<= F where that is known): latents per token on average."""
    if (number := number_in(k)) is None:
        raise TypeError(f"{name} must be an int or a float, got {k!r} of type {type(k).__name__}")
    if not 0 < number < float("inf") or (num_latents is not None and number > num_latents):
        upper = "" if num_latents is None else f" <= {num_latents} (the number of latents)"
        raise ValueError(f"{name} must satisfy 0 < {name}{upper}, got {k}")
    return number


def budgets(m, total, pre: Tensor) -> tuple[Tensor, int]:
    """Tokens per latent of ``pre`` (rows, F) as (F,) int32, and their sum."""
    rows, num_latents = pre.shape
    if not isinstance(m, Tensor):
        m, given = integer_in(m), m
        if m is None:
            raise TypeError(f"m must be an int or a tensor of integers, got {given!r} of type {type(given).__name__}")
    if total is not None:
        total = _integer("total", total)
    if not isinstance(m, Tensor):
        if not 0 <= m <= rows:
            raise ValueError(f"m must satisfy 0 <= m <= {rows} (the number of tokens), got {m}")
        if total not in (None, m * num_latents):
            raise ValueError(f"total must be the sum of m, {m * num_latents}, got {total}")
        return torch.full((num_latents,), m, dtype=torch.int32, device=pre.device), m * num_latents
    if m.is_floating_point() or m.is_complex() or m.dtype == torch.bool:
        raise TypeError(f"m must be a tensor of integers, got {m.dtype}")
    shaped("m", m, (num_latents,), pre, why="one per latent")
    if total is not None and not 0 <= total <= rows * num_latents:
        raise ValueError(f"total must satisfy 0 <= total <= {rows * num_latents} (tokens * latents), got {total}")
    if total is None or deep() or (m.device.type == "cpu" and not torch.compiler.is_compiling()):
        if bool(((m < 0) | (m > rows)).any()):
            raise ValueError(f"m must lie in 0..{rows} (the number of tokens), got {m.min().item()}..{m.max().item()}")
        summed = int(m.sum())
        if total not in (None, summed):
            raise ValueError(f"total must be the sum of m, {summed}, got {total}")
        total = summed
    return m.int(), total


def from_zero(name: str, value) -> float:
    """A finite number of at least 0."""
    if (number := number_in(value)) is None:
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not 0 <= number < float("inf"):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    return number


def budget_law(exponent, shift) -> tuple[float, float]:
    """Weights that fall with the rank."""
    return float(from_zero("exponent", exponent)), float(from_zero("shift", shift))


def mask_for(mask, pre: Tensor) -> Tensor | None:
    """A boolean (F,) or pre.shape mask, as (F,) or (rows, F)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a boolean tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != pre.shape and mask.shape != pre.shape[-1:]:
        raise ValueError(f"mask must have shape {(pre.shape[-1],)} or {tuple(pre.shape)}, got {tuple(mask.shape)}")
    same_device("mask", mask, pre)
    return mask if mask.dim() == 1 else matrix(mask)


def not_negative(name: str, t: Tensor | None) -> None:
    """Under SAE_CHECK=1: no element is below 0."""
    if deep() and t is not None and bool((t < 0).any()):
        raise ValueError(f"{name} must not be negative, got a minimum of {t.min().item()}")


def share(name: str, value, pre: Tensor) -> float | Tensor:
    """0 < share <= 1, a number or one per row of ``pre``; a tensor's elements are looked at under SAE_CHECK=1."""
    if not isinstance(value, Tensor):
        if (number := number_in(value)) is None:
            raise TypeError(f"{name} must be a number or a tensor, got {value!r} of type {type(value).__name__}")
        if not 0 < number <= 1:
            raise ValueError(f"{name} must satisfy 0 < {name} <= 1, got {value}")
        return float(number)
    floating(name, value, dims=value.dim())
    if value.dim() > 0:
        shaped(name, value, pre.shape[:-1], pre, why="one per row of pre, or a single number")
    same_device(name, value, pre)
    if deep() and not bool(((value > 0) & (value <= 1)).all()):
        raise ValueError(f"{name} must satisfy 0 < {name} <= 1, got {value.min().item()}..{value.max().item()}")
    return value.detach()


def count(name: str, value) -> int:
    """An int >= 0."""
    number = _integer(name, value)
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return number


def widths(values, num_latents: int | None = None) -> tuple[int, ...]:
    """Ascending widths of prefixes of the latents, the last all of them where their number is known."""
    try:
        given = tuple(values)
    except TypeError:
        raise TypeError(f"widths must be a sequence of ints, got {type(values).__name__}") from None
    chosen = tuple(_integer("each of widths", width) for width in given)
    ascending = all(a < b for a, b in zip((0, *chosen), chosen, strict=False))
    if not chosen or not ascending or num_latents not in (None, chosen[-1]):
        last = "" if num_latents is None else f" and end with {num_latents} (the number of latents)"
        raise ValueError(f"widths must ascend from at least 1{last}, got {chosen}")
    return chosen


def flag(name: str, value) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def positive(name: str, value) -> float:
    """A positive, finite number."""
    if (number := number_in(value)) is None:
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return number


def theta(theta: Tensor | float, pre: Tensor, num_latents: int) -> Tensor:
    """A threshold as (F,) in the dtype in which pre-activations like ``pre`` are compared with it."""
    wide = torch.promote_types(pre.dtype, torch.float32)
    if not isinstance(theta, Tensor):
        if (number := number_in(theta)) is None:
            raise TypeError(f"theta must be a number or a tensor, got {type(theta).__name__}")
        theta = torch.full((), number, dtype=torch.float64, device=pre.device)  # a fill: nothing comes from the host
    floating("theta", theta, dims=theta.dim())
    if theta.dim() > 1 or (theta.dim() == 1 and theta.shape[0] != num_latents):
        raise ValueError(f"theta must be a scalar or have shape {(num_latents,)}, got {tuple(theta.shape)}")
    same_device("theta", theta, pre)
    rounded = theta.to(wide)
    if theta.dtype != wide and theta.dtype == torch.float64:
        below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
        rounded = torch.where(rounded.detach() > theta.detach(), below, rounded)
    return rounded.expand(num_latents)


def dtype_in(name: str, value) -> torch.dtype:
    """A floating dtype, given as such or by its name: ``torch.bfloat16``, ``"bfloat16"``."""
    chosen = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(chosen, torch.dtype) or chosen not in FLOATS:
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name} must be float32, bfloat16, float16 or float64, a torch.dtype or its name, got {value!r}")
    return chosen


def pairs_of_widths(name: str, pairs) -> list[tuple[int, int]]:
    """Widths that each source of a crosscoder reads and writes; one source at least."""
    found = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"{name}[{number}] must be a pair of widths, read and written, got {pair!r}")
        read, written = (integer_k(width, name=f"{name}[{number}][{i}]") for i, width in enumerate(pair))
        found.append((read, written))
    if not found:
        raise ValueError(f"{name} must hold the widths of at least one source, got none")
    return found


def device_in(name: str, value) -> torch.device:
    """A device, given as such or by its name, that this machine has."""
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise TypeError(f"{name} must be a torch.device or its name, as 'cpu' or 'cuda:0', got {value!r}")
    try:
        device = torch.device(value)
    except RuntimeError:
        raise ValueError(f"{name} must be a device's name, as 'cpu' or 'cuda:0', got {value!r}") from None
    try:
        torch.empty(0, device=device)
    except Exception as error:  # each back end has its own; that of a PyTorch without CUDA is an AssertionError
        why = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ValueError(f"{name}: {str(value)!r} cannot be used on this machine: {why}") from None
    return device


def device_or_default(device) -> torch.device | None:
    """The argument ``device``; None, torch's default one, stays None."""
    return None if device is None else device_in("device", device)


def capacity_of(capacity) -> int | None:
    return None if capacity is None else count("capacity", capacity)


def matrix(t: Tensor) -> Tensor:
    """(*batch_shape, F) as (rows, F): a view where the strides allow it."""
    if t.dim() == 2:
        return t
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def first_line(error: Exception) -> str:
    """What another library's error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
