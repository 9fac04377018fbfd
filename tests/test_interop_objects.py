"""Other libraries' objects, accelerated in place: copied, saved, restored, compiled, refused: `make test-interop`."""

import copy
import io
import pickle

import pytest
import torch
from largest_tensor import Largest
from library_objects import (
    CODERS,
    DICTIONARIES,
    INFERENCE,
    MARKS,
    SIZE,
    TRAINING,
    AutoEncoder,
    AutoEncoderTopK,
    B,
    D,
    F,
    coder,
    sae_lens,
    sae_train,
    saes,
    sparsify,
)

import sae_engine as se
from sae_engine.acceleration import _base as core

pytestmark = MARKS

EVERY = {
    **{f"sae_lens {n}": m for n, m in {**INFERENCE, **{f"training {n}": m for n, m in TRAINING.items()}}.items()},
    **DICTIONARIES,
    **CODERS,
}


@pytest.mark.parametrize("make", list(EVERY.values()), ids=list(EVERY))
def test_in_place_and_undone(make):
    module, plain = make(), make()
    before = dict(module.__dict__)
    parameters = {n: (p, p.data_ptr(), p.stride()) for n, p in module.named_parameters()}
    keys, text = list(module.state_dict()), repr(module)
    assert se.accelerate(se.accelerate(module)) is module
    assert {n: (p, p.data_ptr(), p.stride()) for n, p in module.named_parameters()} == parameters
    assert list(module.state_dict()) == keys and "accelerated by sae_engine" in repr(module)
    x = torch.randn(B, D)
    with torch.no_grad():
        module(x)
    assert module.__dict__.keys() == before.keys()
    se.restore(module)
    assert type(module) is type(plain) and repr(module) == text and module.__dict__.keys() == before.keys()
    with torch.no_grad():
        assert all(map(torch.equal, *(o if isinstance(o, tuple) else (o,) for o in (module(x), plain(x)))))


@pytest.mark.parametrize("make", list(EVERY.values()), ids=list(EVERY))
def test_copies_and_pickles(make):
    module, x = se.accelerate(make()), torch.randn(B, D)
    copies = [copy.deepcopy(module)]
    try:
        pickle.dumps(make())
    except (AttributeError, pickle.PicklingError):
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pickle.dumps(module)  # SAELens keeps lambdas on its objects
    else:
        saved = io.BytesIO()
        torch.save(module, saved)
        saved.seek(0)
        copies += [pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)]
    with torch.no_grad():
        expected = module(x)
        for copied in copies:
            assert type(copied) is type(module) and copied is not module
            assert all(map(torch.equal, *(o if isinstance(o, tuple) else (o,) for o in (copied(x), expected))))


def test_saved_by_the_accelerated_loaded_by_the_plain(tmp_path):
    x = torch.randn(B, D)
    sae = se.accelerate(TRAINING["topk"]())
    sae.save_model(tmp_path / "sae")
    loaded = saes.TopKTrainingSAE.load_from_disk(tmp_path / "sae")
    assert type(loaded) is saes.TopKTrainingSAE
    torch.testing.assert_close(loaded(x), sae(x))
    batch = se.accelerate(TRAINING["batchtopk"]())
    sae_train(None)(batch, x)
    batch.save_inference_model(tmp_path / "inference")
    loaded = saes.SAE.load_from_disk(tmp_path / "inference")
    assert type(loaded) is saes.JumpReLUSAE and loaded.threshold[0] == batch.topk_threshold.float() > 0
    ae = se.accelerate(DICTIONARIES["AutoEncoderTopK"]())
    torch.save(ae.state_dict(), tmp_path / "ae.pt")
    loaded = AutoEncoderTopK.from_pretrained(tmp_path / "ae.pt")
    assert type(loaded) is AutoEncoderTopK
    torch.testing.assert_close(loaded(x), ae(x))
    module = se.accelerate(CODERS["coder"]())
    module.save_to_disk(tmp_path / "coder")
    loaded = sparsify.SparseCoder.load_from_disk(tmp_path / "coder")
    assert type(loaded) is sparsify.SparseCoder
    torch.testing.assert_close(loaded(x=x).sae_out, module(x=x).sae_out)


@pytest.mark.parametrize("make", [TRAINING["topk"], *list(DICTIONARIES.values())[:4], CODERS["coder"]])
def test_weights_written_past_autograd_are_seen(make):
    """The libraries write through .data, which versions do not record: nothing here outlives a call."""
    x, outs = torch.randn(B, D), []
    for accelerated in (True, False):
        module = make()
        module = se.accelerate(module) if accelerated else module
        for p in list(module.parameters())[:3]:
            module(x)
            version = p._version
            p.data.mul_(0.9)
            p.data = p.data + 0.01
            assert p._version == version
        out = module(x)
        outs.append(out[0] if isinstance(out, tuple) else out)
    torch.testing.assert_close(*outs)


# ------------------------------------------------------------------------------------------ all objects made after


