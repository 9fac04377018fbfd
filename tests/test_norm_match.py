"""functional.norm_match and its kernel: the prefix whose norm is nearest to the target (top-AFA)."""
from functools import partial
from itertools import pairwise, product

import pytest
import torch

from sae_engine import functional as f
from sae_engine.testing import HARD_KINDS, assert_same, make_pre
from sae_kernels.dispatch import interprets_triton
from sae_kernels.ops import ops
from sae_kernels.stock import norm_match as stock

FAST = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def by_argsort(pre, target, weight):
    """The rule line by line, one row at a time, in fp64 over fp32 scores: sort, accumulate, nearest in norm space."""
    kept = []
    for row, wanted in zip(pre, target, strict=True):
        score = row.float().relu() * weight.float()
        order = score.argsort(descending=True, stable=True)
        norm = score[order].double().square().cumsum(0).sqrt()
        count = int((norm - wanted.double()).abs().argmin()) + 1
        if wanted.double() >= norm[-1]:
            count = int((score > 0).sum())
        kept.append(sorted(j for j in order[:count].tolist() if score[j] > 0))
    return kept


def rows_of(codes):
    return [codes.indices[a:b].tolist() for a, b in pairwise(codes.offsets.tolist())]


@pytest.mark.emulated
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_equals_the_argsort_rule_on_random_rows(backend):
    rows = 1000 if backend != "triton" or torch.cuda.is_available() else 60  # interpreted, a row takes half a second
    pre, weight = torch.randn(rows, 96), torch.rand(96) + 0.5
    target = torch.rand(rows) * pre.relu().norm(dim=1) * 1.4
    codes = f.norm_match(pre, target, weight_norm=weight, backend=backend)
    energy = (pre.relu() * weight).double().square()
    for number, (got, want) in enumerate(zip(rows_of(codes), by_argsort(pre, target, weight), strict=True)):
        if got != want:  # only a near-tie of the two distances may differ
            distances = [abs(energy[number, kept].sum().sqrt() - target[number]) for kept in (got, want)]
            assert abs(distances[0] - distances[1]) < 1e-6 * target[number], number


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 200), (1, 1), (2, 37), (3, 1500), (0, 10)], ids=str)
def test_equals_reference_on_hard_rows(shape, dtype, backend):
    weight = make_pre("normal", shape[1:], seed=4).abs()
    targets = torch.rand(shape[0]) * 9, torch.zeros(shape[0]), torch.full(shape[:1], 1e9)
    cases = list(product(HARD_KINDS, targets, (None, weight)))
    if backend == "triton" and interprets_triton():  # slowly: each kind with one target, weighted or not in turn
        cases = [(kind, targets[n % 3], (None, weight)[n % 2]) for n, kind in enumerate(HARD_KINDS)]
        if dtype == torch.float16:  # read as bf16 is, by 16 bits, and ranked in fp32 as all are
            cases = cases[::2]
    for kind, target, by in cases:
        args = (make_pre(kind, shape, dtype), target, by, False, None)
        assert_same(ops.norm_match(*args, backend), ops.norm_match(*args, "reference"))


ROWS = {
    "normal": lambda: torch.randn(40, 700),
    "long tails": lambda: (3 * torch.randn(40, 700)).exp() * torch.randn(40, 700).sign(),
    "few positive": lambda: torch.randn(40, 700) - 2.5,
    "tied": lambda: torch.randint(-3, 6, (40, 700)).float(),
    "one value": lambda: torch.ones(40, 700),
    "none positive": lambda: -torch.rand(40, 700),
}


