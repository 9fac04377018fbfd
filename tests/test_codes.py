"""SparseCodes: construction, conversion, indexing, transposing, and what is behind it (kernels/device/dense.py)."""
import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree

import sae_engine as se
from sae_engine.testing import assert_same, make_pre
from sae_kernels.ops import ops

FAST = ("torch", "triton")


def ragged(rows=5, num_latents=40, **kwargs):
    return se.functional.threshold(torch.randn(rows, num_latents), 0.8, **kwargs)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.sanitizer)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_to_dense_gather_and_by_latent_equal_reference(dtype, backend):
    for capacity in (None, 9, 500):
        for shape in ((4, 300), (1, 1), (0, 5)):
            codes = se.functional.threshold(make_pre("special", shape, dtype), 0.1, capacity=capacity)
            triple = (codes.values, codes.indices, codes.offsets)
            assert_same(ops.to_dense(*triple, shape[1], backend), ops.to_dense(*triple, shape[1], "reference"))
            matrix = torch.randn(shape).to(dtype).T.contiguous().T
            assert_same(ops.gather(matrix, *triple[1:], backend), ops.gather(matrix, *triple[1:], "reference"))
            transposed = [ops.by_latent(*triple[1:], shape[1], b) for b in (backend, "reference")]
            owned = int(codes.offsets[-1])
            assert_same(transposed[0][0], transposed[1][0])
            assert_same(*((t[1][:owned], t[2][:owned]) for t in transposed))


def test_by_latent_is_sorted_and_cached():
    codes = ragged()
    transposed = codes.by_latent
    assert codes.by_latent is transposed and codes.replace(values=codes.values * 2).by_latent is transposed
    rows = torch.repeat_interleave(torch.arange(5), codes.offsets.diff())
    latents = codes.indices[transposed.positions].long()
    assert torch.equal(transposed.rows, rows[transposed.positions].int())
    assert bool((torch.diff(latents * 5 + transposed.rows) > 0).all())
    assert torch.equal(transposed.offsets.diff(), torch.bincount(latents, minlength=40))


def test_properties():
    codes = se.functional.topk(torch.randn(2, 3, 20) - 1.5, 4)
    assert codes.shape == (2, 3, 20) and codes.rows == 6 and codes.num_latents == 20
    assert torch.equal(codes.l0, (codes.to_dense() != 0).sum(-1))
    roomy = ragged(capacity=90)
    assert torch.equal(roomy.l0, (roomy.to_dense() != 0).sum(-1))


def test_dense_round_trip_and_gradient():
    dense = torch.randn(2, 3, 10).relu().requires_grad_()
    codes = se.SparseCodes.from_dense(dense)
    assert torch.equal(codes.to_dense(), dense)
    weight = torch.randn(2, 3, 10)
    (codes.to_dense() * weight).sum().backward()
    assert torch.equal(dense.grad, weight * (dense > 0))


def test_from_topk_sorts_and_keeps_the_gradient():
    values = torch.randn(2, 3, requires_grad=True)
    codes = se.SparseCodes.from_topk(values, torch.tensor([[5, 1, 3], [0, 9, 2]]), 10)
    assert codes.indices.tolist() == [1, 3, 5, 0, 2, 9] and codes.k == 3
    padded, indices = codes.to_padded()
    assert torch.equal(padded.gather(1, torch.tensor([[2, 0, 1], [0, 2, 1]])), values) and indices.shape == (2, 3)
    codes.to_dense().sum().backward()
    assert torch.equal(values.grad, torch.ones(2, 3))


def test_to_padded_of_ragged_rows():
    codes = ragged()
    values, indices = codes.to_padded()
    assert values.shape == indices.shape == (5, int(codes.offsets.diff().max()))
    assert torch.equal(torch.zeros(5, 40).scatter_(1, indices.long(), values), codes.to_dense())
    assert all(len(set(row)) == len(row) for row in indices.tolist())
    for rows in ([[3.0, 0, 0, 0, 0], [1.0, 1, 1, 1, 0]], [[0.0, 0], [1, 1]], [[0.0, 0]]):
        codes = se.SparseCodes.from_dense(torch.tensor(rows))
        again = se.SparseCodes.from_topk(*codes.to_padded(), codes.num_latents)
        assert torch.equal(again.to_dense(), torch.tensor(rows))


