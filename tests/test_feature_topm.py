"""functional.feature_topm and its kernels: exactly m_j tokens of each latent j."""
import pytest
import torch

from sae_engine import functional as f
from sae_engine.testing import HARD_KINDS, assert_same, make_pre
from sae_kernels.device import _tuning
from sae_kernels.ops import ops

FAST = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(9, 7), (1, 1), (37, 2), (64, 34), (300, 3)]


def budgets(rows, num_latents, mean):
    """Budgets of all sizes, 0 and the number of rows among them, about ``mean`` on average."""
    draw = (torch.rand(num_latents).log().neg() * mean).int().clamp(max=rows)
    draw[torch.randint(num_latents, ())] = rows
    draw[torch.randint(num_latents, ())] = 0
    return draw


@pytest.mark.parametrize("kind", HARD_KINDS)
def test_reference_matches_definition(kind):
    pre = make_pre(kind, (6, 5))
    m = [0, 6, 3, 1, 2]
    _, indices, offsets = ops.feature_topm(pre, torch.tensor(m), 12, "reference")
    rows = torch.repeat_interleave(torch.arange(6), offsets.diff()).tolist()
    got = sorted(zip(indices.tolist(), rows, strict=True))
    expected = []
    for latent, count in enumerate(m):
        column = [max(v, 0.0) if v == v else v for v in pre[:, latent].tolist()]
        order = sorted((v == v, 0.0 if v != v else -v, row) for row, v in enumerate(column))
        expected += [(latent, row) for *_, row in order[:count]]
    assert got == sorted(expected)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference_on_hard_matrices(shape, dtype, backend):
    rows, num_latents = shape
    for kind in HARD_KINDS:
        pre = make_pre(kind, shape, dtype)
        for m in (budgets(*shape, 1.0), torch.full((num_latents,), min(2, rows)))[: 2 if rows < 50 else 1]:
            total = int(m.sum())
            assert_same(ops.feature_topm(pre, m, total, backend), ops.feature_topm(pre, m, total, "reference"))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("rows", [0, 8, 300])
def test_no_budget_and_all_of_it(rows, backend):
    for kind in ("ties", "special"):
        pre = make_pre(kind, (rows, 3))
        for m in (0, rows):
            counts = torch.full((3,), m)
            args = pre, counts, 3 * m
            assert_same(ops.feature_topm(*args, backend), ops.feature_topm(*args, "reference"))


@pytest.mark.parametrize("backend", FAST)
def test_a_budget_of_many_tiles(backend):
    """One latent takes nearly all rows, the others few: its candidates pass by tile after tile."""
    for budget in ([650, 1, 0, 3, 2], [150, 0, 0, 0, 1]):
        m = torch.tensor(budget)
        grouped = _tuning.groups_of_rows(700, 5, int(m.sum())) is not None
        assert grouped == (budget[0] == 150)
        for kind in ("ties", "normal"):
            args = make_pre(kind, (700, 5), torch.bfloat16), m, int(m.sum())
            assert_same(ops.feature_topm(*args, backend), ops.feature_topm(*args, "reference"))


def test_group_maxima_are_used_and_not_used():
    assert _tuning.groups_of_rows(300, 3, 6) is not None and _tuning.groups_of_rows(300, 3, 600) is None


@pytest.mark.parametrize("kind", ["normal", "ties", "special"])
def test_more_groups_than_one_tile_ranks(kind, monkeypatch):
    monkeypatch.setattr(_tuning, "CANDIDATE_TILE", _tuning.CandidateTile(4, 2, 1))
    pre, m = make_pre(kind, (150, 5)), torch.tensor([3, 0, 30, 1, 2])
    assert _tuning.groups_of_rows(150, 5, 36).number > 8
    assert_same(ops.feature_topm(pre, m, 36, "triton"), ops.feature_topm(pre, m, 36, "reference"))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("wrong", [-3, 5])
def test_a_total_that_is_not_the_sum_stays_inside_memory(wrong, backend):
    """Nothing checks a device's numbers: rows are then cut or end early, and every offset stays in range."""
    if backend == "torch":
        pytest.skip("stock operators size their result by the budgets")
    pre, m = make_pre("normal", (64, 6)), torch.full((6,), 2)
    total = 12 + wrong
    values, indices, offsets = ops.feature_topm(pre, m, total, backend)
    assert values.shape == indices.shape == (total,) and int(offsets[-1]) == min(total, 12)
    assert bool((indices >= 0).all() & (indices < 6).all() & (offsets.diff() >= 0).all())


