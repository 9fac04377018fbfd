"""functional.topk and its kernel: exact selection of k entries a row."""
from itertools import product
from typing import NamedTuple

import pytest
import torch

from sae_engine import functional as f
from sae_engine.testing import HARD_KINDS, assert_same, make_pre
from sae_kernels import reference
from sae_kernels.device import _tuning
from sae_kernels.dispatch import interprets_triton
from sae_kernels.ops import ops
from sae_kernels.stock import _rows, limits
from sae_kernels.stock import row_topk as stock

FAST = ("torch", "triton")


class Sorted(NamedTuple):
    values: torch.Tensor
    indices: torch.Tensor


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [(3, 200, 5), (1, 1, 1), (2, 37, 37), (2, 520, 70), (3, 64, 1), (0, 10, 2), (2, 257, 16)]
IDS = [f"B{b}-F{n}-K{k}" for b, n, k in CASES]


def by_definition(row, k):
    """Three lines: sort by (NaN first, value descending, index ascending), keep k, order by index."""
    order = sorted(range(len(row)), key=lambda j: (row[j] == row[j], 0.0 if row[j] != row[j] else -row[j], j))
    return sorted(order[:k])


@pytest.mark.parametrize("kind", HARD_KINDS)
def test_reference_matches_definition(kind):
    pre = make_pre(kind, (3, 40))
    _, indices = ops.topk(pre, None, None, 7, False, True, "reference")
    assert indices.view(3, 7).tolist() == [by_definition(row, 7) for row in pre.tolist()]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_equals_reference_on_hard_rows(case, dtype, backend):
    rows, num_latents, k = case
    for kind in HARD_KINDS:
        pre = make_pre(kind, (rows, num_latents), dtype)
        for magnitude, relu in ((False, True), (True, False)):
            args = (pre, None, None, k, magnitude, relu)
            assert_same(ops.topk(*args, backend), ops.topk(*args, "reference"))


@pytest.mark.emulated
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "signed"])
def test_masks_and_scores(backend, relu):
    scores = (None, make_pre("ties", (3, 130), seed=1), make_pre("special", (3, 130), seed=2))
    for number, kind in enumerate(HARD_KINDS):
        pre = make_pre(kind, (3, 130), torch.bfloat16)
        draw = torch.rand(3, 130)
        masks = (draw[0] < 0.5, draw < 0.02, torch.zeros(130, dtype=torch.bool))
        cases = list(product(masks, scores))
        if backend == "triton":  # each mask with one score in turn
            cases = [(mask, scores[(number + n) % 3]) for n, mask in enumerate(masks)]
        for mask, by in cases:
            args = (pre, by, mask, 9, False, relu)
            assert_same(ops.topk(*args, backend), ops.topk(*args, "reference"))


@pytest.fixture
def sorted_by_bits(monkeypatch):
    """Sorts as GPUs do long rows: NaN with its sign set comes last, also where topk sorts what it has found."""
    sort, topk = torch.Tensor.sort, torch.Tensor.topk

    def by_bits(x, dim=-1, descending=False, stable=False):
        last = x.isnan() & x.signbit() if x.is_floating_point() else torch.zeros_like(x, dtype=torch.bool)
        keys = torch.where(last, -torch.inf, x) if last.any() else x
        order = sort(keys, dim=dim, descending=descending, stable=stable)
        return Sorted(x.gather(dim, order.indices), order.indices)

    def found(x, k, sorted=True):
        top, columns = topk(x, k)
        order = by_bits(top, 1, descending=True).indices if sorted else torch.arange(k).flip(0).expand_as(top)
        return Sorted(top.gather(1, order), columns.gather(1, order))

    monkeypatch.setattr(torch.Tensor, "sort", by_bits)
    monkeypatch.setattr(torch.Tensor, "topk", found)
    monkeypatch.setattr(limits, "column_groups", lambda num_latents, k: ())  # a CPU's way
    monkeypatch.setattr(_rows, "sorts_nan_by_sign", lambda x: True)
    with torch.device("cpu"):  # a GPU does it by itself, in test_equals_reference_on_hard_rows
        yield


