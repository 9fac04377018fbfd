"""The emulator against torch, and planted faults that its checks must name."""

import pytest
import torch
import triton
import triton.language as tl

import ptx_emulator
from ptx_emulator import EmulatorError

# From 3.9 on Triton warns of launches that do not say whether products and sums may be fused. Ours say it.
pytestmark = [pytest.mark.compiled, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]


@pytest.fixture(autouse=True, scope="module")
def _emulator():
    with ptx_emulator.installed(arch=80, seed=1):
        yield


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) + tl.load(y + at, mask=at < n), mask=at < n)


@triton.jit
def unmasked_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64])
def test_add(dtype):
    x, y = (torch.randn(1000).mul(50).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    add_kernel[(8,)](x, y, out, 1000, BLOCK=128)
    assert torch.equal(out, x + y)


def test_out_of_bounds_is_found():
    x, out = torch.randn(256), torch.empty(250)
    with pytest.raises(EmulatorError, match=r"out of bounds.*write"):
        unmasked_kernel[(2,)](x, out, BLOCK=128)


def test_every_program_writes_the_same_place():
    x, out = torch.randn(128), torch.empty(128)

    @triton.jit
    def same(x, out, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(x + at) + tl.program_id(0))

    same[(1,)](x, out, BLOCK=128)
    with pytest.raises(EmulatorError, match="race on global memory between CTAs"):
        same[(2,)](x, out, BLOCK=128)


def test_store_then_load_without_a_barrier():
    @triton.jit
    def shifted(x, out, scratch, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(scratch + at, tl.load(x + at))
        if BARRIER:
            tl.debug_barrier()
        tl.store(out + at, tl.load(scratch + (BLOCK - 1 - at)))

    x, out, scratch = torch.randn(128), torch.empty(128), torch.empty(128)
    shifted[(1,)](x, out, scratch, BLOCK=128, BARRIER=True)
    assert torch.equal(out, x.flip(0))
    with pytest.raises(EmulatorError, match="race on global memory inside a CTA"):
        shifted[(1,)](x, out, scratch, BLOCK=128, BARRIER=False)


@triton.jit
def reductions_kernel(x, sums, maxima, where, scans, N: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, N)
    v = tl.load(x + row * N + at)
    tl.store(sums + row, tl.sum(v, axis=0))
    tl.store(maxima + row, tl.max(v, axis=0))
    tl.store(where + row, tl.argmax(v, axis=0))
    tl.store(scans + row * N + at, tl.cumsum(v, axis=0))


@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("n", [32, 256, 2048])
def test_reductions(n, warps):
    x = torch.randint(-1000, 1000, (3, n)).float()
    sums, maxima, where, scans = torch.empty(3), torch.empty(3), torch.empty(3, dtype=torch.int32), torch.empty(3, n)
    reductions_kernel[(3,)](x, sums, maxima, where, scans, N=n, num_warps=warps)
    assert torch.equal(sums, x.sum(1)) and torch.equal(maxima, x.max(1).values)
    assert torch.equal(where.long(), torch.stack([(r == r.max()).nonzero()[0, 0] for r in x]))
    assert torch.equal(scans, x.cumsum(1))


def test_missing_barrier_is_found():
    """The same kernel with its barriers deleted from the PTX races on shared memory."""
    from ptx_emulator import driver
    from ptx_emulator.assemble import assemble
    from ptx_emulator.parse import parse

    x = torch.randn(1, 2048)
    sums, maxima, where, scans = torch.empty(1), torch.empty(1), torch.empty(1, dtype=torch.int32), torch.empty(1, 2048)
    kernel = reductions_kernel.warmup(x, sums, maxima, where, scans, N=2048, grid=(1,), num_warps=4)
    text = kernel.asm["ptx"]
    assert "bar.sync" in text
    kernel._init_handles()
    broken = assemble(parse(text.replace("bar.sync", "//bar.sync")), kernel.name)
    with pytest.raises(EmulatorError, match=r"race on shared memory|never written"):
        kernel.run(1, 1, 1, 0, broken, kernel.packed_metadata, None, None, None, x, sums, maxima, where, scans, 2048)
    assert driver.findings


@pytest.mark.parametrize("n", [64, 512])
def test_sort(n):
    @triton.jit
    def sort_kernel(x, out, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(out + at, tl.sort(tl.load(x + at)))

    x = torch.randn(n)
    out = torch.empty(n)
    sort_kernel[(1,)](x, out, N=n)
    assert torch.equal(out, x.sort().values)


def test_nan():
    @triton.jit
    def nan_kernel(x, out, N: tl.constexpr):
        v = tl.load(x + tl.arange(0, N))
        tl.store(out, tl.max(v, axis=0))
        w = tl.reduce(v, 0, _nan_max)
        tl.store(out + 1, w)

    x = torch.randn(256)
    x[77] = float("nan")
    out = torch.empty(2)
    nan_kernel[(1,)](x, out, N=256)
    assert out[0] == x[~x.isnan()].max() and out[1].isnan()


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


def test_histogram_and_atomics():
    @triton.jit
    def histogram_kernel(x, out, counts, N: tl.constexpr, BINS: tl.constexpr):
        v = tl.load(x + tl.program_id(0) * N + tl.arange(0, N))
        h = tl.histogram(v, BINS)
        tl.atomic_add(out + tl.arange(0, BINS), h)
        tl.atomic_add(counts + v, 1)

    x = torch.randint(0, 64, (4, 512), dtype=torch.int32)
    out, counts = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    histogram_kernel[(4,)](x, out, counts, N=512, BINS=64)
    want = torch.bincount(x.flatten(), minlength=64)
    assert torch.equal(out.long(), want) and torch.equal(counts.long(), want)


@triton.jit
def dot_kernel(
    a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, STEP)
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, K, STEP):
        x = tl.load(a + m[:, None] * K + start + k[None, :])
        y = tl.load(b + n[None, :] * K + start + k[:, None])
        total = tl.dot(x, y, total, input_precision=PRECISION)
    tl.store(out + m[:, None] * N + n[None, :], total)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")],
)
def test_dot(dtype, precision):
    a, b = torch.randn(64, 128).to(dtype), torch.randn(32, 128).to(dtype)
    out = torch.empty(64, 32)
    dot_kernel[(1,)](a, b, out, 64, 32, 128, 32, precision)
    want = a.double() @ b.double().t()
    assert (out - want).abs().max() < (0.05 if precision == "tf32" else 1e-4)


def test_last_program_reduces():
    """A message passed by atomics is no race; without their order it is one."""

    @triton.jit
    def last_kernel(x, partial, done, out, N: tl.constexpr, P: tl.constexpr, SEM: tl.constexpr):
        row = tl.program_id(0)
        tl.store(partial + row, tl.sum(tl.load(x + row * N + tl.arange(0, N)), axis=0))
        tl.debug_barrier()
        if tl.atomic_add(done, 1, sem=SEM) == P - 1:
            tl.store(out, tl.sum(tl.load(partial + tl.arange(0, P)), axis=0))

    x = torch.randint(0, 9, (8, 128)).float()
    for sem in ("acq_rel", "relaxed"):
        partial, done, out = torch.empty(8), torch.zeros(1, dtype=torch.int32), torch.empty(1)
        with ptx_emulator.configured(resident=4, seed=5):
            if sem == "relaxed":
                with pytest.raises(EmulatorError, match="between CTAs"):
                    last_kernel[(8,)](x, partial, done, out, 128, 8, sem)
            else:
                last_kernel[(8,)](x, partial, done, out, 128, 8, sem)
                assert out == x.sum()


def test_divergent_loop():
    @triton.jit
    def steps_kernel(x, out, N: tl.constexpr):
        row = tl.program_id(0)
        n = tl.load(x + row)
        total = 0
        while n > 1:
            n = tl.where(n % 2 == 0, n // 2, 3 * n + 1)
            total += 1
        tl.store(out + row, total)

    def collatz(n):
        total = 0
        while n > 1:
            n, total = (n // 2 if n % 2 == 0 else 3 * n + 1), total + 1
        return total

    x = torch.arange(1, 40, dtype=torch.int32)
    out = torch.empty_like(x)
    steps_kernel[(39,)](x, out, N=1)
    assert out.tolist() == [collatz(n) for n in range(1, 40)]
