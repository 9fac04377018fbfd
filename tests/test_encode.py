"""functional.encode: the same codes as the dense pre-activations give, and sparse gradients of everything in it."""
import pytest
import torch
from density import back_end_of
from largest_tensor import Largest

import sae_engine as se
from sae_engine import _encoder, _slabs
from sae_engine import functional as f
from sae_engine.testing import assert_same
from sae_engine.training import TrainStep
from sae_kernels.ops import ops
from sae_kernels.stock import limits
from sae_kernels.stock import linear_16bit as stock_16bit

B, D, F = 7, 9, 40
PATHS = ["torch", "triton", "dense"]
RULES = {
    "TopK": lambda: se.TopK(4), "AbsTopK": lambda: se.AbsTopK(4), "BatchTopK": lambda: se.BatchTopK(3.5),
    "ReLU": lambda: se.ReLU(), "TopAFA": lambda: se.TopAFA(),
    "JumpReLU": lambda: se.JumpReLU(F, threshold=0.4, bandwidth=0.6),
}  # fmt: skip


@pytest.fixture
def path(request, monkeypatch):
    return back_end_of(request.param, monkeypatch)


def make(dtype=torch.float64, shape=(B,)):
    tensors = {
        "x": torch.randn(*shape, D), "W_enc": torch.randn(D, F), "b_enc": torch.randn(F), "b_dec": torch.randn(D),
        "scale": torch.rand(F) + 0.5,
    }  # fmt: skip
    return {n: t.to(dtype).requires_grad_() for n, t in tensors.items()}


def context_for(name, shape=(B,)):
    return {"target_norm": torch.full(shape, 4.0), "weight_norm": torch.rand(F) + 0.5} if name == "TopAFA" else {}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(B,), (2, 3)], ids=str)
