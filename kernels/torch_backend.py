"""Every operation in fast stock PyTorch: what a CPU runs. Signatures and meaning are those of ``reference.py``.

Here the product and selections; ``torch_codes.py`` and ``torch_latent_pass.py`` have the rest.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from . import _tuning, torch_norm_match
from ._sixteen_bit import linear_16bit
from ._tuning import CHUNK_ELEMENTS
from .densified import to_dense
from .ops import ops
from .torch_codes import by_latent, decode, decode_backward_values, decode_backward_weight, decode_error, gather
from .torch_latent_pass import latent_adam, latent_gradients

__all__ = [
    "batch_topk", "by_latent", "decode", "decode_backward_values", "decode_backward_weight", "decode_error",
    "feature_topm", "gather", "latent_adam", "latent_gradients", "linear", "linear_16bit", "norm_match", "threshold",
    "to_dense", "topk",
]

BATCH_GROUP = 32  # latents of a group: the k * G candidates and the F / G maxima cost about the same


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """(B, F) in ``dtype``, by default that of ``x`` and ``weight``; 16-bit results are rounded once, after the bias."""
    dtype = x.dtype if dtype is None else dtype
    if x.dtype not in (torch.bfloat16, torch.float16):
        return ops.linear(x, weight, None if bias is None else bias.to(x.dtype)).to(dtype)
    return ops.linear_16bit(x, weight, bias, dtype, "torch")


def _relu(x: Tensor) -> Tensor:
    return torch.where(x <= 0, 0.0, x)


def _chunk_rows(x: Tensor) -> int:
    return max(CHUNK_ELEMENTS // max(x.shape[1], 1), 1)


def _row_chunks(x: Tensor) -> range:
    return range(0, x.shape[0], _chunk_rows(x))


def _rows_in_cache(x: Tensor) -> list[slice]:
    step = max(_tuning.SCORES_IN_CACHE // max(x.shape[1], 1), 1)
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]


def _above_and_tied(x: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of x > cut and x == cut, where NaN equals NaN and exceeds everything else."""
    nan, cut_nan = x.isnan(), cut.isnan()
    return (x > cut) | (nan & ~cut_nan), (x == cut) | (nan & cut_nan)


def _sorts_nan_by_sign(x: Tensor) -> bool:
    """On a GPU long rows are sorted by their bits: a NaN with its sign set comes last there, behind -Inf.

    Where ``torch.topk`` sorts what it has found, that is so of more than 32 entries.
    """
    return not x.is_cpu