def test_all_objects_made_inside():
    classes = saes.TopKTrainingSAE, saes.StandardTrainingSAE, AutoEncoderTopK
    inits = [c.__dict__.get("__init__") for c in classes]
    with se.accelerated():
        made = {name: make() for name, make in EVERY.items()}
        from_dict = saes.TrainingSAE.from_dict({**SIZE, "k": 3, "architecture": "topk"})
    for module in (*made.values(), from_dict):
        assert "accelerated by sae_engine" in repr(module)
    assert [c.__dict__.get("__init__") for c in classes] == inits
    assert "accelerated" not in repr(EVERY["sae_lens topk"]()) + repr(CODERS["coder"]())


def test_one_library_until_restored():
    assert se.accelerate("dictionary_learning") == "dictionary_learning"
    try:
        with se.accelerated("dictionary_learning"):  # what was on before stays on after
            pass
        assert "accelerated" in repr(AutoEncoderTopK(D, F, 3)) and "accelerated" not in repr(CODERS["coder"]())
    finally:
        se.restore("dictionary_learning")
    assert "accelerated" not in repr(AutoEncoderTopK(D, F, 3))


def test_a_class_for_dict_class():
    ours = se.accelerate(AutoEncoderTopK)
    assert issubclass(ours, AutoEncoderTopK) and isinstance(ours(D, F, 3), AutoEncoderTopK)
    assert se.restore(ours) is AutoEncoderTopK


def test_what_cannot_be_accelerated_is_made_plain_with_a_warning():
    with se.accelerated("sparsify"), pytest.warns(UserWarning, match="groupmax"):
        module = coder(activation="groupmax")()
    assert type(module) is sparsify.SparseCoder


# ------------------------------------------------------------------------------------------ refused


class Mine(AutoEncoderTopK):
    def encode(self, x, **options):
        return super().encode(x, **options) * 2


def with_attribute(make, name, value):
    module = make()
    setattr(module, name, value)
    return module


REFUSED = {
    "another architecture": (lambda: sae_lens("GatedSAE")(), "no operations for this class"),
    "another dictionary": (lambda: AutoEncoder(D, F), "no operations for this class"),
    "a subclass": (lambda: Mine(D, F, 3), "subclass of AutoEncoderTopK"),
    "activation": (lambda: with_attribute(INFERENCE["topk"], "activation_fn", torch.nn.ReLU()), "activation_fn"),
    "method": (lambda: with_attribute(INFERENCE["topk"], "encode", lambda x: x), "encode was replaced"),
    "groupmax": (coder(activation="groupmax"), "groupmax"),
    "layer": (lambda: with_attribute(DICTIONARIES["AutoEncoderTopK"], "encoder", torch.nn.Sequential()), "encoder"),
    "integers": (lambda: with_integers(DICTIONARIES["JumpRelu"]()), "W_enc"),
    "wrapped": (lambda: torch.nn.DataParallel(CODERS["coder"]()), "wraps"),
    "compiled": (lambda: torch.compile(CODERS["coder"](), backend="eager"), "compiled"),
}


def with_integers(module):
    module.W_enc = torch.nn.Parameter(module.W_enc.to(torch.int32), requires_grad=False)
    return module


@pytest.mark.parametrize(("make", "reason"), list(REFUSED.values()), ids=list(REFUSED))
def test_refused_with_the_reason_and_unchanged(make, reason):
    module = make()
    cls, state = type(module), dict(module.__dict__)
    with pytest.raises(se.CannotAccelerate, match=reason):
        se.accelerate(module)
    assert type(module) is cls and module.__dict__ == state


def test_an_activation_replaced_later_is_an_error():
    module = se.accelerate(INFERENCE["topk"]())
    module.activation_fn = torch.nn.ReLU()
    with pytest.raises(se.CannotAccelerate, match="activation_fn"):
        module(torch.randn(B, D))


# ------------------------------------------------------------------------------------------ compiled

COMPILED = INFERENCE["topk"], TRAINING["topk"], DICTIONARIES["AutoEncoderTopK"], CODERS["coder"]


@pytest.mark.parametrize("make", COMPILED)
def test_compiled(make, compile_backend):
    torch._dynamo.reset()
    module, x = se.accelerate(make()), torch.randn(B, D)
    compiled = torch.compile(copy.deepcopy(module), backend=compile_backend)
    results = []
    for m in (compiled, module):
        out = m(x)
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in m.parameters())])
    for a, b in zip(*results, strict=True):  # sums that cancel are as exact as large ones: to a few roundings of those
        torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(b.dtype).eps * float(b.abs().max()))


def test_no_dense_gradient_in_a_training_step():
    """Of all tensors of the backward pass none has tokens times latents elements, AuxK included."""
    rows, latents = 4096, 1024
    sae = saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(d_in=4, d_sae=latents, k=2))
    out = sae_train(torch.arange(latents) < 100)(se.accelerate(sae), torch.randn(rows, 4))
    with Largest() as largest:
        out["loss"].backward()
    assert 0 < largest.seen < rows * latents / 16


def test_codes_are_remembered_weakly():
    module = se.accelerate(INFERENCE["topk"]())
    f = module.encode(torch.randn(B, D))
    assert core.codes_of(f) is not None
    entries = len(core._codes_of)
    del f
    assert len(core._codes_of) == entries - 1