def test_gradients_equal_those_through_dense_pre_activations(name, shape):
    rule, context, weight = RULES[name](), context_for(name, shape), torch.randn(*shape, F, dtype=torch.float64)
    outcomes = []
    for sparse in (True, False):
        torch.manual_seed(0)
        t = make(shape=shape)
        if sparse:
            codes = f.encode(
                t["x"], t["W_enc"], t["b_enc"], b_dec=t["b_dec"], scale=t["scale"], select=rule, **context
            )
        else:
            codes = rule.select(((t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * t["scale"], **context)
        (codes.to_dense() * weight).sum().backward()
        grads = {n: p.grad for n, p in (*t.items(), *rule.named_parameters())}
        outcomes.append((codes, {n: g.clone() for n, g in grads.items()}))
        rule.zero_grad()
    assert_same(outcomes[0][0].indices, outcomes[1][0].indices)
    for key, expected in outcomes[1][1].items():
        assert expected.abs().sum() > 0
        torch.testing.assert_close(outcomes[0][1][key], expected, msg=key)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_every_back_end_gives_the_same_gradients(path):
    outcomes = []
    for backend in (path, "reference"):
        torch.manual_seed(0)
        t = make(torch.float32)
        codes = f.encode(t["x"], t["W_enc"], t["b_enc"], b_dec=t["b_dec"], select=se.TopK(4), backend=backend)
        codes.values.square().sum().backward()
        outcomes.append([codes.values.detach(), *(t[n].grad for n in ("x", "W_enc", "b_enc", "b_dec"))])
    for ours, reference in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, reference)


def test_gradcheck():
    t = make()
    names = ("x", "W_enc", "b_enc", "b_dec", "scale")

    def run(x, W_enc, b_enc, b_dec, scale):
        return f.encode(x, W_enc, b_enc, b_dec=b_dec, scale=scale, select=se.TopK(3)).values

    assert torch.autograd.gradcheck(run, tuple(t[n] for n in names))


@pytest.mark.parametrize("only", ["x", "W_enc", "b_enc", "b_dec", "scale"])
def test_each_gradient_alone(only):
    grads = []
    for chosen in ("xW_encb_encb_decscale", only):
        torch.manual_seed(0)
        t = {n: p.detach().requires_grad_(n in chosen) for n, p in make().items()}
        codes = f.encode(t["x"], t["W_enc"], t["b_enc"], b_dec=t["b_dec"], scale=t["scale"], select=se.TopK(3))
        codes.values.sum().backward()
        grads.append(t[only].grad)
    assert torch.equal(*grads)


def test_no_gradient_is_a_matrix_of_tokens_and_latents():
    """Of all tensors of a backward pass none has tokens times latents elements."""
    rows, latents = 4096, 1024
    x, W = torch.randn(rows, 4), torch.randn(4, latents, requires_grad=True)
    loss = f.encode(x, W, select=se.TopK(2)).values.sum()
    with Largest() as largest:
        loss.backward()
    assert 0 < largest.seen < rows * latents / 16


def test_two_runs_give_the_same_bits():
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        t = make(torch.float32)
        codes = f.encode(t["x"], t["W_enc"], t["b_enc"], b_dec=t["b_dec"], select=se.BatchTopK(5))
        codes.values.square().sum().backward()
        runs.append([t[n].grad for n in ("x", "W_enc", "b_enc", "b_dec")])
    assert_same(*runs)


def test_pre_is_returned_differentiable():
    outcomes = []
    for sparse in (True, False):
        torch.manual_seed(0)
        t = make()
        if sparse:
            (codes,), _, pre = f.encode_with(
                t["x"], t["W_enc"], t["b_enc"], b_dec=t["b_dec"], select=se.TopK(3), keep_pre=True
            )
        else:
            pre = (t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
            codes = f.topk(pre, 3)
        (codes.values.sum() + pre.square().sum()).backward()
        outcomes.append([pre.detach(), *(t[n].grad for n in ("x", "W_enc", "b_enc", "b_dec"))])
    for ours, dense in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("scaled", [False, True])
def test_known_pre_activations_are_taken_as_they_are(scaled, monkeypatch):
    """Nothing is multiplied, and the gradients are those of the product; a latent of scale 0 keeps nothing."""
    outcomes = []
    for known in (True, False):
        torch.manual_seed(0)
        t = make()
        scale = t["scale"] if scaled else None
        pre = (t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
        if scaled:
            with torch.no_grad():
                scale[3] = 0
            pre = pre * scale
        options = {"b_dec": t["b_dec"], "scale": scale, "select": [se.TopK(5), se.BatchTopK(2)]}
        with monkeypatch.context() as patch:
            if known:
                patch.setattr(_encoder, "linear", None)
                options["pre"] = pre.detach()
            codes = f.encode_with(t["x"], t["W_enc"], t["b_enc"], **options).codes
        (codes[0].values.sum() + codes[1].values.square().sum()).backward()
        grads = [t[n].grad for n in t if scaled or n != "scale"]
        outcomes.append([*(c.indices for c in codes), *(c.values.detach() for c in codes), *grads])
    for ours, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, expected)


def test_under_autocast():
    t = make(torch.float32)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        codes = f.encode(t["x"], t["W_enc"], t["b_enc"], b_dec=t["b_dec"], select=se.TopK(3))
    codes.values.float().sum().backward()
    assert codes.values.dtype == torch.bfloat16 and t["W_enc"].grad.dtype == torch.float32
    kept = codes.to_dense().detach().float() != 0
    expected = (t["x"] - t["b_dec"]).detach().bfloat16().float().T @ kept.float()
    torch.testing.assert_close(t["W_enc"].grad, expected)


def test_arguments_are_checked():
    x, W = torch.randn(B, D), torch.randn(D, F)
    for kwargs, error, name in (
        ({"select": torch.relu}, TypeError, "select"),
        ({"select": None}, TypeError, "select"),
        ({"select": [se.TopK(3)]}, TypeError, "encode_with takes several"),
        ({"select": se.TopK(3), "b_dec": torch.ones(D + 1)}, ValueError, "b_dec"),
        ({"select": se.TopK(3), "scale": torch.ones(D)}, ValueError, "scale"),
        ({"select": se.TopK(3), "pre": torch.ones(B, D)}, ValueError, "pre"),
        ({"select": se.TopK(3), "pre": torch.ones(B, F, dtype=torch.int32)}, TypeError, "pre"),
        ({"select": se.TopK(3), "target_norm": torch.ones(B)}, TypeError, "target_norm"),
    ):
        with pytest.raises(error, match=name):
            f.encode(x, W, **kwargs)
    with pytest.raises(ValueError, match="x must have d_in"):
        f.encode(x[:, 1:], W, select=se.TopK(3))


@pytest.mark.parametrize("relu", [True, False])
def test_several_rules_share_one_encoder_and_one_backward_pass(relu):
    dead = torch.arange(F) % 3 == 0
    aux = se.AuxTopK(20, relu=relu)  # more than are dead
    rules = [se.TopK(4), aux, se.ReLU()]
    weights = [torch.randn(B, F, dtype=torch.float64) for _ in rules]
    outcomes = []
    for sparse in (True, False):
        torch.manual_seed(0)
        t = make()
        if sparse:
            codes = f.encode_with(
                t["x"], t["W_enc"], t["b_enc"], b_dec=t["b_dec"], scale=t["scale"], select=rules, dead_mask=dead
            ).codes
            dense = [c.to_dense() for c in codes]
        else:
            pre = ((t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * t["scale"]
            among_dead = pre.relu() if relu else pre
            dense = [rules[0](pre), torch.where(dead, among_dead, 0.0), pre.relu()]
        sum((d * w).sum() for d, w in zip(dense, weights, strict=True)).backward()
        outcomes.append([*(d.detach() for d in dense), *(t[n].grad for n in ("x", "W_enc", "b_enc", "b_dec", "scale"))])
    for ours, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, expected)


def test_several_rules_with_a_capacity():
    grads = []
    for capacity in (None, 200):
        torch.manual_seed(0)
        t = make()
        rules, context = [se.TopAFA(capacity=capacity), se.TopK(3)], context_for("TopAFA")
        codes = f.encode_with(t["x"], t["W_enc"], t["b_enc"], select=rules, **context).codes
        (codes[0].to_dense().square().sum() + codes[1].to_dense().sum()).backward()
        grads.append(t["W_enc"].grad)
    torch.testing.assert_close(*grads)


def test_context_of_several_rules_is_checked():
    x, W = torch.randn(B, D), torch.randn(D, F)
    with pytest.raises(TypeError, match="takes target_norm"):
        f.encode_with(x, W, select=[se.TopK(3), se.ReLU()], target_norm=torch.ones(B))
    with pytest.raises(TypeError, match="dead_mask"):
        f.encode_with(x, W, select=[se.TopK(3), se.AuxTopK(3)])
    with pytest.raises(ValueError, match="select"):
        f.encode_with(x, W, select=[])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("result", [None, torch.float32])
def test_sixteen_bit_linear_rounds_once_and_multiplies_its_gradient_in_sixteen_bits(dtype, result):
    x, weight, bias = torch.randn(7, 12).to(dtype), torch.randn(12, 33).to(dtype), torch.randn(33)
    learned = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = f.linear(*learned, result_dtype=result)
    assert out.dtype == (result or dtype)
    assert torch.equal(out, f.linear(x, weight, bias, result_dtype=result)), "as without a gradient"
    exact = x.double() @ weight.double() + bias.double()
    assert ((out - exact).abs() <= torch.finfo(out.dtype).eps * exact.abs() + 12 * 2.0**-24 * exact.abs().max()).all()
    grad = torch.randn(7, 33).to(out.dtype)
    grads = torch.autograd.grad(out, learned, grad)
    expected = grad.double() @ weight.double().T, x.double().T @ grad.double(), grad.double().sum(0)
    for ours, meant, t in zip(grads, expected, learned, strict=True):
        assert ours.dtype == t.dtype
        # one rounding, and sums of at most 33 products in fp32
        assert ((ours - meant).abs() <= torch.finfo(t.dtype).eps * meant.abs() + 33 * 2.0**-24 * 50).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.sanitizer), "torch", "reference"])
