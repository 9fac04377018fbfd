"""What the learning rate and the weight of sparsity losses are multiplied by, update for update."""
from __future__ import annotations

from .. import _checks as check


def lr_factor(update: int, *, warm_up: int, decay: int, total: int) -> float:
    """A linear rise over the first ``warm_up`` updates to 1, and a linear fall over the last ``decay`` of ``total``.

    The first update has ``1 / warm_up`` and the last ``1 / decay``: none is spent on a rate of 0, which comes with the
    update after the last. Where rise and fall overlap, the smaller factor holds.

    Args:
        update: which one, from 0.
        warm_up, decay: updates; 0 for none.
        total: updates of the whole run.

    Raises:
        TypeError, ValueError: an argument is no int, or negative.

    Example:
        >>> [lr_factor(u, warm_up=2, decay=4, total=8) for u in range(9)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    update, decay, total = (check.count(n, v) for n, v in (("update", update), ("decay", decay), ("total", total)))
    rise = warm_up_factor(update, warm_up)
    return rise if decay == 0 else min(rise, max((total - update) / decay, 0.0))


def warm_up_factor(update: int, steps: int) -> float:
    """``(update + 1) / steps`` over the first ``steps`` updates, then 1: in (0, 1].

    Raises:
        TypeError, ValueError: an argument is no int, or negative.

    Example:
        >>> [warm_up_factor(u, 4) for u in range(5)], warm_up_factor(0, 0)
        ([0.25, 0.5, 0.75, 1.0, 1.0], 1.0)
    """
    update, steps = check.count("update", update), check.count("steps", steps)
    return min((update + 1) / steps, 1.0) if steps else 1.0
