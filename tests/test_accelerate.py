"""What accelerates other libraries' objects, tested without them; with them: test_interop_accelerate.py
and test_interop_objects.py."""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import sae_engine as se
from sae_engine.acceleration import _base as core
from sae_engine.acceleration import switch as machinery

B, D, F = 10, 6, 40


# ------------------------------------------------------------------------------------------ nothing at import


def test_import_loads_none_of_it():
    code = """
import sys
import sae_engine as se
wanted = ("sae_engine.acceleration.switch", "sae_lens", "dictionary_learning", "sparsify")
assert not [name for name in wanted if name in sys.modules]
assert callable(se.accelerate) and callable(se.restore) and callable(se.accelerated)
assert "sae_engine.acceleration.switch" in sys.modules and not [name for name in wanted[1:] if name in sys.modules]
try:
    se.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(sys.executable).anchor, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("obj", [nn.Linear(2, 3), 3, None, se.SparseAutoencoder(4, 8, se.TopK(2)), nn.Linear])
def test_what_is_no_library_s_is_refused(obj):
    with pytest.raises(se.CannotAccelerate, match="none of the autoencoders of sae_lens"):
        se.accelerate(obj)


def test_names_are_checked():
    for call in (se.accelerate, se.restore, lambda name: se.accelerated(name).__enter__()):
        with pytest.raises(ValueError, match="saelens"):
            call("saelens")
    with pytest.raises(TypeError, match="obj must be an autoencoder"):
        se.restore(nn.Linear(2, 3))


def test_wrapped_modules_are_pointed_at():
    with pytest.raises(se.CannotAccelerate, match=r"\.module"):
        se.accelerate(nn.DataParallel(nn.Linear(2, 3)))


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    monkeypatch.delitem(sys.modules, "sae_engine.acceleration.sae_lens", raising=False)
    with pytest.raises(ImportError, match="sae_lens"):
        se.accelerate("sae_lens")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="none of sae_lens"), se.accelerated():
        pass


# ------------------------------------------------------------------------------------------ classes, with a toy library


class Theirs(nn.Module):
    def __init__(self, k=3):
        super().__init__()
        self.k, self.weight = k, nn.Parameter(torch.ones(2))

    def encode(self, x):
        return "theirs"


class Inherits(Theirs):
    pass


class Fast(nn.Module):
    def encode(self, x):
        return "ours"


class OurTheirs(Fast, Theirs):
    pass


class OurInherits(Fast, Inherits):
    pass


class Exact(Fast, Theirs):
    pass


@pytest.fixture
def toy(monkeypatch):
    """A library with two classes, one of which inherits its ``__init__``."""
    library = types.ModuleType("toy_accelerated")
    library.CLASSES, library.EXACT = core.table(OurTheirs, OurInherits), core.table(Exact)

    def check(obj, plain):
        if obj.k < 0:
            raise core.refuse(obj, "k is negative")
        core.check_module(obj, library.CLASSES[plain], ("weight",))

    library.check = check
    name = Theirs.__module__.partition(".")[0]
    monkeypatch.setattr(machinery, "LIBRARIES", {name: "toy"})
    monkeypatch.setattr(machinery, "_library", lambda asked: library)
    return name


def test_class_is_swapped_and_back(toy):
    obj = Theirs()
    assert se.accelerate(obj) is obj and type(obj) is OurTheirs and obj.encode(0) == "ours"
    assert type(se.accelerate(obj, exact=True)) is Exact and type(se.accelerate(obj)) is OurTheirs
    assert se.restore(obj) is obj and type(obj) is Theirs and se.restore(obj) is obj
    assert se.accelerate(Theirs) is OurTheirs and se.accelerate(Theirs, exact=True) is Exact
    assert se.restore(OurTheirs) is Theirs


def test_refusal_changes_nothing(toy):
    class Mine(Theirs):
        pass

    for obj, reason in ((Theirs(-1), "k is negative"), (Mine(), "subclass of Theirs")):
        cls = type(obj)
        with pytest.raises(se.CannotAccelerate, match=reason):
            se.accelerate(obj)
        assert type(obj) is cls
    obj = Theirs()
    obj.encode = lambda x: "mine"
    with pytest.raises(se.CannotAccelerate, match="encode was replaced"):
        se.accelerate(obj)
    obj = Theirs()
    obj.weight = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(se.CannotAccelerate, match="weight is torch"):
        se.accelerate(obj)


def test_objects_made_after(toy):
    before = Theirs.__init__, Inherits.__dict__.get("__init__")
    with se.accelerated(toy):
        made = Theirs(k=4), Inherits(5)
        with pytest.warns(UserWarning, match="k is negative"):
            plain = Theirs(-1)
    assert [type(m) for m in made] == [OurTheirs, OurInherits] and [m.k for m in made] == [4, 5]
    assert type(plain) is Theirs and type(Theirs()) is Theirs and type(Inherits()) is Inherits
    assert (Theirs.__init__, Inherits.__dict__.get("__init__")) == before


def test_restored_when_the_block_fails_and_kept_when_it_was_on_before(toy):
    with pytest.raises(RuntimeError, match="inside"), se.accelerated(toy):
        raise RuntimeError("inside")
    assert type(Theirs()) is Theirs
    se.accelerate(toy)
    with se.accelerated(toy, exact=True):
        assert type(Theirs()) is Exact
    assert type(Theirs()) is not Theirs
    se.restore(toy)
    assert type(Theirs()) is Theirs


# ------------------------------------------------------------------------------------------ the tools


def encoder(dtype=torch.float64):
    shapes = {"x": (B, D), "W": (D, F), "b": (F,), "b_dec": (D,), "scale": (F,)}
    return {n: torch.randn(s, dtype=dtype, requires_grad=True) for n, s in shapes.items()}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(B,), (2, B // 2)])
def test_pre_activations_have_the_dense_gradient(relu, scaled, shape):
    weight, outcomes = torch.randn(B, F, dtype=torch.float64), []
    for ours in (True, False):
        torch.manual_seed(0)
        t = encoder()
        x, scale = t["x"].view(*shape, D), t["scale"] if scaled else None
        pre = (x - t["b_dec"]) @ t["W"] + t["b"]
        pre = pre if scale is None else pre * scale
        pre = pre.relu() if relu else pre
        if ours:
            pre = core.pre_activations(pre.detach(), x, t["W"], t["b"], t["b_dec"], scale, relu=relu)
        (pre.view(B, F) * weight).sum().backward()
        outcomes.append([pre.detach(), *(t[n].grad for n in t if scaled or n != "scale")])
    for ours, dense in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, dense)


def test_pre_activations_can_pass_nothing():
    t = encoder()
    pre = core.pre_activations(torch.randn(B, F), t["x"], t["W"], t["b"], None, through=False)
    assert pre.requires_grad
    (pre.sum() + t["x"].sum()).backward()
    assert t["W"].grad is None and (t["x"].grad == 1).all()


def test_no_gradient_no_node():
    t = encoder()
    with torch.no_grad():
        pre = torch.randn(B, F)
        assert core.pre_activations(pre, t["x"], t["W"], t["b"], None) is pre


def codes_and_weights():
    torch.manual_seed(0)
    values = torch.randn(B * 3, dtype=torch.float64, requires_grad=True)
    codes = se.functional.topk(torch.randn(B, F, dtype=torch.float64), 3).replace(values=values)
    W_dec = torch.randn(F, D, dtype=torch.float64, requires_grad=True)
    return values, codes, W_dec, torch.randn(D, dtype=torch.float64)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_decode_by_codes_has_the_dense_gradients(held, scaled):
    norm = torch.rand(F, dtype=torch.float64) + 0.5 if scaled else None
    values, codes, W_dec, b_dec = codes_and_weights()
    dense = core.remember(codes.to_dense(), codes)
    out = core.decode_dense(dense, core.codes_of(dense), W_dec, b_dec, norm)
    if held:
        dense.retain_grad()
    reference = dense
    if not held:
        del dense, reference
    out.square().sum().backward()

    their_values, their_codes, their_W, _ = codes_and_weights()
    theirs = their_codes.to_dense()
    theirs.retain_grad()
    expected = (theirs if norm is None else theirs * norm) @ their_W + b_dec
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(values.grad, their_values.grad)
    torch.testing.assert_close(W_dec.grad, their_W.grad)
    if held:
        torch.testing.assert_close(reference.grad, theirs.grad)


def test_codes_are_forgotten_with_their_matrix_and_when_it_is_written_to():
    _, codes, _, _ = codes_and_weights()
    dense = core.remember(codes.detach().to_dense(), codes)
    assert core.codes_of(dense) is codes and core.codes_of(dense.clone()) is None and core.codes_of(dense[:2]) is None
    dense[0, 0] = 1
    assert core.codes_of(dense) is None
    entries = len(core._codes_of)
    del dense
    assert len(core._codes_of) == entries - 1
    with torch.inference_mode():  # no version to tell a write by
        assert core.codes_of(core.remember(codes.detach().to_dense(), codes)) is None


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (7, 30), (30, F), (0, F), (5, 5)])
def test_of_latents(start, stop):
    _, codes, _, _ = codes_and_weights()
    part = core.of_latents(codes, start, stop)
    expected = codes.to_dense().detach().clone()
    expected[:, :start], expected[:, stop:] = 0, 0
    assert torch.equal(part.to_dense(), expected) and part.offsets.shape == (B + 1,)


@pytest.mark.parametrize("total", [0, 1, 7, B * F - 1, B * F])
@pytest.mark.parametrize("rows", [B, 7, 0])
def test_budget_is_exact(total, rows):
    total = min(total, rows * F)
    assert core.BudgetRule(total).select(torch.rand(rows, F)).values.numel() == total


def test_straight_rule_passes_gradients_through_zeros():
    pre = torch.full((1, F), -1.0)
    pre[0, :2] = torch.tensor([2.0, 3.0])
    x, W = torch.ones(1, 1), pre.clone().requires_grad_()
    for straight, expected in ((True, 4), (False, 2)):
        W.grad = None
        codes = se.functional.encode(x, W, select=core.TopRule(4, straight=straight))
        assert codes.values.tolist() == [2.0, 3.0, 0.0, 0.0]
        codes.values.sum().backward()
        assert int((W.grad != 0).sum()) == expected


def test_listeners_are_noticed():
    module = nn.Identity()
    assert not core.listened(module)
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        handle = getattr(module, register)(lambda *a: None)
        assert core.listened(module)
        handle.remove()
        assert not core.listened(module)
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    assert core.listened(module)
    handle.remove()
