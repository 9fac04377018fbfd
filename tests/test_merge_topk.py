"""The operation merge_topk: rows that pass by in slabs of latents are selected from as if they were whole."""
import pytest
import torch

from sae_engine.testing import HARD_KINDS, assert_same, make_pre
from sae_kernels.device import _tuning
from sae_kernels.dispatch import interprets_triton
from sae_kernels.ops import ops

BACKENDS = ("reference", "torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 3


def selected(pre, k, backend, score=None, mask=None, magnitude=False):
    """Values and latents (B, k) of whole rows, and their scores; masked entries are 0 in the end."""
    values, latents = (t.view(-1, k) for t in ops.topk(pre, score, mask, k, magnitude, False, backend))
    return values, None if score is None else score.gather(1, latents.long()), latents


def merged(pre, widths, k, backend, score=None, mask=None, magnitude=False):
    """The same of slabs of ``widths``, the first of at least k latents."""
    def slab(matrix, start, width):
        return None if matrix is None else matrix[..., start : start + width]

    first = widths[0]
    held = selected(slab(pre, 0, first), k, "reference", slab(score, 0, first), slab(mask, 0, first), magnitude)
    held = tuple(None if t is None else t.contiguous() for t in held)
    for width in widths[1:]:
        ops.merge_topk(*held, slab(pre, first, width), slab(score, first, width), mask, first, magnitude, backend)
        first += width
    assert first == pre.shape[1]
    if mask is not None:
        held[0].masked_fill_(~mask[held[2].long()], 0.0)
    return held


def check(pre, widths, k, backend, **kwargs):
    found, whole = merged(pre, widths, k, backend, **kwargs), selected(pre, k, "reference", **kwargs)
    assert_same(*(tuple(t for t in some if t is not None) for some in (found, whole)))


def hard_rows(kind, shape, dtype=torch.float32):
    """Beside the hard kinds: rows whose every slab holds more than what is held, and one of few giants."""
    if kind in HARD_KINDS:
        return make_pre(kind, shape, dtype)
    if kind == "giants":
        pre = torch.randn(shape) * 1e-2
        return pre.scatter_(1, torch.rand(shape).topk(4, 1).indices, 1e4).to(dtype)
    if kind == "rounded":
        return torch.randn(shape).mul(2).round().to(dtype)
    return torch.randn(shape).sort(dim=1, descending=kind == "descending").values.to(dtype)


KINDS = (*HARD_KINDS, "giants", "rounded", "ascending", "descending")
CUTTINGS = [(7, (40, 1, 64, 5, 90)), (1, (1, 1, 1, 130)), (16, (16, 200, 3)), (50, (60, 50, 33, 49))]
IDS = [f"K{k}-{'-'.join(map(str, widths))}" for k, widths in CUTTINGS]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "widths"), CUTTINGS, ids=IDS)
def test_any_cutting_selects_as_whole_rows_do(k, widths, dtype, backend):
    """Slabs of one latent, of fewer than k, of k, of no multiple of anything."""
    kinds = KINDS
    if backend == "triton" and interprets_triton():  # slowly: each kind in two of the twelve
        number = 3 * CUTTINGS.index((k, widths)) + DTYPES.index(dtype)
        kinds = [KINDS[(number + n) % len(KINDS)] for n in (0, 5)]
    for number, kind in enumerate(kinds):
        pre = hard_rows(kind, (ROWS, sum(widths)), dtype)
        for magnitude in (False, True) if kinds is KINDS else (number % 2 == 1,):
            check(pre, widths, k, backend, magnitude=magnitude)


@pytest.fixture
def small_lists(monkeypatch):
    """Room for hardly more than what is held, and tiles that overflow it: as k = 4,096 has them, at small sizes."""
    monkeypatch.setattr(_tuning, "merge_lanes", lambda k: _tuning.next_power_of_2(2 * k))
    monkeypatch.setattr(_tuning, "merge_tile", lambda *_: _tuning.Tile(32, 4))


@pytest.mark.sanitizer
def test_lists_that_overflow_drop_nothing(small_lists):
    """A list is merged when the next tile does not fit, and of a tile that fits no empty list its first k are listed.

    Of rows that ascend every tile overflows; of others some.
    """
    k = 7
    assert _tuning.merge_lanes(k) - k < 32, "a whole tile fits no list"
    check(hard_rows("ascending", (1, 120), torch.bfloat16), (20, 100), k, "triton")
    check(make_pre("ties", (2, 90), torch.bfloat16), (10, 80), k, "triton")
    score, mask = hard_rows("ascending", (1, 120)), torch.arange(120) % 5 > 0
    check(make_pre("special", (1, 120), torch.bfloat16), (10, 110), k, "triton", score=score, mask=mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eligible", [0, 3, 60])
def test_masked_latents_fill_up_rows_by_their_index(eligible, backend):
    """Which also holds where none is eligible, or where -Inf is and outranks them."""
    widths, k = (20, 9, 101), 8
    kinds = ("special", "negative") if backend == "triton" and interprets_triton() else HARD_KINDS  # slowly
    for number, kind in enumerate(kinds):
        mask = torch.zeros(130, dtype=torch.bool)
        mask[torch.randperm(130)[:eligible]] = True
        pre = make_pre(kind, (ROWS, 130), torch.bfloat16)
        pre[0] = -torch.inf
        score = make_pre("special", (ROWS, 130), seed=1) if number % 2 else None
        check(pre, widths, k, backend, mask=mask, score=score)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["normal", "ties", "special", "nan"])
def test_a_score_ranks_in_place_of_what_is_kept(kind, backend):
    pre, score = make_pre("special", (ROWS, 150), torch.bfloat16), make_pre(kind, (ROWS, 150), seed=3)
    check(pre, (30, 70, 2, 48), 11, backend, score=score)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slabs_lie_as_they_like(backend):
    """Columns of a wider matrix, as slices of a slab's buffer are; every other column; latents × tokens."""
    wide = make_pre("ties", (ROWS, 400), torch.bfloat16)
    for pre in (wide[:, 7:207], wide[:, ::2], make_pre("transposed", (ROWS, 200))):
        check(pre, (30, 101, 69), 9, backend)


def test_fp64_and_rows_of_one_latent():
    for kind in KINDS:
        for backend in ("reference", "torch"):
            check(hard_rows(kind, (ROWS, 150), torch.float64), (20, *(1,) * 10, 120), 9, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    check(torch.empty(0, 30), (10, 20), 4, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_held_is_written_in_place_and_is_a_constant(backend):
    """A tensor that autograd has saved notices; no gradient flows to the slab, whose entries are asked for later."""
    pre = torch.arange(40.0).expand(2, 40).clone().requires_grad_()
    values, _, latents = (None if t is None else t.detach().clone() for t in selected(pre[:, :10], 3, "reference"))
    versions = values._version, latents._version
    ops.merge_topk(values, None, latents, pre[:, 10:], None, None, 10, False, backend)
    assert latents.tolist() == [[37, 38, 39]] * 2 and values.tolist() == latents.tolist()
    assert values._version > versions[0] and latents._version > versions[1]
    assert not values.requires_grad and not latents.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend, compile_backend):
    pre = make_pre("ties", (ROWS, 90))

    def select(pre):
        held = tuple(t.view(-1, 5) for t in ops.topk(pre[:, :40], None, None, 5, False, False, backend))
        ops.merge_topk(held[0], None, held[1], pre[:, 40:], None, None, 40, False, backend)
        return held

    found = torch.compile(select, fullgraph=True, backend=compile_backend)(pre)
    assert_same(found, selected(pre, 5, "reference")[::2])
