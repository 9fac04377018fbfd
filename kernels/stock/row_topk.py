"""Row top-k: ``torch.topk`` finds the entries; only rows whose k-th and (k + 1)-th tie need a second look."""
import torch
from torch import Tensor

from . import limits
from ._rows import above_and_tied, chunk_rows, largest, row_chunks


def _resolve_ties(score: Tensor, mask: Tensor | None, cut: Tensor, k: int) -> Tensor:
    """Column indices (rows, k) of the entries above ``cut`` (rows, 1) and the first of those equal to it."""
    kept = []
    for start in row_chunks(score):
        rows = slice(start, start + chunk_rows(score))
        above, tied = above_and_tied(score[rows], cut[rows])
        quota = k - above.sum(1, keepdim=True)
        if mask is None:
            first = tied & (tied.cumsum(1, dtype=torch.int32) <= quota)
        else:  # masked entries tie with -Inf, yet rank below it
            real, masked = tied & mask[rows], tied & ~mask[rows]
            left = quota - real.sum(1, keepdim=True)
            first = (real & (real.cumsum(1, dtype=torch.int32) <= quota)) | (
                masked & (masked.cumsum(1, dtype=torch.int32) <= left)
            )
        kept.append((above | first).nonzero()[:, 1].view(-1, k))
    return torch.cat(kept)


def topk_columns(score: Tensor, mask: Tensor | None, k: int) -> Tensor:
    """Ascending column indices (rows, k); ``mask`` tells masked entries, at -Inf in ``score``, from others at -Inf.

    ``torch.topk`` breaks ties as it likes. It is asked for a few more entries: where the last of them lies below the
    k-th, all that tie with the k-th are among them. Other rows, rare ones, are looked at whole.
    """
    sizes = limits.column_groups(score.shape[1], k) if score.is_cpu else ()
    if sizes:
        return _topk_columns_by_groups(score, mask, k, sizes)
    slack = 32 if score.element_size() == 2 else 1  # 16-bit numbers tie a few times a row
    top, columns = largest(score, min(k + slack, score.shape[1]))
    cut = top[:, k - 1 : k]
    kept = columns[:, :k]
    tied = ((top[:, k - 1] == top[:, k]) | top[:, k].isnan()).nonzero()[:, 0]
    if tied.numel():
        open_ended = (top[:, -1:] == cut) | top[:, -1:].isnan() | (cut == -torch.inf)
        whole, short = tied[open_ended[tied, 0]], tied[~open_ended[tied, 0]]
        kept = kept.clone()
        if short.numel():
            among, order = columns[short].sort(dim=1)
            first = _resolve_ties(top[short].gather(1, order), None, cut[short], k)
            kept[short] = among.gather(1, first)
        if whole.numel():
            kept[whole] = _resolve_ties(score[whole], None if mask is None else mask[whole], cut[whole], k)
    return kept.sort(dim=1).values


def _topk_columns_by_groups(score: Tensor, mask: Tensor | None, k: int, sizes: tuple[int, ...]) -> Tensor:
    """The same from group maxima. Rows are looked at whole where those leave it open.

    As many rows at once as temporaries may have memory for: a CPU's threads share the rows, and PyTorch wakes no thread
    for fewer than a hundred.
    """
    among_groups = _among_groups if score.element_size() > 2 else _among_groups_with_ties
    kept = [score.new_zeros(0, k, dtype=torch.int64)]
    for start in row_chunks(score):
        rows = slice(start, start + chunk_rows(score))
        part = score[rows].contiguous()
        columns, certain = among_groups(part, k, sizes)
        if not bool(certain.all()):
            unsure = (~certain).nonzero()[:, 0]
            whole, allowed = part[unsure], None if mask is None else mask[rows][unsure]
            columns[unsure] = _resolve_ties(whole, allowed, _kth_of_rows(whole, k), k)
        kept.append(columns)
    return torch.cat(kept).sort(dim=1).values


