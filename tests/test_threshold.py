"""functional.threshold and its kernels: entries above theta, NaN included, with and without a window."""
from itertools import product

import pytest
import torch

from sae_engine import functional as f
from sae_engine.testing import HARD_KINDS, assert_same, make_pre
from sae_kernels.dispatch import interprets_triton
from sae_kernels.ops import ops

FAST = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_definition(dtype, backend):
    for kind in HARD_KINDS:
        pre = make_pre(kind, (3, 210), dtype)
        theta = torch.rand(210)
        codes = f.threshold(pre, theta, backend=backend)
        kept = (pre.float() > theta) | pre.isnan()
        assert_same(codes.to_dense(), torch.where(kept, pre, 0.0))
        assert torch.equal(codes.offsets.diff(), kept.sum(1)) and torch.equal(codes.indices, kept.nonzero()[:, 1].int())


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitude_matches_definition(dtype, backend):
    """Signs stay; a threshold below 0 keeps everything, and one of 0 everything but zeros; 205 is no whole tile."""
    for kind in HARD_KINDS:
        pre = make_pre(kind, (3, 205), dtype)
        theta = torch.rand(205)
        theta[:2] = torch.tensor([-1.0, 0.0])
        codes = f.threshold(pre, theta, magnitude=True, backend=backend)
        kept = (pre.float().abs() > theta) | pre.isnan()
        assert_same(codes.to_dense(), torch.where(kept, pre, 0.0))
        assert torch.equal(codes.offsets.diff(), kept.sum(1)) and torch.equal(codes.indices, kept.nonzero()[:, 1].int())


def test_magnitude_passes_the_gradient_to_what_is_kept():
    pre = torch.tensor([[-2.0, 1.0, 0.5, -0.5]], requires_grad=True)
    (f.threshold(pre, 0.75, magnitude=True).to_dense() * torch.tensor([3.0, 5.0, 7.0, 9.0])).sum().backward()
    assert pre.grad.tolist() == [[3.0, 5.0, 0.0, 0.0]]


def test_magnitude_has_no_bandwidth():
    with pytest.raises(ValueError, match=r"bandwidth must be None with magnitude=True, got 0\.5"):
        f.threshold(torch.zeros(1, 4), 0.0, magnitude=True, bandwidth=0.5)
    with pytest.raises(TypeError, match="magnitude"):
        f.threshold(torch.zeros(1, 4), 0.0, magnitude="yes")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 200), (1, 1), (2, 37), (2, 2500), (0, 10)], ids=str)
def test_equals_reference_on_hard_rows(shape, dtype, backend):
    kinds = HARD_KINDS
    if dtype == torch.float16 and backend == "triton" and interprets_triton():  # slowly: fp16 is read as bf16 is
        kinds = ("normal", "special", "nan")
    for number, kind in enumerate(kinds):
        pre = make_pre(kind, shape, dtype)
        theta, capacities = torch.rand(shape[1]), (None, 3, pre.numel() + 2)
        cases = [*product((None, 0.5), capacities, (False,)), *product((None,), capacities, (True,))]
        if backend == "triton" and interprets_triton():  # slowly: with and without a bandwidth, one capacity in turn
            cases = [(None, capacities[number % 3], number % 2 == 0), (0.5, capacities[(number + 1) % 3], False)]
        for case in cases:
            args = (pre, theta, *case)
            assert_same(ops.threshold(*args, backend), ops.threshold(*args, "reference"))


