"""Matrix products on a CPU, each by the fastest of what PyTorch carries for it. Torch only.

PyTorch multiplies fp32 matrices by MKL, which keeps its AVX-512 code for Intel's processors. oneDNN chooses by what the
processor can do: on others with AVX-512 it takes half the time (benchmarks/gemm.py measures both). Same operands, same
fp32 accumulation, another order of summation.
"""
import functools
import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import limits


def _processor() -> dict:
    """What PyTorch knows of it; an older one does not tell."""
    tell = getattr(torch.cpu, "get_capabilities", None)
    return {} if tell is None else tell()


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether this is an x86 processor with AVX-512, but not one of Intel's, and oneDNN is there.

    The answer stays the same throughout a process.
    """
    known = _processor()
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    is_other = "Intel" not in known.get("cpu_name", "Intel") and known.get("avx512_f", False)
    is_other &= platform.machine() in ("x86_64", "AMD64")
    return has_both and is_other and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to multiply these. ``torch.backends.mkldnn.flags(enabled=False)`` turns it off."""
    plain = all(t.is_cpu and t.dtype == torch.float32 and t.layout == torch.strided for t in (x, weight))
    is_vector = x.shape[0] == 1 and weight.stride(1) == 1  # times a row-major matrix: there MKL is not slow
    # For rows with gaps, as in a slab of a row-major encoder, oneDNN has loops alone, a thousand times as slow.
    is_dense = weight.is_contiguous() or weight.T.is_contiguous()
    return plain and is_dense and not is_vector and _mkl_is_slow() and bool(torch.backends.mkldnn.enabled)


class Reused:
    """Memory of one result after the other: fresh memory costs a product a tenth to a fifth more."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def like(self, x: Tensor) -> Callable[[int], Tensor]:
        """Gives so many numbers of x's dtype, those of the call before if there are as many."""

        def memory(size: int) -> Tensor:
            if self._memory is None or self._memory.dtype != x.dtype or self._memory.numel() < size:
                self._memory = None  # before its successor is made
                self._memory = x.new_empty(size)
            return self._memory[:size]

        return memory


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None, *,
    memory: Callable[[int], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """``x @ weight + bias``: (B, D), (D, F), (F,) of one dtype, any strides, to (B, F). No gradient: ``ops.linear``.

    ``scale`` (F,) then multiplies the result.

    ``memory`` gives so many numbers to write the result to. oneDNN writes to none but its own: a large result it makes
    of some latents at a time, which are copied. The system would give memory for a whole one anew, a page fault for
    every 4 kB, and that takes longer than the copies do.
    """
    shape = x.shape[0], weight.shape[1]
    if x.numel() == 0 or weight.numel() == 0 or not by_onednn(x, weight):
        out = None if memory is None else memory(shape[0] * shape[1]).view(shape)
        out = torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)
        return out if scale is None else out.mul_(scale)
    bias = None if bias is None else bias.contiguous()  # oneDNN does not look at its stride
    width = latents_at_once(*shape, weight)
    if memory is None or width == shape[1]:
        out = _by_onednn(x, weight, bias)
        return out if scale is None else out.mul_(scale)
    out = memory(shape[0] * shape[1]).view(shape)
    for start in range(0, shape[1], width):
        some = slice(start, start + width)
        part = _by_onednn(x, weight[:, some], None if bias is None else bias[some])
        if scale is None:
            out[:, some] = part
        else:
            torch.mul(part, scale[some], out=out[:, some])
        del part  # before the next one is made
    return out


def whole_rows_from(x: Tensor, weight: Tensor) -> int | None:
    """From how many rows on whole rows at a time are made in less time than some columns of all rows; None: never.

    What is selected from whole rows then takes no merging (benchmarks/floor.py). MKL takes longer for few rows.
    """
    return 160 if by_onednn(x, weight) else None


def rows_at_once(rows: int, x: Tensor, weight: Tensor) -> int:
    """Of how many of so many rows at a time a result is made best: of a few hundred, where memory then serves again."""
    if not by_onednn(x, weight) or rows * weight.shape[1] * 4 < limits.KEPT_BY_ALLOCATOR:
        return rows
    fit = min((limits.KEPT_BY_ALLOCATOR - 1) // (4 * weight.shape[1]), 256)
    return fit if fit >= 160 else rows


def latents_at_once(rows: int, num_latents: int, weight: Tensor) -> int:
    """Of how many latents oneDNN makes a result of so many rows at a time; all, where that is the best.

    Some columns of a row-major ``weight`` (D, F) are rows with gaps.
    """
    if rows * num_latents * 4 < limits.KEPT_BY_ALLOCATOR or not weight.T.is_contiguous():
        return num_latents
    return min(max(limits.KEPT_BY_ALLOCATOR // 2 // (4 * rows) // 64, 1) * 64, num_latents)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight.T, bias, "none", [], "")


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether the processor has an instruction for products of bfloat16, which oneDNN then uses."""
    return bool(_processor().get("avx512_bf16", False)) and torch.backends.mkldnn.is_available()


def one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of one token on a CPU: (1, D), (F, D), (F,) of one dtype to (1, F).

    A matrix times a vector takes two thirds of the time of ``F.linear`` where that calls for a matrix product, and
    twice as long in bfloat16 where oneDNN knows an instruction for it (benchmarks/lm.py).
    """
    if weight.dtype == torch.bfloat16 and _multiplies_bfloat16():
        return F.linear(x, weight, bias)
    out = weight @ x[0]
    return (out if bias is None else out + bias)[None]