def _descending(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in descending order, NaN first, and the columns that they come from."""
    if _sorts_nan_by_sign(x):
        x = x.masked_fill(x.isnan(), torch.nan)
    return x.sort(dim=1, descending=True)


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order, NaN above everything, and their columns."""
    if not _sorts_nan_by_sign(x):
        return x.topk(k)
    top, columns = x.topk(k, sorted=False)  # finding them, a GPU ranks every NaN first
    top, order = _descending(top)
    return top, columns.gather(1, order)


def _resolve_ties(score: Tensor, mask: Tensor | None, cut: Tensor, k: int) -> Tensor:
    """Column indices (rows, k) of the entries above ``cut`` (rows, 1) and the first of those equal to it."""
    kept = []
    for start in _row_chunks(score):
        rows = slice(start, start + _chunk_rows(score))
        above, tied = _above_and_tied(score[rows], cut[rows])
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


def _topk_columns(score: Tensor, mask: Tensor | None, k: int) -> Tensor:
    """Ascending column indices (rows, k); ``mask`` tells masked entries, at -Inf in ``score``, from others at -Inf.

    ``torch.topk`` breaks ties as it likes. It is asked for a few more entries: where the last of them lies below the
    k-th, all that tie with the k-th are among them. Other rows, rare ones, are looked at whole.
    """
    sizes = _tuning.column_groups(score.shape[1], k) if score.is_cpu else ()
    if sizes:
        return _topk_columns_by_groups(score, mask, k, sizes)
    slack = 32 if score.element_size() == 2 else 1  # 16-bit numbers tie a few times a row
    top, columns = _largest(score, min(k + slack, score.shape[1]))
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
    """The same from group maxima. Rows are looked at whole where those leave it open."""
    rows, num_latents = score.shape
    among_groups = _among_groups if score.element_size() > 2 else _among_groups_with_ties
    kept = []
    step = max(_tuning.SCORES_IN_CACHE // num_latents, 1)  # it is read twice
    for start in range(0, rows, step):
        part = score[start : start + step].contiguous()
        columns, certain = among_groups(part, k, sizes)
        if not bool(certain.all()):
            unsure = (~certain).nonzero()[:, 0]
            whole = part[unsure]
            allowed = None if mask is None else mask[start : start + step][unsure]
            columns[unsure] = _resolve_ties(whole, allowed, _kth_of_rows(whole, k), k)
        kept.append(columns)
    columns = kept[0] if len(kept) == 1 else torch.cat([score.new_zeros(0, k, dtype=torch.int64), *kept])
    return columns.sort(dim=1).values


def _in_largest_groups(x: Tensor, number: int, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Entries (rows, n) of the ``number`` groups with the largest maxima, their columns, and what no other exceeds.

    Group g of G holds columns g, g + G, …, so that maxima run along memory. The groups are found as the entries are:
    by groups of their maxima, as often as there are ``sizes``.
    """
    if not sizes:
        return x, torch.arange(x.shape[1], device=x.device).expand(x.shape), x.new_full((x.shape[0],), -torch.inf)
    size, groups = sizes[0], x.shape[1] // sizes[0]
    grouped = x.view(-1, size, groups)
    maxima, columns, bound = _in_largest_groups(grouped.amax(1), number, sizes[1:])
    top, position = maxima.topk(min(number + 1, maxima.shape[1]))
    if top.shape[1] > number:
        bound = torch.maximum(bound, top[:, number])  # NaN, where one is left out
    group = columns.gather(1, position[:, :number])[:, None]
    among = grouped.gather(2, group.expand(-1, size, -1)).flatten(1)
    starts = torch.arange(0, size * groups, groups, device=x.device)
    return among, (group + starts[:, None]).flatten(1), bound


def _among_groups(x: Tensor, k: int, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Columns (rows, k) of the largest entries of ``x`` (rows, F), and whether it is certain that they are.

    It is not where an entry that was left out ties with the k-th, or is NaN.
    """
    among, columns, bound = _in_largest_groups(x, k, sizes)
    top, position = among.topk(k + 1)
    return columns.gather(1, position[:, :k]), top[:, k - 1] > torch.maximum(top[:, k], bound)


def _among_groups_with_ties(x: Tensor, k: int, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The same for 16-bit numbers, of which a few tie with the k-th in most rows: integers rank value, then column.

    A few more groups than k are looked at, so that they hold all that tie.
    """
    among, columns, bound = _in_largest_groups(x, k + 8, sizes)
    bits = (among + 0.0).view(torch.int16).long()  # -0 + 0 is 0
    rank = torch.where(bits < 0, bits ^ 0x7FFF, bits)  # not of NaN: its rows are not certain
    position = (rank * x.shape[1] - columns).topk(k).indices
    cut = among.gather(1, position[:, -1:])[:, 0]
    return columns.gather(1, position), (cut > bound) & ~among.isnan().any(1)


def _topk_columns_among(score: Tensor, mask: Tensor, k: int) -> Tensor:
    """The same where every row masks the same columns (F,): the others are picked out first."""
    eligible = mask.nonzero()[:, 0]
    if eligible.numel() <= k:
        others = (~mask).nonzero()[: k - eligible.numel(), 0]
        return torch.cat([eligible, others]).sort().values.expand(score.shape[0], k)
    kept = [eligible.new_empty(0, k)]
    for start in _row_chunks(score):
        part = score[start : start + _chunk_rows(score), eligible]
        kept.append(eligible[_topk_columns(part, None, k)])
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
        kept = _topk_columns(by, None, k)
    elif mask.dim() == 1 and mask.is_cpu:  # on a CPU, where reading it waits for nothing
        kept = _topk_columns_among(by, mask, k)
    else:
        mask = mask.expand(pre.shape)
        kept = _topk_columns(torch.where(mask, by, -torch.inf), mask, k)
    values = pre.gather(1, kept)
    if apply_relu:
        values.masked_fill_(values <= 0, 0.0)
    if mask is not None:
        values = torch.where(mask.expand(pre.shape).gather(1, kept), values, 0.0)
    return values.flatten(), kept.int().flatten()


def _kth_largest(x: Tensor, k: int) -> Tensor:
    """The k-th largest of a vector, NaN above everything."""
    return x.kthvalue(x.numel() - k + 1).values


def _first_k(x: Tensor, k: int) -> Tensor:
    """Ascending positions of the k largest of a vector, ties to the lowest."""
    above, tied = (mask.nonzero()[:, 0] for mask in _above_and_tied(x, _kth_largest(x, k)))
    return torch.cat([above, tied[: k - above.numel()]]).sort().values


def _first_k_by_groups(flat: Tensor, k: int) -> Tensor | None:
    """``_first_k`` of relu(flat) from group maxima; None where they do not narrow it down."""
    groups = flat.numel() // BATCH_GROUP
    if groups < 4 * k:
        return None
    grouped = flat[: groups * BATCH_GROUP].view(groups, BATCH_GROUP)
    maxima = grouped.amax(1)
    bound = _kth_largest(maxima, k)
    chosen = (~(maxima < bound)).nonzero()[:, 0]  # NaN maxima are chosen
    if bound <= 0 or chosen.numel() > 4 * k:
        return None
    rest = flat[groups * BATCH_GROUP :]
    kept = _first_k(torch.cat([grouped[chosen].flatten(), rest]), k)
    inside = kept < chosen.numel() * BATCH_GROUP
    group = chosen[(kept // BATCH_GROUP).clamp(max=chosen.numel() - 1)]
    return torch.where(
        inside, group * BATCH_GROUP + kept % BATCH_GROUP, kept + (groups - chosen.numel()) * BATCH_GROUP
    )


def batch_topk(pre: Tensor, mask: Tensor | None, total: int):
    """Group maxima bound the candidates, one selection among them finds the cut; ties by flat position."""
    rows, num_latents = pre.shape
    flat = pre if mask is None else torch.where(mask.expand(pre.shape), pre.relu(), -1.0)  # masked: below every relu
    flat = flat.reshape(-1)
    if total in (0, flat.numel()):
        kept = torch.arange(total, device=pre.device)
    else:
        by_groups = _first_k_by_groups(flat, total)
        kept = _first_k(flat.relu() if mask is None else flat, total) if by_groups is None else by_groups
    bounds = torch.arange(rows + 1, device=pre.device) * num_latents
    return _relu(flat[kept]), (kept % max(num_latents, 1)).int(), torch.searchsorted(kept, bounds)


def _first_of_rows(x: Tensor, counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Row and column of the ``counts[r]`` largest of each row r, ties to the lowest column; ``most`` bounds counts."""
    top, columns = _largest(x, min(most + 1, x.shape[1]))  # one more than asked for shows where a row's last one ties
    last = counts[:, None] - 1
    cut = top.gather(1, last)
    after = top.gather(1, (last + 1).clamp(max=top.shape[1] - 1))
    tied = (((after == cut) | cut.isnan()) & (last + 1 < x.shape[1]))[:, 0]
    taken = (torch.arange(top.shape[1], device=x.device) <= last) & ~tied[:, None]
    rows, ranks = taken.nonzero(as_tuple=True)
    whole = tied.nonzero()[:, 0]
    above, equal = _above_and_tied(x[whole], cut[whole])
    quota = counts[whole, None] - above.sum(1, keepdim=True)
    again, among = (above | (equal & (equal.cumsum(1, dtype=torch.int32) <= quota))).nonzero(as_tuple=True)
    return torch.cat([rows, whole[again]]), torch.cat([columns[rows, ranks], among])


def feature_topm(pre: Tensor, m: Tensor, total: int):
    """Latents in chunks, turned around; those with budgets of like size together, since ``topk`` serves the largest."""
    rows, num_latents = pre.shape
    positions = [torch.zeros(0, dtype=torch.int64, device=pre.device)]
    budgets = m.clamp(0, rows).long()
    sizes = torch.frexp(budgets.double()).exponent  # 0 for a budget of 0, else its number of bits
    for size in sizes.unique().tolist() if rows else []:
        for latents in (sizes == size).nonzero()[:, 0].split(max(CHUNK_ELEMENTS // rows, 1)) if size else []:
            columns = pre if latents.shape[0] == num_latents else pre[:, latents]
            column, row = _first_of_rows(columns.relu().T.contiguous(), budgets[latents], min((1 << size) - 1, rows))
            positions.append(row * num_latents + latents[column])
    kept = torch.cat(positions).sort().values
    bounds = torch.arange(rows + 1, device=pre.device) * num_latents
    row = kept // num_latents
    indices = kept - row * num_latents
    return _relu(pre[row, indices]), indices.int(), torch.searchsorted(kept, bounds)


def _places(keep: Tensor, start: int) -> Tensor:
    """(N, 2) row and column of what a chunk's mask keeps; its first row is row ``start`` of the whole."""
    places = keep.nonzero()
    if start:
        places[:, 0] += start
    return places


def _compress(dense: Tensor, kept: list[Tensor], capacity: int | None):
    """Compressed rows from the ``_places`` of chunks of rows, in order."""
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


def _nearest_prefix(ranked: Tensor, target: Tensor) -> Tensor:
    """Length (rows, 1) of the first prefix whose norm is nearest to ``target``; ``ranked`` descends in each row."""
    norms = ranked.double().square().cumsum_(1).sqrt_()
    target = target.double()[:, None]
    beyond = torch.searchsorted(norms, target).clamp(max=ranked.shape[1] - 1)
    distance = lambda at: (norms.gather(1, at) - target).abs()  # noqa: E731
    before = (beyond - 1).clamp(min=0)
    nearest = norms.gather(1, torch.where(distance(before) <= distance(beyond), before, beyond))
    count = torch.searchsorted(norms, nearest) + 1  # the first of a plateau
    first = ~norms[:, -1:].isfinite() | target.isnan()
    count = torch.where(first, 1, count)
    return torch.where(target >= norms[:, -1:], ranked.shape[1], count)


def _kept_of_sorted(score: Tensor, target: Tensor) -> Tensor:
    """Mask of what each row keeps, by one sort of its scores; any scores."""
    ranked, _ = _descending(score)
    count = _nearest_prefix(ranked, target)
    cut = ranked.gather(1, count - 1)
    above, tied = _above_and_tied(score, cut)
    quota = count - above.sum(1, keepdim=True)
    if bool((tied.sum(1, keepdim=True) > quota).any()):
        tied &= tied.cumsum(1, dtype=torch.int32) <= quota
    return (above | tied) & ~(score <= 0)


def norm_match(pre: Tensor, target_norm: Tensor, weight_norm: Tensor | None, capacity: int | None):
    kept = []
    wide = torch.float64 if pre.dtype == torch.float64 else torch.float32
    for rows in _rows_in_cache(pre):
        score, target = pre[rows].contiguous().to(wide).relu(), target_norm[rows]
        if weight_norm is not None:
            score = score * weight_norm.to(wide)
        if wide == torch.float64:
            keep = _kept_of_sorted(score, target)
        else:
            keep, found = torch_norm_match.kept(score, target)
            if not bool(found.all()):
                keep[~found] = _kept_of_sorted(score[~found], target[~found])
        kept.append(_places(keep, rows.start))
    values, *rest = _compress(pre, kept, capacity)
    return values.relu_(), *rest  # an infinite weight makes NaN, which ranks first, of an entry that is not positive


def threshold(pre: Tensor, theta: Tensor, bandwidth: float | None, capacity: int | None):
    kept = []
    lower = theta if bandwidth is None else theta - bandwidth / 2
    lower = lower.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # nothing exceeds NaN
    for rows in _rows_in_cache(pre):
        keep = (pre[rows] <= lower).logical_not_()  # NaN is kept
        kept.append(_places(keep, rows.start))
    values, indices, offsets, required = _compress(pre, kept, capacity)
    if bandwidth is not None:
        values = torch.where(values <= theta[indices.long()], 0.0, values)
    return values, indices, offsets, required
