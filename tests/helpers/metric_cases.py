"""How results of metrics are compared: sums in fp64, in any order."""

import pytest
import torch

# Sums of n fp64 terms in another order differ by at most n roundings; here n < 2^17 and ratios divide two such sums.
FP64_SUMS = 2**18 * torch.finfo(torch.float64).eps


def assert_close(a, b, tolerance=FP64_SUMS):
    """Nested results agree: numbers to ``tolerance`` (relative), all else exactly."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_close(a[name], b[name], tolerance)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y, tolerance)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance, nan_ok=True)
    else:
        assert a == b