def test_nan_of_either_sign_ranks_first_where_rows_are_sorted_by_their_bits(sorted_by_bits):
    for dtype, integer in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        nan = torch.tensor(-1, dtype=integer).view(dtype)  # by its bits: a conversion may drop the sign
        for share in (0.02, 0.3):
            pre = torch.where(torch.rand(4, 130) < share, nan, torch.randn(4, 130).to(dtype))
            assert pre[pre.isnan()].signbit().all()
            for k in (1, 9, 60):
                args = (pre, None, None, k, False, True)
                assert_same(ops.topk(*args, "torch"), ops.topk(*args, "reference"))
            m = torch.arange(130) % 5
            args = (pre, m, int(m.sum()))
            assert_same(ops.feature_topm(*args, "torch"), ops.feature_topm(*args, "reference"))
            args = (pre, torch.full((4,), 3.0), None, False, None)
            assert_same(ops.norm_match(*args, "torch"), ops.norm_match(*args, "reference"))


def test_fp64_on_torch():
    for kind in HARD_KINDS:
        pre = make_pre(kind, (4, 90), torch.float64)
        assert_same(ops.topk(pre, None, None, 8, False, True, "torch"), reference.topk(pre, None, None, 8, False, True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", [(50,), (2, 3, 50), (2, 1, 3, 50)], ids=str)
def test_any_leading_dimensions_and_strides(shape, backend):
    pre = make_pre("ties", shape)
    if len(shape) > 2:
        pre = pre.transpose(0, 1)
    codes = f.topk(pre, 4, backend=backend)
    expected = f.topk(pre.contiguous().reshape(-1, 50), 4, backend="reference")
    assert codes.shape == pre.shape and codes.batch_shape == pre.shape[:-1]
    assert_same((codes.values, codes.indices, codes.offsets), (expected.values, expected.indices, expected.offsets))


@pytest.mark.parametrize("backend", FAST)
def test_every_other_column_of_a_wider_matrix(backend):
    pre = make_pre("normal", (3, 160))[:, ::2]
    assert_same(ops.topk(pre, None, None, 6, False, True, backend), reference.topk(pre, None, None, 6, False, True))


@pytest.mark.sanitizer
@pytest.mark.parametrize("split", [0, 1 << 30], ids=["whole rows", "split rows"])
def test_every_kernel_is_exercised(split, monkeypatch):
    """Few entries of rows that one program streams or several do; many of them, with groups and without."""
    monkeypatch.setattr(_tuning, "SPLIT_ROWS", split)
    assert _tuning.row_groups(520, 70) is None and _tuning.row_groups(200, 5) is not None
    for k in (5, 90):
        pre = make_pre("ties", (2, 200), torch.bfloat16)
        args = (pre, None, None, k, False, True)
        assert_same(ops.topk(*args, "triton"), ops.topk(*args, "reference"))
    monkeypatch.setattr(_tuning, "MAX_TILE", 64)
    assert _tuning.row_groups(400, 9) is None and _tuning.wide_row(2, 400, 9).groups is not None
    args = (make_pre("ties", (2, 400), torch.bfloat16), None, None, 9, False, True)
    assert_same(ops.topk(*args, "triton"), ops.topk(*args, "reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_latents", "k"), [(200, 5), (257, 3), (1000, 9), (64, 1)])
def test_rows_that_one_program_streams(num_latents, k, dtype, monkeypatch):
    """What batches of SPLIT_ROWS and more do, at sizes for the interpreter."""
    monkeypatch.setattr(_tuning, "SPLIT_ROWS", 0)
    for kind in HARD_KINDS:
        pre = make_pre(kind, (3, num_latents), dtype)
        mask = torch.rand(num_latents) < 0.3
        for args in ((pre, None, None, k, False, True), (pre, None, mask, k, True, False)):
            assert_same(ops.topk(*args, "triton"), ops.topk(*args, "reference"))


def clustered(shape, k, dtype):
    """Rows whose large numbers lie in too few sets of groups to bound them: most that pass the bound are not kept."""
    wide = _tuning.wide_row(*shape, k)
    size = 1 if wide.groups is None else wide.groups.size
    pre = make_pre("normal", shape)
    large = torch.arange(shape[1]) // size % wide.sets < k - 1
    pre[:, large] = 100 * pre[:, large].abs()
    pre[-1, 7::50] = torch.inf
    return pre.to(dtype)


# (limit of a tile, F, k): groups or none; sets for all entries or too few; a list of one tile or of several
WIDE_CASES = [(64, 200, 9), (64, 131, 16), (32, 300, 20), (32, 90, 40), (64, 50, 50), (32, 97, 1)]


@pytest.fixture
def small_tiles(request, monkeypatch):
    """Limits at which small rows are selected as long ones are, and many of them overflow their lists."""
    monkeypatch.setattr(_tuning, "MAX_TILE", request.param)
    monkeypatch.setattr(_tuning, "MIN_TILE", 16)
    monkeypatch.setattr(_tuning, "row_groups", lambda *_: None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("small_tiles", "num_latents", "k"), WIDE_CASES, indirect=["small_tiles"])
def test_rows_that_fit_no_tile(small_tiles, num_latents, k, dtype):
    kinds = ("clustered", *HARD_KINDS, "clustered")
    if dtype == torch.float16 and interprets_triton():  # slowly: another 16-bit type ranks as bf16 does, by its bits
        kinds = ("clustered", "special", "nan")
    for number, kind in enumerate(kinds):
        shape = (2, num_latents)
        pre = clustered(shape, k, dtype) if kind == "clustered" else make_pre(kind, shape, dtype)
        args = (pre, None, None, k, number % 2 == 1, number % 2 == 0)
        assert_same(ops.topk(*args, "triton"), ops.topk(*args, "reference"))


@pytest.mark.parametrize(("small_tiles", "num_latents", "k"), WIDE_CASES, indirect=["small_tiles"])
def test_masks_and_scores_of_rows_that_fit_no_tile(small_tiles, num_latents, k):
    shape = (2, num_latents)
    draw = torch.rand(shape)
    pre, by_kind = make_pre("transposed", shape, torch.bfloat16), ("ties", "special", "normal")
    masks = (draw[0] < 0.5, draw < 0.05, torch.zeros(num_latents, dtype=torch.bool))
    for mask, kind in zip(masks, by_kind, strict=True):
        for score in (None, make_pre(kind, shape, seed=1)):
            args = (pre, score, mask, k, False, score is None)
            assert_same(ops.topk(*args, "triton"), ops.topk(*args, "reference"))


@pytest.mark.parametrize("small_tiles", [32], indirect=True)
def test_lists_overflow_in_these_tests(small_tiles):
    """More entries than the list holds lie above the bound, and the list is one of several tiles."""
    pre, wide = clustered((1, 300), 20, torch.float32), _tuning.wide_row(1, 300, 20)
    assert wide.block == 16 and wide.capacity == 64 < int((pre > 5).sum()) and wide.sets == 32


@pytest.mark.parametrize("chunk", [1 << 24, 1 << 10])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", HARD_KINDS)
def test_groups_and_chunks_of_the_cpu_path(kind, masked, chunk, monkeypatch):
    """All sizes of groups of columns, and of groups of groups, in one chunk of rows and in several."""
    monkeypatch.setattr(limits, "CHUNK_ELEMENTS", chunk)
    sizes = set()
    for num_latents, k in ((1024, 3), (520, 2), (304, 4), (264, 8), (1024, 2), (2048, 1)):
        sizes.add(limits.column_groups(num_latents, k))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            pre = make_pre(kind, (7, num_latents), dtype)
            mask = torch.arange(num_latents) % 3 > 0 if masked else None
            for score in (None, make_pre("ties", (7, num_latents), dtype, seed=1)):
                args = (pre, score, mask, k, False, False)
                assert_same(stock.topk(*args), reference.topk(*args))
    assert sizes == {(8, 8), (8, 4), (4, 4), (4, 2)}


@pytest.mark.parametrize("eligible", [0, 1, 4, 5, 6, 39])
def test_a_mask_of_columns_with_few_or_many_eligible(eligible):
    mask = torch.zeros(40, dtype=torch.bool)
    mask[torch.randperm(40)[:eligible]] = True
    for kind in ("special", "ties", "normal"):
        for relu in (True, False):
            args = (make_pre(kind, (5, 40)), None, mask, 5, False, relu)
            assert_same(stock.topk(*args), reference.topk(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_latents", "k"), [(32768, 32), (131072, 32), (131072, 64), (12288, 512), (131072, 4096)])
def test_production_shapes(num_latents, k, dtype):
    pre = torch.randn(64, num_latents, device="cuda").to(dtype)
    for x in (pre, pre.relu(), pre.round()):
        args = (x, None, None, k, False, True)
        assert_same(ops.topk(*args, "triton"), ops.topk(*args, "reference"))


@pytest.mark.gpu
def test_offsets_past_31_bits():
    pre = torch.randn(16500, 131072, device="cuda", dtype=torch.bfloat16)  # 2.16e9 elements
    codes = f.topk(pre, 8, backend="triton")
    last = f.topk(pre[-3:], 8, backend="reference")
    assert_same((codes.values[-24:], codes.indices[-24:]), (last.values, last.indices))


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("kwargs", [{}, {"magnitude": True}, {"relu": False}], ids=["relu", "magnitude", "signed"])
def test_gradient_is_the_kept_entries(kwargs, backend):
    k = 22  # more than are positive: zeros and negative numbers are kept too
    pre = make_pre("ties", (3, 30)).requires_grad_()
    assert bool(((pre > 0).sum(1) < k).all())
    weight = torch.randn(3, 30)
    (f.topk(pre, k, backend=backend, **kwargs).to_dense() * weight).sum().backward()
    kept = torch.zeros(3, 30).scatter_(1, f.topk(pre.detach(), k, **kwargs).indices.view(3, k).long(), 1.0)
    if not kwargs:
        kept = kept * (pre.detach() > 0)  # zeros kept after ReLU pass nothing
    assert torch.equal(pre.grad, kept * weight)


@pytest.mark.parametrize("backend", FAST)
def test_masked_fill_has_value_zero_and_no_gradient(backend):
    pre = torch.ones(1, 5, requires_grad=True)
    codes = f.topk(pre, 3, mask=torch.tensor([False, False, False, True, False]), relu=False, backend=backend)
    assert codes.indices.tolist() == [0, 1, 3] and codes.values.tolist() == [0.0, 0.0, 1.0]
    codes.values.sum().backward()
    assert pre.grad.tolist() == [[0.0, 0.0, 0.0, 1.0, 0.0]]


def test_gradcheck():
    pre = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    score = torch.randn(3, 12, dtype=torch.float64)
    for kwargs in ({}, {"magnitude": True}, {"relu": False}, {"score": score}):
        assert torch.autograd.gradcheck(lambda p, kw=kwargs: f.topk(p, 4, **kw).to_dense(), (pre,))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_sorted_orders_rows_by_rank(backend):
    pre = make_pre("special", (4, 60))
    codes = f.topk(pre, 9, sorted=True, relu=False, backend=backend)
    plain = f.topk(pre, 9, relu=False)
    keys = reference.ordered_keys(codes.values.view(4, 9))
    assert bool((keys.diff(dim=1) <= 0).all())
    assert torch.equal(codes.indices.view(4, 9).sort(1).values, plain.indices.view(4, 9))


@pytest.mark.parametrize("bad", [0, 11, -1, 2.5, True, "3", None])
def test_k_is_checked(bad):
    with pytest.raises((ValueError, TypeError), match="k"):
        f.topk(torch.randn(2, 10), bad)


@pytest.mark.parametrize(
    ("kwargs", "error", "name"),
    [
        ({"score": torch.randn(2, 9)}, ValueError, "score"),
        ({"score": torch.randn(2, 10), "magnitude": True}, ValueError, "score"),
        ({"mask": torch.ones(10)}, TypeError, "mask"),
        ({"mask": torch.ones(9, dtype=torch.bool)}, ValueError, "mask"),
        ({"backend": "cuda"}, ValueError, "backend"),
    ],
    ids=["score-shape", "score-and-magnitude", "mask-dtype", "mask-shape", "backend"],
)
def test_arguments_are_checked(kwargs, error, name):
    with pytest.raises(error, match=name):
        f.topk(torch.randn(2, 10), 3, **kwargs)


@pytest.mark.parametrize("pre", [torch.ones(2, 5, dtype=torch.int64), torch.tensor(1.0), [1.0]], ids=str)
def test_pre_is_checked(pre):
    with pytest.raises((ValueError, TypeError), match="pre"):
        f.topk(pre, 1)


def test_triton_refuses_fp64():
    with pytest.raises(TypeError, match="float64"):
        f.topk(torch.randn(2, 5, dtype=torch.float64), 1, backend="triton")


def test_triton_needs_cuda_or_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        f.topk(torch.randn(2, 5, device="cpu"), 1, backend="triton")


def test_default_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv("SAE_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        f.topk(torch.randn(2, 5), 1)
