"""What holds for every operation of the table, whatever it does: back ends agree, contracts and traffic are true."""

import pytest
import torch
from torch.utils import _pytree as pytree

from sae_engine.testing import assert_same, assert_within_budget, force_dense
from sae_kernels import densified, reference
from sae_kernels.operations import OPERATIONS, Operation
from sae_kernels.ops import ops

BACKENDS = ("reference", "torch", "triton")
FAST = ("torch", "triton")
WITHOUT_BACK_ENDS = {  # composed of others, or the same wherever they run
    "at_latents", "encode_entries", "encoder_gradient", "feature_budgets", "linear", "move_threshold", "zipf_shortfall",
}  # fmt: skip


class Sizes:
    """Of arguments: small, and none is another's multiple of a tile."""

    def __init__(self, B=5, d=12, F=40, k=7):
        self.B, self.d, self.F, self.k = B, d, F, k


EXAMPLES = [
    pytest.param(row, name, id=f"{row.name} {name}".strip()) for row in OPERATIONS.values() for name in row.examples
]
TYPICAL = [pytest.param(row, id=row.name) for row in OPERATIONS.values()]


@pytest.fixture(autouse=True)
def _sparse(monkeypatch):
    """Codes are gathered, however dense."""
    monkeypatch.setattr(densified, "DENSE_SHARE", force_dense(float("inf")))


def arguments(row: Operation, name: str = "", dtype=torch.float32, **sizes):
    return row.example(Sizes(**sizes), dtype, torch.get_default_device(), name)


