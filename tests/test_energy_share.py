"""functional.energy_share: the smallest prefix of a row that holds a share of its energy; norm_match's kernel."""
from itertools import pairwise, product

import pytest
import torch

from sae_engine import functional as f
from sae_engine.testing import HARD_KINDS, assert_same, make_pre
from sae_kernels.dispatch import interprets_triton
from sae_kernels.ops import ops
from sae_kernels.stock import norm_match as stock

FAST = ("torch", "triton")
ALL = ("reference", *FAST)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEAR = 1e-6  # relative to the goal: what the contract leaves open


def assert_holds_its_share(codes, pre, share, weight=None):
    """The rule line by line, a row at a time, in fp64 over fp32 scores: sort, accumulate, find the first that reaches.

    Where a prefix's energy is within NEAR of the goal, the next one may be kept as well, and the other way round.
    """
    shares = torch.as_tensor(share, dtype=torch.float64).expand(len(pre))
    for number, (a, b) in enumerate(pairwise(codes.offsets.tolist())):
        kept = codes.indices[a:b].tolist()
        score = torch.where(pre[number] <= 0, 0.0, pre[number]).float()
        score = score if weight is None else score * weight.float()
        assert_same(codes.values[a:b], torch.where(pre[number] <= 0, 0.0, pre[number])[kept])
        if not score.isfinite().all():
            odd = score.isnan() if score.isnan().any() else score.isinf()
            assert kept == odd.nonzero()[:1, 0].tolist(), number
            continue
        order = score.argsort(descending=True, stable=True)
        energy = score[order].double().square().cumsum(0)
        assert kept == sorted(order[: len(kept)].tolist()), number  # a prefix, its ties from the lowest index
        positive = int((score > 0).sum())
        if shares[number] == 1 or positive == 0:
            assert len(kept) == positive, number
            continue
        goal = shares[number] * energy[-1]
        assert 1 <= len(kept) <= positive, number
        assert energy[len(kept) - 1] >= goal * (1 - NEAR), (number, len(kept))
        assert len(kept) == 1 or energy[len(kept) - 2] < goal * (1 + NEAR), (number, len(kept))


@pytest.mark.emulated
@pytest.mark.parametrize("backend", ALL)
def test_equals_the_argsort_rule_on_random_rows(backend):
    rows = 16 if backend == "triton" else 1000
    pre, weight, share = torch.randn(rows, 96), torch.rand(96) + 0.5, torch.rand(rows) * 0.999 + 1e-3
    codes = f.energy_share(pre, share, weight_norm=weight, backend=backend)
    assert_holds_its_share(codes, pre, share, weight)
    assert_holds_its_share(f.energy_share(pre[:20], 0.9, backend=backend), pre[:20], 0.9)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 200), (1, 1), (2, 37), (3, 1500), (0, 10)], ids=str)
def test_hard_rows(shape, dtype, backend):
    weight = make_pre("normal", shape[1:], seed=4).abs()
    cases = list(product(HARD_KINDS, (0.9, 1.0, 1e-9), (None, weight)))
    if backend == "triton" and interprets_triton():  # slowly: each kind with one share, weighted or not in turn
        cases = [(kind, (0.9, 1.0, 1e-9)[n % 3], (None, weight)[n % 2]) for n, kind in enumerate(HARD_KINDS)]
    for kind, share, by in cases:
        pre = make_pre(kind, shape, dtype)
        assert_holds_its_share(f.energy_share(pre, share, weight_norm=by, backend=backend), pre, share, by)


