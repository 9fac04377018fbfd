"""The encoder's product that takes group maxima along: the same codes as the stock product and a selection give."""
import os
import subprocess
import sys

import pytest
import torch

import sae_engine as se
from sae_engine import _passes
from sae_engine import functional as f
from sae_engine.testing import assert_same, assert_within_budget
from sae_kernels import _tuning, reference
from sae_kernels.ops import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# B, D, F, G; the interpreter's tiles are 32 x 64 x 16
CASES = [
    (3, 5, 40, 4), (33, 17, 67, 8), (1, 1, 1, 2), (37, 61, 131, 64), (32, 16, 64, 16), (2, 48, 128, 1), (0, 4, 32, 8)
]  # fmt: skip
IDS = [f"B{b}-D{d}-F{n}-G{g}" for b, d, n, g in CASES]


@pytest.fixture
def fused():
    """The product that takes maxima along, wherever there are any to take."""
    with _passes.encoder_choice(True):
        yield


def launch(*args, **kwargs):
    from sae_kernels import encode  # imports triton, which must not happen before conftest.py has spoken

    return encode.launch(*args, **kwargs)


def make(rows, width, num_latents, dtype=torch.float32, *, layout="latents"):
    """x, weight and bias; the weight contiguous along d_in ("latents", as ours is), along F or along neither."""
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(width, num_latents).to(dtype)
    if layout == "latents":
        weight = weight.T.contiguous().T
    elif layout == "strided":
        weight = torch.randn(2 * width, 3 * num_latents).to(dtype)[::2, ::3]
        x = torch.randn(width, 2 * rows).to(dtype)[:, ::2].T
    elif layout == "transposed":
        x = x.T.contiguous().T
    return x, weight, torch.randn(num_latents)


def maxima_of(pre, size, *, magnitude=False, rank_relu=False):
    """By definition: the largest key of each group."""
    score = pre.abs() if magnitude else reference.relu(pre) if rank_relu else pre
    keys = reference.ordered_keys(score.float()) >> _tuning.key_shift(pre.dtype)
    return torch.stack([part.amax(1) for part in keys.split(size, dim=1)], dim=1)


def assert_product(pre, x, weight, bias):
    truth = x.double() @ weight.double() + (0 if bias is None else bias.double())
    assert_within_budget(pre, truth, reference.linear(x, weight, bias))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_product_and_maxima(case, dtype):
    rows, width, num_latents, size = case
    x, weight, bias = make(rows, width, num_latents, dtype)
    for magnitude, rank_relu, by in ((False, False, bias), (True, False, None), (False, True, bias.to(dtype))):
        pre, maxima = launch(x, weight, by, size, magnitude, rank_relu)
        assert pre.shape == (rows, num_latents) and pre.dtype == dtype
        assert_product(pre, x, weight, by)
        if rows:
            assert torch.equal(maxima, maxima_of(pre, size, magnitude=magnitude, rank_relu=rank_relu))


@pytest.mark.parametrize("layout", ["latents", "columns", "strided", "transposed"])
@pytest.mark.parametrize("sizes", [(37, 33, 70), (48, 32, 96)], ids=["odd", "aligned"])
def test_any_strides(sizes, layout):
    x, weight, bias = make(*sizes, layout=layout)
    pre, maxima = launch(x, weight, bias[::1], 8, False, False)
    assert_product(pre, x, weight, bias)
    assert torch.equal(maxima, maxima_of(pre, 8))
    spread = torch.randn(2 * sizes[2])[::2]
    assert_product(launch(x, weight, spread, 8, False, False)[0], x, weight, spread)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["latents", "columns", "transposed"])
def test_tiles_copied_by_descriptor_give_the_same_bits(layout, dtype):
    """Ragged last tiles included: 80 rows, 48 columns and 176 latents."""
    x, weight, bias = make(80, 48, 176, dtype, layout=layout)
    by_descriptor, by_pointer = (launch(x, weight, bias, 16, False, False, tma=tma) for tma in (True, False))
    assert_same(by_descriptor, by_pointer)


