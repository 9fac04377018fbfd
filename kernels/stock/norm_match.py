"""Prefixes by energy in stock PyTorch: a few passes over cached rows bracket each row's cut; what is left is sorted.

The two criteria, nearest in norm and a share of the row's energy, differ in the energy that is wanted, and in the last
step: which of the prefixes around it is kept.
"""
import torch
from torch import Tensor

from ._rows import above_and_tied, compress, descending, places, rows_in_cache

ROUNDS = 6  # passes that narrow the bracket; of half-normal rows they leave a hundredth of the entries, seldom more
SHARE = 8  # rows of which more than an eighth is left (many tie) are sorted whole
MARGIN = 1e-5  # of an energy: its fp32 sum is nearer to the truth than that
RUN = 64  # squares that are summed in fp32 before fp64 takes over


def _kept_of_bracket(score: Tensor, target: Tensor, is_share: bool = False) -> tuple[Tensor, Tensor]:
    """Mask (rows, F) of what each row of ``score`` (fp32, none below 0) keeps, and whether that was found (rows,).

    Not found: rows whose largest score is not finite or whose target is not positive, and rows with too many ties.
    """
    top = score.amax(1)
    finite = top.isfinite()
    exponent = torch.where(finite, top, 1.0).frexp().exponent.clamp(min=-126)
    scale = torch.ldexp(torch.ones_like(top), -exponent)  # a power of two: squares stay finite, nothing is rounded
    scaled = score * scale[:, None]
    squares = scaled.square()
    total = _energy(squares)
    if is_share:
        wanted, everything = target.double() * total, finite & ((target >= 1) | (total == 0))
    else:
        target = target.double() * scale
        wanted, everything = target.square(), finite & (target >= total.sqrt())
    found = finite & (target > 0) & ~everything
    lo, hi = _bracket(scaled, squares, torch.where(found, wanted, 0.0).float(), top * scale)

    beyond = _at_least(scaled, hi)
    inside = _at_least(scaled, torch.where(found, lo, torch.inf)).sub_(beyond)
    number_beyond, lengths = beyond.sum(1), inside.sum(1)
    found &= lengths * SHARE <= score.shape[1]
    lengths = torch.where(found, lengths, 0.0).long()
    ranked = _ranked(scaled, inside.mul_(found[:, None].float()) != 0, lengths)
    energy_before = _energy(beyond.mul_(squares))
    length, cut = _reaching(ranked, energy_before, wanted) if is_share else _nearest(ranked, energy_before, target)
    count = number_beyond.long() + length
    cut = torch.where(length == 0, hi, cut)
    keep = scaled >= cut[:, None]
    excess = _at_least(scaled, cut, out=inside).sum(1).long() - count
    for row in (found & (excess > 0)).nonzero()[:, 0].tolist():  # ties at the cut go to the lowest index
        tied = (scaled[row] == cut[row]).nonzero()[:, 0]
        keep[row, tied[tied.numel() - int(excess[row]) :]] = False
    keep[everything] = score[everything] > 0
    return keep, found | everything


def _energy(squares: Tensor) -> Tensor:
    """(rows,) fp64 sums."""
    width = squares.shape[1] // RUN * RUN
    runs = squares[:, :width].unflatten(1, (-1, RUN)).sum(2)
    return torch.cat([runs, squares[:, width:]], 1).sum(1, dtype=torch.float64)


def _at_least(x: Tensor, level: Tensor, out: Tensor | None = None) -> Tensor:
    """1 where a row of ``x`` reaches its ``level`` (rows,), else 0.

    Numbers, not truth values: a CPU multiplies and adds them up several times as fast, exactly below 2^24.
    """
    return torch.ge(x, level[:, None], out=torch.empty_like(x) if out is None else out)


