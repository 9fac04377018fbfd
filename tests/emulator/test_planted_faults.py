"""Faults planted in the PTX of our own kernels: each kind turns the emulator red."""

import re

import pytest
import torch
import triton
import triton.language as tl
from copies_fenced import copies_are_fenced

import ptx_emulator
from ptx_emulator import EmulatorError
from sae_engine import functional as f

pytestmark = pytest.mark.compiled


@pytest.fixture
def planted(monkeypatch):
    """``planted(kernel, change)``: from now on that kernel is launched with ``change(its PTX)``."""
    from ptx_emulator import driver

    kernels, changed_texts = [], []

    def plant(kernel, change):
        def load(self, name, binary, shared, device):
            if name != kernel.fn.__name__:
                return true_load(self, name, binary, shared, device)
            text = binary.decode()
            changed = change(text)
            assert changed != text, f"nothing to change in {name}"
            changed_texts.append(changed)
            return true_load(self, name, changed.encode(), shared, device)

        true_load = driver._Utils.load_binary
        monkeypatch.setattr(driver._Utils, "load_binary", load)
        kernel.device_caches.clear()
        kernels.append(kernel)

    yield plant
    for kernel in kernels:
        kernel.device_caches.clear()
    assert changed_texts, "the kernel was not launched"


def call_topk():
    return f.topk(torch.randn(3, 1000), 20, backend="triton")


def without_barriers(text):
    return text.replace("bar.sync", "// bar.sync")


def without_guards(text):
    """Masked loads and stores take place in every lane."""
    return re.sub(r"@!?%p\d+ ((?:ld|st)\.global)", r"\1", text)


def shifted(text):
    """Vector loads start in the middle of their first element."""
    return re.sub(r"(ld\.global\S*\.v[248]\.b32 [^\[]*\[ *%rd\d+) *\+ *0 *\]", r"\1 + 4 ]", text)


def without_shared_stores(text):
    return re.sub(r"(?m)^(.*)(st\.shared)", r"// \1\2", text)


def one_row(text):
    """Every program takes itself for the first."""
    return re.sub(r"mov\.u32 (\s*%r\d+), %ctaid\.x", r"mov.u32 \1, 0", text)


FAULTS = {
    "no barriers": (without_barriers, "race on shared memory|never written"),
    "no masks": (without_guards, "out of bounds"),
    "no store to shared memory": (without_shared_stores, "never written"),
    "programs of one row": (one_row, "unordered writes of the same value|race on global memory between CTAs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_topk(fault, planted):
    from sae_kernels.device.row_topk import _row_topk_kernel

    change, finding = FAULTS[fault]
    call_topk()
    planted(_row_topk_kernel, change)
    with ptx_emulator.configured(raise_on="all"), pytest.raises(EmulatorError, match=finding):
        call_topk()


def test_misaligned_vector(planted):
    from sae_kernels.device.decode import _decode_kernel

    codes = f.topk(torch.randn(3, 100), 5)
    weight, bias = torch.randn(100, 512), torch.zeros(512)
    f.decode(codes, weight, bias, backend="triton")
    planted(_decode_kernel, shifted)
    with pytest.raises(EmulatorError, match="misaligned"):
        f.decode(codes, weight, bias, backend="triton")


def late(text):
    """The tiles that come asynchronously are not waited for."""
    text = re.sub(r"cp\.async\.wait_group \s*\d+", "cp.async.wait_group 7", text)
    return "\n".join(line for line in text.split("\n") if "try_wait" not in line and "bra.uni waitLoop" not in line)


@triton.jit
def _product_kernel(x_ptr, weight_ptr, out_ptr, D, BLOCK: tl.constexpr):
    """x [BLOCK, D] @ weight [D, BLOCK]: no kernel of ours has a loop whose tiles come asynchronously."""
    at = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(0, D, BLOCK):
        x = tl.load(x_ptr + at[:, None] * D + (step + at)[None, :])
        weight = tl.load(weight_ptr + (step + at)[:, None] * BLOCK + at[None, :])
        acc = tl.dot(x, weight, acc)
    tl.store(out_ptr + at[:, None] * BLOCK + at[None, :], acc)


def test_missing_wait(planted):
    x, weight = torch.randn(64, 256).bfloat16(), torch.randn(256, 64).bfloat16()
    out = torch.empty(64, 64)
    with copies_are_fenced(stages=3):
        _product_kernel[(1,)](x, weight, out, 256, BLOCK=64, num_stages=3, enable_fp_fusion=True)
        torch.testing.assert_close(out, x.float() @ weight.float(), rtol=1e-4, atol=1e-4)  # 256 terms of size 1 in fp32
    planted(_product_kernel, late)
    with pytest.raises(EmulatorError, match=r"before it was waited for|never written"):
        _product_kernel[(1,)](x, weight, out, 256, BLOCK=64, num_stages=3, enable_fp_fusion=True)