def test_an_overflow_is_reported_wherever_the_host_looks():
    codes = ragged(capacity=4)
    for look in (codes.check, codes.to_padded, codes.to_sparse_csr, lambda: codes[:2], lambda: se.cat([codes])):
        with pytest.raises(RuntimeError, match="capacity=4"):
            look()


def test_no_latents_at_all():
    pre = torch.zeros(3, 0)
    assert se.SparseCodes.from_dense(pre).to_dense().shape == (3, 0)
    for select in (lambda: se.functional.norm_match(pre, torch.ones(3)), lambda: se.ReLU().select(pre)):
        with pytest.raises(ValueError, match="pre must have at least one latent"):
            select()


def test_codes_made_under_inference_mode_serve_training():
    with torch.inference_mode():
        made = se.functional.topk(torch.randn(3, 20), 4)
        assert made.by_latent.offsets.numel() == 21
    codes = se.SparseCodes.from_topk(*(t.clone() for t in made.to_padded()), 20)
    weight = torch.randn(20, 5, requires_grad=True)
    with torch.inference_mode():
        assert codes.by_latent.offsets.numel() == 21
    se.functional.decode(codes, weight).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_to_sparse_csr_keeps_stored_zeros():
    codes = se.functional.topk(torch.zeros(2, 6), 2)
    csr = codes.to_sparse_csr()
    assert csr.shape == (2, 6) and csr.values().numel() == 4
    values = codes.values.clone().requires_grad_()
    codes.replace(values=values).to_sparse_csr().to_dense().sum().backward()
    assert torch.equal(values.grad, torch.ones(4))
    roomy = ragged(capacity=100)
    assert torch.equal(roomy.to_sparse_csr().to_dense(), roomy.to_dense())


@pytest.mark.parametrize("make", [ragged, lambda: se.functional.topk(torch.randn(5, 40), 3)], ids=["ragged", "uniform"])
@pytest.mark.parametrize("rows", [2, slice(1, 4), [4, 0, 0], torch.tensor([True, False, True, False, False])], ids=str)
def test_rows_are_chosen_as_a_tensor_would(rows, make):
    codes = make()
    chosen = codes[rows]
    assert torch.equal(chosen.to_dense(), codes.to_dense()[rows]) and chosen.shape == codes.to_dense()[rows].shape


def test_indexing_over_leading_dimensions():
    codes = se.functional.topk(torch.randn(2, 3, 20), 4)
    assert torch.equal(codes[1].to_dense(), codes.to_dense()[1])
    assert torch.equal(codes[:, 2].to_dense(), codes.to_dense()[:, 2])
    assert len(codes) == 2
    with pytest.raises(IndexError):
        codes[2]


def test_cat():
    parts = [ragged(3), ragged(2, capacity=60), se.functional.topk(torch.randn(4, 40), 3)]
    whole = se.cat(parts)
    assert torch.equal(whole.to_dense(), torch.cat([p.to_dense() for p in parts]))
    assert se.cat([parts[2], parts[2]]).k == 3
    for bad in ([], [parts[0], ragged(2, 30)]):
        with pytest.raises(ValueError, match="codes"):
            se.cat(bad)


def test_replace_steers_with_gradient():
    codes = se.functional.topk(torch.randn(3, 20), 4)
    scale = torch.tensor(2.0, requires_grad=True)
    codes.replace(values=codes.values * scale).to_dense().sum().backward()
    torch.testing.assert_close(scale.grad, codes.values.sum())
    with pytest.raises(ValueError, match="values"):
        codes.replace(values=torch.ones(3))


