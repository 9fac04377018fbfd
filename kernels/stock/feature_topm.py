"""Feature choice: the transposed matrix, some latents at a time."""
import torch
from torch import Tensor

from . import limits
from ._rows import above_and_tied, largest, relu


def _first_of_rows(x: Tensor, counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Row and column of the ``counts[r]`` largest of each row r, ties to the lowest column; ``most`` bounds counts."""
    top, columns = largest(x, min(most + 1, x.shape[1]))  # one more than asked for shows where a row's last one ties
    last = counts[:, None] - 1
    cut = top.gather(1, last)
    after = top.gather(1, (last + 1).clamp(max=top.shape[1] - 1))
    tied = (((after == cut) | cut.isnan()) & (last + 1 < x.shape[1]))[:, 0]
    taken = (torch.arange(top.shape[1], device=x.device) <= last) & ~tied[:, None]
    rows, ranks = taken.nonzero(as_tuple=True)
    whole = tied.nonzero()[:, 0]
    above, equal = above_and_tied(x[whole], cut[whole])
    quota = counts[whole, None] - above.sum(1, keepdim=True)
    again, among = (above | (equal & (equal.cumsum(1, dtype=torch.int32) <= quota))).nonzero(as_tuple=True)
    return torch.cat([rows, whole[again]]), torch.cat([columns[rows, ranks], among])


def feature_topm(pre: Tensor, m: Tensor, total: int):
    """The transposed matrix, some latents at a time: those of like budgets together, as ``topk`` takes one k."""
    rows, num_latents = pre.shape
    positions = [torch.zeros(0, dtype=torch.int64, device=pre.device)]
    budgets = m.clamp(0, rows).long()
    sizes = torch.frexp(budgets.double()).exponent  # 0 for a budget of 0, else its number of bits
    for size in sizes.unique().tolist() if rows else []:
        for latents in (sizes == size).nonzero()[:, 0].split(max(limits.CHUNK_ELEMENTS // rows, 1)) if size else []:
            columns = pre if latents.shape[0] == num_latents else pre[:, latents]
            column, row = _first_of_rows(columns.relu().T.contiguous(), budgets[latents], min((1 << size) - 1, rows))
            positions.append(row * num_latents + latents[column])
    kept = torch.cat(positions).sort().values
    bounds = torch.arange(rows + 1, device=pre.device) * num_latents
    row = kept // num_latents
    indices = kept - row * num_latents
    return relu(pre[row, indices]), indices.int(), torch.searchsorted(kept, bounds)