@pytest.mark.parametrize("rounds", [0, 1, 6])
@pytest.mark.parametrize("kind", ROWS)
def test_stock_search_equals_reference_however_wide_the_bracket(kind, rounds, monkeypatch):
    monkeypatch.setattr(stock, "ROUNDS", rounds)
    monkeypatch.setattr(stock, "SHARE", 1)  # no row is sorted instead
    pre, weight = ROWS[kind](), torch.rand(700) + 0.5
    for scale in (1.0, 2.0**90, 2.0**-90):
        for share in (1e-3, 0.05, 0.3, 0.8, 0.999, 1.0, 1.1):
            target = (pre.relu() * weight).double().norm(dim=1).mul(share * scale).float().clamp(min=1e-30)
            match = partial(f.norm_match, pre * scale, target, weight_norm=weight)
            got, want = match(backend="torch"), match(backend="reference")
            norms = [(c.to_dense().double() * weight).norm(dim=1) for c in (got, want)]
            distances = [(norm - target).abs() for norm in norms]
            is_near_tie = (distances[0] - distances[1]).abs() < 1e-6 * target
            same = (got.to_dense() == want.to_dense()).all(1)
            assert (same | is_near_tie).all()
            if 1e-3 < share < 0.9:  # elsewhere near-ties are common: entries that hardly count, targets that are met
                assert same.all()


def test_stock_search_finds_ordinary_rows_without_sorting_them():
    score, target = torch.randn(8, 4096).relu(), torch.tensor([1e-9, 0.5, 5.0, 20.0, 40.0, 44.0, 1e9, torch.inf])
    assert stock._kept_of_bracket(score, target)[1].all()
    for odd in (torch.nan, torch.inf):
        score[3, 7] = odd
        found = stock._kept_of_bracket(score, target)[1]
        assert not found[3] and found.sum() == 7


@pytest.mark.parametrize("backend", FAST)
def test_many_tied_entries_and_huge_or_tiny_numbers(backend):
    ones = torch.ones(1, 3000)  # more candidates than finish in registers, all equal
    for scale in (1.0, 1e30, 1e-36):
        codes = f.norm_match(ones * scale, torch.tensor([scale * 40.01]), backend=backend)
        assert codes.indices.tolist() == list(range(1601))  # 40.01^2 = 1600.8, nearest norm is sqrt(1601)


def assert_nearest(pre, target, weight, codes):
    """Equal to the reference, but where the two prefixes are equally near to the target, to 1e-6."""
    want = f.norm_match(pre, target, weight_norm=weight, backend="reference")
    score = pre.float().relu().double() * (1.0 if weight is None else weight)
    for number, (ours, theirs) in enumerate(zip(rows_of(codes), rows_of(want), strict=True)):
        if ours != theirs:
            off = [abs(float(score[number, k].square().sum().sqrt() - target[number].double())) for k in (ours, theirs)]
            assert abs(off[0] - off[1]) < 1e-6 * float(target[number]), (number, len(ours), len(theirs), off)
    row = torch.arange(len(pre)).repeat_interleave(codes.offsets.diff())
    assert_same(codes.values, pre.relu()[row, codes.indices.long()])


LONG = 6000  # columns: more than are set aside whole, so that a sample guesses
KINDS_OF_ROW = {
    "normal": lambda: torch.randn(4, LONG),
    "heavy tails": lambda: torch.randn(4, LONG).exp().square(),
    "sorted": lambda: torch.randn(4, LONG).sort(dim=1).values,  # the sample is anything but random
    "few large first": lambda: torch.cat([torch.rand(4, 40) * 100, torch.rand(4, LONG - 40)], 1),
    "all in one place": lambda: torch.cat([torch.zeros(4, LONG - 7), torch.rand(4, 7)], 1),  # none in the sample
    "equal": lambda: torch.full((4, LONG), 0.3),
    "two numbers": lambda: torch.where(torch.rand(4, LONG) < 0.9, 0.25, 2.0),
    "wide range": lambda: (torch.randn(4, LONG) * 20).exp2(),
}


@pytest.mark.emulated
@pytest.mark.parametrize("kind", KINDS_OF_ROW)
@pytest.mark.parametrize("weighted", [False, True])
def test_long_rows_whatever_the_sample_says(kind, weighted):
    pre = KINDS_OF_ROW[kind]().bfloat16()
    weight = torch.rand(LONG) + 0.5 if weighted else None
    norm = (pre.double().relu() * (1.0 if weight is None else weight)).norm(dim=1).float()
    for shares in ((0.02, 0.3, 0.6, 0.8), (0.95, 0.999, 0.99999, 1.0001)):
        target = norm * torch.tensor(shares)
        assert_nearest(pre, target, weight, f.norm_match(pre, target, weight_norm=weight, backend="triton"))


