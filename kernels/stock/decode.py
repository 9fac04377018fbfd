"""Sums of decoder rows by ``embedding_bag``, which sums 16-bit rows in fp32 and rounds once."""
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import densified, limits
from .densified import error_of

SUM = 0  # embedding_bag's mode, by number


def wide_of(*tensors: Tensor) -> torch.dtype:
    """What products of the tensors are summed in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def bags(weights: Tensor, indices: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """Weighted sums of table rows, one a bag, in new memory. Entries after the last bag belong to none."""
    bags, ends = offsets.numel() - 1, offsets
    if offsets.is_cpu:
        owned = int(offsets[-1])
        weights, indices = weights[:owned], indices[:owned]
    else:  # without reading the device: a last bag takes the entries that belong to no row, and is cut off
        ends = F.pad(offsets, (0, 1), value=indices.numel())
    return full_bags(weights, indices, ends.to(indices.dtype), table)[:bags]


def full_bags(weights: Tensor, indices: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """The same where every entry has a bag, and ``offsets`` the dtype of ``indices``."""
    if indices.numel() == 0 or table.shape[0] == 0:
        return table.new_zeros(offsets.numel() - 1, table.shape[1])
    return torch.embedding_bag(table, indices, offsets, False, SUM, False, weights, True)[0]


def widened(weight: Tensor, indices: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """``weight`` in a wider ``dtype``, some columns at a time: the columns, a table of them, the entries' rows in it.

    To a CPU, a copy of the whole matrix would take longer than the sums; that of a few columns stays in the cache while
    they are summed. A GPU may lack the room. Where there are fewer entries than latents, it holds their rows alone.
    """
    few = indices.numel() < weight.shape[0]
    rows = indices.numel() if few else weight.shape[0]
    at = torch.arange(rows, dtype=indices.dtype, device=indices.device) if few else indices
    most = limits.SCORES_IN_CACHE if weight.is_cpu else limits.WIDE_ELEMENTS["cuda"]
    width = max(most // max(rows, 1), 32)  # 32 numbers of 16 bits fill a cache line
    table = weight.new_empty(0, dtype=dtype)
    for start in range(0, weight.shape[1], width):
        columns = slice(start, min(start + width, weight.shape[1]))
        part = weight[:, columns]
        table = table.resize_(rows, part.shape[1]).copy_(part[indices] if few else part)
        yield columns, table, at


def decode(values, indices, offsets, weight, bias, dtype, *_by_latent):
    """``embedding_bag``, which sums 16-bit rows in fp32 and rounds once; in fp32 where more is to come than that."""
    if bias is None and values.dtype == weight.dtype == dtype:
        return bags(values, indices, offsets, weight)
    wide = wide_of(values, weight)
    values, bias = values.to(wide), None if bias is None else bias.to(wide)
    if weight.dtype == wide:
        out = bags(values, indices, offsets, weight)
        return (out if bias is None else out.add_(bias)).to(dtype)
    out = weight.new_empty(offsets.numel() - 1, weight.shape[1], dtype=dtype)
    for columns, table, at in widened(weight, indices, wide):
        part = bags(values, at, offsets, table)
        out[:, columns] = part if bias is None else part.add_(bias[columns])
    return out


def decode_error(values, indices, offsets, weight, bias, target, dtype):
    out = decode(values, indices, offsets, weight, None, wide_of(values, weight))
    return error_of(out, bias, target, dtype)


def decode_sources(values, indices, offsets, weights, firsts, width, bias, target, dtype):
    return densified.added_sources(decode, values, indices, offsets, weights, firsts, width, bias, target, dtype)
