"""What rules of activation sparsity keep, learn, save and refuse."""
import json
from dataclasses import replace

import pytest
import torch
from lm_models import make, token_ids
from torch import nn

import sae_engine as se
from sae_engine.cli import main
from sae_engine.data import evaluation_text, load_language_model
from sae_engine.lm import layers
from sae_engine.lm.fit import dropped, quantile
from sae_engine.lm.fit import token_ids as token_ids_of
from sae_engine.lm.places import find

TEXTS = [ids for ids in token_ids(contexts=12, length=32)]


@pytest.fixture(autouse=True)
def sparse(monkeypatch):
    monkeypatch.setattr(layers, "densest", lambda numbers: 1.0)


@pytest.fixture
def lm():
    return load_language_model()  # the embedded one


# --- thresholds ------------------------------------------------------------------------------------------------------


def reference(llama, ids, weigh):
    """Activations, W_up x and the scores' weights of block 1, from all of the texts."""
    mlp, seen = llama.model.layers[1].mlp, []
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in ids:
            llama(input_ids=batch)
    handle.remove()
    x = torch.cat(seen)
    a, u = mlp.act_fn(x @ mlp.gate_proj.weight.T), x @ mlp.up_proj.weight.T
    norms = mlp.down_proj.weight.norm(dim=0)
    scale = {"": torch.ones_like(norms), "up": u.abs().mean(0), "up_rms": u.square().mean(0).sqrt(), "down": norms,
             "up*down": u.abs().mean(0) * norms}[weigh]  # fmt: skip
    return x, a, u, scale


class Tokens:
    """A tokenizer that nothing is asked of but its marks, of which there are none."""

    bos_token_id = eos_token_id = 1


def fitted(model, rule, **options):
    lm = load_language_model(model, tokenizer=Tokens())
    return rule.fit(lm, TEXTS, context_length=32, batch_size=4, **options)