def test_every_tile_is_reached_whatever_their_order(monkeypatch):
    """Groups of rows of tiles that are full, cut short, and larger than the matrix."""
    x, weight, bias = make(150, 3, 140)
    for group in (1, 2, 3, 8):
        monkeypatch.setattr(_tuning, "ENCODER_GROUP", group)
        pre, maxima = launch(x, weight, bias, 4, False, False)
        assert_product(pre, x, weight, bias)
        assert torch.equal(maxima, maxima_of(pre, 4))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # NumPy's, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinities_reach_the_maxima(dtype):
    x, weight, bias = make(4, 6, 70, dtype)
    x[1] = torch.nan
    x[2, 3] = -torch.inf
    weight = weight.contiguous()
    weight[:, 9], weight[:, 69] = torch.inf, -torch.nan
    bias[30] = torch.nan
    for magnitude, rank_relu in ((False, False), (True, False), (False, True)):
        pre, maxima = launch(x, weight, bias, 8, magnitude, rank_relu)
        assert pre.isnan().any() and pre.isinf().any() and pre.isfinite().any()
        assert torch.equal(maxima, maxima_of(pre, 8, magnitude=magnitude, rank_relu=rank_relu))
        assert (maxima[:, 30 // 8] == (2**31 - 1) >> _tuning.key_shift(dtype)).all()


# --- selection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "num_latents", "k"), [(5, 257, 3), (35, 200, 5), (2, 1031, 16), (3, 64, 40), (0, 90, 2)]
)
def test_topk_is_that_of_the_pre_activations(rows, num_latents, k, dtype, fused):
    x, weight, bias = make(rows, 11, num_latents, dtype)
    weight[:, 7] = weight[:, 3]  # ties
    bias[7] = bias[3]
    for magnitude in (False, True):
        pre, *kept = ops.encode_topk(x, weight, bias, k, magnitude, not magnitude, "triton")
        assert_product(pre, x, weight, bias)
        assert_same(kept, reference.topk(pre, None, None, k, magnitude, not magnitude))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "num_latents", "total"), [(5, 257, 15), (35, 200, 70), (3, 64, 0), (2, 520, 17), (0, 90, 0)]
)
def test_batch_topk_is_that_of_the_pre_activations(rows, num_latents, total, dtype, fused):
    x, weight, bias = make(rows, 11, num_latents, dtype)
    for shift in (0, 20):  # with 20 all but a few are negative, and zeros are kept
        pre, *kept = ops.encode_batch_topk(x, weight, bias - shift, total, "triton")
        assert_same(kept, reference.batch_topk(pre, None, total))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_back_end_multiplies_and_selects(backend, dtype):
    x, weight, bias = make(9, 21, 300, dtype)
    pre, *kept = ops.encode_topk(x, weight, bias, 4, False, True, backend)
    assert_product(pre, x, weight, bias)
    assert_same(kept, reference.topk(pre, None, None, 4, False, True))
    pre, *kept = ops.encode_batch_topk(x, weight, None, 30, backend)
    assert_product(pre, x, weight, None)
    assert_same(kept, reference.batch_topk(pre, None, 30))


def launched(call):
    """Names of the kernels that a call launches."""
    from sae_kernels._meter import metering

    with metering() as meter:
        call()
    return [launch.kernel for launch in meter.launches]


RULES = {"TopK": lambda: se.TopK(3), "AbsTopK": lambda: se.AbsTopK(3), "BatchTopK": lambda: se.BatchTopK(2.5)}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", RULES)
def test_encode_uses_it_where_it_is_the_choice(name, fused):
    x, weight, bias = make(6, 10, 300)
    rule = RULES[name]()
    call = lambda: f.encode(x, weight, bias, select=rule, backend="triton")  # noqa: E731
    weight.requires_grad_()
    names = launched(call)
    assert names[0] == "_encode_kernel" and "_group_max_kernel" not in names
    for choice in (False, None):  # nothing has been measured, hence the stock product
        with _passes.encoder_choice(choice):
            assert "_encode_kernel" not in launched(call)