def _bracket(scaled: Tensor, squares: Tensor, wanted: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """lo, hi (rows,): from lo up the entries' energy surely reaches ``wanted``, from hi up it surely does not.

    ``top`` are the rows' largest scores. By false position; an end that stays put twice counts half (the Illinois
    rule), so that both ends close in.
    """
    energies = torch.empty_like(scaled)
    lo, hi = torch.zeros_like(top), torch.full_like(top, torch.inf)
    excess, lack = squares.sum(1) - wanted, wanted.clone()  # of energy at lo and hi
    for number in range(ROUNDS):
        most = torch.minimum(hi, top)
        if number == 1:
            middle = (torch.maximum(lo, most / 64) * most).sqrt()  # in orders of magnitude: some rows have long tails
        elif number == 2:
            middle = (lo + most) / 2
        else:
            middle = most - (most - lo) * (lack / (excess + lack)).clamp(0.01, 0.99)
        energy = _at_least(scaled, middle, out=energies).mul_(squares).sum(1)
        reaches, fails = energy >= wanted * (1 + MARGIN), energy <= wanted * (1 - MARGIN)
        lo, hi = torch.where(reaches, middle, lo), torch.where(fails, middle, hi)
        excess = torch.where(reaches, energy - wanted, excess / 2)
        lack = torch.where(fails, wanted - energy, lack / 2)
    return lo, hi


def _ranked(scaled: Tensor, inside: Tensor, lengths: Tensor) -> Tensor:
    """(rows, n) each row's entries under the mask, ``lengths`` of them, in descending order, then zeros."""
    row, column = inside.nonzero().unbind(1)
    place = torch.arange(row.shape[0], device=row.device) - (lengths.cumsum(0) - lengths)[row]
    ranked = scaled.new_zeros(scaled.shape[0], max(int(lengths.max()), 1))
    ranked[row, place] = scaled[row, column]
    return ranked.sort(1, descending=True).values


def _nearest(ranked: Tensor, energy_before: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """How many entries of ``ranked``, after those of ``energy_before``, end nearest to ``target``; the last of them."""
    norms = (energy_before[:, None] + ranked.double().square().cumsum(1)).sqrt_()
    norms = torch.cat([energy_before.sqrt()[:, None], norms], 1)
    crossing = torch.searchsorted(norms, target[:, None]).clamp(1, ranked.shape[1])
    distance = lambda at: (norms.gather(1, at) - target[:, None]).abs()  # noqa: E731
    is_before = distance(crossing - 1) <= distance(crossing)
    is_before &= (crossing > 1) | (energy_before > 0)[:, None]  # one entry at least
    nearest = norms.gather(1, crossing - is_before.long())
    length = torch.searchsorted(norms, nearest).clamp(max=ranked.shape[1])  # the first of a plateau; NaN has none
    return length[:, 0], ranked.gather(1, (length - 1).clamp(min=0))[:, 0]


def _reaching(ranked: Tensor, energy_before: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """How many entries of ``ranked``, after those of ``energy_before``, reach ``wanted``; the last of them."""
    energies = energy_before[:, None] + ranked.double().square().cumsum_(1)
    length = torch.searchsorted(energies, wanted[:, None]).add_(1).clamp_(max=ranked.shape[1])
    return length[:, 0], ranked.gather(1, length - 1)[:, 0]


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


def _reaching_prefix(ranked: Tensor, share: Tensor) -> Tensor:
    """Length (rows, 1) of the first prefix whose energy is this share of the row's; ``ranked`` descends in each row."""
    energies, share = ranked.double().square().cumsum_(1), share.double()[:, None]
    count = torch.searchsorted(energies, share * energies[:, -1:]).add_(1).clamp_(max=ranked.shape[1])
    count = torch.where(share >= 1, ranked.shape[1], count)
    return torch.where(ranked[:, :1].isfinite() & (share > 0), count, 1)


def _kept_of_sorted(score: Tensor, target: Tensor, is_share: bool) -> Tensor:
    """Mask of what each row keeps, by one sort of its scores; any scores."""
    ranked, _ = descending(score)
    count = _reaching_prefix(ranked, target) if is_share else _nearest_prefix(ranked, target)
    cut = ranked.gather(1, count - 1)
    above, tied = above_and_tied(score, cut)
    quota = count - above.sum(1, keepdim=True)
    if bool((tied.sum(1, keepdim=True) > quota).any()):
        tied &= tied.cumsum(1, dtype=torch.int32) <= quota
    return (above | tied) & ~(score <= 0)


def norm_match(pre: Tensor, target: Tensor, weight_norm: Tensor | None, is_share: bool, capacity: int | None):
    kept = []
    wide = torch.float64 if pre.dtype == torch.float64 else torch.float32
    for rows in rows_in_cache(pre):
        score, goal = pre[rows].contiguous().to(wide).relu(), target[rows]
        if weight_norm is not None:
            score = score * weight_norm.to(wide)
        if wide == torch.float64:
            keep = _kept_of_sorted(score, goal, is_share)
        else:
            keep, found = _kept_of_bracket(score, goal, is_share)
            if not bool(found.all()):
                keep[~found] = _kept_of_sorted(score[~found], goal[~found], is_share)
        kept.append(places(keep, rows.start))
    values, *rest = compress(pre, kept, capacity)
    return values.relu_(), *rest  # an infinite weight makes NaN, which ranks first, of an entry that is not positive
