"""functional.decode, its kernel and both its gradients (kernels/device/decode.py, backward.py; densified.py)."""
import pytest
import torch
from density import back_end_of, force_dense
from largest_tensor import Largest

from sae_engine import SparseCodes
from sae_engine import functional as f
from sae_engine.testing import assert_same, assert_within_budget
from sae_kernels import reference
from sae_kernels.device import _tuning
from sae_kernels.ops import ops
from sae_kernels.stock import backward, densified, limits
from sae_kernels.stock import decode as stock_decode

FAST = ("torch", "triton")
PATHS = ("torch", "triton", "dense")
PAIRS = [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32),
]  # fmt: skip
CASES = [("B5-K7-F64-D37", 5, 7, 64, 37), ("B1-K1-F1-D1", 1, 1, 1, 1), ("B3-K20-F20-D130", 3, 20, 20, 130),
         ("B4-K3-F90-D1100", 4, 3, 90, 1100), ("B0", 0, 2, 9, 5)]  # fmt: skip


@pytest.fixture
def path(request, monkeypatch):
    return back_end_of(request.param, monkeypatch)


def make(rows, k, num_latents, width, dtypes=(torch.float32, torch.float32), *, ragged=False):
    pre = torch.randn(rows, num_latents).to(dtypes[0])
    codes = f.threshold(pre, 0.6, backend="torch") if ragged else f.topk(pre, k, relu=False, backend="torch")
    weight, bias = torch.randn(num_latents, width).to(dtypes[1]), torch.randn(width).to(dtypes[1])
    return codes.detach(), weight, bias, torch.randn(rows, width)


def test_reference_matches_definition():
    codes, weight, bias, _ = make(4, 3, 12, 5, ragged=True)
    out = f.decode(codes, weight, bias, backend="reference")
    for row in range(4):
        expected = bias.double()
        for n in range(int(codes.offsets[row]), int(codes.offsets[row + 1])):
            expected = expected + codes.values[n].double() * weight[int(codes.indices[n])].double()
        torch.testing.assert_close(out[row], expected.float())


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: f"{p[0]}-{p[1]}".replace("torch.", ""))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def test_forward_and_gradients_within_budget(case, dtypes, path):
    for ragged in (False, True):
        codes, weight, bias, grad = make(*case[1:], dtypes, ragged=ragged)
        results = []
        for run in ("truth", "honest", path):
            cast = (lambda t: t.double()) if run == "truth" else (lambda t: t.clone())
            values, w, b = (cast(t).requires_grad_() for t in (codes.values, weight, bias))
            out = f.decode(codes.replace(values=values), w, b, backend="reference" if run == "honest" else path
                           if run != "truth" else "reference")
            out.backward(grad.to(out.dtype))
            results.append((out.detach(), values.grad, w.grad, b.grad))
        for truth, honest, ours in zip(*results, strict=True):
            assert_within_budget(ours, truth.double(), honest)


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("only", ["values", "weight", "bias"])
def test_each_gradient_alone(only, path):
    codes, weight, bias, grad = make(4, 5, 40, 16)
    tensors = {"values": codes.values.clone(), "weight": weight, "bias": bias}
    together = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    alone = {n: t.clone().requires_grad_(n == only) for n, t in tensors.items()}
    for t in (together, alone):
        f.decode(codes.replace(values=t["values"]), t["weight"], t["bias"], backend=path).backward(grad)
    assert torch.equal(alone[only].grad, together[only].grad)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_zero_values_get_the_true_gradient(path):
    values = torch.zeros(2, 3, requires_grad=True)
    codes = SparseCodes.from_topk(values, torch.tensor([[0, 1, 2], [3, 4, 5]]), 6)
    weight = torch.randn(6, 4)
    f.decode(codes, weight, backend=path).sum().backward()
    torch.testing.assert_close(values.grad.flatten(), weight.sum(1))


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_any_strides(path):
    codes, weight, bias, grad = make(5, 6, 50, 33)
    plain = [t.clone().requires_grad_() for t in (weight, bias)]
    odd = [weight.T.contiguous().T.requires_grad_(), torch.randn(66)[::2].copy_(bias).requires_grad_()]
    outs = []
    for w, b in (plain, odd):
        out = f.decode(codes, w, b, backend=path)
        (out.T * grad.T).sum().backward()
        outs.append((out.detach(), w.grad, b.grad))
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_capacity_leftovers_belong_to_nobody(path):
    pre, weight = torch.randn(4, 30), torch.randn(30, 8)
    pre[:, 0] = -1.0
    if densified.DENSE_SHARE["cpu"]["decode"]:  # a GEMM reads all of the weight; a gather must not read the leftovers
        weight[0] = torch.nan
    roomy = f.threshold(pre, 0.5, capacity=100, backend="torch")
    exact = f.threshold(pre, 0.5, backend="torch")
    outs, grads = [], []
    for codes in (roomy, exact):
        values, w = codes.values.clone().requires_grad_(), weight.clone().requires_grad_()
        out = f.decode(codes.replace(values=values), w, backend=path)
        out.square().sum().backward()
        outs.append(out.detach())
        grads.append((values.grad[: exact.values.numel()], w.grad))
    torch.testing.assert_close(*outs)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert not outs[0].isnan().any() and not grads[0][0].isnan().any()


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_latents_with_many_entries(path):
    """Zipf-like firing: one latent owns more entries than one program sums."""
    rows = 3 * _tuning.SPLIT_LATENT + 5
    indices = torch.stack([torch.zeros(rows, dtype=torch.int64), 1 + torch.arange(rows) % 7], dim=1)
    codes = SparseCodes.from_topk(torch.randn(rows, 2), indices, 9)
    grad, weight = torch.randn(rows, 20), torch.randn(9, 20)
    truth = codes.to_dense().double().T @ grad.double()
    runs = []
    for _ in range(2):
        w = weight.clone().requires_grad_()
        f.decode(codes, w, backend=path).backward(grad)
        runs.append(w.grad)
    honest = codes.to_dense().T @ grad
    assert_within_budget(runs[0], truth, honest)
    assert torch.equal(*runs)


