"""What selections in stock PyTorch share: rows by value, masks around a cut, compressed rows from masks."""
import torch
import torch.nn.functional as F
from torch import Tensor

from . import limits


def relu(x: Tensor) -> Tensor:
    return torch.where(x <= 0, 0.0, x)


def chunk_rows(x: Tensor) -> int:
    return max(limits.CHUNK_ELEMENTS // max(x.shape[1], 1), 1)


def row_chunks(x: Tensor) -> range:
    return range(0, x.shape[0], chunk_rows(x))


def rows_in_cache(x: Tensor) -> list[slice]:
    step = max(limits.SCORES_IN_CACHE // max(x.shape[1], 1), 1)
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]


def above_and_tied(x: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of x > cut and x == cut, where NaN equals NaN and exceeds everything else."""
    nan, cut_nan = x.isnan(), cut.isnan()
    return (x > cut) | (nan & ~cut_nan), (x == cut) | (nan & cut_nan)


def sorts_nan_by_sign(x: Tensor) -> bool:
    """On a GPU long rows are sorted by their bits: a NaN with its sign set comes last there, behind -Inf.

    Where ``torch.topk`` sorts what it has found, that is so of more than 32 entries.
    """
    return not x.is_cpu


def descending(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in descending order, NaN first, and the columns that they come from."""
    if sorts_nan_by_sign(x):
        x = x.masked_fill(x.isnan(), torch.nan)
    return x.sort(dim=1, descending=True)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order, NaN above everything, and their columns."""
    if not sorts_nan_by_sign(x):
        return x.topk(k)
    top, columns = x.topk(k, sorted=False)  # finding them, a GPU ranks every NaN first
    top, order = descending(top)
    return top, columns.gather(1, order)


def places(keep: Tensor, start: int) -> Tensor:
    """(N, 2) row and column of what a chunk's mask keeps; its first row is row ``start`` of the whole."""
    places = keep.nonzero()
    if start:
        places[:, 0] += start
    return places


def compress(dense: Tensor, kept: list[Tensor], capacity: int | None):
    """Compressed rows from the ``places`` of chunks of rows, in order."""
    places = kept[0] if len(kept) == 1 else torch.cat([dense.new_zeros(0, 2, dtype=torch.int64), *kept])
    row, column = places.unbind(1)
    offsets = torch.searchsorted(row.contiguous(), torch.arange(dense.shape[0] + 1, device=dense.device))
    required = offsets[-1].clone()
    if capacity is not None:
        row, column = row[:capacity], column[:capacity]
    values, indices = dense[row, column], column.int()
    if capacity is not None:
        extra = (0, capacity - row.numel())
        values, indices, offsets = F.pad(values, extra), F.pad(indices, extra), offsets.clamp(max=capacity)
    return values, indices, offsets, required