def _in_largest_groups(x: Tensor, number: int, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Entries (rows, n) of the ``number`` groups with the largest maxima, their columns, and what no other exceeds.

    Group g of G holds columns g, g + G, …, so that maxima run along memory. The groups are found as the entries are:
    by groups of their maxima, as often as there are ``sizes``. They come unsorted, which takes half the time.
    """
    if not sizes:
        return x, torch.arange(x.shape[1], device=x.device).expand(x.shape), x.new_full((x.shape[0],), -torch.inf)
    size, groups = sizes[0], x.shape[1] // sizes[0]
    grouped = x.view(-1, size, groups)
    maxima, columns, bound = _in_largest_groups(grouped.amax(1), number, sizes[1:])
    top, position = maxima.topk(min(number, maxima.shape[1]), sorted=False)
    if top.shape[1] < maxima.shape[1]:
        bound = torch.maximum(bound, top.amin(1))  # NaN, where one may be left out
    group = columns.gather(1, position)[:, None]
    among = grouped.gather(2, group.expand(-1, size, -1)).flatten(1)
    starts = torch.arange(0, size * groups, groups, device=x.device)
    return among, (group + starts[:, None]).flatten(1), bound


def _among_groups(x: Tensor, k: int, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Columns (rows, k) of the largest entries of ``x`` (rows, F), unsorted, and whether it is certain that they are.

    It is not certain where an entry that was left out ties with the k-th, or is NaN. One group more than k is looked
    at: the least of their maxima then lies below the k-th entry unless they tie.
    """
    among, columns, bound = _in_largest_groups(x, k + 1, sizes)
    top, position = among.topk(k, sorted=False)
    cut = top.amin(1)
    alone = (among >= cut[:, None]).sum(1) == k
    return columns.gather(1, position), alone & (cut > bound)


def _among_groups_with_ties(x: Tensor, k: int, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The same for 16-bit numbers, of which a few tie with the k-th in most rows: integers rank value, then column.

    A few more groups than k are looked at, so that they hold all that tie.
    """
    among, columns, bound = _in_largest_groups(x, k + 9, sizes)
    bits = (among + 0.0).view(torch.int16).long()  # -0 + 0 is 0
    rank = torch.where(bits < 0, bits ^ 0x7FFF, bits)  # not of NaN: its rows are not certain
    position = (rank * x.shape[1] - columns).topk(k, sorted=False).indices
    kept = among.gather(1, position)
    return columns.gather(1, position), (kept.amin(1) > bound) & ~among.isnan().any(1)


def _topk_columns_among(score: Tensor, mask: Tensor, k: int) -> Tensor:
    """The same where every row masks the same columns (F,): the others are picked out first."""
    eligible = mask.nonzero()[:, 0]
    if eligible.numel() <= k:
        others = (~mask).nonzero()[: k - eligible.numel(), 0]
        return torch.cat([eligible, others]).sort().values.expand(score.shape[0], k)
    kept = [eligible.new_empty(0, k)]
    for start in row_chunks(score):
        part = score[start : start + chunk_rows(score), eligible]
        kept.append(eligible[topk_columns(part, None, k)])
    return torch.cat(kept)


def _kth_of_rows(x: Tensor, k: int) -> Tensor:
    """(rows, 1) the k-th largest of each row, NaN above everything."""
    return x.topk(k).values[:, -1:]


def topk(pre: Tensor, score: Tensor | None, mask: Tensor | None, k: int, magnitude: bool, apply_relu: bool):
    """``torch.topk`` finds the entries; only rows whose k-th and (k + 1)-th tie need a second look."""
    rows, num_latents = pre.shape
    by = pre.abs() if magnitude else pre if score is None else score
    if k == num_latents:
        kept = torch.arange(k, device=pre.device).expand(rows, k)
    elif mask is None:
        kept = topk_columns(by, None, k)
    elif mask.dim() == 1 and mask.is_cpu:  # on a CPU, where reading it waits for nothing
        kept = _topk_columns_among(by, mask, k)
    else:
        mask = mask.expand(pre.shape)
        kept = topk_columns(torch.where(mask, by, -torch.inf), mask, k)
    values = pre.gather(1, kept)
    if apply_relu:
        values.masked_fill_(values <= 0, 0.0)
    if mask is not None:
        values = torch.where(mask.expand(pre.shape).gather(1, kept), values, 0.0)
    return values.flatten(), kept.int().flatten()
