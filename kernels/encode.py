"""Encoder product: pre-activations and, along the way, the largest key of each group of latents.

Math      pre = x @ weight + bias, rounded once; maxima[b, g] = largest key of pre[b, g*G : (g+1)*G]
Grid      (cdiv(B, BLOCK_B) * cdiv(F, BLOCK_F),); one program owns one tile of pre, tiles of GROUP rows of tiles in turn
Traffic   reads x and weight, repeats through L2; writes B*F*s and B*F/G*4. The selection never streams pre
Numerics  fp32 accumulation in one order, fp32 bias, one rounding; keys of the rounded values, NaN kept
Source    group maxima: see kernels/README.md
"""
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _tuning
from ._device import ordered_key, relu


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tile(
    matrix,  # [R, C] in: a pointer, or a descriptor of tiles, of the transpose where C is not contiguous
    row, col, R, C, stride_r, stride_c,
    TMA: tl.constexpr, ROWS_CONTIGUOUS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """The tile [BLOCK_R, BLOCK_C] of a matrix at (row, col), zeros beyond its edges."""
    if TMA:
        if ROWS_CONTIGUOUS:
            return matrix.load([row, col])
        else:
            return matrix.load([col, row]).T
    else:
        rows = row + tl.arange(0, BLOCK_R)
        cols = col + tl.arange(0, BLOCK_C)
        places = rows.to(tl.int64)[:, None] * stride_r + cols.to(tl.int64)[None, :] * stride_c
        return tl.load(matrix + places, mask=(rows < R)[:, None] & (cols < C)[None, :], other=0.0)


@triton.jit(do_not_specialize=["B"])
def _encode_kernel(
    x,           # [B, D] in
    weight,      # [D, F] in
    bias_ptr,    # [F] in, or unused
    pre,         # [B, F] out, contiguous; x, weight and pre are pointers, or descriptors where TMA
    maxima_ptr,  # [B, NG] out, int32
    B, F, D, NG, stride_xb, stride_xd, stride_wd, stride_wf, stride_bf,
    HAS_BIAS: tl.constexpr, MAGNITUDE: tl.constexpr, RELU: tl.constexpr, SHIFT: tl.constexpr, TMA: tl.constexpr,
    X_ROWS: tl.constexpr, W_ROWS: tl.constexpr, RAGGED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    G: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):
    """One tile of the product, and the group maxima of its rows."""
    # GROUP rows of tiles go down column by column, so that programs at work together share tiles of x and of weight
    program = tl.program_id(0)
    in_group = GROUP * tl.cdiv(F, BLOCK_F)
    first = program // in_group * GROUP
    tall = tl.minimum(tl.cdiv(B, BLOCK_B) - first, GROUP)
    row = (first + program % in_group % tall) * BLOCK_B
    col = program % in_group // tall * BLOCK_F

    acc = tl.zeros((BLOCK_B, BLOCK_F), tl.float32)
    for step in range(0, tl.cdiv(D, BLOCK_D)):
        left = _tile(x, row, step * BLOCK_D, B, D, stride_xb, stride_xd, TMA, X_ROWS, BLOCK_B, BLOCK_D)
        right = _tile(weight, step * BLOCK_D, col, D, F, stride_wd, stride_wf, TMA, W_ROWS, BLOCK_D, BLOCK_F)
        if UPCAST:  # the interpreter multiplies the bits of 16-bit numbers
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)

    rows = row + tl.arange(0, BLOCK_B)
    cols = col + tl.arange(0, BLOCK_F)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols.to(tl.int64) * stride_bf, mask=cols < F, other=0.0).to(tl.float32)[None, :]
    if TMA:
        value = acc.to(pre.dtype)
        pre.store([row, col], value)
    else:
        value = acc.to(pre.dtype.element_ty)
        places = rows.to(tl.int64)[:, None] * F + cols[None, :]
        tl.store(pre + places, value, mask=(rows < B)[:, None] & (cols < F)[None, :])

    score = value.to(tl.float32)  # ranked is what was stored
    if MAGNITUDE:
        score = tl.abs(score)
    if RAGGED:
        score = tl.where((cols < F)[None, :], score, 0.0 if MAGNITUDE else float("-inf"))
    # a maximum that keeps NaN commutes with the key, which costs more
    largest = tl.reduce(tl.reshape(score, (BLOCK_B, BLOCK_F // G, G)), 2, _larger)
    if RELU:
        largest = relu(largest)
    groups = col // G + tl.arange(0, BLOCK_F // G)
    places = rows.to(tl.int64)[:, None] * NG + groups[None, :]
    tl.store(maxima_ptr + places, ordered_key(largest) >> SHIFT, mask=(rows < B)[:, None] & (groups < NG)[None, :])


def _descriptor(matrix, rows, cols):
    """Of the tiles [rows, cols] of a matrix, or of [cols, rows] of its transpose where columns are contiguous."""
    if matrix.stride(1) != 1:
        matrix, rows, cols = matrix.T, cols, rows
    return TensorDescriptor.from_tensor(matrix, [rows, cols])


def _is_aligned(matrix):
    """Whether tiles can come in 16-byte loads and by the hardware's copies: one stride is 1, the other fits."""
    outer, inner = matrix.stride() if matrix.stride(1) == 1 else matrix.stride()[::-1]
    fits = outer % 16 == 0 and outer >= 16 and matrix.data_ptr() % 16 == 0
    return inner == 1 and fits and min(matrix.shape) > 0


def launch(x, weight, bias, size, magnitude, rank_relu, tma=None):
    """pre (B, F) and maxima (B, ceil(F / size)) int32; x (B, D) and weight (D, F) have the dtype of pre.

    Keys are those of abs(pre) (``magnitude``) or relu(pre) (``rank_relu``). ``tma``: whether tiles are copied by the
    hardware; by default where it can.
    """
    (rows, width), num_latents = x.shape, weight.shape[1]
    number = -(-num_latents // size)
    pre = x.new_empty(rows, num_latents)
    maxima = x.new_empty(rows, number, dtype=torch.int32)
    if rows == 0:
        return pre, maxima
    interpreted = triton.knobs.runtime.interpret
    target = None if interpreted else triton.runtime.driver.active.get_current_target()
    backend, arch = ("interpreter", 0) if target is None else (target.backend, target.arch)
    precision = _tuning.dot_precision(x.dtype, backend)
    aligned = all(map(_is_aligned, (x, weight, pre)))
    tile = _tuning.encoder_tile(x.dtype, precision, aligned, backend, arch)
    tma = aligned and (_tuning.has_tma(backend, arch) if tma is None else tma)
    tiles = (x, tile.rows, tile.width), (weight, tile.width, tile.latents), (pre, tile.rows, tile.latents)
    x_arg, weight_arg, pre_arg = (_descriptor(*t) if tma else t[0] for t in tiles)
    _encode_kernel[triton.cdiv(rows, tile.rows) * triton.cdiv(num_latents, tile.latents),](
        x_arg, weight_arg, bias, pre_arg, maxima,
        B=rows, F=num_latents, D=width, NG=number, stride_xb=x.stride(0), stride_xd=x.stride(1),
        stride_wd=weight.stride(0), stride_wf=weight.stride(1), stride_bf=0 if bias is None else bias.stride(0),
        HAS_BIAS=bias is not None, MAGNITUDE=magnitude, RELU=rank_relu, SHIFT=_tuning.key_shift(x.dtype),
        TMA=tma, X_ROWS=x.stride(1) == 1, W_ROWS=weight.stride(1) == 1,
        RAGGED=num_latents % size != 0, UPCAST=interpreted, PRECISION=precision, G=size, BLOCK_B=tile.rows,
        BLOCK_F=tile.latents, BLOCK_D=tile.width, GROUP=_tuning.ENCODER_GROUP, num_stages=tile.stages,
        **_tuning.options(tile.warps),
    )
    return pre, maxima