@pytest.mark.sanitizer
def test_small_and_complete(monkeypatch):
    monkeypatch.setattr(densified, "DENSE_SHARE", force_dense(float("inf")))
    for name in ("SPLIT_ROW", "SPLIT_LATENT"):
        monkeypatch.setattr(_tuning, name, 8)  # so that pieces of rows and of latents are summed first
    codes, weight, bias, grad = make(6, 12, 30, 20)
    values, w = codes.values.clone().requires_grad_(), weight.clone().requires_grad_()
    out = f.decode(codes.replace(values=values), w, bias, backend="triton")
    out.backward(grad)
    torch.testing.assert_close(out, codes.to_dense() @ weight + bias)
    torch.testing.assert_close(w.grad, codes.to_dense().T @ grad)
    torch.testing.assert_close(values.grad, (grad @ weight.T).gather(1, codes.indices.long().view(6, 12)).flatten())


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: f"{p[0]}-{p[1]}".replace("torch.", ""))
@pytest.mark.parametrize(("width", "num_latents", "k"), [(768, 32768, 32), (4096, 131072, 64), (2304, 65536, 32)])
def test_production_shapes(width, num_latents, k, dtypes):
    codes = f.topk(torch.randn(512, num_latents, device="cuda").to(dtypes[0]), k).detach()
    weight = torch.randn(num_latents, width, device="cuda").to(dtypes[1])
    grad = torch.randn(512, width, device="cuda")
    results = []
    for run in ("truth", "honest", "triton"):
        cast = (lambda t: t.double()) if run == "truth" else (lambda t: t.clone())
        values, w = cast(codes.values).requires_grad_(), cast(weight).requires_grad_()
        out = f.decode(codes.replace(values=values), w, backend="triton" if run == "triton" else "reference")
        out.backward(grad.to(out.dtype))
        results.append((out.detach(), values.grad, w.grad))
    for truth, honest, ours in zip(*results, strict=True):
        assert_within_budget(ours, truth, honest)


@pytest.mark.parametrize("backend", FAST)
def test_two_runs_give_the_same_bits(backend):
    codes, weight, bias, grad = make(20, 4, 64, 24)
    runs = []
    for _ in range(2):
        values, w = codes.values.clone().requires_grad_(), weight.clone().requires_grad_()
        out = f.decode(codes.replace(values=values), w, bias, backend=backend)
        out.backward(grad)
        runs.append((out.detach(), values.grad, w.grad))
    assert_same(*runs)


def test_gradcheck():
    codes, weight, bias, _ = make(3, 4, 10, 6, (torch.float64, torch.float64))
    args = codes.values.clone().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w, b: f.decode(codes.replace(values=v), w, b), args)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_autocast_decides_the_result_and_nothing_else(path):
    codes, weight, _, grad = make(20, 24, 128, 40)
    truth = codes.to_dense().double() @ weight.double()
    w = weight.clone().requires_grad_()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        out = f.decode(codes, w, backend=path)
        assert_within_budget(out, truth, truth.bfloat16())  # one rounding of the exact result
        out.backward(grad.bfloat16())
    truth_w = codes.to_dense().double().T @ grad.bfloat16().double()
    assert_within_budget(w.grad, truth_w, truth_w.float())