def test_sixteen_bit_product_with_its_bias_in_the_operands(dtype, by_columns, backend, monkeypatch):
    """More rows than half their width, so that the bias is cut into pieces; some latents at a time."""
    monkeypatch.setitem(limits.WIDE_ELEMENTS, "cuda", 1)
    for rows, width, latents in ((9, 12, 300), (40, 70, 5), (3, 1, 257)):
        x, bias = torch.randn(rows, width).to(dtype), torch.randn(latents) * torch.logspace(-6, 3, latents)
        weight = torch.randn(width, latents).to(dtype)
        weight = weight.T.contiguous().T if by_columns else weight
        bias[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
        out = ops.linear_16bit(x, weight, bias, dtype, backend)
        assert out.dtype == dtype
        exact = x.double() @ weight.double() + bias.double()
        torch.testing.assert_close(out[:, :3].double(), exact[:, :3], equal_nan=True, rtol=0, atol=0)
        off = (out.double() - exact)[:, 3:].abs()
        sums = (x.double().abs() @ weight.double().abs() + bias.double().abs())[:, 3:]
        assert (off <= torch.finfo(dtype).eps / 2 * exact[:, 3:].abs() + (width + 3) * 2.0**-24 * sums + 2.0**-25).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pieces_sum_up_to_the_bias_they_were_cut_from(dtype):
    from sae_kernels.device import linear_16bit  # which imports Triton

    bias = torch.randn(600) * torch.logspace(-6, 4, 600)
    scales = stock_16bit.with_scales(torch.zeros(1, 5, dtype=dtype))[0, 5:]
    pieces = linear_16bit.operand_of(torch.zeros(5, 600, dtype=dtype), bias, 5 + scales.numel())[5:]
    back = scales.double() @ pieces.double()
    assert ((back - bias).abs() <= (0.0 if dtype == torch.bfloat16 else 2.0**-33)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.sanitizer), "torch", "reference"])
