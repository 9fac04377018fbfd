"""The encoder's product of 16-bit operands by cuBLAS, with an fp32 bias and a single rounding.

Math      x @ weight + bias = [x, scales] @ [weight; pieces], where pieces * scales = bias, exactly; whoever multiplies
          one x by many weights makes the first operand once (``stock.linear_16bit.with_scales``)
Grid      (tiles of the operand, rows and columns); one program copies one tile of the weights, or writes pieces
Traffic   4 bytes a weight, and what the GEMM moves. cuBLAS rounds a bias to 16 bits; fp32 sums, which another operator
          biases and rounds, would move 8 bytes a result: that is the way of fewer rows than half their width
Numerics  products of 16-bit numbers and their sums in fp32, as the tensor cores take them; rounded once, after the bias
Source    -
"""
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl

from ..stock import limits
from ..stock import linear_16bit as stock
from ._launch import Launch, Layout, layout, planned

PIECES = tl.constexpr(stock.PIECES)
TILE = (16, 256)  # 32 numbers a thread, in loads of 16 bytes

_setting = threading.Lock()


@triton.jit
def _operand_kernel(
    weight_ptr, bias_ptr, out_ptr,  # [D, F] in, [F] in, fp32, [WIDTH, F] out; by columns where BY_COLUMNS
    D, F, WIDTH, stride_wd, stride_wf,
    FIRST: tl.constexpr, OTHERS: tl.constexpr, BY_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """One tile: the weights, below them three rows of pieces, and zeros."""
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None].to(tl.int64)
    columns = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :].to(tl.int64)
    if BY_COLUMNS:  # the operand lies in memory as (F, WIDTH)
        d, latent, width = columns, rows, WIDTH
        last = tl.program_id(1) * BLOCK + BLOCK
    else:
        d, latent, width = rows, columns, F
        last = tl.program_id(0) * BLOCK_ROWS + BLOCK_ROWS
    tile = tl.load(weight_ptr + d * stride_wd + latent * stride_wf, mask=(d < D) & (latent < F), other=0.0)
    if last > D:
        bias = tl.load(bias_ptr + latent, mask=latent < F, other=0.0)
        high = (bias / FIRST).to(tile.dtype)
        part = high.to(tl.float32) * FIRST
        finite = tl.abs(part) < float("inf")  # of infinity and NaN all is in `high`
        rest = tl.where(finite, bias, 0.0) - tl.where(finite, part, 0.0)
        middle = (rest / OTHERS).to(tile.dtype)
        low = ((rest - middle.to(tl.float32) * OTHERS) / OTHERS).to(tile.dtype)
        tile = tl.where(d == D, high, tl.where(d == D + 1, middle, tl.where(d == D + PIECES - 1, low, tile)))
    tl.store(out_ptr + rows * width + columns, tile, mask=(d < WIDTH) & (latent < F))


@planned
def _plan(weight: Layout, width: int) -> Launch:
    (d, latents), by_columns = weight.shape, weight.strides[0] == 1
    rows, columns = (latents, width) if by_columns else (width, latents)
    first, others = stock.SCALES[weight.dtype]
    grid = triton.cdiv(rows, TILE[0]), triton.cdiv(columns, TILE[1])  # the second axis ends at 65,535
    return Launch(
        _operand_kernel, grid, warps=4, D=d, F=latents, WIDTH=width, stride_wd=weight.strides[0],
        stride_wf=weight.strides[1], FIRST=first, OTHERS=others, BY_COLUMNS=by_columns, BLOCK_ROWS=TILE[0],
        BLOCK=TILE[1],
    )  # fmt: skip


def operand_of(weight, bias, width):
    """(width, F): weight (D, F), the pieces of bias (F,), fp32, and zeros; rows or columns lie whole, as the weight's.
    """
    by_columns = weight.stride(0) == 1
    shape = (weight.shape[1], width) if by_columns else (width, weight.shape[1])
    out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    _plan(layout(weight), width)(weight, bias, out)
    return out.T if by_columns else out


@contextmanager
def _sums_in_fp32(dtype: torch.dtype) -> Iterator[None]:
    """Forbids cuBLAS to add the partial sums of a long product in 16 bits, which torch lets it do by default."""
    name = f"allow_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_reduced_precision_reduction"
    matmul = torch.backends.cuda.matmul
    with _setting:  # it holds for the whole process: other threads' products are meanwhile only more exact
        before = getattr(matmul, name), getattr(matmul, f"{name}_split_k", True)
        setattr(matmul, name, False)
        try:
            yield
        finally:
            setattr(matmul, name, before)


def launch(x, weight, bias, dtype):
    """(B, F) in ``dtype``; see ``reference.linear_16bit``."""
    rows, d = x.shape[0], weight.shape[0]
    by_stock = dtype != x.dtype or 0 in (rows, d, weight.shape[1])
    if by_stock or (bias is not None and not stock.adds_bias_in_product(rows, d)):
        return stock.linear_16bit(x, weight, bias, dtype)
    out = torch.empty(rows, weight.shape[1], dtype=dtype, device=x.device)
    if bias is None:
        with _sums_in_fp32(dtype):
            return torch.mm(x[:, :d], weight, out=out)
    bias = bias.float().contiguous()
    if x.shape[1] == d:
        x = stock.with_scales(x)
    step = max(limits.WIDE_ELEMENTS["cuda"] // x.shape[1] // 128, 1) * 128  # results start aligned, too
    for start in range(0, weight.shape[1], step):
        latents = slice(start, start + step)
        operand = operand_of(weight[:, latents], bias[latents], x.shape[1])
        with _sums_in_fp32(dtype):
            torch.mm(x, operand, out=out[:, latents])
        del operand  # before the next one is made
    return out
