"""Sparse decode: the weighted sum of each row's active decoder vectors.

Math      out[b] = sum over row b's entries of value * weight[index] (+ bias)
Grid      (B, cdiv(D, BLOCK_D)); one program owns one tile of one row, so no atomics
Traffic   reads N*(s_v + 4) and N*D*s_w (rows reused through L2 only), writes B*D*s_o
Numerics  fp32 accumulation, IN_FLIGHT entries at a time in entry order; bitwise reproducible
Source    Gao et al. 2024, arXiv:2406.04093 (sparse decoder)
"""
import triton
import triton.language as tl

from . import _tuning


@triton.jit
def _decode_kernel(
    values_ptr, indices_ptr, offsets_ptr,  # [N] in, [N] in int32, [B + 1] in int64
    weight_ptr, bias_ptr, out_ptr,         # [F, D] in, [D] in or unused, [B, D] out
    D, stride_wf, stride_wd, stride_bd, stride_ob,
    HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr, IN_FLIGHT: tl.constexpr,
):
    """One tile of one row: IN_FLIGHT weight rows are one tile, so that all are loaded before any is used."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    entry = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    column = offs_d.to(tl.int64) * stride_wd
    acc = tl.zeros((BLOCK_D,), tl.float32)
    while entry < end:
        entries = entry + tl.arange(0, IN_FLIGHT)
        present = entries < end
        value = tl.load(values_ptr + entries, mask=present, other=0.0).to(tl.float32)
        latent = tl.load(indices_ptr + entries, mask=present, other=0).to(tl.int64)
        at = latent[:, None] * stride_wf + column[None, :]  # [IN_FLIGHT, BLOCK_D]
        weight = tl.load(weight_ptr + at, mask=present[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(value[:, None] * weight, axis=0)
        entry += IN_FLIGHT
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_d * stride_bd, mask=mask_d, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_ob + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_d)


def launch(values, indices, offsets, weight, bias, dtype, *_by_latent):
    """out (B, D) in ``dtype``; see ``reference.decode``. The codes turned around serve the backward only."""
    rows, width = offsets.numel() - 1, weight.shape[1]
    out = weight.new_empty(rows, width, dtype=dtype)
    if out.numel() == 0:
        return out
    block = _tuning.decode_block(width)
    _decode_kernel[(rows, triton.cdiv(width, block))](
        values, indices, offsets, weight, bias, out,
        D=width, stride_wf=weight.stride(0), stride_wd=weight.stride(1),
        stride_bd=0 if bias is None else bias.stride(0), stride_ob=out.stride(0),
        HAS_BIAS=bias is not None, BLOCK_D=block, IN_FLIGHT=_tuning.ENTRIES_IN_FLIGHT,
        **_tuning.options(_tuning.decode_warps(block)),
    )
    return out