@pytest.mark.emulated
@pytest.mark.parametrize("shape", [(300, 2), (2, 20000)], ids=["many rows", "rows in segments"])
def test_kernel_finds_places_across_rows_and_segments(shape):
    """Sums of counts over more rows than are summed at once; several programs a row, several tiles each."""
    pre = make_pre("normal", shape)
    pre[0, shape[1] // 2 :] += 2  # dense from here on
    kept = int((pre > 1.5).sum())
    for capacity in (None, kept - 7, kept + 900):
        args = pre, torch.full((shape[1],), 1.5), None, capacity, False
        assert_same(ops.threshold(*args, "triton"), ops.threshold(*args, "reference"))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_window_stores_the_dropped_half_as_zero(backend):
    codes = f.threshold(torch.tensor([[0.4, 0.48, 0.6]]), 0.5, bandwidth=0.1, backend=backend)
    assert codes.indices.tolist() == [1, 2]
    assert torch.equal(codes.values, torch.tensor([0.0, 0.6])) and codes.l0.tolist() == [1]


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_float64_theta_is_compared_exactly(backend):
    above = torch.tensor(0.1).nextafter(torch.tensor(1.0))
    pre = torch.stack([torch.tensor(0.1), above])[None]
    theta = torch.tensor((float(pre[0, 0]) + float(above)) / 2 + 1e-12, dtype=torch.float64)  # rounds up to `above`
    assert theta.float() == above
    assert f.threshold(pre, theta, backend=backend).indices.tolist() == [1]


@pytest.mark.parametrize("backend", FAST)
def test_gradients_of_pre_and_theta(backend):
    bandwidth = 0.6
    pre, weight = torch.randn(5, 30), torch.randn(5, 30)
    theta = torch.rand(30) * 0.5
    grads = []
    for run in (backend, "by hand"):
        p, t = pre.clone().requires_grad_(), theta.clone().requires_grad_()
        if run == backend:
            (f.threshold(p, t, bandwidth=bandwidth, backend=backend).to_dense() * weight).sum().backward()
            grads.append((p.grad, t.grad))
        else:
            window = (pre - theta).abs() < bandwidth / 2
            grads.append((weight * (pre > theta), -(theta / bandwidth) * (weight * window).sum(0)))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1])  # a sum of 5 in another order
    assert grads[0][1].abs().sum() > 0


@pytest.mark.parametrize("backend", FAST)
def test_theta_gradient_of_a_window_narrower_than_theta_resolves(backend):
    theta = torch.full((4,), 2e4, requires_grad=True)
    pre = torch.full((3, 4), 2e4)
    f.threshold(pre, theta, bandwidth=1e-3, backend=backend).to_dense().sum().backward()
    assert theta.grad.isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_scalar_theta_tensor_learns_too(backend):
    theta = torch.tensor(0.2, requires_grad=True)
    f.threshold(torch.randn(4, 50), theta, bandwidth=0.5, backend=backend).values.sum().backward()
    assert theta.grad.shape == () and theta.grad != 0


def test_gradcheck():
    pre = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: f.threshold(p, 0.3).to_dense(), (pre,))


@pytest.mark.sanitizer
def test_small_and_complete():
    pre, theta = make_pre("special", (2, 300), torch.bfloat16), torch.rand(300)
    for args in ((pre, theta, 0.2, 700, False), (pre, theta, None, 700, True)):
        assert_same(ops.threshold(*args, "triton"), ops.threshold(*args, "reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_production_shape(dtype):
    pre, theta = torch.randn(256, 32768, device="cuda").to(dtype), torch.rand(32768, device="cuda") + 2
    for magnitude in (False, True):
        args = pre, theta, None, None, magnitude
        assert_same(ops.threshold(*args, "triton"), ops.threshold(*args, "reference"))


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"theta": torch.ones(9)}, "theta"),
        ({"theta": torch.ones(10, dtype=torch.int64)}, "theta"),
        ({"theta": "1"}, "theta"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"bandwidth": -1}, "bandwidth"),
        ({"bandwidth": "wide"}, "bandwidth"),
        ({"capacity": True}, "capacity"),
    ],
)
def test_arguments_are_checked(kwargs, name):
    with pytest.raises((ValueError, TypeError), match=name):
        f.threshold(torch.randn(2, 10), **{"theta": 0.5, **kwargs})