def test_rule_of_shapes_dtype_and_architecture(monkeypatch):
    ranges = {"sm_90": {"16-bit": _tuning.FusedRange(rows=1024, width=1024)}}
    monkeypatch.setattr(_tuning, "FUSED_ENCODER", ranges)
    chosen = _tuning.fuses_encoder
    assert chosen(4096, 768, 32, torch.bfloat16, "sm_90") and chosen(1024, 1024, 64, torch.float16, "sm_90")
    assert not chosen(1023, 768, 32, torch.bfloat16, "sm_90")
    assert not chosen(4096, 1025, 32, torch.bfloat16, "sm_90")
    assert not chosen(4096, 768, 128, torch.bfloat16, "sm_90") and not chosen(4096, 768, None, torch.bfloat16, "sm_90")
    assert not chosen(4096, 768, 32, torch.float32, "sm_90")
    assert not chosen(4096, 768, 32, torch.bfloat16, "sm_100")


@pytest.mark.parametrize("b_dec", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_encode_gives_the_same_codes_and_gradients(name, b_dec, fused):
    outcomes = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        t = [torch.randn(2, 3, 9), torch.randn(9, 200), torch.randn(200), torch.randn(9)]
        x, weight, bias, center = (p.requires_grad_() for p in t)
        rule = RULES[name]()
        codes = f.encode(x, weight, bias, b_dec=center if b_dec else None, select=rule, backend=backend)
        assert codes.shape == (2, 3, 200)
        codes.values.square().sum().backward()
        outcomes.append([codes.values.detach(), codes.indices, codes.offsets,
                         *(p.grad for p in (x, weight, bias, center) if p.grad is not None)])  # fmt: skip
    assert len(outcomes[0]) == (7 if b_dec else 6)
    for ours, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, expected)


def test_pre_activations_that_were_selected_from_are_returned(fused):
    x, weight, bias = make(6, 10, 300)
    with torch.no_grad():
        codes, pre = f.encode(x[None], weight, bias, select=se.TopK(3), return_pre=True, backend="triton")
    assert pre.shape == (1, 6, 300)
    expected = f.topk(pre, 3, backend="reference")
    assert_same((codes.values, codes.indices), (expected.values, expected.indices))
    weight.requires_grad_()  # a gradient through pre asks for the ordinary product
    codes, pre = f.encode(x, weight, bias, select=se.TopK(3), return_pre=True, backend="triton")
    pre.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0)[:, None].expand(10, 300))


def test_several_rules_share_the_product(fused):
    x, weight, bias = make(6, 10, 300)
    rules = [se.TopK(3), se.ReLU(), se.TopK(5)]
    codes, pre = f.encode(x, weight, bias, select=rules, return_pre=True, backend="triton")
    for rule, found in zip(rules, codes, strict=True):
        expected = rule.select(pre, backend="reference")
        assert_same((found.values, found.indices), (expected.values, expected.indices))


def test_a_subclass_that_selects_otherwise_is_obeyed(fused):
    class Odd(se.TopK):
        def _select(self, pre, backend):
            return f.topk(pre, self.k, mask=torch.arange(pre.shape[-1]) % 2 == 1, backend=backend)

    x, weight, bias = make(6, 10, 300)
    with torch.no_grad():
        codes = f.encode(x, weight, bias, select=Odd(3), backend="triton")
    assert (codes.indices % 2 == 1).all()


def test_under_autocast(fused):
    x, weight, bias = make(6, 10, 300)
    weight.requires_grad_()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        codes = f.encode(x, weight, bias, select=se.TopK(3), backend="triton")
    assert codes.values.dtype == torch.bfloat16
    codes.values.float().sum().backward()
    kept = codes.to_dense().detach().float() != 0
    torch.testing.assert_close(weight.grad, x.bfloat16().float().T @ kept.float())


@pytest.mark.no_poison
def test_compiles_whole(fused, compile_backend, monkeypatch):
    monkeypatch.setenv("SAE_BACKEND", "triton")
    torch._dynamo.reset()
    x, weight, bias = make(6, 10, 300)
    weight.requires_grad_()

    def loss(x, weight, bias):
        return f.encode(x, weight, bias, select=se.TopK(3)).values.square().sum()

    grads = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend=compile_backend)):
        weight.grad = None
        call(x, weight, bias).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("rule", [lambda: se.TopK(3), lambda: se.BatchTopK(3)], ids=["TopK", "BatchTopK"])
