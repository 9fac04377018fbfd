"""Sums of random rows of a table: a decoder's gather and nothing else, which measures what an L2 cache delivers."""

import torch
import triton
import triton.language as tl


@triton.jit
def _gather_sums_kernel(
    table_ptr, chosen_ptr, out_ptr,  # [R, W] in, int32, [S, K] in, int32, [S, W] out, int32
    W, K: tl.constexpr, BLOCK_W: tl.constexpr, IN_FLIGHT: tl.constexpr,
):  # fmt: skip
    """One sum: IN_FLIGHT rows are loaded before any is used."""
    sum_ = tl.program_id(0).to(tl.int64)
    words = tl.arange(0, BLOCK_W)
    total = tl.zeros((BLOCK_W,), tl.int32)
    for first in range(0, K, IN_FLIGHT):
        places = first + tl.arange(0, IN_FLIGHT)
        row = tl.load(chosen_ptr + sum_ * K + places, mask=places < K, other=0).to(tl.int64)
        present = (places < K)[:, None] & (words < W)[None, :]
        total += tl.sum(tl.load(table_ptr + row[:, None] * W + words[None, :], mask=present, other=0), axis=0)
    tl.store(out_ptr + sum_ * W + words, total, mask=words < W)


def gather_sums(table: torch.Tensor, chosen: torch.Tensor, in_flight: int, warps: int) -> torch.Tensor:
    """(S, W): the sum of the rows of ``table`` that each row of ``chosen`` names."""
    out = table.new_empty(chosen.shape[0], table.shape[1])
    _gather_sums_kernel[(chosen.shape[0],)](
        table, chosen, out, W=table.shape[1], K=chosen.shape[1], BLOCK_W=triton.next_power_of_2(table.shape[1]),
        IN_FLIGHT=in_flight, num_warps=warps,
    )  # fmt: skip
    return out
