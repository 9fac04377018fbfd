"""Every selection against the reference, bit for bit, on drawn shapes, strides, dtypes, ties and special values.

2,800 cases on the torch back end and DRAWN_CASES (30) of each selection in Triton's interpreter, the same ones on every
run.
"""
import math
import os
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_engine import functional as f
from sae_engine.testing import assert_same

# NumPy, on which the interpreter stands, warns where floating point overflows as it should.
pytestmark = pytest.mark.filterwarnings(*(f"ignore:{what} encountered:RuntimeWarning" for what in (
    "overflow", "underflow", "invalid value", "divide by zero")))  # fmt: skip
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would compile every case anew")
BACKENDS = [pytest.param("torch", 400, id="torch"), pytest.param(
    "triton", int(os.environ.get("DRAWN_CASES", "30")), id="triton", marks=INTERPRETED)]  # fmt: skip
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan, 0.5, 2.0]),
    st.sampled_from([1e-45, -1e-45, 1.2e-38, 3e38, -3e38, 65504.0, 6e-8, 1 + 2**-7, 1 + 2**-10]),  # where dtypes end
    st.floats(width=32),
)


def on_drawn_cases(check):
    """``check(data, backend)`` as a test of so many drawn cases on each back end."""

    @pytest.mark.parametrize(("backend", "number"), BACKENDS)
    def test(backend, number):
        @settings(
            max_examples=number, derandomize=True, database=None, deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        )  # fmt: skip
        @given(st.data())
        def of_one_case(data):
            check(data, backend)

        of_one_case()

    return test


@st.composite
def tensors(draw, shape, dtype):
    """Entries from a few numbers, so that ties abound, or all different; a quarter of the time not contiguous."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layout = draw(st.sampled_from(["contiguous"] * 4 + ["transposed", "every other", "offset", "expanded"]))
    size = list(shape)
    if layout == "transposed":
        size = size[::-1]
    elif layout == "every other":
        size[-1] *= 2
    elif layout == "offset":
        size[-1] += 3
    elif layout == "expanded":
        size[0] = min(size[0], 1)
    if draw(st.booleans()):
        few = torch.tensor(draw(st.lists(NUMBERS, min_size=1, max_size=6)), dtype=torch.float64)
        x = few[torch.randint(len(few), size, generator=rng)]
    else:
        x = torch.randn(size, generator=rng, dtype=torch.float64)
    x = x.to(dtype)
    if layout == "transposed":
        x = x.permute(*range(x.dim())[::-1])
    elif layout == "every other":
        x = x[..., ::2]
    elif layout == "offset":
        x = x[..., 3:]
    return x.expand(shape) if layout == "expanded" and shape[0] != 0 else x.reshape(shape) if x.shape != shape else x


@st.composite
def matrices(draw, backend):
    """(*batch_shape, F) pre-activations."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16] + [torch.float64] * (backend == "torch")
    most_latents, most_rows = (200, 5) if backend == "torch" else (130, 2)
    latents = draw(st.one_of(st.integers(1, 20), st.integers(1, most_latents)))
    batch = draw(st.lists(st.integers(0, most_rows), min_size=0, max_size=2 if backend == "torch" else 1))
    return draw(tensors((*batch, latents), draw(st.sampled_from(dtypes))))


@st.composite
def masks(draw, pre):
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.sampled_from([pre.shape, pre.shape[-1:]]))
    return torch.rand(shape, generator=rng) < draw(st.sampled_from([0.0, 0.05, 0.5, 0.9]))


def counts(pre):
    return st.one_of(st.integers(1, min(8, pre.shape[-1])), st.integers(1, pre.shape[-1]))


def agree(select, backend, *args, **kwargs):
    got, expected = (select(*args, **kwargs, backend=b) for b in (backend, "reference"))
    assert got.shape == expected.shape
    assert_same((got.values, got.indices, got.offsets), (expected.values, expected.indices, expected.offsets))
    return got, expected


@on_drawn_cases
def test_topk(data, backend):
    pre = data.draw(matrices(backend))
    agree(f.topk, backend, pre, data.draw(counts(pre)), magnitude=data.draw(st.booleans()),
          relu=data.draw(st.sampled_from([None, True, False])))  # fmt: skip


@on_drawn_cases
def test_topk_with_masks_and_scores(data, backend):
    pre = data.draw(matrices(backend))
    score, mask = None, data.draw(masks(pre))
    if data.draw(st.booleans()):
        score = data.draw(tensors(tuple(pre.shape), data.draw(st.sampled_from([torch.float32, pre.dtype]))))
    elif data.draw(st.booleans()):
        mask = mask if mask.any() else None
    magnitude = score is None and data.draw(st.booleans())
    agree(f.topk, backend, pre, data.draw(counts(pre)), score=score, mask=mask, magnitude=magnitude,
          relu=data.draw(st.sampled_from([None, True, False])))  # fmt: skip