@pytest.mark.parametrize("memory_budget", [None, 3 * 200 * 4], ids=["whole", "chunks"])
def test_training_steps_are_the_same(rule, memory_budget, monkeypatch):
    monkeypatch.setenv("SAE_BACKEND", "triton")
    outcomes = []
    for choice in (True, False):
        torch.manual_seed(0)
        sae = se.SparseAutoencoder(9, 200, rule())
        step = se.training.TrainStep(sae, lr=1e-2, memory_budget=memory_budget)
        with _passes.encoder_choice(choice):
            reports = [step(torch.randn(7, 9)) for _ in range(2)]
        outcomes.append([reports[1]["loss"], *sae.state_dict().values()])
    for ours, stock in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, stock)


# --- cost ----------------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_selection_reads_the_pre_activations_only_where_groups_won(dtype, fused):
    from sae_kernels._meter import metering

    rows, width, num_latents, k = 32, 16, 4096, 8
    x, weight, _ = make(rows, width, num_latents, dtype)
    with metering() as meter:
        pre, *_ = ops.encode_topk(x, weight, None, k, False, True, "triton")
    groups = _tuning.row_groups(num_latents, k)
    counts = meter.of(pre)
    assert counts.stored == pre.nbytes
    assert counts.loaded <= rows * k * (groups.size + 1) * dtype.itemsize < pre.nbytes / 4
    maxima = rows * groups.number * 4
    assert meter.launches[0].kernel == "_encode_kernel"
    assert meter.launches[0].stored["maxima_ptr"] == maxima and meter.launches[1].loaded["maxima_ptr"] == maxima


COMPILE = r"""
import re
from sae_engine import kernel_report as report
from sae_kernels import _compile
HARDWARE = {  # what multiplies, and how tiles come
    "sm_80": ("ttg.nvidia_mma", r"cp\.async\.cg[^;]*0x10"),
    "sm_90": ("ttng.warp_group_dot", r"cp\.async\.bulk\.tensor\.2d"),
    "sm_100": ("ttng.tc_gen5_mma", r"cp\.async\.bulk\.tensor\.2d"),
    "gfx942": ("ttg.amd_mfma", r"(global|buffer)_load_dwordx4"),
}
for target, (unit, copies) in HARDWARE.items():
    for shape in (report.S1, report.S2, report.S3):
        launches = report.run_cell((report.CASES["encode fused"], shape, report.BF16), target).launches
        launch = next(launch for _, launch in launches if launch.kernel == "_encode_kernel")
        asm, tile = launch.compiled.asm, "{BLOCK_B}x{BLOCK_F}x".format(**launch.arguments)
        assert _compile.read_binary(launch.compiled, target, disassemble=False).spills == 0, (target, shape)
        assert unit in asm["ttgir"], (target, unit)
        assert re.search(copies, asm.get("ptx", asm.get("amdgcn"))), (target, copies)
        assert target == "gfx942" or "max.NaN." in asm["ptx"], target
        # sums are reduced where they lie; on sm_80, rounded, they move to be stored by 16 bytes
        moved = [line for line in asm["ttgir"].splitlines() if "convert_layout" in line and "<" + tile in line]
        assert len(moved) == (target == "sm_80"), (target, moved)
"""


@pytest.mark.slow
def test_tensor_cores_wide_copies_and_no_spill(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "num_latents", "k"), [(768, 32768, 32), (768, 131072, 32), (4096, 131072, 64)])
def test_production_shapes(width, num_latents, k, dtype, fused):
    x, weight, bias = make(300, width, num_latents, dtype)
    pre, *kept = ops.encode_topk(x, weight, bias, k, False, True, "triton")
    assert_product(pre, x, weight, bias)
    assert_same(kept, reference.topk(pre, None, None, k, False, True))


@pytest.mark.gpu
def test_offsets_past_31_bits(fused):
    x, weight, bias = make(16500, 16, 131072, torch.bfloat16)  # 2.16e9 pre-activations
    pre, maxima = launch(x, weight, bias, 64, False, False)
    assert_product(pre[-3:], x[-3:], weight, bias)
    assert torch.equal(maxima[-3:], maxima_of(pre[-3:], 64))
