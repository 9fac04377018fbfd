"""sm_100: tensor memory, its products, and what its checks must name."""

import os
import re

import pytest
import torch
import triton
import triton.language as tl
from copies_fenced import copies_are_fenced
from triton.tools.tensor_descriptor import TensorDescriptor

import ptx_emulator
from ptx_emulator import EmulatorError
from ptx_emulator.assemble import Unsupported, assemble
from ptx_emulator.parse import parse

# From 3.9 on Triton warns of launches that do not say whether products and sums may be fused. Ours say it.
pytestmark = [
    pytest.mark.compiled,
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.skipif(os.environ.get("PTX_EMULATOR_ARCH") == "sm_80", reason="the run for sm_90 shows it"),
]


@pytest.fixture(autouse=True, scope="module")
def _emulator():
    with ptx_emulator.installed(arch=100, seed=1, resident=2, quantum=400):
        yield


@triton.jit
def dot_kernel(
    a, b, out, K, a_m, a_k, b_k, b_n, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr
):
    """One tile a program: the products of all start from those of their first operands."""
    m, n, k = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, N), tl.arange(0, STEP)
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, K, STEP):
        x = tl.load(a + m[:, None] * a_m + (start + k)[None, :] * a_k)
        y = tl.load(b + (start + k)[:, None] * b_k + n[None, :] * b_n)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    tl.store(out + m[:, None] * N + n[None, :], total)


def operands(M, N, K, dtype, by_columns=(False, False)):
    """a (M, K) and b (K, N); where it says so, a's rows or b's columns follow one another in memory."""
    a = torch.randn(K, M).t() if by_columns[0] else torch.randn(M, K)
    b = torch.randn(K, N) if by_columns[1] else torch.randn(N, K).t()
    return a.to(dtype), b.to(dtype)


def bound(a, b):
    """Half a unit of the last place of fp32 for each product and sum, and of tf32's 11 bits for each fp32 operand."""
    size = (a.double().abs() @ b.double().abs()).max().item()
    return size * ((a.shape[1] + 1) * 2.0**-24 + (2 * 2.0**-10 if a.dtype == torch.float32 else 0))


@pytest.mark.parametrize(("M", "N", "K", "step", "dtype", "warps", "stages", "by_columns"), [
    (64, 64, 128, 64, torch.bfloat16, 4, 1, (False, False)),
    (64, 32, 192, 64, torch.float16, 4, 3, (False, True)),
    (64, 128, 64, 32, torch.bfloat16, 8, 1, (True, True)),
    (128, 16, 64, 32, torch.float16, 4, 1, (True, False)),
    (128, 64, 128, 32, torch.bfloat16, 4, 2, (True, False)),
    (128, 256, 32, 16, torch.float16, 8, 1, (False, True)),
    (256, 64, 32, 32, torch.bfloat16, 8, 1, (False, False)),
    (64, 64, 64, 32, torch.float32, 4, 1, (False, False)),
])  # fmt: skip
def test_products(M, N, K, step, dtype, warps, stages, by_columns):
    a, b = operands(M, N, K, dtype, by_columns)
    out = torch.empty(M, N)
    with copies_are_fenced(stages):
        kernel = dot_kernel[(1,)](
            a, b, out, K, *a.stride(), *b.stride(), M, N, step, "tf32", num_warps=warps, num_stages=stages
        )
        assert "tcgen05.mma" in kernel.asm["ptx"]
        assert (out - a.double() @ b.double()).abs().max() <= bound(a, b)


def test_programs_side_by_side():
    """Each has tensor memory of its own, at columns of its own."""
    a, b = operands(192, 64, 64, torch.bfloat16)
    out = torch.empty(192, 64)
    dot_kernel[(3,)](a, b, out, 64, *a.stride(), *b.stride(), 64, 64, 32, "ieee", num_warps=4, num_stages=1)
    assert (out - a.double() @ b.double()).abs().max() <= bound(a, b)