@pytest.mark.parametrize("weigh", ["", "up", "up_rms", "down", "up*down"])
@pytest.mark.parametrize("compensate", [False, True])
def test_threshold_at_the_gate_is_its_definition(weigh, compensate):
    model = make("Llama").double()
    batches = token_ids_of(load_language_model(model, tokenizer=Tokens()), TEXTS, None, 32, 4)
    with torch.no_grad():
        x, a, u, scale = reference(model, batches, weigh)
    rule = fitted(model, se.lm.Threshold(0.7, weigh=weigh, compensate=compensate), at="gate")
    learned = rule.layers["model.layers.1.mlp"]
    if weigh:
        torch.testing.assert_close(learned.scale.double(), scale, rtol=1e-5, atol=0)
    score = a.abs() * scale
    assert float(learned.threshold) == pytest.approx(float(score.flatten().quantile(0.7)), rel=0.01)
    kept = score > learned.threshold
    assert learned.density == pytest.approx(0.3, abs=0.01)
    assert learned.density == pytest.approx(float(kept.double().mean()), abs=1e-3)
    mean = torch.where(kept, 0.0, a * u).sum(0) / (~kept).sum(0).clamp(min=1)
    h = torch.where(kept, a * u, mean if compensate else 0.0)
    mlp = model.model.layers[1].mlp
    expected = (h @ mlp.down_proj.weight.T)[:40]
    clear = ((score - learned.threshold).abs() > 1e-5 * score).all(1)[:40]  # of rounding on either side
    assert clear.sum() > 30
    se.lm.sparsify(model, rule)
    with torch.no_grad():
        at_once = mlp(x[:40])
        by_five = torch.cat([mlp(rows) for rows in x[:40].split(5)])
    torch.testing.assert_close(at_once[clear], expected[clear], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(by_five[clear], expected[clear], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compensate", [False, True])
def test_threshold_of_hidden_and_inputs_is_its_definition(compensate):
    for at, name in (("hidden", "transformer.h.1.mlp.c_proj"), ("inputs", "transformer.h.1.attn.c_attn")):
        model = make("GPT2").double()
        rule = fitted(model, se.lm.Threshold(0.6, weigh="down", compensate=compensate), at=at)
        assert len(rule.layers) == {"hidden": 2, "inputs": 8}[at]
        learned, linear = rule.layers[name], model.get_submodule(name)
        x = torch.randn(6, linear.weight.shape[0], dtype=torch.float64)
        kept = x.abs() * linear.weight.norm(dim=1) > learned.threshold
        mean = learned.mean.double() if compensate else torch.zeros((), dtype=torch.float64)
        expected = torch.where(kept, x, mean) @ linear.weight + linear.bias
        se.lm.sparsify(model, rule)
        with torch.no_grad():
            torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(linear(x.repeat(2, 1))[:6], expected, rtol=1e-5, atol=1e-7)


def test_quantile_of_counts():
    scores = torch.randn(50_000).abs()
    counts = torch.bincount(scores.view(torch.int32) >> 15, minlength=1 << 16)
    for share in (0.0, 0.3, 0.9, 0.999):
        threshold = quantile(counts, share)
        assert float((scores <= threshold).double().mean()) == pytest.approx(share, abs=0.003)
    assert quantile(torch.bincount(torch.zeros(9, dtype=torch.int64), minlength=1 << 16), 0.5) == 0


def test_held_out_density_and_the_report(lm):
    learning, held_out = evaluation_text()[::2], evaluation_text()[1::2]
    rule = se.lm.Threshold(0.7, weigh="down", compensate=True).fit(lm, learning, at="hidden", tokens=4096)
    found, _ = find(lm.model, "hidden", None)
    batches = token_ids_of(lm, held_out, 2048, None, 8)
    for _, density in dropped(rule, lm, found, batches, rule.layers).values():  # of the plain model, as it was fitted
        assert density == pytest.approx(0.3, abs=0.01)
    plain = se.lm.Threshold(0.7, weigh="down")
    plain.layers = {name: replace(one, mean=None) for name, one in rule.layers.items()}
    reports = []
    for one in (rule, plain):
        reports.append(se.lm.report(se.lm.sparsify(lm, one), held_out, tokens=1024, context_length=128))
        se.restore(lm)
    for layer in reports[0].layers:
        assert 0.2 < layer.density < layer.union < 1 and layer.bytes_read == layer.density
    assert 0 < reports[0].rise < reports[1].rise < 0.2  # the means of what is dropped are worth much
    assert reports[0].tokens == 1024 and "| transformer.h.3.mlp.c_proj |" in str(reports[0])
    assert reports[0].perplexity_before == reports[1].perplexity_before


def test_one_cett_for_all_layers(lm):
    texts = evaluation_text()[:2]
    found = se.lm.ppl_sparsity(lm, texts, rise=0.02, tokens=256, context_length=64, steps=3)
    assert found["perplexity_whole"] < found["perplexity"] <= 1.02 * found["perplexity_whole"]
    assert 0 < found["cett"] < 1 and 0.1 < found["density"] < 0.9
    again = se.lm.report(se.lm.sparsify(lm, found["rule"]), texts, tokens=256, context_length=64)
    assert again.perplexity_after == pytest.approx(found["perplexity"])


# --- other rules -----------------------------------------------------------------------------------------------------


def test_nan_is_kept_and_nothing_may_be():
    p = torch.tensor([[0.5, torch.nan, -3.0, 0.0]])
    learned = se.lm.rules.Learned(threshold=torch.tensor(1.0))
    kept, mask = se.lm.Threshold(0.5).select(p, learned)
    assert mask.tolist() == [[False, True, True, False]] and kept[0, 2] == -3 and kept[0, 1].isnan()
    model = make("Llama")
    rule = se.lm.Threshold(0.5)
    rule.layers = {f"model.layers.{n}.mlp": se.lm.rules.Learned(threshold=torch.tensor(torch.inf)) for n in (0, 1)}
    rule.at = "gate"
    se.lm.sparsify(model, rule)
    with torch.no_grad():
        for rows in (2, 20):
            assert torch.equal(model.model.layers[0].mlp(torch.randn(rows, 32)), torch.zeros(rows, 32))


@pytest.mark.parametrize("rule", [se.TopK(12), se.AbsTopK(12), se.StatisticalTopK(12.0), se.ReLU()], ids=repr)
def test_activations_of_the_library_are_rules(rule):
    model = make("GPT2")
    linear = model.transformer.h[0].mlp.c_proj
    x = torch.randn(3, 128)
    expected = rule(x) @ linear.weight + linear.bias
    se.lm.sparsify(model, rule, at="hidden")
    with torch.no_grad():
        torch.testing.assert_close(linear(x), expected)
        torch.testing.assert_close(linear(x.repeat(4, 1))[:3], expected)


@pytest.mark.parametrize("rule", [se.lm.TopShare(0.75), se.lm.TopShare(0.75, straight_through=True), se.TopK(24)],
                         ids=["kept", "straight through", "lazy neurons"])  # fmt: skip
def test_gradients_of_training_are_those_of_a_mask(rule):
    model, plain = make("Llama").double(), make("Llama").double()
    se.lm.sparsify(model, rule, at="gate", training=True)
    ours, mlp = model.model.layers[0].mlp, plain.model.layers[0].mlp
    assert ours.down_proj.weight.stride() == mlp.down_proj.weight.stride()
    x = torch.randn(5, 32, dtype=torch.float64)
    results = []
    for module in (ours, mlp):
        seen = x.clone().requires_grad_()
        if module is ours:
            out = module(seen)
        else:
            a = mlp.act_fn(mlp.gate_proj(seen))
            by = a.detach() if isinstance(rule, se.TopK) else a.detach().abs()
            mask = torch.zeros_like(a).scatter_(1, by.topk(24).indices, 1.0)
            kept = a * mask * (a > 0) if isinstance(rule, se.TopK) else a * mask
            if getattr(rule, "straight_through", False):
                kept = a + (kept - a).detach()
            out = mlp.down_proj(kept * mlp.up_proj(seen))
        (out.square()).sum().backward()
        results.append([out, seen.grad, *(p.grad for p in module.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_rule_comes_back_from_its_files(tmp_path):
    model = make("Llama")
    rule = fitted(model, se.lm.Threshold(0.6, weigh="up", compensate=True), at="gate")
    rule.save(tmp_path)
    again = se.lm.load(tmp_path)
    assert again == rule and again.at == "gate" and again.model == rule.model
    for name, learned in rule.layers.items():
        assert again.layers[name].density == learned.density
        for kind, tensor in learned.tensors().items():
            assert torch.equal(again.layers[name].tensors()[kind], tensor)
    se.lm.sparsify(model.to(torch.bfloat16), again)  # another dtype of the same weights


@pytest.mark.parametrize("damage", ["no file", "no tensors", "later", "lacks", "more", "json"])
def test_damaged_files_are_refused(damage, tmp_path):
    rule = fitted(make("Llama"), se.lm.Threshold(0.6), at="gate")
    rule.save(tmp_path)
    config, tensors = tmp_path / "activation_sparsity.json", tmp_path / "activation_sparsity.safetensors"
    content = json.loads(config.read_text())
    name = next(iter(content["layers"]))
    if damage == "no file":
        config.unlink()
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "json":
        config.write_text("{")
    else:
        if damage == "later":
            content["format"] = 9
        elif damage == "lacks":
            content["layers"]["model.layers.7.mlp"] = content["layers"][name]
        else:
            del content["layers"][name]
        config.write_text(json.dumps(content))
    kind = FileNotFoundError if damage in ("no file", "no tensors") else ValueError
    with pytest.raises(kind, match="activation_sparsity"):
        se.lm.load(tmp_path)


# --- refusals --------------------------------------------------------------------------------------------------------


class OtherLinear(nn.Linear):
    """As quantised layers and adapters are: a subclass."""


def _other_linear(model):
    inner = model.model.layers[1].mlp
    other = OtherLinear(96, 32, bias=False)
    other.load_state_dict(inner.down_proj.state_dict())
    inner.down_proj = other


@pytest.mark.parametrize(("change", "why"), [
    (_other_linear, r"layers.1.mlp.down_proj \(OtherLinear\) is not exactly nn.Linear"),
    (lambda m: m.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None), "hooks on Linear"),
    (lambda m: setattr(m.model.layers[1].mlp, "forward", m.model.layers[1].mlp.forward), "forward has been replaced"),
    (lambda m: m.model.layers[1].mlp.to("meta"), "meta device"),
    (lambda m: se.lm.sparsify(m, se.lm.TopShare(0.5)), "skips weights already"),
], ids=["a subclass", "hooks", "forward", "meta", "twice"])  # fmt: skip
def test_what_cannot_be_taken_is_refused_and_nothing_is_changed(change, why):
    model = make("Llama", relu=True)
    change(model)
    before = {name: type(m) for name, m in model.named_modules()}
    for layers_asked in (None, [1]):
        with pytest.raises(se.CannotAccelerate, match=why):
            se.lm.sparsify(model, se.lm.TopShare(0.5), at="gate", layers=layers_asked)
        assert {name: type(m) for name, m in model.named_modules()} == before


def test_a_model_without_zeros_is_not_accelerated():
    with pytest.raises(se.CannotAccelerate, match="sets none of its activations to zero: at most"):
        se.accelerate(make("Llama"))
    with pytest.raises(ValueError, match="exact=True"):
        se.accelerate(make("OPT", relu=True), exact=True)


def test_arguments_are_checked(tmp_path):
    model = make("Llama")
    for bad in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
            se.lm.Threshold(bad)
    with pytest.raises(TypeError, match="sparsity must be a number"):
        se.lm.TopShare("half")
    with pytest.raises(ValueError, match="weigh must be one of"):
        se.lm.Threshold(0.5, weigh="left")
    with pytest.raises(ValueError, match="has not been fitted"):
        se.lm.sparsify(model, se.lm.Threshold(0.5))
    with pytest.raises(RuntimeError, match="nothing to save"):
        se.lm.Threshold(0.5).save(tmp_path)
    with pytest.raises(ValueError, match="at must be one of"):
        se.lm.sparsify(model, se.lm.TopShare(0.5), at="left")
    with pytest.raises(ValueError, match=r"layers must lie in 0\.\.1, got 2"):
        se.lm.sparsify(model, se.lm.TopShare(0.5), layers=[2])
    with pytest.raises(TypeError, match="rule must be one of"):
        se.lm.sparsify(model, 0.5)
    with pytest.raises(TypeError, match="each token by itself"):
        se.lm.sparsify(model, se.BatchTopK(4))
    with pytest.raises(se.CannotAccelerate, match="no gated MLP"):
        se.lm.sparsify(make("GPT2"), se.lm.TopShare(0.5), at="gate")
    with pytest.raises(ValueError, match="weighs by W_up x"):
        fitted(model, se.lm.Threshold(0.5, weigh="up"), at="hidden")
    with pytest.raises(RuntimeError, match="hold no token"):
        se.lm.Threshold(0.5).fit(load_language_model(model, tokenizer=Tokens()), [])
    with pytest.raises(ValueError, match="skips no weights"):
        se.lm.report(load_language_model(model, tokenizer=Tokens()), TEXTS)


def test_another_models_fit_and_lost_strides_are_refused():
    model, rule = make("Llama"), fitted(make("Llama"), se.lm.Threshold(0.6), at="gate")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"another model: the weights of model\.layers\.1\.mlp"):
        se.lm.sparsify(model, rule)
    assert not layers.skipping(model)
    with pytest.raises(ValueError, match="at must be 'gate', where the rule was fitted"):
        se.lm.sparsify(make("Llama"), rule, at="hidden")
    model = se.lm.sparsify(make("Llama"), se.lm.TopShare(0.75))
    model.load_state_dict({n: t.contiguous() for n, t in model.state_dict().items()}, assign=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no longer laid out"):
        model(input_ids=token_ids(1, 4))
    with pytest.raises(se.CannotAccelerate, match="fit on the plain model"):
        fitted(model, se.lm.Threshold(0.6), at="gate")


def test_experts_stay_dense():
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    ))  # fmt: skip
    with pytest.raises(se.CannotAccelerate, match=r"experts stay dense: model\.layers\.0"):
        se.lm.sparsify(model, se.lm.TopShare(0.5))


def test_a_block_that_is_asked_for_and_has_no_mlp_is_refused():
    model = make("Llama")
    model.model.layers[0].mlp = nn.Identity()
    with pytest.raises(se.CannotAccelerate, match="layers: block 0 has nothing that can skip weights"):
        se.lm.sparsify(model, se.lm.TopShare(0.5), at="gate", layers=[0, 1])
    assert list(layers.skipping(se.lm.sparsify(model, se.lm.TopShare(0.5)))) == ["model.layers.1.mlp"]


# --- the command line ------------------------------------------------------------------------------------------------


def test_commands(tmp_path, capsys):
    common = ["--tokens", "512", "--context-length", "64", "--device", "cpu"]
    folder, out = tmp_path / "rule", tmp_path / "report.json"
    assert main(["lm", "fit", str(folder), "--sparsity", "0.5", "--at", "hidden", "--compensate", *common]) == 0
    assert "4 modules of embedded" in capsys.readouterr().out
    assert main(["lm", "report", str(folder), "--out", str(out), *common]) == 0
    assert "| transformer.h.0.mlp.c_proj | 5" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["layers"]) == 4
    assert main(["lm", "report", "exact", *common]) == 1
    assert "sets none of its activations to zero" in capsys.readouterr().err
    assert main(["lm", "fit", str(folder), "--sparsity", "2", *common]) == 1
    assert "sparsity must lie in [0, 1)" in capsys.readouterr().err
