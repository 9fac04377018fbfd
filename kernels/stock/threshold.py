"""Thresholds: a comparison of cached rows."""
import torch
from torch import Tensor

from ._rows import compress, places, rows_in_cache


def threshold(pre: Tensor, theta: Tensor, bandwidth: float | None, capacity: int | None, magnitude: bool):
    kept = []
    lower = theta if bandwidth is None else theta - bandwidth / 2
    lower = lower.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # nothing exceeds NaN
    for rows in rows_in_cache(pre):
        keep = ((pre[rows].abs() if magnitude else pre[rows]) <= lower).logical_not_()  # NaN is kept
        kept.append(places(keep, rows.start))
    values, indices, offsets, required = compress(pre, kept, capacity)
    if bandwidth is not None:
        values = torch.where(values <= theta[indices.long()], 0.0, values)
    return values, indices, offsets, required