LONG = 6000  # columns: more than are set aside whole, so that a sample guesses
ROWS = {
    "normal": lambda: torch.randn(2, LONG),
    "heavy tails": lambda: torch.randn(2, LONG).exp().square(),
    "sorted": lambda: torch.randn(2, LONG).sort(dim=1).values,  # the sample is anything but random
    "in one place": lambda: torch.cat([torch.zeros(2, LONG - 7), torch.rand(2, 7)], 1),  # none in the sample
    "equal": lambda: torch.full((2, LONG), 0.3),
    "two numbers": lambda: torch.where(torch.rand(2, LONG) < 0.9, 0.25, 2.0),
    "wide range": lambda: (torch.randn(2, LONG) * 20).exp2(),
    "one giant that no sample sees": lambda: torch.randn(2, LONG).index_fill(1, torch.tensor([LONG - 3]), 2.0**90),
    "huge": lambda: torch.randn(2, LONG).clamp(-4, 4) * 8e37,
    "tiny": lambda: torch.randn(2, LONG) * 1e-39,
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("backend", FAST)
def test_long_rows_whatever_the_sample_says(kind, backend):
    pre, weight = ROWS[kind](), torch.rand(LONG) * 0.5 + 0.5
    for share, by in (((0.3, 0.9), None), ((0.02, 0.99999), weight)):
        share = torch.tensor(share, dtype=torch.float64)
        assert_holds_its_share(f.energy_share(pre, share, weight_norm=by, backend=backend), pre, share, by)


@pytest.mark.parametrize("backend", FAST)
def test_short_rows_of_any_size(backend):
    scale = torch.tensor([1e-42, 1e-30, 1e-12, 1.0, 1e12, 1e30, 8e37])
    pre = torch.randn(7, 300).clamp(-4, 4) * scale[:, None]
    assert_holds_its_share(f.energy_share(pre, 0.8, backend=backend), pre, 0.8)


@pytest.mark.emulated
@pytest.mark.parametrize("backend", ALL)
def test_special_shares(backend):
    pre = torch.tensor([[3.0, -9.0, 1.0, 2.0]])
    for share, kept in ((1e-300, [0]), (0.64, [0]), (0.65, [0, 3]), (0.92, [0, 3]), (0.93, [0, 2, 3]), (1, [0, 2, 3])):
        assert f.energy_share(pre, share, backend=backend).indices.tolist() == kept
    ones = torch.ones(1, 3000)
    for share, number in ((0.5, 1500), (0.5001, 1501), (1 / 3000, 1), (1.0, 3000)):
        assert f.energy_share(ones, share, backend=backend).indices.tolist() == list(range(number))
    tenths = torch.arange(1, 11) / 10  # fp32: most are more than that
    for share in (tenths, tenths.double()):
        kept = f.energy_share(torch.full((10, 10), 0.3), share, backend=backend).offsets.diff()
        assert kept.tolist() == list(range(1, 11))
    assert f.energy_share(-pre.abs(), 0.5, backend=backend).values.numel() == 0
    # what only SAE_CHECK=1 would refuse of a tensor keeps what the nearest share would
    share = torch.tensor([-1.0, 0.0, 7.0, torch.nan])
    kept = f.energy_share(pre.expand(4, 4), share, backend=backend)
    assert kept.offsets.diff().tolist() == [1, 1, 3, 1]


@pytest.mark.parametrize("backend", ALL)
def test_rows_that_are_not_finite_keep_their_first_entry(backend):
    pre = torch.randn(4, LONG)
    pre[0, 5000], pre[1, 4000], pre[2, 17], pre[2, 3000] = torch.inf, torch.nan, torch.inf, -torch.nan
    pre[3, 9] = -torch.inf  # never positive
    for share in (0.5, 1.0):
        assert_holds_its_share(f.energy_share(pre, share, backend=backend), pre, share)


@pytest.mark.parametrize("backend", ALL)
def test_strides_leading_dimensions_and_a_share_for_each_row(backend):
    wide = torch.randn(2, 3, 80)
    pre, share = wide[..., ::2], torch.rand(2, 3) * 0.9 + 0.05
    codes = f.energy_share(pre, share, backend=backend)
    assert codes.shape == pre.shape
    assert_holds_its_share(codes, pre.reshape(6, 40), share.flatten())
    one = f.energy_share(pre, torch.tensor(0.7, dtype=torch.float64), backend=backend)
    assert_same(one.to_dense(), f.energy_share(pre, 0.7, backend=backend).to_dense())


@pytest.mark.parametrize("backend", ALL)
def test_capacity(backend):
    pre = torch.randn(4, 50)
    plain = f.energy_share(pre, 0.7, backend=backend)
    needed = plain.values.numel()
    roomy = f.energy_share(pre, 0.7, capacity=needed + 5, backend=backend).check()
    assert_same(roomy.to_dense(), plain.to_dense())
    assert roomy.values.numel() == needed + 5 and int(roomy.required) == needed
    tight = f.energy_share(pre, 0.7, capacity=needed - 3, backend=backend)
    assert torch.equal(tight.indices, plain.indices[:-3]) and int(tight.offsets[-1]) == needed - 3
    with pytest.raises(RuntimeError, match=f"capacity={needed - 3}.*{needed}"):
        tight.check()


@pytest.mark.parametrize("rounds", [0, 1, 6])
def test_stock_search_however_wide_the_bracket(rounds, monkeypatch):
    monkeypatch.setattr(stock, "ROUNDS", rounds)
    monkeypatch.setattr(stock, "SHARE", 1)  # no row is sorted instead
    for pre in (torch.randn(20, 700), torch.randint(-3, 6, (20, 700)).float(), (3 * torch.randn(20, 700)).exp()):
        for scale, share in product((1.0, 2.0**90, 2.0**-90), (1e-3, 0.05, 0.3, 0.8, 0.999)):
            assert_holds_its_share(f.energy_share(pre * scale, share, backend="torch"), pre * scale, share)


def test_stock_search_of_more_rows_than_a_cache_holds(monkeypatch):
    monkeypatch.setattr(stock, "rows_in_cache", lambda pre: [slice(0, 3), slice(3, 6), slice(6, 9)])
    pre, share = torch.randn(8, 300), torch.rand(8) * 0.9 + 0.05
    pre[4, 7] = torch.inf
    assert_holds_its_share(f.energy_share(pre, share, backend="torch"), pre, share)


def test_fp64_scores_are_not_rounded():
    pre = torch.tensor([[1.0 + 1e-12, 1.0, 1.0 + 2e-12]], dtype=torch.float64)
    for backend in ("reference", "torch"):
        assert f.energy_share(pre, 0.3, backend=backend).indices.tolist() == [2]


@pytest.mark.parametrize("backend", FAST)
def test_gradient_is_the_kept_entries(backend):
    pre, weight = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    codes = f.energy_share(pre, 0.8, backend=backend)
    (codes.to_dense() * weight).sum().backward()
    assert torch.equal(pre.grad, weight * (codes.to_dense() > 0))


def test_gradcheck():
    pre, weight = torch.randn(3, 12, dtype=torch.float64, requires_grad=True), torch.rand(12, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda p: f.energy_share(p, 0.8, weight_norm=weight).to_dense(), (pre,))


@pytest.mark.sanitizer
def test_small_and_complete():
    pre = make_pre("special", (2, 300), torch.bfloat16)
    args = (pre, torch.rand(2), None, True, 600)
    assert_same(ops.norm_match(*args, "triton"), ops.norm_match(*args, "reference"))
    pre = make_pre("normal", (2, 5000), torch.bfloat16)
    assert_holds_its_share(f.energy_share(pre, 0.9, capacity=pre.numel(), backend="triton").check(), pre, 0.9)


@pytest.mark.compiled
@pytest.mark.parametrize("seed", range(4))
def test_giants_over_noise_in_many_rows(seed):
    """Rows whose energy lies in few entries, and shares that leave out less and less of them."""
    rng = torch.Generator().manual_seed(seed)
    pre = torch.randn(48, 8192, generator=rng) * 0.01
    large = torch.rand(2, 48, 32, generator=rng).log().sum(0) * -10
    pre.scatter_(1, torch.rand(48, 8192, generator=rng).topk(32, 1).indices, large)
    share = 1 - 10 ** (-1 - 5 * torch.rand(48, dtype=torch.float64, generator=rng))
    codes = f.energy_share(pre, share, capacity=pre.numel(), backend="triton").check()
    assert_holds_its_share(codes, pre, share)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_production_shape(dtype):
    pre = torch.randn(64, 32768, device="cuda").to(dtype)
    for share in (0.05, 0.5, 0.95):
        assert_holds_its_share(f.energy_share(pre, share, backend="triton"), pre, share)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"share": 0}, "share"),
        ({"share": 1.5}, "share"),
        ({"share": float("nan")}, "share"),
        ({"share": "half"}, "share"),
        ({"share": True}, "share"),
        ({"share": torch.rand(3)}, "share"),
        ({"share": torch.ones(2, dtype=torch.int64)}, "share"),
        ({"weight_norm": torch.ones(9)}, "weight_norm"),
        ({"capacity": -1}, "capacity"),
    ],
)
def test_arguments_are_checked(kwargs, name):
    with pytest.raises((ValueError, TypeError), match=name):
        f.energy_share(torch.randn(2, 10), **{"share": 0.5, **kwargs})


def test_shares_of_a_tensor_are_looked_at_when_asked(monkeypatch):
    monkeypatch.setenv("SAE_CHECK", "1")
    for wrong in (0.0, 1.1, torch.nan):
        with pytest.raises(ValueError, match="share must satisfy 0 < share <= 1"):
            f.energy_share(torch.randn(2, 10), torch.tensor([0.5, wrong]))
