"""The operation sparse_mlp: an MLP of which each token keeps some neurons."""
import pytest
import torch
import torch.nn.functional as nn_functional

from sae_engine import SparseCodes
from sae_engine import functional as f
from sae_engine.testing import allocated_by, assert_same, assert_within_budget
from sae_kernels.dispatch import interprets_triton
from sae_kernels.ops import ops
from sae_kernels.stock import densified
from sae_kernels.stock import sparse_mlp as stock

BACKENDS = ("reference", "torch", "triton")
FAST = ("torch", "triton")
F, D, D_OUT = 37, 12, 20
# NumPy's, in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def arguments(tokens=3, share=0.3, dtype=torch.float32, *, up=True, biases=True, sizes=(F, D, D_OUT)):
    """x, kept, up, up_bias, down, down_bias."""
    num_neurons, d, d_out = sizes
    kept = torch.where(torch.rand(tokens, num_neurons) < share, torch.randn(tokens, num_neurons), 0.0).to(dtype)
    x, weight = torch.randn(tokens, d).to(dtype), torch.randn(num_neurons, d).to(dtype)
    given = (x, kept, weight, torch.randn(num_neurons)) if up else (None, kept, None, None)
    given = (*given, torch.randn(num_neurons, d_out).to(dtype), torch.randn(d_out))
    return given if biases else (*given[:3], None, given[4], None)


def dense(x, kept, up, up_bias, down, down_bias):
    """As a dense model's code has it, in fp64."""
    x, kept, up, up_bias, down, down_bias = (None if t is None else t.double() for t in (
        x, kept, up, up_bias, down, down_bias))  # fmt: skip
    hidden = kept if up is None else kept * nn_functional.linear(x, up, up_bias)
    return nn_functional.linear(hidden, down.T, down_bias)


def check(args, backend):
    assert_within_budget(ops.sparse_mlp(*args, backend), dense(*args), ops.sparse_mlp(*args, "reference"))


@pytest.mark.parametrize("up", [True, False])
def test_the_reference_is_the_dense_mlp_of_what_is_kept(up):
    args = [None if t is None else t.double() for t in arguments(up=up)]
    torch.testing.assert_close(ops.sparse_mlp(*args, "reference"), dense(*args))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 8, 9])
