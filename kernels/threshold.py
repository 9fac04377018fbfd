"""Threshold: every entry above its latent's theta; NaN is kept and counted.

Math      keep pre > theta_j (or > floor_j <= theta_j, entries up to theta_j then holding 0)
Grid      (B,); one program owns one row, first to count, then to write
Traffic   reads B*F*s twice; writes N*(s + 4)
Numerics  compared in fp32; exact
Source    Rajamanoharan et al. 2024, arXiv:2407.14435 (JumpReLU); Bussmann et al. 2024 (inference of BatchTopK)
"""
import torch
import triton
import triton.language as tl

from . import _tuning
from ._compact import allocate


@triton.jit
def _per_latent(ptr, cols, mask, STRIDE: tl.constexpr):
    """A tile of a (F,) vector; one load where it is a number expanded, whose stride is 0."""
    return tl.load(ptr) if STRIDE == 0 else tl.load(ptr + cols * STRIDE, mask=mask, other=0.0)


@triton.jit
def _above(pre_ptr, floor_ptr, cols, present, stride_pf, STRIDE_FF: tl.constexpr, WIDE: tl.constexpr):
    """A tile of pre and the mask of its entries above the floor."""
    at = cols.to(tl.int64) if WIDE else cols
    value = tl.load(pre_ptr + at * stride_pf, mask=present, other=0.0)
    wide = value.to(tl.float32)
    return value, present & ((wide > _per_latent(floor_ptr, cols, present, STRIDE_FF)) | (wide != wide))


@triton.jit
def _count_kernel(
    pre_ptr, floor_ptr, count_ptr,  # [B, F] in, [F] in fp32, [B] out int32
    F, stride_pb, stride_pf, STRIDE_FF: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """One row: how many entries it stores."""
    row = tl.program_id(0).to(tl.int64)
    counts = tl.zeros((BLOCK,), tl.int32)
    for tile in range(0, tl.cdiv(F, BLOCK)):
        cols = tile * BLOCK + tl.arange(0, BLOCK)
        _, keep = _above(pre_ptr + row * stride_pb, floor_ptr, cols, cols < F, stride_pf, STRIDE_FF, WIDE)
        counts += keep.to(tl.int32)
    tl.store(count_ptr + row, tl.sum(counts, axis=0))


@triton.jit
def _write_kernel(
    pre_ptr, floor_ptr, theta_ptr, offsets_ptr,  # [B, F], [F] fp32, [F] fp32, [B + 1] int64, all in
    values_ptr, indices_ptr,                     # [N] out each
    F, stride_pb, stride_pf,
    STRIDE_FF: tl.constexpr, STRIDE_TF: tl.constexpr, HAS_WINDOW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """One row, tile by tile in column order, until it has written its share."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + row)
    room = (tl.load(offsets_ptr + row + 1) - start).to(tl.int32)
    values_ptr += start
    indices_ptr += start
    written = tl.full((), 0, tl.int32)
    tile = tl.full((), 0, tl.int32)
    while (tile * BLOCK < F) & (written < room):
        cols = tile * BLOCK + tl.arange(0, BLOCK)
        value, keep = _above(pre_ptr + row * stride_pb, floor_ptr, cols, cols < F, stride_pf, STRIDE_FF, WIDE)
        if HAS_WINDOW:
            theta = _per_latent(theta_ptr, cols, cols < F, STRIDE_TF)
            wide = value.to(tl.float32)
            value = tl.where((wide > theta) | (wide != wide), wide, 0.0).to(value.dtype)
        at = written + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        fits = keep & (at < room)  # a row cut short by its capacity
        tl.store(indices_ptr + at, cols, mask=fits)
        tl.store(values_ptr + at, value, mask=fits)
        written += tl.sum(keep.to(tl.int32), axis=0)
        tile += 1


def launch(pre, theta, bandwidth, capacity):
    """values (N,), indices (N,), offsets (B + 1,), required (); see ``reference.threshold``."""
    rows, num_latents = pre.shape
    floor = None if bandwidth is None else theta - bandwidth / 2
    lower = theta if floor is None else floor
    block, warps = _tuning.threshold_tile(num_latents)
    matrix = dict(
        F=num_latents, stride_pb=pre.stride(0), stride_pf=pre.stride(1), STRIDE_FF=lower.stride(0),
        WIDE=_tuning.is_wide(num_latents * pre.stride(1)), BLOCK=block, **_tuning.options(warps),
    )
    count = torch.empty(rows, dtype=torch.int32, device=pre.device)
    if rows:
        _count_kernel[(rows,)](pre, lower, count, **matrix)
    values, indices, offsets, required = allocate(pre, count, capacity)
    if rows and values.numel():
        _write_kernel[(rows,)](
            pre, lower, theta, offsets, values, indices,
            STRIDE_TF=theta.stride(0), HAS_WINDOW=floor is not None, **matrix,
        )
    return values, indices, offsets, required