def giants_over_noise(seed, rows, latents):
    """Rows whose energy lies in 32 entries, and targets within 1e-3 to 1e-9 of their norm."""
    rng, device = torch.Generator().manual_seed(seed), torch.get_default_device()
    with torch.device("cpu"):
        pre = torch.randn(rows, latents, generator=rng) * 0.01
        large = torch.rand(2, rows, 32, generator=rng).log().sum(0) * -10  # Gamma(2)
        pre.scatter_(1, torch.rand(rows, latents, generator=rng).topk(32, 1).indices, large)
        share = 1 - 10 ** (-3 - 6 * torch.rand(rows, dtype=torch.float64, generator=rng))
    return pre.to(device), (pre.relu().double().norm(dim=1) * share).float().to(device)


def assert_all_written(pre, target, backend):
    """Every place that a count promises holds an entry of its row: unwritten ones are poisoned, and repeat none."""
    codes = f.norm_match(pre, target, capacity=pre.numel(), backend=backend).check()
    for number, columns in enumerate(rows_of(codes)):
        assert all(a < b for a, b in pairwise(columns)) and min(columns) >= 0 and max(columns) < pre.shape[1], number
    assert_nearest(pre, target, None, f.norm_match(pre, target, backend=backend))


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("latents", [500, LONG])
def test_giants_over_noise(latents, backend):
    assert_all_written(*giants_over_noise(0, 3 if backend == "triton" else 200, latents), backend)


@pytest.mark.compiled
@pytest.mark.parametrize("seed", range(8))
def test_giants_over_noise_in_many_rows(seed):
    """Where two passes summed the same energy in different groups, one row in some 300 had an entry too many."""
    assert_all_written(*giants_over_noise(seed, 64, 8192), "triton")


def test_a_row_that_fills_every_place():
    pre = torch.rand(2, 4096) + 0.1  # the longest row that is set aside whole
    target = pre.norm(dim=1) * torch.tensor([0.3, 0.9999])
    assert_nearest(pre, target, None, f.norm_match(pre, target, backend="triton"))


def test_targets_far_below_and_above_the_row():
    pre = torch.randn(6, LONG).abs() * torch.tensor([1e-30, 1e30, 1.0, 1.0, 1e30, 1e-30])[:, None]
    args = pre, torch.tensor([1e30, 1e-30, 1e-38, 3e38, 1e28, 1e-29]), None, None
    assert_nearest(*args[:3], f.norm_match(*args[:2], backend="triton"))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_numbers_near_the_largest_of_fp32(backend):
    pre = torch.tensor([[0.9, 2.5, 0.5, 1.0]]) * 1e38
    assert f.norm_match(pre, torch.tensor([2.6e38]), backend=backend).indices.tolist() == [1, 3]  # 2.69 is nearer


def test_long_rows_that_are_not_finite():
    pre = torch.randn(6, LONG)
    pre[0, 5000], pre[1, 4000], pre[2, 17] = torch.inf, torch.nan, torch.inf
    pre[2, 3000] = -torch.nan
    target = torch.tensor([5.0, 5.0, torch.inf, torch.inf, 0.0, torch.nan])
    pre[3, 9] = torch.inf
    args = pre, target, None, False, None
    assert_same(ops.norm_match(*args, "triton"), ops.norm_match(*args, "reference"))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_special_targets(backend):
    pre = torch.tensor([[3.0, -1.0, 4.0, 0.0]])
    for target, kept in ((0.0, [2]), (4.4, [2]), (4.6, [0, 2]), (torch.inf, [0, 2]), (torch.nan, [2])):
        assert f.norm_match(pre, torch.tensor([target]), backend=backend).indices.tolist() == kept
    assert f.norm_match(-pre.abs(), torch.tensor([1.0]), backend=backend).values.numel() == 0


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_capacity(backend):
    pre, target = torch.randn(4, 50), torch.full((4,), 3.0)
    plain = f.norm_match(pre, target, backend=backend)
    needed = plain.values.numel()
    roomy = f.norm_match(pre, target, capacity=needed + 5, backend=backend).check()
    assert_same(roomy.to_dense(), plain.to_dense())
    assert roomy.values.numel() == needed + 5 and int(roomy.required) == needed
    tight = f.norm_match(pre, target, capacity=needed - 3, backend=backend)
    assert torch.equal(tight.indices, plain.indices[:-3]) and int(tight.offsets[-1]) == needed - 3
    with pytest.raises(RuntimeError, match=f"capacity={needed - 3}.*{needed}"):
        tight.check()