def test_any_number_of_tokens(tokens, dtype, backend):
    """9: one more than share a union. Biases, weights of another dtype and layout with some."""
    args = list(arguments(tokens, dtype=dtype, up=tokens != 2, biases=tokens != 8))
    if tokens == 9:
        args[2], args[4] = args[2].float(), args[4].T.contiguous().T
    if tokens == 0:
        assert ops.sparse_mlp(*args, backend).shape == (0, D_OUT)
        return
    check(args, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_nothing_kept_and_everything_kept(tokens, backend):
    *args, bias = arguments(tokens, share=0.0)
    assert_same((ops.sparse_mlp(*args, bias, backend),), (bias.expand(tokens, D_OUT),))
    assert_same((ops.sparse_mlp(*args, None, backend),), (torch.zeros(tokens, D_OUT),))
    check(arguments(tokens, share=1.0), backend)


@pytest.mark.parametrize("backend", FAST)
def test_no_neurons_and_no_width(backend):
    for sizes in ((0, 3, 2), (4, 0, 2), (4, 3, 0)):
        args = arguments(2, sizes=sizes, share=1.0)
        torch.testing.assert_close(ops.sparse_mlp(*args, backend), dense(*args).float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("up", [True, False])
def test_what_a_token_does_not_keep_leaves_no_trace(up, backend):
    """Neurons that no token keeps, and one that only another token keeps: infinities there reach that token alone."""
    args = arguments(3, up=up)
    weights, kept = [args[2], args[4]] if up else [args[4]], args[1]
    kept[:, :4], kept[0, 2], kept[1, 3] = 0.0, 1.0, 2.0
    clean = ops.sparse_mlp(*args, backend)
    for weight in weights:
        before = weight.clone()
        weight[0], weight[1] = torch.nan, torch.inf
        assert_same((ops.sparse_mlp(*args, backend),), (clean,))
        for bad in (torch.nan, torch.inf):
            weight[3] = bad
            found = ops.sparse_mlp(*args, backend)
            torch.testing.assert_close(found[[0, 2]], clean[[0, 2]])
            assert not found[1].isfinite().any()
        weight.copy_(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinities_are_kept(backend):
    args = arguments(3, share=0.0)
    args[1][0, 5], args[1][1, 6] = torch.nan, torch.inf
    found = ops.sparse_mlp(*args, backend)
    assert found[0].isnan().all() and not found[1].isfinite().any()
    assert_same((found[2],), (args[5],))


@pytest.mark.parametrize("backend", FAST)
def test_a_row_does_not_depend_on_its_batch(backend):
    args = arguments(5)
    whole = ops.sparse_mlp(*args, backend)
    for row in range(5):
        x, kept = (t[row : row + 1] for t in args[:2])
        torch.testing.assert_close(ops.sparse_mlp(x, kept, *args[2:], backend)[0], whole[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype):
    args = arguments(1, dtype=dtype, sizes=(4096, 64, 64))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ops.sparse_mlp(*args, "torch"))
    finally:
        torch.set_num_threads(before)
    assert_same((found[1], found[2]), (found[0], found[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("step", [1, 2])
def test_the_operators_that_a_cpu_runs_sum_16_bits_in_fp32(dtype, step):
    """Of each PyTorch that is supported: in 16 bits a sum of ones would stop at 256, or at 2048."""
    width = 5000
    x = torch.ones(1, step * width).to(dtype)[:, ::step]
    x[0, ::7] = 0.25
    weight = torch.ones(3, step * width).to(dtype)[:, ::step]
    exact = x.double().sum().to(dtype)
    at = torch.tensor([1])
    assert torch.equal(stock.products(x, weight, at, at - 1, at - 1, dtype), exact[None])
    assert torch.equal(ops.linear_16bit(x, weight.T, None, dtype, "torch"), exact.expand(1, 3))
    kept, table = x, torch.ones(width, 3 * step).to(dtype)[:, ::step]
    found = ops.sparse_mlp(None, kept, None, None, table, None, "torch")
    assert (found.double() - x.double().sum()).abs().max() <= torch.finfo(dtype).eps * exact  # eighths round as well


def test_no_weight_is_copied():
    """Rows of 16 bits are multiplied and summed where they lie: all that is allocated is a fraction of a matrix."""
    num_neurons, d = 4096, 256
    up, down = (torch.randn(num_neurons, d).bfloat16() for _ in range(2))
    x, kept = torch.randn(1, d).bfloat16(), torch.zeros(1, num_neurons).bfloat16()
    kept[0, ::20] = 1.0
    codes = SparseCodes.from_dense(kept)
    of_codes = codes.values, codes.indices, codes.offsets
    calls = {
        "sparse_mlp": lambda: ops.sparse_mlp(x, kept, up, None, down, None, "torch"),
        "decode_backward_values": lambda: ops.decode_backward_values(x, *of_codes, up, "torch"),
        "decode": lambda: ops.decode(*of_codes, down, None, torch.bfloat16, None, None, None, "torch"),
        "decode of fp32 codes": lambda: ops.decode(
            codes.values.float(), *of_codes[1:], down, None, torch.float32, None, None, None, "torch"),
        "linear_16bit": lambda: ops.linear_16bit(x, up.T, None, torch.bfloat16, "torch"),
    }  # fmt: skip
    most = {name: allocated_by(call).peak for name, call in calls.items()}
    assert {name: peak for name, peak in most.items() if peak > up.nbytes / 4} == {}


@pytest.mark.sanitizer
def test_every_kernel_in_small():
    """Several shares, tiles and parts; infinities that another token keeps; a second block of tokens."""
    for tokens, up in ((1, True), (9, True), (2, False)):
        args = arguments(tokens, 0.5, up=up, sizes=(70, 40, 50))
        check(args, "triton")
        args[1][:, 3] = 0.0
        args[1][0, 3], args[4][3] = 1.0, torch.inf
        found = ops.sparse_mlp(*args, "triton")
        assert not found[0].isfinite().any() and found[1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_gather_denser_codes_than_many(dtype):
    """On a CPU, by ``benchmarks/crossover.py --rows``; both ways agree. 0.4 of all latents are kept."""
    weight = torch.randn(50, 24).to(dtype)
    for rows in (1, densified.FEW_ROWS, densified.FEW_ROWS + 1):
        codes = f.topk(torch.randn(rows, 50).to(dtype), 20, relu=False)
        args = torch.randn(rows, 24).to(dtype), codes.values, codes.indices, codes.offsets, weight
        if weight.is_cpu:
            assert densified.pays("decode_backward_values", args) == (rows > densified.FEW_ROWS)
        truth = ops.decode_backward_values(*(t.double() if t.is_floating_point() else t for t in args), "reference")
        yardstick = ops.decode_backward_values(*args, "reference")
        for choice in (False, True):
            with densified.choosing(choice):
                assert_within_budget(ops.decode_backward_values(*args, "torch"), truth, yardstick)


def test_gradients_are_refused():
    args = dict(zip(("x", "kept", "up", "up_bias", "down", "down_bias"), arguments(1), strict=True))
    for name in args:
        given = {**args, name: args[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=f"{name} requires one"):
            f.sparse_mlp(**given)
        with torch.no_grad():
            f.sparse_mlp(**given)
        with pytest.raises(RuntimeError, match="sparse_mlp has no gradient"):
            ops.sparse_mlp(*given.values(), "torch").sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch 2.15 calls it in jvp
def test_a_function_transform_sees_the_reference():
    x, kept, *rest = arguments(2)
    found = torch.func.jvp(lambda x: f.sparse_mlp(x, kept, rest[0], rest[2]), (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(found, (kept * (torch.ones_like(x) @ rest[0].T)) @ rest[2])


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"x": None}, ValueError, "x and up go together, got only up"),
    ({"up": None}, ValueError, "x and up go together, got only x"),
    ({"x": None, "up": None}, ValueError, "up_bias needs up"),
    ({"kept": torch.zeros(3, F, dtype=torch.int64)}, TypeError, "kept must be float32"),
    ({"x": torch.zeros(3, D, dtype=torch.float64)}, TypeError, "x must have the dtype of kept"),
    ({"x": torch.zeros(2, D)}, ValueError, "x must have shape"),
    ({"up": torch.zeros(D, F)}, ValueError, "up must have shape"),
    ({"down": torch.zeros(D_OUT, F)}, ValueError, r"down must have shape \(37, 37\) \(a row a neuron"),
    ({"down": torch.zeros(F)}, ValueError, "down must have 2 dimension"),
    ({"up_bias": torch.zeros(F, 1)}, ValueError, "up_bias must have 1 dimension"),
    ({"down_bias": torch.zeros(F)}, ValueError, "down_bias must have shape"),
    ({"down_bias": [0.0]}, TypeError, "down_bias must be a tensor"),
])  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    args = dict(zip(("x", "kept", "up", "up_bias", "down", "down_bias"), arguments(3), strict=True))
    with pytest.raises(error, match=message):
        f.sparse_mlp(**{**args, **change})


def test_any_batch_shape():
    x, kept, up, up_bias, down, bias = arguments(6)
    flat = f.sparse_mlp(x, kept, up, down, up_bias, bias)
    shaped = f.sparse_mlp(x.view(2, 3, D), kept.view(2, 3, F), up, down, up_bias, bias)
    assert_same((shaped,), (flat.view(2, 3, D_OUT),))
    torch.testing.assert_close(f.sparse_mlp(x[0], kept[0], up, down, up_bias, bias), flat[0])


@pytest.mark.skipif(not interprets_triton(), reason="looks into Triton's interpreter")
@pytest.mark.interpreter
def test_offsets_of_64_bits(monkeypatch):
    """As where a row's stride times its neurons passes 31 bits: the union's addresses are widened."""
    from sae_kernels.device import _launch, _tuning

    args = arguments(2)
    expected = ops.sparse_mlp(*args, "triton")
    monkeypatch.setattr(_tuning, "is_wide", lambda *_: True)
    _launch.forget_plans()
    assert_same((ops.sparse_mlp(*args, "triton"),), (expected,))
    _launch.forget_plans()