def tensors(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def called(row: Operation, args, backend):
    """The results, and after them the arguments that the operation has written in place."""
    schema = row.operator._schema.arguments
    args = [pytree.tree_map(torch.clone, a) if said.alias_info else a for a, said in zip(args, schema, strict=False)]
    results = getattr(ops, row.name)(*args, backend)
    written = [a for a, said in zip(args, schema, strict=False) if said.alias_info and said.alias_info.is_write]
    return tensors((results, written))


def widened(args):
    def wide(a):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            return a.double()
        return torch.float64 if isinstance(a, torch.dtype) else a

    return pytree.tree_map(wide, args)


def compare(row, found, args):
    """Bit for bit, or within the budget that the reference's own error in this dtype gives."""
    honest = called(row, args, "reference")
    assert [t.dtype for t in found] == [t.dtype for t in honest]
    if row.is_exact:
        assert_same(tuple(found), tuple(honest))
        return
    for ours, truth, yardstick in zip(found, called(row, widened(args), "reference"), honest, strict=True):
        assert_within_budget(ours, truth, yardstick)


def test_the_table_is_complete():
    registered = {
        schema.name.removeprefix("sae_engine::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("sae_engine::")
    }
    assert registered == set(OPERATIONS) | WITHOUT_BACK_ENDS
    assert registered == {name for name in registered if hasattr(ops, name)}, "our own code calls them through ops"
    assert all(hasattr(reference, name) for name in OPERATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("row", "name"), EXAMPLES)
def test_back_ends_agree_and_repeat(row, name, backend, dtype):
    args = arguments(row, name, dtype)
    found = called(row, args, backend)
    compare(row, found, args)
    assert_same(tuple(called(row, args, backend)), tuple(found))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("row", [row for row in OPERATIONS.values() if row.gemm], ids=lambda row: row.name)
def test_a_gemm_agrees_too(row, backend, monkeypatch):
    monkeypatch.setattr(densified, "DENSE_SHARE", force_dense(0.0))
    args = arguments(row)
    compare(row, called(row, args, backend), args)


def strided(t):
    """The same numbers, none of which lies beside another."""
    if not isinstance(t, torch.Tensor) or t.dim() == 0:
        return t
    return t.repeat_interleave(2, dim=-1)[..., ::2]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("row", TYPICAL)
def test_strides_do_not_matter(row, backend):
    """Of what is read: what is written in place is a parameter's or a moment's, and stays where it lies."""
    args = arguments(row)
    said = row.operator._schema.arguments
    spread = [a if s.alias_info else pytree.tree_map(strided, a) for a, s in zip(args, said, strict=False)]
    compare(row, called(row, spread, backend), args)


@pytest.mark.parametrize("row", TYPICAL)
def test_fakes_have_the_shapes_of_what_runs(row):
    args = arguments(row)
    for ours, meta in zip(tensors(row.results_on_meta(*args)), called(row, args, "torch"), strict=False):
        assert (ours.shape, ours.dtype) == (meta.shape, meta.dtype)


def with_gradients(row, args):
    """The arguments, those that gradients flow to as leaves."""
    names = [argument.name for argument in row.operator._schema.arguments]
    return [a.detach().clone().requires_grad_() if name in row.gradients and a is not None else a
            for name, a in zip(names, args, strict=False)]  # fmt: skip


@pytest.mark.no_poison  # opcheck compares runs of torch.empty itself
@pytest.mark.parametrize(
    ("row", "name", "backend"),
    [pytest.param(*e.values, backend, id=f"{e.id}-{backend}") for e in EXAMPLES for backend in BACKENDS
     if backend != "triton" or e.values[1] == ""],  # by Triton once each: the interpreter takes seconds
)
def test_opcheck(row, name, backend):
    torch.library.opcheck(row.operator, (*with_gradients(row, arguments(row, name)), backend))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("row", "name"), [e for e in EXAMPLES if e.values[0].gradients])
def test_gradients_agree(row, name, backend):
    def gradients(args, backend):
        leaves = with_gradients(row, args)
        outputs = [t for t in tensors(getattr(ops, row.name)(*leaves, backend)) if t.requires_grad]
        torch.manual_seed(0)
        given = [torch.randn(t.shape).to(t.dtype) for t in outputs]
        return torch.autograd.grad(outputs, [t for t in tensors(leaves) if t.requires_grad], given, allow_unused=True)

    args = arguments(row, name)
    runs = gradients(args, backend), gradients(widened(args), "reference"), gradients(args, "reference")
    for ours, truth, honest in zip(*runs, strict=True):
        assert (ours is None) == (honest is None)
        if ours is not None:
            assert_within_budget(ours, truth, honest)


@pytest.mark.parametrize("row", [
    row for row in OPERATIONS.values() if not row.gradients and row.name != "by_latent"  # which is of integers
    and not row.operator._schema.is_mutable
], ids=lambda row: row.name)  # fmt: skip
def test_what_is_a_gradient_has_none(row):
    """It raises where differentiating it again would otherwise give zeros."""
    args = pytree.tree_map(lambda a: a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a,
                           arguments(row))  # fmt: skip
    first = tensors(getattr(ops, row.name)(*args, "torch"))[0]
    with pytest.raises(RuntimeError, match=f"{row.name} is itself a gradient"):
        first.sum().backward()


@pytest.mark.parametrize("row", TYPICAL)
def test_traffic_grows_with_every_size(row):
    small = row.traffic(*arguments(row))
    assert small.bytes > 0 and small.flops >= 0
    for size in ({"B": 10}, {"d": 24}, {"F": 80}, {"k": 14}):
        larger = row.traffic(*row.example(Sizes(**size), torch.float32, "meta"))
        on_meta = row.traffic(*row.example(Sizes(), torch.float32, "meta"))
        assert larger.bytes >= on_meta.bytes and larger.flops >= on_meta.flops, size
        assert small.bytes <= on_meta.bytes, "codes may name fewer latents than they could"
    every = row.traffic(*row.example(Sizes(10, 24, 80, 14), torch.float32, "meta"))
    assert every.bytes > small.bytes and (every.flops > small.flops or small.flops == 0)


def test_traffic_asks_for_a_count_that_follows_from_the_data():
    row = OPERATIONS["threshold"]
    *args, _ = arguments(row)
    with pytest.raises(ValueError, match="capacity"):
        row.traffic(*args, None)