def test_an_input_that_holds_the_scales_gives_the_same_product(dtype, backend):
    """Made once from an input and a center for the products with many weights; also where none of them needs it."""
    for rows, width, biased in ((40, 70, True), (9, 61, True), (9, 12, False), (4, 70, True)):
        x, center = torch.randn(rows, width), torch.randn(width)
        weight, bias = torch.randn(width, 20).to(dtype), torch.randn(20) if biased else None
        operand, rounded = stock_16bit.with_scales(x, center, dtype), (x - center).to(dtype)
        assert operand.shape[1] % 64 == 0
        assert_same(operand[:, :width], rounded)
        assert_same(*(ops.linear_16bit(given, weight, bias, dtype, backend) for given in (operand, rounded)))
    operand.requires_grad_()
    ops.linear_16bit(operand, weight, bias, dtype, backend).sum().backward()
    assert_same(operand.grad[:, :width], weight.float().sum(1).to(dtype).expand(rows, width))
    assert not operand.grad[:, width:].any()


def test_slabs_multiply_an_input_that_was_extended_once(monkeypatch):
    """As on a GPU, where columns for the bias follow an input of 16 bits: the same codes and gradients."""
    found = []
    for extended in (False, True):
        torch.manual_seed(3)
        t = make(torch.bfloat16, (600,))
        monkeypatch.setattr(stock_16bit, "is_extended", lambda x, dtype, extended=extended: extended)
        codes = f.encode(t["x"], t["W_enc"], t["b_enc"], b_dec=t["b_dec"], select=se.TopK(4), memory_budget=10_000)
        codes.values.float().square().sum().backward()
        found.append((codes.values.detach(), codes.indices, t["W_enc"].grad, t["b_dec"].grad))
    assert_same(*found)


@pytest.mark.no_poison  # the compiler runs torch.empty itself
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slabs_of_an_extended_input_compile_whole(dtype, monkeypatch):
    monkeypatch.setattr(stock_16bit, "is_extended", lambda *_: True)
    monkeypatch.setattr(_slabs, "LATENTS_AT_LEAST", 16)
    torch._dynamo.reset()
    sae, x = se.SparseAutoencoder(16, 256, se.TopK(4), dtype=dtype), torch.randn(64, 16, dtype=dtype)
    with torch.no_grad():
        sae.b_dec.normal_()

    def encode(x):
        codes = sae.encode(x, memory_budget=64 * 64 * 2)
        return codes.values, codes.indices

    assert_same(torch.compile(encode, fullgraph=True, backend="aot_eager")(x), encode(x))


def test_a_step_multiplies_an_input_that_was_extended_once(monkeypatch):
    found = []
    for extended in (False, True):
        torch.manual_seed(3)
        sae = se.SparseAutoencoder(16, 4096, se.TopK(4), dtype=torch.float32)
        step = TrainStep(sae, lr=1e-2, losses=se.losses.AuxK(8), dead_after=600, compute_dtype="bfloat16",
                         memory_budget=600 * 2048 * 2)  # fmt: skip
        monkeypatch.setattr(stock_16bit, "is_extended", lambda x, dtype, extended=extended: extended)
        for _ in range(3):
            step(torch.randn(600, 16))
        found.append(tuple(p.detach() for p in sae.parameters()))
    assert_same(*found)


def test_a_million_latents_fit_the_grid():
    """Of a GPU's grid only the first axis takes more than 65,535 programs."""
    from sae_kernels.device import _launch, linear_16bit

    for strides in ((1, 16), (1 << 20, 1)):
        plan = linear_16bit._plan(_launch.Layout((16, 1 << 20), strides, torch.bfloat16), 64)
        assert plan.grid[1] <= 65_535


@pytest.mark.gpu
def test_sixteen_bit_gradients_take_sixteen_bit_operands_on_a_gpu():
    x, weight = (torch.randn(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with torch.profiler.profile(acc_events=True) as profile:  # torch 2.11 warns where it is left open
        f.linear(x, weight).sum().backward()
    assert not [event.name for event in profile.events() if "sgemm" in event.name], "an fp32 product"
