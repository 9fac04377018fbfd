"""What holds for every operation of the table, whatever it does: back ends agree, contracts and traffic are true."""

import pytest
import torch
from density import force_dense
from torch.utils import _pytree as pytree

from sae_engine.testing import assert_same, assert_within_budget
from sae_kernels import reference
from sae_kernels.operations import OPERATIONS, Operation, in_fp64
from sae_kernels.ops import ops
from sae_kernels.stock import densified

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
    args = row.apart(args)
    return row.outcome(getattr(ops, row.name)(*args, backend), args)


def compare(row, found, args, backend):
    """Bit for bit, or within the budget that the reference's own error in this dtype gives."""
    honest = called(row, args, "reference")
    assert [t.dtype for t in found] == [t.dtype for t in honest]
    if row.is_exact:
        assert_same(tuple(found), tuple(honest))
        return
    exact = called(row, in_fp64(args), "reference")
    # On a GPU torch's fused Adam takes beta2 as an fp32 number: 1 - 0.999, and so a second moment, is off by 1.3e-5.
    off = 2e-5 if row.name == "latent_adam" and backend == "torch" and found[0].is_cuda else 0.0
    for ours, truth, yardstick in zip(found, exact, honest, strict=True):
        if off and (ours.double() - truth).abs().max() <= off * truth.abs().max():
            continue
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
    compare(row, found, args, backend)
    assert_same(tuple(called(row, args, backend)), tuple(found))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", densified.SIZES)
def test_a_gemm_agrees_too(name, backend, monkeypatch):
    row = OPERATIONS[name]
    monkeypatch.setattr(densified, "DENSE_SHARE", force_dense(0.0))
    args = arguments(row)
    compare(row, called(row, args, backend), args, backend)


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
    compare(row, called(row, spread, backend), args, backend)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("row", "name"), EXAMPLES)
def test_what_is_only_read_stays_as_it_is(row, name, backend, tokens):
    """And no result lies in an argument's memory: of one token, what is broadcast is already as large as the result."""
    args = arguments(row, name, B=tokens)
    read = [a for a, said in zip(args, row.operator._schema.arguments, strict=False) if not said.alias_info]
    before = [t.clone() for t in tensors(read)]
    found = tensors(getattr(ops, row.name)(*args, backend))
    assert_same(tuple(tensors(read)), tuple(before))
    ours = {t.untyped_storage().data_ptr() for t in tensors(args) if t.numel()}
    assert not ours & {t.untyped_storage().data_ptr() for t in found if t.numel()}


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
    runs = gradients(args, backend), gradients(in_fp64(args), "reference"), gradients(args, "reference")
    for ours, truth, honest in zip(*runs, strict=True):
        assert (ours is None) == (honest is None)
        if ours is not None:
            assert_within_budget(ours, truth, honest)


@pytest.mark.parametrize("row", [
    row for row in OPERATIONS.values() if not row.gradients and row.name != "by_latent"  # which is of integers
    and not row.operator._schema.is_mutable
    and not row.name.startswith("decode_backward")  # which can be differentiated again: tests/test_second_order.py
], ids=lambda row: row.name)  # fmt: skip
def test_what_has_no_gradient_says_so(row):
    """As gradients of gradients have none. It raises where differentiating it again would otherwise give zeros."""
    args = pytree.tree_map(lambda a: a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a,
                           arguments(row))  # fmt: skip
    first = tensors(getattr(ops, row.name)(*args, "torch"))[0]
    with pytest.raises(RuntimeError, match=f"{row.name} (is itself a gradient|has no gradient)"):
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


# Of 2 tokens, width 7, 10 latents, 3 entries a token. Codes are 6 values, 6 int32 indices and 3 int64 offsets.
BY_HAND = {
    # the matrix read, values and indices written
    "topk": (40 + 12 + 24, 0),
    # values and latents held, read and written; a slab of 10 latents
    "merge_topk": (2 * (12 + 24) + 40, 0),
    "batch_topk": (40 + 12 + 24 + 24, 0),
    "feature_topm": (40 + 40 + 12 + 24 + 24, 0),
    # targets 2 x 4, weight norms 10 x 4, `required` 8; scale, square, add of 20 elements
    "norm_match": (40 + 8 + 40 + 60 + 8, 60),
    "threshold": (40 + 40 + 60 + 8, 0),
    # codes; 6 rows of the weight, the bias in fp32; 2 x 7 out; 6 x 7 multiply-adds and the bias
    "decode": (60 + 6 * 14 + 28 + 28, 84 + 14),
    # a target of 2 x 7 less, the residual in fp32, its two squared norms; subtract, square, add of 14 elements
    "decode_error": (60 + 6 * 14 + 28 + 56 + 56 + 8, 98 + 42),
    # two sources, of 7 and of the 4 last columns, each with codes as above
    "decode_sources": (120 + 6 * (14 + 8) + 28 + 56 + 56 + 8, 6 * (14 + 8) + 14 + 42),
    "decode_backward_values": (28 + 6 * 14 + 24 + 24 + 12, 84),
    "decode_backward_weight": (28 + 60 + 140, 84),
    "to_dense": (60 + 40, 0),
    "gather": (24 + 24 + 12 + 12, 0),
    "by_latent": (24 + 24 + 88 + 72, 0),
    # x, gate, rows of 7 and of 10 numbers; 2 x 10 out; gate and two products of 20 entries
    "sparse_mlp": (28 + 40 + 140 + 200 + 40, 20 * (2 * 17 + 1)),
    "linear_16bit": (28 + 140 + 40 + 40, 2 * 2 * 7 * 10 + 20),
    # codes, gradient, x, 6 rows of the weight; 10 x (7 + 7 + 1) fp32 sums; two products of 7 and one of 7 an entry
    "latent_gradients": (60 + 28 + 28 + 84 + 600, 6 * (28 + 14 + 1)),
    # 24 bytes for each of 150 parameters, 2 more for each of 140 weights; d(center) of 7 and the norm
    "latent_adam": (60 + 28 + 28 + 84 + 3600 + 280 + 32, 6 * (28 + 14 + 1) + 17 * 150 + 2 * 70 + 9 * 70),
}  # fmt: skip


@pytest.mark.parametrize("row", TYPICAL)
def test_traffic_by_hand(row):
    """In bf16, each latent named once."""
    assert row.name in BY_HAND, "count its bytes and flops"
    assert row.traffic(*row.example(Sizes(2, 7, 10, 3), torch.bfloat16, "meta")) == BY_HAND[row.name]


def test_traffic_counts_latents_that_are_named_and_parameters_that_serve_as_weights():
    row = OPERATIONS["decode"]
    args = list(row.example(Sizes(2, 7, 10, 3), torch.float32))
    args[1] = torch.tensor([1, 2, 3, 2, 3, 4], dtype=torch.int32)
    assert row.traffic(*args) == (72 + 4 * 28 + 28 + 56, 84 + 14)
    in_fp32 = OPERATIONS["latent_adam"].example(Sizes(2, 7, 10, 3), torch.float32, "meta")  # without copies
    assert OPERATIONS["latent_adam"].traffic(*in_fp32).bytes == 72 + 56 + 56 + 3600 + 32


def test_traffic_asks_for_a_count_that_follows_from_the_data():
    row = OPERATIONS["threshold"]
    *args, _, magnitude = arguments(row)
    with pytest.raises(ValueError, match="capacity"):
        row.traffic(*args, None, magnitude)
