"""Codes to a matrix, a matrix read at the codes, and the transposed index of codes.

Math      dense[b, index] = value; out[n] = dense[row of n, index of n]
Grid      (B,); one program owns one row's entries
Traffic   N*(s + 4) and the matrix's zeros; the gather touches N sectors
Numerics  copies only; transposing is a stable sort of the indices, so its result is unique
Source    -
"""
import torch
import triton
import triton.language as tl

from ._launch import Launch, Layout, layout, planned

BLOCK = 256  # entries of one step: common rows (k <= 128) take one


@triton.jit
def _scatter_kernel(
    values_ptr, indices_ptr, offsets_ptr, dense_ptr,  # [N] in, [N] in int32, [B + 1] in int64, [B, F] out, zeroed
    F, BLOCK: tl.constexpr,
):
    """One row's entries, written at their latents."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    while start < end:
        entry = start + tl.arange(0, BLOCK)
        latent = tl.load(indices_ptr + entry, mask=entry < end, other=0)
        value = tl.load(values_ptr + entry, mask=entry < end, other=0.0)
        tl.store(dense_ptr + row * F + latent, value, mask=entry < end)
        start += BLOCK


@triton.jit
def _gather_kernel(
    dense_ptr, indices_ptr, offsets_ptr, out_ptr,  # [B, F] in, [N] in int32, [B + 1] in int64, [N] out
    stride_db, stride_df, BLOCK: tl.constexpr,
):
    """One row's entries, read at their latents."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    while start < end:
        entry = start + tl.arange(0, BLOCK)
        latent = tl.load(indices_ptr + entry, mask=entry < end, other=0).to(tl.int64)
        value = tl.load(dense_ptr + row * stride_db + latent * stride_df, mask=entry < end, other=0.0)
        tl.store(out_ptr + entry, value, mask=entry < end)
        start += BLOCK


@planned
def _plan_scatter(rows: int, num_latents: int) -> Launch:
    return Launch(_scatter_kernel, (rows,), warps=4, F=num_latents, BLOCK=BLOCK)


def launch_to_dense(values, indices, offsets, num_latents):
    """(B, F); see ``reference.to_dense``."""
    rows = offsets.shape[0] - 1
    dense = torch.zeros(rows, num_latents, dtype=values.dtype, device=values.device)
    if rows and values.shape[0]:
        _plan_scatter(rows, num_latents)(values, indices, offsets, dense)
    return dense


@planned
def _plan_gather(dense: Layout) -> Launch:
    return Launch(
        _gather_kernel, dense.shape[:1], warps=4, stride_db=dense.strides[0], stride_df=dense.strides[1], BLOCK=BLOCK
    )


def launch_gather(dense, indices, offsets):
    """(N,); see ``reference.gather``."""
    out = torch.zeros(indices.shape[0], dtype=dense.dtype, device=dense.device)
    if dense.shape[0] and out.shape[0]:
        _plan_gather(layout(dense))(dense, indices, offsets, out)
    return out


@triton.jit
def _entry_rows_kernel(indices_ptr, offsets_ptr, rows_ptr, latents_ptr, BLOCK: tl.constexpr):
    """One row's entries: their row, and their latent as the sort key."""
    row = tl.program_id(0)
    start = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    while start < end:
        entry = start + tl.arange(0, BLOCK)
        tl.store(rows_ptr + entry, tl.zeros((BLOCK,), tl.int32) + row, mask=entry < end)
        tl.store(latents_ptr + entry, tl.load(indices_ptr + entry, mask=entry < end, other=0), mask=entry < end)
        start += BLOCK


@planned
def _plan_entry_rows(rows: int) -> Launch:
    return Launch(_entry_rows_kernel, (rows,), warps=4, BLOCK=BLOCK)


def launch_by_latent(indices, offsets, num_latents):
    """latent_offsets (F + 1,), rows (N,), positions (N,); see ``reference.by_latent``."""
    number = offsets.shape[0] - 1
    rows = torch.full_like(indices, number)
    latents = torch.full_like(indices, num_latents)  # entries that belong to no row sort behind the last latent
    if number and indices.shape[0]:
        _plan_entry_rows(number)(indices, offsets, rows, latents)
    latents, positions = latents.sort(stable=True)
    bounds = torch.arange(num_latents + 1, dtype=torch.int32, device=indices.device)
    return torch.searchsorted(latents, bounds), rows[positions], positions