def test_to_and_detach():
    pre = torch.randn(3, 20, requires_grad=True)
    codes = se.functional.topk(pre, 4)
    assert codes.values.requires_grad and not codes.detach().values.requires_grad
    wide = codes.to(torch.float64)
    assert wide.values.dtype == torch.float64
    assert wide.indices.dtype == torch.int32 and wide.offsets.dtype == torch.int64
    assert codes.to("meta").offsets.is_meta


def test_is_a_pytree():
    codes = ragged(capacity=70)
    doubled = pytree.tree_map(lambda t: t * 2 if t.is_floating_point() else t, codes)
    assert isinstance(doubled, se.SparseCodes) and torch.equal(doubled.to_dense(), codes.to_dense() * 2)
    assert int(doubled.required) == int(codes.required)
    plain = se.functional.topk(torch.randn(2, 3, 20), 4)
    cloned = pytree.tree_map(lambda t: t.clone(), plain)
    assert torch.equal(cloned.to_dense(), plain.to_dense())
    leaves, spec = pytree.tree_flatten(plain)
    again = pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec)))
    assert again.batch_shape == (2, 3) and again.k == 4


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: se.SparseCodes.from_topk(torch.ones(2, 3), torch.zeros(2, 2), 9), ValueError, "indices"),
        (lambda: se.SparseCodes.from_topk(torch.ones(2, 3), torch.zeros(2, 3), 9), TypeError, "indices"),
        (lambda: se.SparseCodes.from_topk(torch.ones(2, 3).long(), torch.zeros(2, 3).long(), 9), TypeError, "values"),
        (lambda: se.SparseCodes.from_topk(torch.ones(2, 3), torch.zeros(2, 3).long(), 2), ValueError, "num_latents"),
        (lambda: se.SparseCodes.from_topk(torch.ones(2, 3), torch.zeros(2, 3, device="meta").long(), 9), ValueError,
         "indices"),
        (lambda: ragged().replace(values=torch.zeros_like(ragged().indices)), TypeError, "values"),
        (lambda: se.cat([ragged(), ragged()[0]]), ValueError, "codes"),
        (lambda: se.cat([torch.ones(3)]), TypeError, "codes"),
        (lambda: se.SparseCodes.from_dense(torch.ones(2, dtype=torch.int64)), TypeError, "dense"),
    ],
)
def test_arguments_are_checked(call, error, name):
    with pytest.raises(error, match=name):
        call()


def test_out_of_range_indices_are_found_when_asked(monkeypatch):
    monkeypatch.setenv("SAE_CHECK", "1")
    with pytest.raises(ValueError, match="indices"):
        se.SparseCodes.from_topk(torch.ones(1, 2), torch.tensor([[0, 9]]), 9)
    with pytest.raises(ValueError, match="indices"):
        se.SparseCodes.from_topk(torch.ones(1, 2), torch.tensor([[3, 3]]), 9)
    codes = ragged()
    broken = se.SparseCodes(codes.values, codes.indices + 40, codes.offsets, codes.batch_shape, 40)
    with pytest.raises(ValueError, match="indices"):
        se.functional.decode(broken, torch.randn(40, 3))


@pytest.mark.parametrize("make", [
    ragged, lambda: ragged(capacity=90), lambda: se.functional.topk(torch.randn(5, 40), 3),
], ids=["ragged", "capacity", "uniform"])  # fmt: skip
def test_arithmetic_is_that_of_the_dense_tensor(make):
    codes, scalar, vector = make(), torch.tensor(0.3), torch.randn(40)
    dense = codes.to_dense()
    for ours, theirs in [
        (codes * 2, dense * 2), (2 * codes, dense * 2), (codes / 4, dense / 4), (-codes, -dense),
        (codes * scalar, dense * scalar), (scalar * codes, dense * scalar), (codes / scalar, dense / scalar),
        (codes * vector, dense * vector), (vector * codes, dense * vector), (codes / vector, dense / vector),
        (np.float32(0.5) * codes, dense * 0.5), (codes * np.int64(3), dense * 3),
        (codes * (vector > 0), dense * (vector > 0)), (codes * torch.arange(40), dense * torch.arange(40)),
    ]:  # fmt: skip
        assert torch.equal(ours.to_dense(), theirs) and ours.dtype == theirs.dtype
        assert ours.indices is codes.indices and ours.offsets is codes.offsets and ours.required is codes.required
    half = codes.to(torch.bfloat16)
    assert [(half * f).dtype for f in (2, scalar, vector)] == [(half.values * f).dtype for f in (2, scalar, vector[:1])]