def test_result_dtype():
    codes, weight, bias, _ = make(3, 4, 10, 6)
    assert f.decode(codes, weight.bfloat16()).dtype == torch.float32
    assert f.decode(codes.to(torch.float16), weight.half()).dtype == torch.float16
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert f.decode(codes, weight, bias).dtype == torch.bfloat16


def test_arguments_are_checked():
    codes, weight, bias, _ = make(3, 4, 10, 6)
    with pytest.raises(TypeError, match="codes"):
        f.decode(codes.to_dense(), weight)
    with pytest.raises(ValueError, match="W_dec"):
        f.decode(codes, weight[:-1])
    with pytest.raises(ValueError, match="b_dec"):
        f.decode(codes, weight, bias[:-1])
    with pytest.raises(TypeError, match="W_dec"):
        f.decode(codes, weight.long())
    with pytest.raises(ValueError, match="W_dec must be on c"):
        f.decode(codes, weight.to("meta"))


# --- decode_error: the residual and its squared norm, in one launch ------------------------------------------------


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: f"{p[0]}-{p[1]}".replace("torch.", ""))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def test_error_and_gradients_within_budget(case, dtypes, path):
    """Two tiles of columns at D = 1100; a target that is transposed in memory; with and without a bias."""
    for has_bias in (True, False):
        codes, weight, bias, grad = make(*case[1:], dtypes, ragged=True)
        target = torch.randn(grad.shape[::-1]).T
        grad_squares = torch.randn(grad.shape[0])
        results = []
        for run in ("truth", "honest", path):
            cast = (lambda t: t.double()) if run == "truth" else (lambda t: t.clone())
            values, w, b, t = (cast(t).requires_grad_() for t in (codes.values, weight, bias, target))
            backend = "reference" if run in ("truth", "honest") else {"dense": "torch"}.get(path, path)
            args = (values, codes.indices, codes.offsets, w, b if has_bias else None, t, t.dtype, backend)
            residual, squares = ops.decode_error(*args)
            torch.autograd.backward([residual, squares], [cast(grad), cast(grad_squares)])
            results.append((residual.detach(), squares.detach(), values.grad, w.grad, t.grad))
        for truth, honest, ours in zip(*results, strict=True):
            assert_within_budget(ours, truth.double(), honest)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_squares_are_those_of_the_residual_before_it_is_rounded(backend):
    codes, weight, bias, _ = make(3, 4, 30, 40)
    target = torch.randn(3, 40)
    args = codes.values, codes.indices, codes.offsets, weight, bias, target
    rounded, squares = ops.decode_error(*args, torch.float16, backend)
    exact, same = ops.decode_error(*args, torch.float32, backend)
    assert torch.equal(rounded, exact.half()) and torch.equal(squares, same)
    torch.testing.assert_close(exact, f.decode(codes, weight, bias) - target)
    torch.testing.assert_close(squares, exact.square().sum(1))


# --- rows of uneven length -----------------------------------------------------------------------------------------


def uneven(num_latents, lengths, dtype=torch.float32):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    indices = torch.cat([torch.randperm(num_latents)[:n].sort().values for n in lengths]).int()
    return SparseCodes(torch.randn(int(offsets[-1])).to(dtype), indices, offsets, (len(lengths),), num_latents)


@pytest.mark.emulated
@pytest.mark.parametrize("path", ["triton"], indirect=True)
@pytest.mark.parametrize(("width", "split"), [(20, _tuning.SPLIT_ROW), (1100, 32)])
def test_rows_of_none_to_hundreds_of_entries(path, width, split, monkeypatch):
    """Rows that hold several pieces, exactly one, none, and one across a border; the last piece ends with the codes."""
    monkeypatch.setattr(_tuning, "SPLIT_ROW", split)
    codes = uneven(4 * split, [0, split, 3, 3 * split + 5, split - 8, 7, 0, 2 * split - 7, 1])
    assert (codes.values.numel() % split, int(codes.offsets[1]) % split) == (1, 0)
    weight, grad = torch.randn(4 * split, width), torch.randn(9, width)
    runs = []
    for run in ("truth", "honest", path, path):
        cast = (lambda t: t.double()) if run == "truth" else (lambda t: t.clone())
        values, w = cast(codes.values).requires_grad_(), cast(weight).requires_grad_()
        out = f.decode(codes.replace(values=values), w, backend=path if run == path else "reference")
        out.backward(cast(grad))
        runs.append((out.detach(), values.grad, w.grad))
    for truth, honest, ours, again in zip(*runs, strict=True):
        assert_within_budget(ours, truth, honest)
        assert torch.equal(ours, again)


