"""200 steps of TrainStep on real activations follow dense PyTorch's, from the same start on the same batches."""

from dataclasses import replace

import curve
import pytest
import torch

STEPS = 200
ROUNDING = 64 * torch.finfo(torch.float32).eps  # of a mean of B * d squares: a few of each partial sum


def furthest(a, b):
    return max(abs(x - y) / y for x, y in zip(a, b, strict=True))


@pytest.mark.slow
def test_the_loss_curve_is_that_of_dense_pytorch():
    x, _ = curve.activations(4096, torch.device("cpu"))
    found = list(curve.curves(x, replace(curve.CASE, B=64), STEPS, nearby=2))
    (_, _, ours), (_, _, dense), *nearby = found
    assert [name for name, *_ in found] == [curve.OURS, curve.DENSE, curve.NEARBY, curve.NEARBY]
    assert dense[-1] < dense[0] / 3
    assert furthest(ours[:10], dense[:10]) < ROUNDING
    # Later an entry at the cut goes the other way, and Adam carries that on. How far apart that drives two right
    # runs, dense ones show that start a few roundings away; CONTRIBUTING's factor of 2, plus a rounding.
    drift = max(furthest(errors, dense) for _, _, errors in nearby)
    assert furthest(ours, dense) <= 2 * drift + ROUNDING