def test_arithmetic_is_differentiable_in_both():
    pre, vector, scalar = torch.randn(4, 20), torch.randn(20) + 3, torch.tensor(1.5)
    weight = torch.randn(4, 20)

    def gradients(multiply):
        p, v, s = (t.clone().requires_grad_() for t in (pre, vector, scalar))
        codes = se.functional.topk(p, 3)
        (multiply(codes, v, s) * weight).sum().backward()
        return p.grad, v.grad, s.grad

    ours = gradients(lambda codes, v, s: (-(codes * v) / v * v / s).to_dense())
    dense = gradients(lambda codes, v, s: -codes.to_dense() * v / v * v / s)
    torch.testing.assert_close(ours, dense)


def test_arithmetic_compiles():
    """Whole with numbers; Dynamo breaks the graph where a tensor meets what is none."""
    pre, vector = torch.randn(4, 20), torch.rand(20) + 1

    def scaled(p):
        return (2 * -se.functional.topk(p, 3) / 4).half().float().to_dense()

    def weighted(p):
        return (vector * se.functional.topk(p, 3) / vector).to_dense()

    assert torch.equal(torch.compile(scaled, backend="eager", fullgraph=True)(pre), scaled(pre))
    assert torch.equal(torch.compile(weighted, backend="eager")(pre), weighted(pre))


@pytest.mark.parametrize(("factor", "error", "message"), [
    (torch.ones(5, 1), ValueError, r"\(40,\), one number per latent, got shape \(5, 1\)"),
    (torch.ones(39), ValueError, "per latent"), (torch.ones(1), ValueError, "per latent"),
    (torch.ones(40, dtype=torch.complex64), TypeError, "complex64"), (True, TypeError, "bool"),
    ("2", TypeError, "str"), ([2.0], TypeError, "list"), (1j, TypeError, "complex"), (None, TypeError, "NoneType"),
    (np.ones(40, dtype=np.float32), TypeError, "ndarray"),
])  # fmt: skip
def test_arithmetic_with_anything_else_is_refused(factor, error, message):
    codes = ragged()
    for compute in (lambda: codes * factor, lambda: factor * codes, lambda: codes / factor):
        with pytest.raises(error, match=message):
            compute()
    with pytest.raises(TypeError, match="SparseCodes"):
        codes * codes
    for compute in (lambda: codes + codes, lambda: 1 / codes, lambda: codes + 1):
        with pytest.raises(TypeError, match="unsupported operand"):
            compute()


def test_dtypes_by_their_names_as_tensors_have_them():
    codes = se.functional.topk(torch.randn(3, 20, requires_grad=True), 4)
    for name in ("double", "float", "half", "bfloat16"):
        ours = getattr(codes, name)()
        assert torch.equal(ours.values, getattr(codes.values, name)()) and ours.values.requires_grad
    assert codes.to(codes.device).indices is codes.indices and codes.cpu().device.type == "cpu"
    with pytest.raises(TypeError, match="int32"):
        codes.to(torch.int32)
    with pytest.raises(ValueError, match=r"device.*cpu"):
        codes.cuda("cpu")


