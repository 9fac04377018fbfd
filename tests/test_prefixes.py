"""functional.decode_prefixes and SparseCodes.split_latents: nested reconstructions in one pass."""
import pytest
import torch

import sae_engine as se
from sae_engine import functional as f
from sae_engine.testing import assert_same, assert_within_budget

WIDTHS = (3, 4, 20, 40)


def truth(dense, W_dec, b_dec, widths):
    return torch.stack([dense[..., :w] @ W_dec[:w] + b_dec for w in widths], dim=-2)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(40,), (0, 40), (5, 40), (2, 3, 40)], ids=str)
def test_equals_decoding_each_prefix(shape, dtype, backend):
    codes = f.threshold(torch.randn(shape).to(dtype), 0.6)
    W_dec, b_dec = torch.randn(40, 7).to(dtype), torch.randn(7).to(dtype)
    got = f.decode_prefixes(codes, W_dec, b_dec, widths=WIDTHS, backend=backend)
    assert got.shape == (*shape[:-1], 4, 7) and got.dtype == dtype
    dense = codes.to_dense()
    honest = truth(dense, W_dec, b_dec, WIDTHS)
    assert_within_budget(got.flatten(), truth(dense.double(), W_dec.double(), b_dec.double(), WIDTHS).flatten(),
                         honest.flatten())  # fmt: skip
    if dtype == torch.float32 and codes.rows:
        torch.testing.assert_close(got[..., -1, :], f.decode(codes, W_dec, b_dec))


def test_runs_of_entries_and_unused_capacity():
    pre = torch.randn(5, 40)
    runs = f.threshold(pre, 0.6, capacity=150).split_latents(WIDTHS)
    assert runs.shape == (5, 4, 40) and runs.offsets.shape == (21,)
    dense = runs.to_dense()
    low = 0
    for number, width in enumerate(WIDTHS):
        inside = torch.zeros(40, dtype=torch.bool)
        inside[low:width] = True
        assert_same(dense[:, number], torch.where((pre > 0.6) & inside, pre, 0.0))
        low = width
    exact = f.decode_prefixes(f.threshold(pre, 0.6), torch.eye(40), widths=WIDTHS)
    assert_same(f.decode_prefixes(f.threshold(pre, 0.6, capacity=150), torch.eye(40), widths=WIDTHS), exact)


def test_gradients_equal_dense_autograd_in_fp64():
    codes = f.topk(torch.randn(2, 3, 40, dtype=torch.float64), 6)
    leaves = [torch.randn(40, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64), codes.values]
    grads = []
    for run in (0, 1):
        W_dec, b_dec, values = (t.clone().requires_grad_() for t in leaves)
        mine = codes.replace(values=values)
        out = f.decode_prefixes(mine, W_dec, b_dec, widths=WIDTHS) if run else truth(
            mine.to_dense(), W_dec, b_dec, WIDTHS)  # fmt: skip
        (out * torch.arange(1, out.numel() + 1).view(out.shape)).sum().backward()
        grads.append((W_dec.grad, b_dec.grad, values.grad))
    for dense, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, dense)


@pytest.mark.slow
def test_whole_graph(compile_backend):
    torch._dynamo.reset()
    run = lambda pre, W_dec: f.decode_prefixes(f.topk(pre, 5), W_dec, widths=WIDTHS)  # noqa: E731
    pre, W_dec = torch.randn(4, 40), torch.randn(40, 7)
    compiled = torch.compile(run, fullgraph=True, backend=compile_backend)
    torch.testing.assert_close(compiled(pre, W_dec), run(pre, W_dec))


def test_autocast_decides_the_dtype_and_not_the_sums():
    codes, W_dec = f.topk(torch.randn(4, 40), 5), torch.randn(40, 7)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        got = f.decode_prefixes(codes, W_dec, widths=WIDTHS)
    assert_same(got, f.decode_prefixes(codes, W_dec, widths=WIDTHS).bfloat16())


@pytest.mark.parametrize("widths", [(), (3, 3, 40), (40, 3), (3, 39), (3, 41), (0, 40), (3, 40.0), "40", 40, (True,)])
def test_widths_are_checked(widths):
    with pytest.raises((ValueError, TypeError), match="widths"):
        f.decode_prefixes(f.topk(torch.randn(4, 40), 5), torch.randn(40, 7), widths=widths)


def test_codes_are_checked():
    with pytest.raises(TypeError, match="codes"):
        f.decode_prefixes(torch.randn(4, 40), torch.randn(40, 7), widths=(40,))
    with pytest.raises(ValueError, match="W_dec"):
        f.decode_prefixes(f.topk(torch.randn(4, 40), 5), torch.randn(41, 7), widths=(40,))
    assert se.functional.decode_prefixes is f.decode_prefixes
