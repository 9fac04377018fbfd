"""Rows as int8: what a dimension has of its own is taken out, and each row then has a scale.

Language models have dimensions that are a hundred times larger than the others, in every row. With one scale a row they
leave nothing of the others; minus its mean and divided by its deviation, each dimension is as large as any. With 254
steps over a row's range the error is that of rounding, whose variance is step² / 12: some 5e-5 of the variance of rows
that are nearly Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LARGEST = 127
# Beside the rows (n, d) int8: what dimensions have, of one shard, and the size of a row's step.
PARTS = {"mean": "F32", "deviation": "F32", "scale": "F16"}


def quantized(rows: Tensor, key: str) -> dict[str, Tensor]:
    """``key`` (n, d) int8, ``mean`` and ``deviation`` (d,) float32, ``scale`` (n,) float16, of finite rows (n, d).

    Example:
        >>> x = torch.randn(1000, 64) * torch.logspace(0, 3, 64) + 5
        >>> found = restored(quantized(x, "rows").__getitem__, "rows")
        >>> fvu = (found - x).square().sum() / (x - x.mean(0)).square().sum()
        >>> bool(fvu < 1e-4)
        True
    """
    mean = rows.double().mean(0).float()
    deviation = (rows - mean).double().square().mean(0).sqrt().float()
    deviation = torch.where(deviation > 0, deviation, 1)  # of what is the same in all rows, nothing is left
    rows = (rows - mean) / deviation
    scale = (rows.abs().amax(1) / LARGEST).half()
    steps = rows / torch.where(scale > 0, scale, 1).float()[:, None]
    steps = steps.round_().clamp_(-LARGEST, LARGEST)
    return {key: steps.to(torch.int8), "mean": mean, "deviation": deviation, "scale": scale}


def restored(part: Callable[[str], Tensor], key: str) -> Tensor:
    """The rows (n, d) float32 of what :func:`quantized` made; ``part`` gives it by name."""
    return part(key).float().mul_(part("scale").float()[:, None]).mul_(part("deviation")).add_(part("mean"))
