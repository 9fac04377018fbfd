"""Batch top-k: group maxima bound the candidates, one selection among them finds the cut."""
import torch
from torch import Tensor

from ._rows import above_and_tied, relu

SAMPLED = 17  # of so many maxima one is looked at first; odd, so that they lie in all columns of groups
GROUP = 32  # latents of a group: the k * G candidates and the F / G maxima cost about the same


def _kth_largest(x: Tensor, k: int) -> Tensor:
    """The k-th largest of a vector, NaN above everything."""
    return x.kthvalue(x.numel() - k + 1).values


def _first_k(x: Tensor, k: int) -> Tensor:
    """Ascending positions of the k largest of a vector, ties to the lowest."""
    above, tied = (mask.nonzero()[:, 0] for mask in above_and_tied(x, _kth_largest(x, k)))
    return torch.cat([above, tied[: k - above.numel()]]).sort().values


def _first_k_by_groups(flat: Tensor, k: int) -> Tensor | None:
    """``_first_k`` of relu(flat) from group maxima; None where they do not narrow it down."""
    groups = flat.numel() // GROUP
    if groups < 4 * k:
        return None
    grouped = flat[: groups * GROUP].view(groups, GROUP)
    maxima = grouped.amax(1)
    bound, chosen = _reached_by(maxima, k)
    if bound <= 0 or chosen.numel() > 4 * k:
        return None
    offered = torch.cat([grouped.index_select(0, chosen).flatten(), flat[groups * GROUP :]])
    candidates = (~(offered < bound)).nonzero()[:, 0]  # k of them or a few more: each group is there for one at least
    kept = candidates[_first_k(offered[candidates], k)]
    inside = kept < chosen.numel() * GROUP
    group = chosen[(kept // GROUP).clamp(max=chosen.numel() - 1)]
    return torch.where(
        inside, group * GROUP + kept % GROUP, kept + (groups - chosen.numel()) * GROUP
    )


def _reached_by(maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A bound that k groups' maxima reach, or a few more, and ascending which. NaN reaches every bound.

    Any such bound leaves the same entries in the end. A sample's takes a tenth of the time that the k-th largest of
    all takes; what is a few deviations too low for its share is seldom too high, and where it is, all are looked at.
    """
    if k >= 256 * SAMPLED:
        expected = k / SAMPLED
        bound = _kth_largest(maxima[::SAMPLED], int(expected + 4 * expected**0.5))
        chosen = (~(maxima < bound)).nonzero()[:, 0]
        if bound > 0 and k <= chosen.numel() <= 2 * k:
            return bound, chosen
    bound = _kth_largest(maxima, k)
    return bound, (~(maxima < bound)).nonzero()[:, 0]


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
    return relu(flat.index_select(0, kept)), (kept % max(num_latents, 1)).int(), torch.searchsorted(kept, bounds)
