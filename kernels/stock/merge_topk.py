"""Row top-k of slabs of latents: entries above the least that a row holds are found by group maxima, and merged."""
import torch
from torch import Tensor

from . import limits
from ._rows import chunk_rows
from .row_topk import topk_columns

GROUP = 32  # latents whose maximum says whether they are looked at
# Candidates are gathered, padded to the row that has most of them, where that takes less than 1/FEW of the slab's
# entries; else the whole slab is merged.
FEW = 4


@torch.no_grad()
def merge_topk(
    values: Tensor, scores: Tensor | None, latents: Tensor, pre: Tensor, score: Tensor | None, mask: Tensor | None,
    first: int, magnitude: bool,
) -> None:
    """As many rows at a time as temporaries may have memory for; see ``reference.merge_topk``."""
    rows, width = pre.shape
    columns = None
    if mask is not None:  # masked entries are left out: what is held ranks no lower than they do, and comes first
        columns = mask[first : first + width].nonzero()[:, 0]
        width = columns.numel()
    if width == 0:
        return
    step = max(limits.MERGED_SCORES // width, 1) if pre.is_cpu else chunk_rows(pre)
    for start in range(0, rows, step):
        some = slice(start, start + step)
        held = [t[some] for t in (values, scores) if t is not None]
        slab = [t[some] if columns is None else t[some].index_select(1, columns) for t in (pre, score) if t is not None]
        _merge(held, latents[some], slab, columns, mask, first, magnitude)


def _merge(
    held: list[Tensor], latents: Tensor, slab: list[Tensor], columns: Tensor | None, mask: Tensor | None, first: int,
    magnitude: bool,
) -> None:
    """``held`` (rows, k) and ``slab`` (rows, C) are values and, where they rank, scores.

    ``columns`` (C,): which columns of the slab these are, where a mask leaves some out.
    """
    allowed = None if mask is None else mask[latents.long()]
    by, held_by = (parts[-1].abs() if magnitude else parts[-1] for parts in (slab, held))
    cut = torch.where(held_by.isnan(), torch.inf, held_by).amin(1, keepdim=True)  # NaN still exceeds it
    if allowed is not None:
        cut = torch.where(allowed.all(1, keepdim=True), cut, torch.nan)  # any number, -Inf too, exceeds what is masked
    row, place = _exceeding(by, cut)
    if row.numel() == 0:
        return
    k, width = latents.shape[1], by.shape[1]
    counts = torch.bincount(row, minlength=len(by))
    rows, counts = counts.nonzero(), counts[counts > 0][:, None]
    present = torch.arange(int(counts.max()), device=by.device) < counts  # (R, most of a row)
    if FEW * present.numel() < by.numel():
        order = (row * width + place).argsort()
        places = torch.zeros_like(present, dtype=torch.int64).masked_scatter_(present, place[order])
    else:
        places = torch.arange(width, device=by.device).expand(len(rows), width)
        present = torch.ones_like(places, dtype=torch.bool)
    found = (places if columns is None else columns[places]) + first
    kept = rows[:, 0]
    among = [torch.cat([h[kept], s[rows, places]], 1) for h, s in zip(held, slab, strict=True)]
    among_by = among[-1].abs() if magnitude else among[-1]
    real = torch.ones_like(latents[kept], dtype=torch.bool) if allowed is None else allowed[kept]
    real = torch.cat([real, present], 1)
    best = topk_columns(among_by.masked_fill(~real, -torch.inf), real, k)
    among.append(torch.cat([latents[kept], found.int()], 1))
    for tensor, merged in zip((*held, latents), among, strict=True):
        tensor[kept] = merged.gather(1, best)


def _exceeding(x: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of ``x`` (rows, C) that exceed ``cut`` (rows, 1), as NaN always does, unordered.

    Group g of some number of them holds columns g, g + number, …, so that maxima run along memory.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    groups = x.shape[1] // GROUP
    row, column = (~(x[:, groups * GROUP :] <= cut)).nonzero().unbind(1)
    if groups == 0:
        return row, column
    grouped = x[:, : groups * GROUP].unflatten(1, (GROUP, groups))
    owner, group = (~(grouped.amax(1) <= cut)).nonzero().unbind(1)
    entry, member = (~(grouped[owner, :, group] <= cut[owner])).nonzero().unbind(1)
    found = member * groups + group[entry]
    return torch.cat([owner[entry], row]), torch.cat([found, column + groups * GROUP])
