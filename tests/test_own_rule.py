"""A rule that a user writes outside the package, in a file of few lines, can do what the package's own can."""
import copy
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import sae_engine as se
from sae_engine.checkpoints import formats
from sae_engine.data import evaluation_text, load_language_model
from sae_engine.data.memory import TensorStream
from sae_engine.testing import assert_same
from sae_engine.training import Architecture

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
TopPSAE = imported(FILE.with_name("top_p_sae.py")).TopPSAE


@dataclass(frozen=True, kw_only=True)
class GradientSAE(Architecture):
    """A rule that needs more than the pre-activations: rows of a second place."""

    k: int = 4
    context: ClassVar = {"gradient": "model.gradients"}

    def build_rule(self, d_sae, steps):
        return se.GradientTopK(self.k)


@dataclass(frozen=True, kw_only=True)
class OfAnotherPlaceSAE(GradientSAE):
    context: ClassVar = {"gradient": "blocks.0.hook_mlp_out"}


class Undecorated(Architecture):
    p: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Renaming(Architecture):
    name: str = "taken"


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
    se.training.TrainStep(again, lr=1e-2)  # which lays its encoder out as the first one's: cuBLAS sums by layout
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


# --- in a configuration ----------------------------------------------------------------------------------------------


def configuration(folder, *, updates=4, eval_tokens=0, **sae):
    pytest.importorskip("pydantic", reason="configurations are checked by pydantic, which is not installed")
    return {
        "saes": [{"hook_name": "model.rows", "d_sae": F, "aux_k": 4, **sae}], "data": {"training_tokens": updates * B},
        "optim": {"train_batch_size_tokens": B}, "eval": {"eval_tokens": eval_tokens}, "logger": {"progress": False},
        "output": {"output_path": str(folder), "save_steps": 2},
    }  # fmt: skip


def test_a_configuration_trains_it_by_the_name_of_its_class_and_a_run_goes_on(tmp_path):
    rows = torch.randn(5 * B, D)
    run = se.train(configuration(tmp_path / "run", architecture="top_p_sae:TopPSAE", p=P), dataset=rows)
    assert run.config.saes[0].architecture == TopPSAE(p=P)
    (sae,) = run.saes().values()
    assert type(sae.activation) is TopP and sae.activation.p == P
    in_python = configuration(tmp_path / "again")
    saes = [se.training.TrainConfig.from_dict(configuration("x", architecture="top_p_sae:TopPSAE", p=P)).saes[0]]
    config = se.training.TrainConfig.from_dict({**in_python, "sweep": {"p": [P]}, "saes": [saes[0].to_dict()]})
    (other,) = se.train(config, dataset=rows).saes().values()
    assert_same(tuple(other.state_dict().values()), tuple(sae.state_dict().values()))
    for place in (tmp_path / "run" / "checkpoints").glob("step-*4"):
        place.rename(tmp_path / place.name)
    (resumed,) = se.training.resume(tmp_path / "run", dataset=rows).saes().values()
    assert_same(tuple(resumed.state_dict().values()), tuple(sae.state_dict().values()))


def test_a_program_that_has_not_imported_it_finds_it_by_its_name(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "saes: [{hook_name: blocks.1.hook_resid_pre, architecture: 'top_p_sae:TopPSAE', p: 0.5}]"
    )
    code = "import sys; from sae_engine.training import TrainConfig; print(TrainConfig.from_yaml(sys.argv[1]).saes)"
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run.yaml")], capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": os.pathsep.join([str(FILE.parent), os.environ.get("PYTHONPATH", "")]), "PATH": ""},
    )  # fmt: skip
    assert "TopPSAE(p=0.5)" in shown.stdout, shown.stderr


def test_what_its_rule_needs_comes_from_a_place_of_its_own(tmp_path):
    """As a TrainStep is given it: the trainer deals out the same rows of both places."""
    rows, gradients = torch.randn(3 * B, D), torch.randn(3 * B, D)
    config = configuration(
        tmp_path / "run", architecture=f"{__name__}:GradientSAE", normalize_activations="none", b_dec_init="zeros",
        aux_k_coefficient=0,
    )  # fmt: skip
    config["optim"] |= {"lr": 1e-3, "lr_warm_up_steps": 0, "lr_decay_steps": 0}
    trainer = se.training.Trainer(config, dataset=[rows, gradients])
    trainer.train()
    (trained,) = trainer.trainees.values()
    sae = trained.config.build(D, D, steps=4, seed=0, device=rows.device)
    step = se.training.TrainStep(sae, lr=1e-3, dead_after=trained.optim.dead_after)
    stream = TensorStream([rows, gradients], batch_rows=B, seed=0)
    for _ in range(4):
        x, gradient = stream.next()
        step(x, gradient=gradient)
    assert_same(tuple(trained.sae.state_dict().values()), tuple(sae.state_dict().values()))


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("no_such_module:TopPSAE", "saes.0.architecture: 'no_such_module:TopPSAE' cannot be imported: No module named"),
        ("top_p_sae:TopQ", "cannot be imported.*no attribute 'TopQ'"),
        ("top_p:TopP", "'top_p:TopP' must be a class derived from Architecture"),
        ("top_p_sae", "must be one of topk, .*, or module:Class of your own, got 'top_p_sae'"),
        (f"{__name__}:Undecorated", r"must be a dataclass: Undecorated lacks @dataclass\(frozen=True, kw_only=True\)"),
        (f"{__name__}:Renaming", "must not have fields that every entry of saes has: Renaming has name"),
    ],
)
def test_architectures_that_are_none_are_refused_by_their_field(tmp_path, architecture, said):
    with pytest.raises(se.training.config.ConfigError, match=said) as refused:
        se.training.TrainConfig.from_dict(configuration(tmp_path, architecture=architecture))
    assert [path for path, _ in refused.value.faults] == ["saes.0.architecture"]


def test_one_inside_a_function_is_refused_since_no_file_could_name_it():
    @dataclass(frozen=True, kw_only=True)
    class Hidden(Architecture):
        pass

    with pytest.raises(ValueError, match="architecture: must be at the top of a module"):
        se.training.config.SAEConfig(hook_name="model.rows", architecture=Hidden())


def test_an_evaluation_that_lacks_what_the_rule_needs_is_refused_before_the_training(tmp_path):
    config = configuration(tmp_path / "run", architecture=f"{__name__}:OfAnotherPlaceSAE",
                           hook_name="blocks.1.hook_resid_pre", eval_tokens=64)  # fmt: skip
    config["data"] |= {"shuffle_tokens": 8 * B, "context_size": 16}
    with pytest.raises(ValueError, match=r"eval.eval_tokens: must be 0: the rule of .* needs gradient, which"):
        se.train(config)
    assert not (tmp_path / "run").exists()
    config["eval"]["eval_tokens"] = 0
    assert se.train(config).metrics()[-1]["metrics/l0"] == 4
