"""sm_90: wgmma, tensor copies, mbarriers."""

import pytest
import torch
import triton
import triton.language as tl
from copies_fenced import copies_are_fenced
from triton.tools.tensor_descriptor import TensorDescriptor

import ptx_emulator
from ptx_emulator import EmulatorError
from ptx_emulator.assemble import assemble
from ptx_emulator.parse import parse

# From 3.9 on Triton warns of launches that do not say whether products and sums may be fused. Ours say it.
pytestmark = [pytest.mark.compiled, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]


@pytest.fixture(autouse=True, scope="module")
def _emulator():
    with ptx_emulator.installed(arch=90, seed=1):
        yield


@triton.jit
def tma_dot_kernel(a, b, out, K, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, TRANSPOSED: tl.constexpr):
    row, col = tl.program_id(0) * M, tl.program_id(1) * N
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, K, STEP):
        x = a.load([row, start])
        if TRANSPOSED:  # noqa: SIM108 (tl.constexpr: the branch that is not taken is not compiled)
            y = b.load([col, start]).T
        else:
            y = b.load([start, col])
        total = tl.dot(x, y, total)
    out.store([row, col], total.to(out.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("step", "stages"), [(64, 3), (32, 1)])
def test_tma_dot(dtype, transposed, step, stages):
    M, N, K = 100, 72, 200
    a, b = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    out = torch.full((M, N), 7.0, dtype=dtype)
    matrix = b if transposed else b.t().contiguous()
    blocks = [64, step], [64, step] if transposed else [step, 64]
    tma_dot_kernel[(2, 2)](
        TensorDescriptor.from_tensor(a, blocks[0]), TensorDescriptor.from_tensor(matrix, blocks[1]),
        TensorDescriptor.from_tensor(out, [64, 64]), K, 64, 64, step, transposed, num_warps=4, num_stages=stages,
    )  # fmt: skip
    want = (a.double() @ b.double().t()).to(dtype)
    torch.testing.assert_close(out, want, rtol=1e-2, atol=1e-2)


@triton.jit
def dot_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, STEP)
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, K, STEP):
        x = tl.load(a + m[:, None] * K + start + k[None, :])
        y = tl.load(b + n[None, :] * K + start + k[:, None])
        total = tl.dot(x, y, total)
    tl.store(out + m[:, None] * N + n[None, :], total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pointer_dot(dtype):
    a, b = torch.randn(64, 128).to(dtype), torch.randn(64, 128).to(dtype)
    out = torch.empty(64, 64)
    with copies_are_fenced(stages=3):
        dot_kernel[(1,)](a, b, out, 64, 64, 128, 32, num_stages=3)
        assert (out - a.double() @ b.double().t()).abs().max() < (0.05 if dtype == torch.float32 else 1e-4)


def test_missing_wait_is_found():
    """Without the wait on its mbarrier a tile is read before it has come."""
    a, b = torch.randn(64, 64).half(), torch.randn(64, 64).half()
    out = torch.zeros(64, 64).half()
    args = [TensorDescriptor.from_tensor(t, [64, 64]) for t in (a, b, out)]
    kernel = tma_dot_kernel.warmup(*args, 64, 64, 64, 64, True, num_warps=4, num_stages=1, grid=(1,))
    kernel._init_handles()
    text = kernel.asm["ptx"]
    assert "try_wait" in text
    lines = [line for line in text.splitlines() if "try_wait" not in line and "bra.uni waitLoop" not in line]
    broken = assemble(parse("\n".join(lines)), kernel.name)
    with pytest.raises(EmulatorError, match=r"never written|before it was waited for"):
        kernel.run(1, 1, 1, 0, broken, kernel.packed_metadata, None, None, None, *args, 64, 64, 64, 64, True)


def test_operands_that_others_write_are_waited_for():
    """Without its barriers a product reads what other warps are still storing."""
    a, b, out = torch.randn(64, 32).half(), torch.randn(64, 32).half(), torch.empty(64, 64)
    kernel = dot_kernel.warmup(a, b, out, 64, 64, 32, 32, grid=(1,), num_warps=4, num_stages=1)
    kernel._init_handles()
    text = kernel.asm["ptx"]
    assert "wgmma" in text and "bar.sync" in text
    broken = assemble(parse(text.replace("bar.sync", "// bar.sync")), kernel.name)
    with pytest.raises(EmulatorError, match=r"race on shared memory|never written"):
        kernel.run(1, 1, 1, 0, broken, kernel.packed_metadata, None, None, None, a, b, out, 64, 64, 32, 32)