@pytest.mark.interpreter
def test_long_rows_are_summed_in_splits(monkeypatch):
    """A row's own program adds up splits; what it gathers itself is what lies outside of them."""
    from meter import metering

    monkeypatch.setattr(densified, "DENSE_SHARE", force_dense(float("inf")))
    split = _tuning.SPLIT_ROW
    codes = uneven(3 * split, [5, 3 * split])
    weight = torch.randn(3 * split, 16)
    with metering() as meter:
        f.decode(codes, weight, backend="triton")
    splits, rows = meter.launches
    assert (splits.kernel, rows.kernel) == ("_row_split_kernel", "_decode_kernel")
    assert splits.loaded["weight_ptr"] == 2 * split * 16 * 4 and rows.loaded["weight_ptr"] == (split + 5) * 16 * 4
    assert _tuning.splits_of_row(codes.values.numel(), 2) >= 8


@pytest.mark.parametrize("entries", [3, 40])
def test_16_bit_weights_are_widened_a_few_columns_at_a_time(entries, monkeypatch):
    """On a CPU a wide copy of the whole matrix takes several times as long as the sums."""
    monkeypatch.setattr(limits, "SCORES_IN_CACHE", 64)
    with torch.device("cpu"):
        codes = f.topk(torch.rand(entries, 30), 1)
        weight, bias, grad = torch.randn(30, 100).bfloat16(), torch.randn(100), torch.randn(entries, 100).bfloat16()
    arguments = codes.values.bfloat16(), codes.indices, codes.offsets, weight

    with Largest(lambda tensor: tensor.dtype == torch.float32 and tensor.shape[:1] == (30,)) as widened:
        sums = stock_decode.decode(*arguments, bias, torch.bfloat16)
        products = backward.decode_backward_values(grad, *arguments)
    assert widened.seen < weight.numel()
    wide = codes.values.bfloat16().float(), codes.indices, codes.offsets, weight.float()
    expected = reference.decode(*wide, bias, torch.float32), reference.decode_backward_values(grad.float(), *wide)
    for ours, true in zip((sums, products), expected, strict=True):  # rounded once: half a unit in the last place
        spacing = torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(ours.float(), true, rtol=spacing / 2 * (1 + 1e-3), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_products_in_order_of_latents_are_the_same(dtype, monkeypatch):
    """On a CPU, of a weight that no cache holds: some rows of the gradient at a time, the last of them fewer."""
    with torch.device("cpu"):
        codes = uneven(40, [7, 0, 40, 1, 12, 0, 3])
        entries = 5 + codes.indices.numel()  # the last belong to no row
        indices = torch.nn.functional.pad(codes.indices, (0, 5))
        weight, grad = (torch.randn(rows, 24).to(dtype) for rows in (40, codes.rows))
        arguments = grad, torch.ones(entries, dtype=torch.float64), indices, codes.offsets, weight
    in_order_of_rows = backward.decode_backward_values(*arguments)
    monkeypatch.setattr(limits, "GATHERED_IN_CACHE", 3 * 24)
    with Largest(lambda tensor: tensor.dtype == torch.float32) as widened:
        ours = backward.decode_backward_values(*arguments)
    assert ours[-5:].tolist() == [0] * 5
    if dtype == torch.bfloat16:  # sums of 24 exact products
        scale = (grad.float().abs().max() * weight.float().abs().max()).item()
        torch.testing.assert_close(ours, in_order_of_rows, rtol=0, atol=24 * scale * torch.finfo(torch.float32).eps)
        assert 0 < widened.seen <= max(3 * 24, entries)
    else:
        assert torch.equal(ours, in_order_of_rows)


def test_only_where_latents_come_again_are_products_made_in_their_order():
    few, many = (torch.empty(entries, dtype=torch.int32, device="meta") for entries in (4000, 200_000))
    small, large = (torch.empty(latents, 768, device="meta") for latents in (2048, 16384))
    grad = torch.empty(2048, 768, device="meta")
    assert backward._latents_come_again(grad, many, large)
    assert not backward._latents_come_again(grad, many, small)  # the cache holds it
    assert not backward._latents_come_again(grad, few, large)
    assert not backward._latents_come_again(grad.expand(100, -1, -1).flatten(0, 1), many, large)  # few at a time
