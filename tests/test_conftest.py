"""The guards of the other tests: unwritten memory is NaN for them, and invisible to whatever only traces; in Triton's
interpreter masks are boolean and bf16 is widened exactly, whichever its version."""

import os
import re

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx


def allocate(like, **options):
    yield torch.empty(3, 2, **options)
    yield torch.empty_like(like, **options)
    yield torch.empty_strided((3, 2), (1, 3), **options)
    yield like.new_empty((3, 2), **options)
    yield like.new_empty_strided((3, 2), (1, 3), **options)


def written(x):
    return sum(tensor.copy_(x) for tensor in allocate(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_unwritten_numbers_are_nan(dtype):
    for tensor in allocate(torch.zeros(3, 2), dtype=dtype):
        assert torch.isnan(tensor).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_unwritten_integers_are_no_index(dtype):
    for tensor in allocate(torch.zeros(3, 2), dtype=dtype):
        assert (tensor < torch.iinfo(dtype).min // 2).all()


def test_leaves_and_empty_tensors():
    assert torch.isnan(torch.empty(3, requires_grad=True)).all()
    assert torch.empty(0, 4).shape == (0, 4)
    assert torch.isfinite(torch.nn.Linear(3, 4).weight).all()


def test_tracing_sees_no_fill():
    with FakeTensorMode():
        assert torch.empty(3).shape == (3,)
    assert torch.empty(3, device="meta").is_meta
    assert "fill" not in str(make_fx(written)(torch.ones(3, 2)).graph)


def test_compiled_equals_eager(compile_backend):
    x = torch.randn(3, 2)
    torch.testing.assert_close(torch.compile(written, fullgraph=True, backend=compile_backend)(x), written(x))


@pytest.mark.no_poison
def test_marked_tests_have_torch_as_it_is():
    assert torch.empty is torch._C._VariableFunctions.empty


def test_files_say_the_markers_by_which_make_finds_them(request):
    """`make test-interop` imports no other file. Of a whole run this sees all files."""
    using = {item.path for item in request.session.items if item.get_closest_marker("interop")}
    assert [path.name for path in using if not re.search(r"\binterop\b", path.read_text(encoding="utf-8"))] == []


INTERPRETED = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="about Triton's interpreter")


@INTERPRETED
@pytest.mark.parametrize("helped", [False, True], ids=["broadcast", "only_if"])
def test_masks_of_a_broadcast_comparison_are_refused(helped):
    triton = pytest.importorskip("triton")
    import triton.language as tl

    from sae_kernels.device._device import only_if

    @triton.jit
    def kernel(out_ptr, n, BOTH: tl.constexpr):
        lane = tl.arange(0, 8)
        mask = (n > 3) & (lane < 6) if BOTH is None else BOTH(n > 3, lane < 6)
        tl.store(out_ptr + lane, lane, mask=mask)

    out = torch.full((8,), -1, dtype=torch.int32)
    if helped:
        kernel[(1,)](out, 3, only_if)
        assert (out == -1).all()
        kernel[(1,)](out, 4, only_if)
        assert out.tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    else:
        with pytest.raises(Exception, match=r"mask"):
            kernel[(1,)](out, 4, None)


@INTERPRETED
def test_every_bf16_number_is_widened_exactly():
    triton = pytest.importorskip("triton")
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, out_ptr):
        lane = tl.arange(0, 65536)
        tl.store(out_ptr + lane, tl.load(x_ptr + lane).to(tl.float32))

    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = torch.empty(65536)
    kernel[(1,)](x, out)
    assert torch.equal(out.view(torch.int32), x.view(torch.int16).to(torch.int32) << 16)
