"""functional.batch_topk and its kernels: exactly int(k * tokens) entries of the whole matrix."""
from itertools import product

import pytest
import torch

from sae_engine import functional as f
from sae_engine.testing import HARD_KINDS, assert_same, make_pre
from sae_kernels.device import _tuning
from sae_kernels.dispatch import interprets_triton
from sae_kernels.ops import ops
from sae_kernels.stock import batch_topk as selection

FAST = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [(3, 200, 15), (1, 1, 1), (2, 37, 74), (3, 520, 700), (3, 64, 1), (0, 10, 0), (4, 300, 0), (5, 1030, 40)]
IDS = [f"B{b}-F{n}-N{t}" for b, n, t in CASES]


@pytest.mark.parametrize("kind", HARD_KINDS)
def test_reference_matches_definition(kind):
    pre = make_pre(kind, (3, 20))
    _, indices, offsets = ops.batch_topk(pre, None, 11, "reference")
    flat = [max(v, 0.0) if v == v else v for v in pre.flatten().tolist()]
    order = sorted(range(60), key=lambda j: (flat[j] == flat[j], 0.0 if flat[j] != flat[j] else -flat[j], j))[:11]
    rows = torch.repeat_interleave(torch.arange(3), offsets.diff())
    assert (rows * 20 + indices).tolist() == sorted(order)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_equals_reference_on_hard_matrices(case, dtype, backend):
    rows, num_latents, total = case
    for kind in HARD_KINDS:
        pre = make_pre(kind, (rows, num_latents), dtype)
        assert_same(ops.batch_topk(pre, None, total, backend), ops.batch_topk(pre, None, total, "reference"))


@pytest.mark.parametrize("backend", FAST)
def test_masks(backend):
    draw = torch.rand(3, 130)
    masks = draw[0] < 0.5, draw < 0.02, torch.zeros(130, dtype=torch.bool)
    cases = list(product(HARD_KINDS, masks, (20, 200)))
    if backend == "triton" and interprets_triton():  # slowly
        cases = cases[::5]  # every mask, total and kind
    for kind, mask, total in cases:
        args = (make_pre(kind, (3, 130)), mask, total)
        assert_same(ops.batch_topk(*args, backend), ops.batch_topk(*args, "reference"))


def test_group_maxima_are_used_and_not_used():
    assert _tuning.batch_groups(5, 1030, 40) is not None and _tuning.batch_groups(3, 520, 700) is None


def heavy_row(shape, dtype):
    """One row holds nearly all that is kept, more than its list does; NaN and infinity lie far above the cut."""
    pre = make_pre("normal", shape)
    pre[shape[0] // 2] *= 1000
    pre[0, 3], pre[-1, -1] = torch.inf, -torch.nan
    return pre.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(4, 260, 12), (3, 133, 5)], ids=str)
def test_bounds_by_many_programs_and_rows_that_overflow(case, dtype, monkeypatch):
    rows, num_latents, total = case
    few = lambda number, k: _tuning.Sets(max(int(number / (4 * k)), 1), 16, 1)  # noqa: E731
    monkeypatch.setattr(_tuning, "sets_of_groups", few)
    monkeypatch.setattr(_tuning, "survivor_tiles", lambda number: (32, 64, 1))
    monkeypatch.setattr(_tuning, "list_tile", lambda k: _tuning.Tile(32, 1))
    shape = (rows, num_latents)
    masks = (None, torch.rand(num_latents) < 0.3, torch.rand(shape) < 0.01)
    kinds = ("heavy", *HARD_KINDS, "heavy")
    if dtype == torch.float16 and interprets_triton():  # slowly: another 16-bit type ranks as bf16 does, by its bits
        kinds = ("heavy", "special", "nan")
    for number, kind in enumerate(kinds):
        pre = heavy_row(shape, dtype) if kind == "heavy" else make_pre(kind, shape, dtype)
        args = (pre, masks[number % 3], total)
        assert_same(ops.batch_topk(*args, "triton"), ops.batch_topk(*args, "reference"))


@pytest.mark.emulated
def test_more_rows_than_are_summed_at_a_time():
    """And enough programs to clear the histograms in passing."""
    pre = make_pre("ties", (260, 16), torch.bfloat16)
    assert _tuning.batch_groups(260, 16, 260) is not None
    assert_same(ops.batch_topk(pre, None, 260, "triton"), ops.batch_topk(pre, None, 260, "reference"))


@pytest.mark.sanitizer
def test_small_and_complete():
    pre = make_pre("ties", (2, 300), torch.bfloat16)
    for total in (9, 500):
        assert_same(ops.batch_topk(pre, None, total, "triton"), ops.batch_topk(pre, None, total, "reference"))


@pytest.fixture
def sampling(monkeypatch):
    """Samples of small matrices, in each of which the cut is looked for so many standard errors around."""

    def so_many(errors):
        monkeypatch.setattr(_tuning, "SAMPLED", 128)
        monkeypatch.setattr(_tuning, "SAMPLED_RUN", 16)
        monkeypatch.setattr(_tuning, "SAMPLE_TILE", _tuning.Tile(64, 1))
        monkeypatch.setattr(_tuning, "SAMPLE_ERRORS", errors)
        assert _tuning.sampled_runs(4, 520) == 8 and _tuning.batch_groups(4, 520, 400) is None

    return so_many