def test_repr_is_one_line_of_what_one_asks_first():
    dense = torch.tensor([[[0.0, 1, 2], [3, 0, 0]]], dtype=torch.float64, device="cpu").requires_grad_()
    codes = se.SparseCodes.from_dense(dense)
    assert repr(codes) == ("SparseCodes(batch_shape=(1, 2), d_sae=3, mean_l0=1.5, dtype=torch.float64, device=cpu, "
                           "requires_grad=True)")  # fmt: skip
    zeros = se.functional.topk(torch.full((2, 9), -1.0), 4).cpu()
    assert "mean_l0=0," in repr(zeros) and "mean_l0<=4," in repr(zeros.to("meta"))
    roomy = ragged(capacity=90).cpu()
    assert "capacity=90" in repr(roomy) and "mean_l0" in repr(roomy) and "mean_l0" not in repr(roomy.to("meta"))
    assert "mean_l0" not in repr(ragged(0).cpu())
    assert repr(codes[0, 0]).startswith("SparseCodes(batch_shape=(), d_sae=3")


SAVED = {
    "ragged": ragged, "capacity": lambda: ragged(capacity=90), "overflow": lambda: ragged(capacity=4),
    "uniform": lambda: se.functional.topk(torch.randn(2, 3, 40), 3), "no rows": lambda: ragged(0),
    "single": lambda: ragged()[2], "sorted": lambda: se.functional.topk(torch.randn(2, 40), 3, sorted=True),
    "half": lambda: ragged().half(), "runs": lambda: ragged(capacity=90).split_latents((4, 40)),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAVED)
def test_saved_codes_come_back(kind, tmp_path):
    codes = SAVED[kind]()
    assert codes.by_latent is codes.by_latent  # the cache stays out of the file
    torch.save({"codes": codes}, tmp_path / "codes.pt")
    loaded = torch.load(tmp_path / "codes.pt", weights_only=True)["codes"]
    for again in (loaded, copy.copy(codes), copy.deepcopy(codes)):
        leaves, spec = pytree.tree_flatten(codes)
        found, found_spec = pytree.tree_flatten(again)
        assert spec == found_spec and all(assert_same(a, b) is None for a, b in zip(leaves, found, strict=True))
        assert_same(again.to_dense(), codes.to_dense())


def test_saved_codes_come_back_in_a_fresh_process(tmp_path):
    codes = se.functional.topk(torch.randn(2, 3, 40), 3)
    torch.save(codes, tmp_path / "codes.pt")
    torch.save(codes.to_dense(), tmp_path / "dense.pt")
    code = """
import sys, torch, sae_engine
codes, dense = (torch.load(path, weights_only=True) for path in sys.argv[1:])
assert torch.equal(codes.to_dense(), dense) and codes.k == 3, codes
"""
    paths = [str(tmp_path / name) for name in ("codes.pt", "dense.pt")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=120, cwd=tmp_path)


@pytest.mark.parametrize("broken", [
    {"indices": torch.tensor([0, 40, 2], dtype=torch.int32)}, {"indices": torch.tensor([-1, 1, 2], dtype=torch.int32)},
    {"indices": torch.zeros(2, dtype=torch.int32)}, {"indices": torch.zeros(3)}, {"offsets": torch.tensor([0, 3])},
    {"offsets": torch.tensor([0, 4, 3])}, {"offsets": torch.tensor([-1, 2, 3])}, {"offsets": torch.tensor([0, 1, 2])},
    {"values": torch.ones(3).long()}, {"values": "ones"}, {"batch_shape": (3,)}, {"num_latents": 2}, {"k": 2},
    {"required": torch.tensor(2)}, {"required": torch.tensor(2.0)}, {"num_latents": "40"},
], ids=str)  # fmt: skip
def test_a_broken_file_of_codes_is_refused(broken, tmp_path):
    sound = {
        "values": torch.ones(3), "indices": torch.arange(3, dtype=torch.int32), "offsets": torch.tensor([0, 1, 3]),
        "batch_shape": (2,), "num_latents": 40, "k": None, "required": None,
    }  # fmt: skip
    torch.save(se.SparseCodes(**sound), tmp_path / "codes.pt")
    torch.load(tmp_path / "codes.pt", weights_only=True)
    torch.save(se.SparseCodes(**{**sound, **broken}), tmp_path / "codes.pt")
    with pytest.raises(ValueError, match=r"no saved SparseCodes|codes\.(indices|offsets)"):
        torch.load(tmp_path / "codes.pt", weights_only=True)
