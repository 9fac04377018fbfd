"""Inner products of a gradient's rows with codes' decoder rows: for ``backward.py`` and ``latent_pass.py``."""
import torch
import triton
import triton.language as tl

from . import _tuning
from ._launch import Launch, Layout, layout, planned, with_unit_stride


@triton.jit
def _values_kernel(
    grad_ptr, indices_ptr, offsets_ptr, weight_ptr, out_ptr,  # [B, D], [N] int32, [B + 1] int64, [F, D] in; [N] out
    D, stride_gb, stride_wf, stride_wd, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """One of a row's splits: its gradient against the weight rows of every so many BLOCK_N entries."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + row) + tl.program_id(1) * BLOCK_N
    end = tl.load(offsets_ptr + row + 1)
    while start < end:
        entry = start + tl.arange(0, BLOCK_N)
        latent = tl.load(indices_ptr + entry, mask=entry < end, other=0).to(tl.int64)
        acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for tile in range(0, tl.cdiv(D, BLOCK_D)):
            offs_d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
            grad = tl.load(grad_ptr + row * stride_gb + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
            at = latent[:, None] * stride_wf + offs_d.to(tl.int64)[None, :] * stride_wd
            both = (entry < end)[:, None] & (offs_d < D)[None, :]
            weight = tl.load(weight_ptr + at, mask=both, other=0.0).to(tl.float32)
            acc += weight * grad[None, :]
        tl.store(out_ptr + entry, tl.sum(acc, axis=1).to(out_ptr.dtype.element_ty), mask=entry < end)
        start += SPLITS * BLOCK_N


@planned
def _plan_values(grad: Layout, weight: Layout, splits: int) -> Launch:
    rows, width = grad.shape
    return Launch(
        _values_kernel, (rows, splits), warps=4, D=width, stride_gb=grad.strides[0], stride_wf=weight.strides[0],
        stride_wd=weight.strides[1], SPLITS=splits, BLOCK_N=_tuning.VALUES_BLOCK,
        BLOCK_D=_tuning.decode_block(width),
    )


def value_gradients(grad, indices, offsets, weight, dtype):
    """(N,) in ``dtype``, 0 at entries that belong to no row."""
    rows, grad = grad.shape[0], with_unit_stride(grad)
    out = torch.zeros(indices.shape[0], dtype=dtype, device=grad.device)
    if rows and indices.shape[0]:
        splits = _tuning.splits_of_row(indices.shape[0], rows)
        _plan_values(layout(grad), layout(weight), splits)(grad, indices, offsets, weight, out)
    return out
