"""The guard of the other tests: unwritten memory is NaN for them, and invisible to whatever only traces."""

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
