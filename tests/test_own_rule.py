"""A rule that a user writes outside the package, in a file of few lines, can do what the package's own can."""
import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import sae_engine as se
from sae_engine.checkpoints import formats
from sae_engine.data import evaluation_text, load_language_model
from sae_engine.testing import assert_same

FILE = Path(__file__).parents[1] / "examples" / "top_p.py"
BACKENDS = ("reference", "torch", "triton")
D, F, B = 8, 40, 12
P = 0.8


def imported(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TopP = imported(FILE).TopP


def sparse_autoencoder(dtype=torch.float32):
    torch.manual_seed(0)
    return se.SparseAutoencoder(D, F, TopP(P), dtype=dtype)


def exact():
    """An autoencoder and an input of small multiples of a half: products are exact, in whatever order."""
    sae = sparse_autoencoder()
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randint(-40, 41, p.shape) / 2)
    return sae, torch.randint(-2, 3, (B, D)).float()


def dense(pre):
    """The rule once more, by a sort."""
    ranked, order = pre.relu().sort(dim=-1, descending=True)
    energy = ranked.square().cumsum(-1)
    before = torch.cat([torch.zeros_like(energy[..., :1]), energy[..., :-1]], -1)
    kept = torch.zeros_like(pre).scatter(-1, order, (before < P * energy[..., -1:]).to(pre.dtype))
    return pre.relu() * kept.detach()


def test_it_is_short_and_lies_outside():
    assert len(FILE.read_text(encoding="utf-8").splitlines()) <= 25
    assert TopP.__module__ == "top_p"


@pytest.mark.parametrize("backend", BACKENDS)
def test_selects_as_codes_and_dense(backend):
    pre = torch.randn(2, 5, F)
    codes = TopP(P).select(pre, backend=backend)
    assert_same(codes.to_dense(), dense(pre))
    assert_same(TopP(P)(pre), dense(pre))
    sae, x = exact()
    assert_same(sae.encode(x, backend=backend).to_dense(), dense((x - sae.b_dec) @ sae.W_enc + sae.b_enc))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_an_autoencoder_are_those_of_the_dense_one(backend):
    dtype, tolerance = torch.float64, {}
    if backend == "triton":  # which takes no fp64: sums of at most 40 products in fp32, in two orders
        dtype, tolerance = torch.float32, {"rtol": 1e-4, "atol": 1e-5}
    sae, x = sparse_autoencoder(dtype), torch.randn(B, D, dtype=dtype)
    codes = sae.encode(x, backend=backend)
    (sae.decode(codes, backend=backend) - x).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    out = dense((x - sae.b_dec) @ sae.W_enc + sae.b_enc) @ sae.W_dec + sae.b_dec
    (out - x).square().sum().backward()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, **tolerance)


def test_training_steps_are_those_of_autograd_and_adam_in_fp64():
    sae = sparse_autoencoder(torch.float64)
    plain = copy.deepcopy(sae)
    step = se.training.TrainStep(sae, lr=1e-2, normalize_decoder=False)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2)
    for _ in range(4):
        x = torch.randn(B, D, dtype=torch.float64)
        out = dense((x - plain.b_dec) @ plain.W_enc + plain.b_enc) @ plain.W_dec + plain.b_dec
        loss = (out - x).square().sum() / B
        adam.zero_grad()
        loss.backward()
        adam.step()
        torch.testing.assert_close(step(x)["loss"], loss.detach())
    for (name, ours), theirs in zip(sae.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")


def test_chunks_of_rows_give_the_same_bits():
    results = []
    for rows in (B, 1, 5):
        sae, x = exact()
        step = se.training.TrainStep(sae, lr=1e-2, memory_budget=rows * F * 4)
        report = step(x)
        results.append((*report.values(), *sae.state_dict().values()))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.no_poison  # the compiler runs torch.empty itself
def test_compiles_whole(compile_backend):
    torch._dynamo.reset()
    sae, x = sparse_autoencoder(), torch.randn(B, D)
    compiled = torch.compile(sae, fullgraph=True, backend=compile_backend)
    torch.testing.assert_close(compiled(x), sae(x))
    grads = []
    for call in (sae, compiled):
        sae.zero_grad()
        (call(x) - x).square().sum().backward()
        grads.append([p.grad.clone() for p in sae.parameters()])
    torch.testing.assert_close(*grads)
    rule, pre = TopP(P), torch.randn(B, F)
    selected = torch.compile(rule.select, fullgraph=True, backend=compile_backend)(pre)
    assert_same((selected.values, selected.indices, selected.offsets),
                (lambda c: (c.values, c.indices, c.offsets))(rule.select(pre)))  # fmt: skip


def test_saved_and_loaded_it_has_the_same_bits(tmp_path):
    sae = sparse_autoencoder()
    step = se.training.TrainStep(sae, lr=1e-2)
    step(torch.randn(B, D))
    sae.save_pretrained(tmp_path / "saved", format="saelens")
    again, x = se.SparseAutoencoder.from_pretrained(tmp_path / "saved"), torch.randn(B, D)
    assert type(again.activation) is TopP and again.activation.p == P
    assert_same(tuple(again.state_dict().values()), tuple(sae.state_dict().values()))
    assert_same(again(x), sae(x))
    for name in formats.FORMATS.keys() - {"saelens"}:
        with pytest.raises(ValueError, match=rf"{name}.*TopP.*saelens"):
            sae.save_pretrained(tmp_path / name, format=name)


def test_evaluates():
    lm = load_language_model(device=torch.get_default_device())
    torch.manual_seed(0)
    sae = se.SparseAutoencoder(256, 512, TopP(P))
    found = se.metrics.evaluate(sae, lm, evaluation_text(), layer=2, max_tokens=200, context_length=64)
    assert found["sparsity"]["tokens"] == 200
    assert 0 < found["sparsity"]["l0"] < 512 and found["reconstruction"]["mse"] > 0
    assert se.losses.evaluate(sae, torch.randn(B, 256))["loss"] > 0


def test_what_it_is_is_shown_and_what_it_is_not_is_refused():
    assert repr(TopP(0.5)) == "TopP(p=0.5)"
    with pytest.raises(ValueError, match="share must satisfy 0 < share <= 1, got 7"):
        TopP(7)(torch.randn(2, 3))
    with pytest.raises(TypeError, match="TopP"):
        se.inference_form(sparse_autoencoder())