@triton.jit
def chained_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """(a @ b, rounded) @ b': the second product's left operand goes into tensor memory."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    y = tl.load(b + k[:, None] * N + n[None, :])
    first = tl.dot(tl.load(a + m[:, None] * K + k[None, :]), y)
    tl.store(out + m[:, None] * K + k[None, :], tl.dot(first.to(y.dtype), tl.trans(y)))


@pytest.mark.parametrize(("M", "dtype"), [(64, torch.float16), (128, torch.bfloat16), (128, torch.float32)])
def test_left_operand_in_tensor_memory(M, dtype):
    a, b = torch.randn(M, 32).to(dtype), torch.randn(32, 64).to(dtype)
    out = torch.empty(M, 32)
    kernel = chained_kernel[(1,)](a, b, out, M, 64, 32, num_warps=4, num_stages=1)
    assert re.search(r"tcgen05\.mma\S* \[[^\]]*\], \[", kernel.asm["ptx"])
    first = (a.double() @ b.double()).to(dtype)
    # The first product's own error moves its rounding by one unit of the last place, in the worst case.
    unit = first.double().abs() * torch.finfo(dtype).eps if dtype != torch.float32 else bound(a, b)
    slack = ((first.double() * 0 + unit) @ b.double().abs().t()).max() + bound(first, b.t())
    assert (out - first.double() @ b.double().t()).abs().max() <= slack


@triton.jit
def tma_dot_kernel(a, b, out, K, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr):
    row, col = tl.program_id(0) * M, tl.program_id(1) * N
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, K, STEP):
        total = tl.dot(a.load([row, start]), b.load([start, col]), total)
    out.store([row, col], total.to(out.dtype))


def test_tiles_that_come_by_tensor_copies():
    """They come by the async proxy itself, and need no fence."""
    a, b = torch.randn(100, 160).half(), torch.randn(160, 72).half()
    out = torch.zeros(100, 72)
    boxes = [TensorDescriptor.from_tensor(t, box) for t, box in ((a, [64, 64]), (b, [64, 64]), (out, [64, 64]))]
    tma_dot_kernel[(2, 2)](*boxes, 160, 64, 64, 64, num_warps=4, num_stages=3)
    assert (out - a.double() @ b.double()).abs().max() <= bound(a, b)


def without(*words):
    return lambda text: "\n".join(line for line in text.splitlines() if not any(word in line for word in words))


FAULTS = {
    "product not waited for": (without("try_wait", "bra.uni waitLoop"), "the product was not waited for"),
    "load not waited for": (without("tcgen05.wait::ld"), "left behind .*an access that is not waited for"),
    "store not waited for": (without("tcgen05.wait::st"), "the store was not waited for"),
    "no fence between the proxies": (without("fence.proxy.async"), r"written without fence\.proxy\.async"),
    "no barriers": (lambda text: text.replace("bar.sync", "// bar.sync"), "race on shared memory|never written"),
    "fewer columns": (lambda text: re.sub(r"(tcgen05\.(?:de)?alloc.*), 64;", r"\1, 32;", text), "is not allocated"),
    "another warp's rows": (lambda text: text.replace(", 6291456;", ", 2097152;"), "its own quarter of the rows"),
    "columns kept": (without("tcgen05.dealloc"), "columns that stay allocated"),
    "nothing stored, nothing multiplied": (without("tcgen05.mma", "tcgen05.st"), "tensor memory never written"),
    "no commit": (without("tcgen05.commit"), "waits for ever|deadlock"),
    "operands beyond shared memory": (
        lambda text: re.sub(r"(@%p\d+ tcgen05\.mma\S* \[[^\]]*\], )(%rd\d+)", r"add.s64 \2, \2, 14336; \1\2", text),
        "shared access out of bounds"),
}  # fmt: skip


@pytest.fixture(scope="module")
def one_product():
    """A compiled kernel, and how it is launched with its PTX changed."""
    a, b = operands(64, 64, 64, torch.bfloat16)
    out = torch.empty(64, 64)
    args = (a, b, out, 64, *a.stride(), *b.stride(), 64, 64, 64, "ieee")
    kernel = dot_kernel.warmup(*args, grid=(1,), num_warps=4, num_stages=1)
    kernel._init_handles()

    def launch(change):
        text = change(kernel.asm["ptx"])
        broken = assemble(parse(text), kernel.name)
        kernel.run(1, 1, 1, 0, broken, kernel.packed_metadata, None, None, None, *args)
        assert (out - a.double() @ b.double()).abs().max() <= bound(a, b)
        return text

    return launch


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(fault, one_product):
    change, finding = FAULTS[fault]
    whole = one_product(lambda text: text)
    assert change(whole) != whole, "there is nothing to change"
    with pytest.raises(EmulatorError, match=finding):
        one_product(change)


@pytest.mark.parametrize(("old", "new"), [
    ("kind::f16", "kind::i8"), ("cta_group::1.kind", "cta_group::2.kind"), ("16x32bx2", "16x64b"),
    ("tcgen05.commit", "tcgen05.cp"),
])  # fmt: skip
def test_what_is_not_known_is_refused(old, new, one_product):
    with pytest.raises(Unsupported, match=r"tcgen05"):
        one_product(lambda text: text.replace(old, new))