@pytest.mark.sanitizer
def test_small_and_complete():
    assert _tuning.groups_of_rows(300, 5, 6) is not None and _tuning.groups_of_rows(128, 5, 300) is None
    for rows, m in ((128, [1, 0, 2, 128, 3]), (128, [60] * 5), (300, [1, 0, 2, 0, 3])):
        m = torch.tensor(m)
        args = make_pre("ties", (rows, 5), torch.bfloat16), m, int(m.sum())
        assert_same(ops.feature_topm(*args, "triton"), ops.feature_topm(*args, "reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_production_shape(dtype):
    pre = torch.randn(4096, 32768, device="cuda").to(dtype)
    m = (4096 / torch.arange(1, 32769, device="cuda")).int()
    for x in (pre, pre.round(), pre.T.contiguous().T, torch.where(pre > 3.5, torch.nan, pre)):
        for budget in (m, torch.full_like(m, 4)):
            args = x, budget, int(budget.sum())
            assert_same(ops.feature_topm(*args, "triton"), ops.feature_topm(*args, "reference"))


@pytest.mark.gpu
def test_no_host_synchronisation(no_waiting):
    pre, m = torch.randn(512, 4096, device="cuda"), torch.full((4096,), 3, device="cuda")
    f.feature_topm(pre, m, total=3 * 4096, backend="triton")
    with no_waiting():
        f.feature_topm(pre, m, total=3 * 4096, backend="triton")


@pytest.mark.parametrize("backend", FAST)
def test_leading_dimensions_strides_and_integers(backend):
    pre = make_pre("normal", (4, 3, 20)).transpose(0, 1)
    codes = f.feature_topm(pre, 2, backend=backend)
    expected = f.feature_topm(pre.reshape(12, 20), torch.full((20,), 2, dtype=torch.int16), backend="reference")
    assert codes.shape == (3, 4, 20) and codes.values.numel() == 40
    assert_same((codes.values, codes.indices, codes.offsets), (expected.values, expected.indices, expected.offsets))
    assert torch.equal(codes.by_latent.offsets.diff(), torch.full((20,), 2))
    assert f.feature_topm(pre[:0], 0, backend=backend).shape == (0, 4, 20)


def test_fp64_and_one_row():
    pre = make_pre("special", (40,), torch.float64)
    got, want = (f.feature_topm(pre, 1, backend=b) for b in ("torch", "reference"))
    assert_same((got.values, got.indices), (want.values, want.indices))
    assert got.values.dtype == torch.float64 and got.shape == (40,)


@pytest.mark.parametrize("backend", FAST)
def test_gradient_stops_at_zeros(backend):
    pre = make_pre("ties", (6, 20)).requires_grad_()
    weight = torch.randn(6, 20)
    codes = f.feature_topm(pre, 4, backend=backend)
    assert bool((codes.values == 0).any())
    (codes.to_dense() * weight).sum().backward()
    assert torch.equal(pre.grad, weight * (codes.to_dense() > 0))


def test_gradcheck():
    pre = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    m = torch.tensor([0, 5, 1, 2, 2, 3])
    assert torch.autograd.gradcheck(lambda p: f.feature_topm(p, m, total=13).to_dense(), (pre,))


@pytest.mark.parametrize(
    ("m", "total", "name"),
    [
        (-1, None, "m must"), (9, None, "m must"), (True, None, "m must"), (1.5, None, "m must"), (2, 19, "total"),
        (torch.ones(10), None, "m must"), (torch.ones(9, dtype=torch.int64), None, "m must"),
        (torch.full((10,), 9), None, "m must"), (torch.full((10,), -1), 10, "m must"),
        (torch.full((10,), 2), 21, "total"), (torch.full((10,), 2), 81, "total"), (torch.full((10,), 2), 2.0, "total"),
    ],
)  # fmt: skip
def test_arguments_are_checked(m, total, name):
    """On a CPU: the values of a GPU's budgets are not waited for."""
    with pytest.raises((ValueError, TypeError), match=name):
        f.feature_topm(torch.randn(8, 10, device="cpu"), m, total=total)