@on_drawn_cases
def test_batch_topk(data, backend):
    pre = data.draw(matrices(backend))
    k = data.draw(counts(pre))
    if data.draw(st.booleans()):
        k = max(k - data.draw(st.floats(0, 0.999)), 0.01)
    mask = data.draw(masks(pre)) if data.draw(st.booleans()) else None
    agree(f.batch_topk, backend, pre, k, mask=mask)


@on_drawn_cases
def test_threshold(data, backend):
    pre = data.draw(matrices(backend))
    theta = data.draw(st.one_of(
        st.floats(0, 2), NUMBERS,
        tensors((pre.shape[-1],), data.draw(st.sampled_from([torch.float32, torch.float64]))),
    ))  # fmt: skip
    bandwidth = data.draw(st.sampled_from([None, 0.5, 1e-3]))
    capacity = data.draw(st.one_of(st.none(), st.integers(0, pre.numel() + 3)))
    agree(f.threshold, backend, pre, theta, bandwidth=bandwidth, capacity=capacity)


@on_drawn_cases
def test_norm_match(data, backend):
    pre = data.draw(matrices(backend))
    rows = pre.shape[:-1]
    target = data.draw(st.one_of(st.floats(0, 20), st.sampled_from([0.0, math.inf, 3e38, 1e-30, math.nan])))
    target = torch.full(rows, target, dtype=torch.float32)
    if data.draw(st.booleans()):
        rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        target = torch.rand(rows, generator=rng) * 1.3 * pre.float().relu().nan_to_num(1, 1, 0).norm(dim=-1)
    weight = None
    if data.draw(st.booleans()):
        weight = data.draw(tensors((pre.shape[-1],), torch.float32)).abs()
    got, expected = (f.norm_match(pre, target, weight_norm=weight, backend=b) for b in (backend, "reference"))
    if torch.equal(got.offsets, expected.offsets) and torch.equal(got.indices, expected.indices):
        assert_same(got.values, expected.values)
    else:
        near_ties_alone(pre, target, weight, got, expected)
    capacity = data.draw(st.integers(0, pre.numel() + 3))
    cut = f.norm_match(pre, target, weight_norm=weight, capacity=capacity, backend=backend)
    assert cut.values.shape == (capacity,) and int(cut.required) == got.values.numel()
    assert torch.equal(cut.offsets, got.offsets.clamp(max=capacity))
    stored = min(capacity, got.values.numel())
    assert_same((cut.values[:stored], cut.indices[:stored]), (got.values[:stored], got.indices[:stored]))


def near_ties_alone(pre, target, weight, got, expected):
    """Rows that differ keep two prefixes whose norms are equally near to the target, to 1e-6: either is right."""
    score = pre.reshape(-1, pre.shape[-1]).to(torch.promote_types(pre.dtype, torch.float32)).relu()
    score = (score if weight is None else score * weight.to(score.dtype)).double()
    rows = [[codes.indices[a:b].tolist() for a, b in pairwise(codes.offsets.tolist())] for codes in (got, expected)]
    for number, (ours, theirs) in enumerate(zip(*rows, strict=True)):
        if ours != theirs:
            wanted = float(target.reshape(-1)[number])
            off = [abs(float(score[number, kept].square().sum().sqrt()) - wanted) for kept in (ours, theirs)]
            assert abs(off[0] - off[1]) < 1e-6 * wanted, (number, ours, theirs, off, wanted)


@on_drawn_cases
def test_energy_share(data, backend):
    pre = data.draw(matrices(backend))
    share = data.draw(st.one_of(st.floats(1e-6, 1), st.sampled_from([1.0, 0.5, 0.999999, 1e-30])))
    weight = data.draw(st.one_of(st.none(), tensors((pre.shape[-1],), torch.float32)))
    weight = weight if weight is None else weight.abs()
    got, expected = (f.energy_share(pre, share, weight_norm=weight, backend=b) for b in (backend, "reference"))
    if torch.equal(got.offsets, expected.offsets) and torch.equal(got.indices, expected.indices):
        assert_same(got.values, expected.values)
    else:
        either_side_of_the_goal(pre, share, weight, got, expected)


def either_side_of_the_goal(pre, share, weight, got, expected):
    """Rows that differ keep prefixes one of which is part of the other, and end within 1e-6 of the goal."""
    score = pre.reshape(-1, pre.shape[-1]).to(torch.promote_types(pre.dtype, torch.float32)).relu()
    score = (score if weight is None else score * weight.to(score.dtype)).double()
    rows = [[codes.indices[a:b].tolist() for a, b in pairwise(codes.offsets.tolist())] for codes in (got, expected)]
    for number, kept in enumerate(zip(*rows, strict=True)):
        if kept[0] != kept[1]:
            fewer, more = sorted(map(set, kept), key=len)
            goal = float(score[number].square().sum()) * share
            low, high = (float(score[number, list(part)].square().sum()) for part in (fewer, more))
            last = float(score[number, list(more)].min()) ** 2
            assert fewer < more, (number, kept)
            assert low >= goal * (1 - 1e-6) and high - last < goal * (1 + 1e-6), (number, kept, low, high, goal)
