"""decode_sources: what several sources of latents write, in one launch (decode.py in device/ and stock/)."""
import pytest
import torch
from density import force_dense

from sae_engine.testing import assert_same, assert_within_budget
from sae_kernels.device import _tuning
from sae_kernels.ops import ops
from sae_kernels.stock import densified

BACKENDS = ("torch", "triton")
# Columns that each source writes, of so many: causal, side by side, over one another with a gap, all the same.
WIRINGS = {
    "causal": (48, [(0, 48), (16, 48), (32, 48)]), "local": (48, [(0, 16), (16, 32), (32, 48)]),
    "windows": (70, [(3, 40), (21, 33)]), "each": (20, [(0, 20), (0, 20)]), "one": (33, [(0, 33)]),
}  # fmt: skip
LENGTHS = ([3, 0, 5, 1], [0, 0, 0, 0], [9, 4, 0, 2])  # entries of each row, source after source


@pytest.fixture(autouse=True)
def _gathers(monkeypatch):
    monkeypatch.setattr(densified, "DENSE_SHARE", force_dense(float("inf")))


def make(wiring, dtypes=(torch.float32, torch.float32), num_latents=12, lengths=LENGTHS):
    torch.manual_seed(0)
    width, ranges = WIRINGS[wiring]
    codes = []
    for s in range(len(ranges)):
        rows = lengths[s % len(lengths)]
        indices = torch.cat([torch.randperm(num_latents)[:n].sort().values for n in rows]).int()
        offsets = torch.tensor([0, *rows]).cumsum(0)
        codes.append((torch.randn(len(indices)).to(dtypes[0]), indices, offsets))
    weights = [torch.randn(num_latents, stop - first).to(dtypes[1]) for first, stop in ranges]
    bias, target = torch.randn(width), torch.randn(len(lengths[0]), width)
    return *map(list, zip(*codes, strict=True)), weights, [first for first, _ in ranges], width, bias, target


def double(args):
    return [[t.double() if t.is_floating_point() else t for t in a] if isinstance(a, list) and torch.is_tensor(a[0])
            else a.double() if torch.is_tensor(a) else a for a in args]  # fmt: skip


def hold(args, backend, dtype=torch.float32):
    truth = ops.decode_sources(*double(args), torch.float64, "reference")
    honest = ops.decode_sources(*args, dtype, "reference")
    ours = ops.decode_sources(*args, dtype, backend)
    for a, b, c in zip(ours, truth, honest, strict=True):
        assert a.dtype == c.dtype and a.shape == c.shape
        assert_within_budget(a, b, c)
    assert_same(ops.decode_sources(*args, dtype, backend), ours)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_within_budget(wiring, backend):
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)):
        args = make(wiring, dtypes)
        hold(args, backend)
        hold((*args[:6], None, None), backend)
        hold((*args[:7], None), backend, torch.bfloat16)


def test_the_reference_is_a_sum_of_decodes():
    *codes, weights, firsts, width, bias, target = double(make("windows"))
    expected = bias - target
    for first, weight, *of_source in zip(firsts, weights, *codes, strict=True):
        out = ops.decode(*of_source, weight, None, torch.float64, None, None, None, "reference")
        expected[:, first : first + weight.shape[1]] += out
    residual, squares = ops.decode_sources(*codes, weights, firsts, width, bias, target, torch.float64, "reference")
    torch.testing.assert_close(residual, expected)
    torch.testing.assert_close(squares, residual.square().sum(1))


@pytest.mark.emulated
@pytest.mark.parametrize("wiring", ["causal", "windows"])
def test_rows_of_many_entries(wiring, monkeypatch):
    """Rows that hold several splits, exactly one, none, and one across a border; two tiles of columns."""
    monkeypatch.setattr(_tuning, "SPLIT_ROW", 4)
    monkeypatch.setattr(_tuning, "decode_block", lambda width: 32)
    hold(make(wiring, lengths=([4, 0, 11, 1], [2, 9, 3, 12], [0, 0, 8, 5])), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_weights_targets_and_unused_capacity(backend):
    *codes, weights, firsts, width, bias, target = make("causal")
    exact = ops.decode_sources(*codes, weights, firsts, width, bias, target, torch.float32, backend)
    values, indices, offsets = codes
    roomy = [torch.cat([v, v.new_full((3,), torch.nan)]) for v in values], [
        torch.cat([i, i.new_full((3,), 11)]) for i in indices], offsets
    turned = [weight.T.contiguous().T for weight in weights]
    spread = ops.decode_sources(*roomy, turned, firsts, width, bias, target.T.contiguous().T, torch.float32, backend)
    for got, want in zip(spread, exact, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_dense_in_all_go_through_products(backend, monkeypatch):
    args = make("causal")
    sparse = ops.decode_sources(*args, torch.float32, backend)
    monkeypatch.setattr(densified, "DENSE_SHARE", force_dense(0.0))
    product, products = densified._product, []
    monkeypatch.setattr(densified, "_product", lambda *of: products.append(1) or product(*of))
    for got, want in zip(ops.decode_sources(*args, torch.float32, backend), sparse, strict=True):
        torch.testing.assert_close(got, want)
    assert len(products) == 3


def test_it_has_no_gradient():
    args = make("one")
    args[3][0].requires_grad_()
    with pytest.raises(RuntimeError, match="decode_sources has no gradient"):
        ops.decode_sources(*args, torch.float32, "torch")[0].sum().backward()


@pytest.mark.sanitizer
def test_small_and_complete(monkeypatch):
    monkeypatch.setattr(_tuning, "SPLIT_ROW", 4)
    hold(make("windows", lengths=([4, 0, 11, 1], [2, 9, 3, 12])), "triton")


@pytest.mark.gpu
def test_production_shapes():
    torch.manual_seed(0)
    rows, latents, k, d, layers = 512, 4096, 10, 768, 12
    offsets = torch.arange(rows + 1) * k
    indices = [torch.rand(rows, latents).topk(k).indices.sort().values.flatten().int() for _ in range(layers)]
    values = [torch.randn(rows * k).bfloat16() for _ in range(layers)]
    weights = [torch.randn(latents, (layers - s) * d).bfloat16() for s in range(layers)]
    width = layers * d
    bias, target = torch.randn(width), torch.randn(rows, width).bfloat16()
    hold((values, indices, [offsets] * layers, weights, [s * d for s in range(layers)], width, bias, target), "triton")
