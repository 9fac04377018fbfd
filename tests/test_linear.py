"""The encoder's product on a CPU: either library, any strides, every gradient; and who is asked."""
import pytest
import torch

import sae_engine as se
from sae_engine.testing import assert_within_budget
from sae_kernels.ops import ops
from sae_kernels.stock import limits
from sae_kernels.stock import linear as stock

LIBRARIES = [
    "MKL",
    pytest.param("oneDNN", marks=pytest.mark.skipif(
        not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
        reason="this build of PyTorch has no oneDNN",
    )),
]  # fmt: skip
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch):
    monkeypatch.setattr(stock, "_mkl_is_slow", lambda: request.param == "oneDNN")
    return request.param


LAYOUTS = {
    "row-major": lambda t: t,
    "latent-contiguous": lambda t: t.T.contiguous().T,
    "every second": lambda t: torch.stack([t, t], -1).flatten(-2)[:, ::2],
    "part of a row": lambda t: torch.cat([t, t], -1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("B", "D", "F"), [(5, 7, 9), (1, 64, 257), (64, 1, 3), (33, 96, 128)])
def test_product_in_any_layout(library, B, D, F, layout):
    x, weight, bias = torch.randn(B, D), torch.randn(D, F), torch.randn(2 * F)[::2]  # oneDNN reads no bias's stride
    truth = x.double() @ weight.double() + bias.double()
    laid = LAYOUTS[layout]
    assert_within_budget(stock.linear(laid(x), laid(weight), bias), truth, torch.addmm(bias, x, weight))
    assert_within_budget(stock.linear(laid(x), laid(weight)), truth - bias.double(), x @ weight)


@pytest.mark.parametrize(("B", "D", "F"), [(0, 7, 9), (5, 0, 9), (5, 7, 0)])
def test_empty_products(library, B, D, F):
    bias = torch.randn(F)
    out = stock.linear(torch.randn(B, D), torch.randn(D, F), bias)
    assert out.shape == (B, F)
    assert torch.equal(out, bias.expand(B, F))


def test_numbers_that_are_not_finite(library):
    x, weight = torch.ones(3, 4), torch.ones(4, 5)
    x[0, 1], weight[2, 3] = torch.nan, torch.inf
    out = stock.linear(x, weight)
    assert out[0].isnan().all() and (out[1:, 3] == torch.inf).all() and (out[1:, :3] == 4).all()


@pytest.mark.parametrize("alone", ["x", "weight", "bias", None])
def test_gradients(library, alone):
    operands = {"x": torch.randn(6, 5), "weight": torch.randn(5, 11), "bias": torch.randn(11)}
    ours = {name: t.clone().requires_grad_(alone in (name, None)) for name, t in operands.items()}
    plain = {name: t.clone().requires_grad_(alone in (name, None)) for name, t in operands.items()}
    truth = {name: t.double().requires_grad_(alone in (name, None)) for name, t in operands.items()}
    grad = torch.randn(6, 11)
    ops.linear(*ours.values()).backward(grad)
    for named, g in ((plain, grad), (truth, grad.double())):
        (named["x"] @ named["weight"] + named["bias"]).backward(g)
    for name, t in ours.items():
        if alone in (name, None):
            assert_within_budget(t.grad, truth[name].grad, plain[name].grad)
        else:
            assert t.grad is None


@needs_onednn
def test_encode_multiplies_by_the_library_that_was_chosen(library):
    x, sae = torch.randn(4, 16), se.SparseAutoencoder(16, 64, se.TopK(3))
    with torch.profiler.profile() as profile, torch.no_grad():
        sae.encode(x)
    names = {event.name for event in profile.events()}
    assert ("mkldnn::_linear_pointwise" in names) == (library == "oneDNN")
    assert ("aten::addmm" in names) == (library == "MKL")


@needs_onednn
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # reading torch's own flags says so
def test_the_choice_follows_the_processor_and_the_switch(monkeypatch):
    capabilities = {"cpu_name": "AMD EPYC", "avx512_f": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(stock.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    decide = stock._mkl_is_slow.__wrapped__
    assert decide()
    monkeypatch.setattr(stock, "_mkl_is_slow", decide)
    matrix = torch.randn(2, 2)
    assert stock.by_onednn(matrix, matrix) and not stock.by_onednn(matrix[:1], matrix)
    assert stock.by_onednn(matrix[:1], matrix.T) and not stock.by_onednn(matrix.double(), matrix.double())
    slab = torch.randn(2, 4)[:, :2]  # of a row-major matrix: oneDNN multiplies it by loops
    assert not stock.by_onednn(matrix, slab) and stock.by_onednn(matrix, torch.randn(4, 2).T[:, :2])
    with torch.backends.mkldnn.flags(enabled=False):
        assert not stock.by_onednn(matrix, matrix)
    capabilities["cpu_name"] = "Intel Xeon"
    assert not decide()
    capabilities.update(cpu_name="AMD EPYC", avx512_f=False)  # MKL's AVX2 code serves any processor
    assert not decide()
    capabilities.update(cpu_name="AMD EPYC", avx512_f=True)
    assert decide()
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not decide()


@pytest.mark.parametrize("in_cache", [7, 70, 1 << 20])
def test_a_row_major_encoder_gets_a_gradient_of_its_own_layout(monkeypatch, in_cache):
    monkeypatch.setattr(limits, "TRANSPOSED_IN_CACHE", in_cache)
    x = torch.randn(9, 7)
    row_major, by_latent = torch.randn(7, 53), torch.empty(53, 7).T
    by_latent.copy_(row_major)
    grads = []
    for weight in (row_major, by_latent):
        weight.requires_grad_()
        codes = se.functional.encode(x, weight, select=se.TopK(4), backend="torch")
        (codes.values * torch.linspace(1, 2, codes.values.numel())).sum().backward()
        assert weight.grad.stride() == weight.stride()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert grads[0].count_nonzero() > 0


@pytest.mark.parametrize("has_instruction", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_is_multiplied_as_the_processor_does_it_best(monkeypatch, dtype, has_instruction):
    monkeypatch.setattr(stock, "_multiplies_bfloat16", lambda: has_instruction)
    x, weight, bias = torch.randn(1, 64).to(dtype), torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype)
    by_matrix = []
    plain = stock.F.linear
    monkeypatch.setattr(stock.F, "linear", lambda *of: by_matrix.append(1) or plain(*of))
    for some in (None, bias):
        exact = x.double() @ weight.double().T + (0 if some is None else some.double())
        allowed = 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (stock.one_row(x, weight, some).double() - exact).abs().max() <= allowed
    assert len(by_matrix) == 2 * (has_instruction and dtype == torch.bfloat16)


def test_what_multiplies_bfloat16(monkeypatch):
    capabilities = {"avx512_f": True, "avx512_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    decide = stock._multiplies_bfloat16.__wrapped__
    assert not decide()
    capabilities["avx512_bf16"] = True
    assert decide()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not decide()


def test_whole_rows_at_a_time_where_onednn_multiplies(monkeypatch):
    x, weight = torch.empty(2, 1), torch.empty(16_384, 1).T
    monkeypatch.setattr(stock, "by_onednn", lambda *_: False)
    assert (stock.whole_rows_from(x, weight), stock.rows_at_once(2048, x, weight)) == (None, 2048)
    monkeypatch.setattr(stock, "by_onednn", lambda *_: True)
    assert (stock.whole_rows_from(x, weight), stock.rows_at_once(2048, x, weight)) == (160, 256)
    assert stock.rows_at_once(511, x, weight) == 511  # less than 32 MiB
    for latents, rows in ((32_768, 255), (49_152, 170), (65_536, 2048)):  # of the last, too few rows would fit
        assert stock.rows_at_once(2048, x, torch.empty(latents, 1).T) == rows


@needs_onednn
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_scale", [False, True])
def test_onednn_makes_a_large_result_of_some_latents_at_a_time(monkeypatch, has_bias, has_scale):
    """In the caller's memory, without a whole one of its own."""
    monkeypatch.setattr(stock, "_mkl_is_slow", lambda: True)
    x, weight, bias = torch.randn(33, 48), torch.randn(1000, 48).T, torch.randn(1000) if has_bias else None
    scale = torch.rand(1000) if has_scale else None
    whole, widths = stock.linear(x, weight, bias, scale), []
    if scale is not None:
        assert torch.equal(whole, stock.linear(x, weight, bias) * scale)
    plain = stock._by_onednn
    monkeypatch.setattr(stock, "_by_onednn", lambda *of: widths.append(of[1].shape[1]) or plain(*of))
    monkeypatch.setattr(limits, "KEPT_BY_ALLOCATOR", 33 * 4 * 256)
    memory = torch.full((33 * 1000,), torch.nan)
    out = stock.linear(x, weight, bias, scale, memory=lambda size: memory[:size])
    assert widths == [128] * 7 + [104]
    assert out.data_ptr() == memory.data_ptr()
    torch.testing.assert_close(out, whole)
    widths.clear()
    row_major = weight.contiguous()  # a part of its columns are rows with gaps
    for of_weight, room in ((row_major, lambda size: memory[:size]), (weight, None)):
        torch.testing.assert_close(stock.linear(x, of_weight, bias, scale, memory=room), whole)
    assert widths == [1000, 1000]