@pytest.mark.sanitizer
def test_small_and_complete():
    pre = make_pre("special", (2, 300), torch.bfloat16)
    args = (pre, torch.rand(2) * 5, None, False, 600)
    assert_same(ops.norm_match(*args, "triton"), ops.norm_match(*args, "reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_production_shape(dtype):
    pre = torch.randn(64, 32768, device="cuda").to(dtype)
    total = pre.float().relu().norm(dim=1)
    for share in (0.01, 0.3, 0.9):
        got, want = (f.norm_match(pre, total * share, backend=b) for b in ("triton", "reference"))
        energy = [c.to_dense().double().square().sum(1).sqrt() for c in (got, want)]
        torch.testing.assert_close(*energy, rtol=1e-6, atol=0)  # near-ties: equal energy, either prefix


@pytest.mark.parametrize("backend", FAST)
def test_gradient_is_the_kept_entries(backend):
    pre = torch.randn(3, 40, requires_grad=True)
    weight = torch.randn(3, 40)
    codes = f.norm_match(pre, torch.full((3,), 3.0), backend=backend)
    (codes.to_dense() * weight).sum().backward()
    assert torch.equal(pre.grad, weight * (codes.to_dense() > 0))


def test_gradcheck():
    pre = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    target, weight = torch.full((3,), 1.5, dtype=torch.float64), torch.rand(12, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda p: f.norm_match(p, target, weight_norm=weight).to_dense(), (pre,))


def test_leading_dimensions():
    pre = torch.randn(2, 3, 20)
    codes = f.norm_match(pre, torch.ones(2, 3))
    assert codes.shape == pre.shape
    assert_same(codes.to_dense().view(6, 20), f.norm_match(pre.view(6, 20), torch.ones(6)).to_dense())


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_targets_may_have_strides(backend):
    pre, target = torch.randn(6, 20), torch.rand(12)[::2] * 4
    strided, plain = (f.norm_match(pre, t, backend=backend) for t in (target, target.contiguous()))
    assert_same(strided.to_dense(), plain.to_dense())


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"target_norm": torch.ones(3)}, "target_norm"),
        ({"target_norm": torch.ones(2, 1)}, "target_norm"),
        ({"weight_norm": torch.ones(9)}, "weight_norm"),
        ({"capacity": -1}, "capacity"),
        ({"capacity": 2.5}, "capacity"),
    ],
)
def test_arguments_are_checked(kwargs, name):
    with pytest.raises((ValueError, TypeError), match=name):
        f.norm_match(torch.randn(2, 10), **{"target_norm": torch.ones(2), **kwargs})


def test_negative_target_is_found_when_asked(monkeypatch):
    monkeypatch.setenv("SAE_CHECK", "1")
    with pytest.raises(ValueError, match="target_norm"):
        f.norm_match(torch.randn(2, 10), torch.tensor([1.0, -1.0]))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_an_infinite_weight_makes_nan_of_what_is_not_positive(backend):
    pre, weight = torch.tensor([[1.5, -0.3]]), torch.tensor([1.0, torch.inf])
    codes = f.norm_match(pre, torch.ones(1), weight_norm=weight, backend=backend)
    assert codes.indices.tolist() == [1] and codes.values.tolist() == [0.0]  # its score is 0 * inf; its value relu(pre)