@pytest.mark.parametrize("errors", [4, 0, -9])
def test_samples_decide_nothing(errors, sampling):
    """Windows in which the cut is, and with negative errors such as it misses, whose ends have changed places."""
    sampling(errors)
    kinds = ("normal", "ties", "special")
    for total, kind, dtype, masked in zip((400, 500, 700), kinds, DTYPES, (False, True, False), strict=True):
        pre, mask = make_pre(kind, (4, 520), dtype), torch.rand(520) < 0.6 if masked else None
        assert_same(ops.batch_topk(pre, mask, total, "triton"), ops.batch_topk(pre, mask, total, "reference"))


@pytest.mark.sanitizer
@pytest.mark.parametrize("off", [1, 0.5, 2])
def test_a_sample_that_misleads(off, sampling):
    """The sampled columns lie elsewhere than the others: the cut is within the window, above and below it."""
    sampling(1)
    pre = torch.rand(4, 520) + 1
    runs = torch.arange(8)
    start = (runs * 40503 % 65536 * (520 // 16) >> 16) * 16
    pre[(runs * 4 // 8)[:, None], start[:, None] + torch.arange(16)] *= off
    assert_same(ops.batch_topk(pre, None, 600, "triton"), ops.batch_topk(pre, None, 600, "reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_production_shape(dtype):
    pre = torch.randn(512, 32768, device="cuda").to(dtype)
    for x in (pre, pre.round()):
        for k in (32, 8192):  # a bound by group maxima, and a sample
            assert_same(ops.batch_topk(x, None, 512 * k, "triton"), ops.batch_topk(x, None, 512 * k, "reference"))


@pytest.mark.gpu
def test_no_host_synchronisation(no_waiting):
    pre = torch.randn(64, 4096, device="cuda")
    f.batch_topk(pre, 8, backend="triton")
    with no_waiting():
        f.batch_topk(pre, 8, backend="triton")


@pytest.mark.parametrize("backend", FAST)
def test_fractional_k_and_leading_dimensions(backend):
    pre = make_pre("normal", (2, 3, 40)).transpose(0, 1)
    codes = f.batch_topk(pre, 2.4, backend=backend)
    expected = f.batch_topk(pre.reshape(6, 40), 2.4, backend="reference")
    assert codes.values.numel() == int(2.4 * 6) and codes.shape == (3, 2, 40)
    assert_same((codes.values, codes.indices, codes.offsets), (expected.values, expected.indices, expected.offsets))
    assert f.batch_topk(pre, 0.1, backend=backend).values.numel() == 0


@pytest.mark.parametrize("backend", FAST)
def test_gradient_stops_at_zeros(backend):
    pre = make_pre("ties", (3, 20)).requires_grad_()
    weight = torch.randn(3, 20)
    codes = f.batch_topk(pre, 15, backend=backend)
    assert bool((codes.values == 0).any())
    (codes.to_dense() * weight).sum().backward()
    assert torch.equal(pre.grad, weight * (codes.to_dense() > 0))


def test_gradcheck():
    pre = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: f.batch_topk(p, 2.5).to_dense(), (pre,))


@pytest.mark.parametrize("bad", [0, -1.0, 10.5, True, "3", float("nan"), float("inf")])
def test_k_is_checked(bad):
    with pytest.raises((ValueError, TypeError), match="k"):
        f.batch_topk(torch.randn(2, 10), bad)


@pytest.mark.parametrize("kind", ["normal", "ties", "columns", "nan"])
def test_a_bound_from_a_sample_of_maxima_changes_nothing(kind, monkeypatch):
    """So many entries that the bound is a sample's; of ``columns`` it is too high, and all are asked."""
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(300, 2176, generator=generator)  # 68 groups a row, four of which are looked at: 17, 34, 51, 0
    if kind == "ties":
        pre = (4 * pre).round() / 4
    elif kind == "columns":
        pre.view(300, 4, 17, 32)[:, :, 0] += 8.0  # the sample has nothing else
    elif kind == "nan":
        pre[7, 5] = torch.nan
    asked = []
    kth = selection._kth_largest
    monkeypatch.setattr(selection, "_kth_largest", lambda x, k: asked.append(x.numel()) or kth(x, k))
    k, groups = 5000, pre.numel() // 32
    values, indices, offsets = selection.batch_topk(pre, None, k)
    assert (groups in asked) is (kind == "columns") and groups // 17 in asked
    order = pre.relu().nan_to_num(torch.inf).flatten().sort(descending=True, stable=True).indices[:k].sort().values
    assert torch.equal(indices, (order % 2176).int())
    assert torch.equal(offsets, torch.searchsorted(order, torch.arange(301) * 2176))
    assert torch.equal(values.nan_to_num(-1.0), pre.flatten()[order].nan_to_num(-1.0))
