"""Language models that skip weights: the same numbers, and nothing of the model is lost on the way there and back."""
import copy
import io

import pytest
import torch
from lm_models import GATED, MODELS, NOT_GATED, make, stepwise, token_ids

import sae_engine as se
from sae_engine import functional
from sae_engine.lm import layers


@pytest.fixture
def calls(monkeypatch):
    """Shapes of what has run sparse; everything may, however much is kept."""
    seen = []
    own = functional.sparse_mlp

    def counted(x, kept, *args, **options):
        seen.append(tuple(kept.shape))
        return own(x, kept, *args, **options)

    monkeypatch.setattr(functional, "sparse_mlp", counted)
    monkeypatch.setattr(layers, "densest", lambda numbers: 1.0)
    return seen


def layout(model):
    return {name: (t.clone(), t.stride(), t.data_ptr()) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_zeros_of_the_model_are_skipped_and_nothing_changes(kind, dtype, calls):
    model, ids = make(kind, relu=True), token_ids()
    truth = stepwise(copy.deepcopy(model).double(), ids)
    model.to(dtype)
    before = layout(model)
    dense = stepwise(model, ids)
    assert se.accelerate(model) is model
    ours = stepwise(model, ids)
    modules = layers.skipping(model)
    assert len(modules) == (3 if kind == "Gemma3n" else 2)  # three of its six layers have a top-k
    assert len(calls) == len(modules) * (ids.shape[1] - 12)  # each token behind the prompt, both contexts at once
    off, dense_off = (float((logits - truth).abs().max()) for logits in (ours, dense))
    assert off <= 2 * dense_off
    assert all(torch.equal(t, before[name][0]) for name, t in model.state_dict().items())
    se.restore(model)
    assert not layers.skipping(model)
    after = layout(model)
    assert all(torch.equal(after[name][0], t) and after[name][1] == stride for name, (t, stride, _) in before.items())
    assert torch.equal(stepwise(model, ids), dense)


@pytest.mark.parametrize("kind", ["Llama", "OPT", "Gemma3n"])
def test_generates_the_same_tokens(kind, calls):
    model, ids = make(kind, relu=True), token_ids()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    assert torch.equal(se.accelerate(model).generate(ids, **options), plain) and calls


@pytest.mark.parametrize("kind", MODELS)
def test_a_rule_gives_the_same_token_by_token_and_at_once(kind, calls):
    """Sparse code of up to 8 tokens against dense code of a prompt with the rule as a mask."""
    model, ids = make(kind), token_ids()
    for at in ("gate", "hidden", "inputs") if kind not in NOT_GATED else ("hidden", "inputs"):
        calls.clear()
        plain = stepwise(model, ids)
        se.lm.sparsify(model, se.lm.TopShare(0.5), at=at)
        steps = stepwise(model, ids)
        with torch.no_grad():
            at_once = model(input_ids=ids).logits[:, 11:].transpose(0, 1).double()
        assert calls and all(shape[0] == 2 for shape in calls)
        assert (steps - plain).abs().max() > 1e-3
        torch.testing.assert_close(steps, at_once, atol=1e-5, rtol=1e-5)
        se.restore(model)
        assert torch.equal(stepwise(model, ids), plain)


@pytest.mark.parametrize("kind", ["Llama", "Phi3", "GPT2"])
def test_a_model_that_skips_is_copied_pickled_saved_and_cast(kind, calls, tmp_path):
    model, ids = make(kind), token_ids()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    se.lm.sparsify(model, se.lm.TopShare(0.5))
    names, steps = set(model.state_dict()), stepwise(model, ids)
    assert names == set(before)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(stepwise(other, ids), steps) and len(layers.skipping(other)) == 2
        se.restore(other)
        assert len(layers.skipping(model)) == 2
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], t) for name, t in before.items())
    model.load_state_dict(before)
    assert torch.equal(stepwise(model, ids), steps)
    calls.clear()
    assert stepwise(model.to(torch.bfloat16), ids).isfinite().all() and calls
    assert "skips by TopShare" in repr(model) or kind == "GPT2"  # its Conv1D has a repr of its own


@pytest.mark.parametrize("rows", [0, 1, 8, 9])
def test_up_to_eight_tokens_run_sparse(rows, calls):
    mlp = make("Llama").model.layers[0].mlp
    model = se.lm.sparsify(make("Llama"), se.lm.TopShare(0.75))
    x = torch.randn(rows, 32)
    with torch.no_grad():
        ours = model.model.layers[0].mlp(x)
        a = mlp.act_fn(mlp.gate_proj(x))
        kept = se.functional.topk(a, 24, magnitude=True).to_dense()
        expected = mlp.down_proj(kept * mlp.up_proj(x))
    assert bool(calls) == (rows in (1, 8)) and ours.shape == (rows, 32)
    torch.testing.assert_close(ours, expected)


def test_what_keeps_much_runs_dense(monkeypatch):
    """Where half is kept, and where a matrix is small."""
    assert (layers.densest(4096 * 1024), layers.densest(2048 * 512), layers.densest(64)) == (0.45, 0.2, 0.0)
    monkeypatch.setattr(functional, "sparse_mlp", None)  # calling it would raise
    small = se.lm.sparsify(make("Llama"), se.lm.TopShare(0.99))
    assert stepwise(small, token_ids()).isfinite().all()
    monkeypatch.setattr(layers, "densest", lambda numbers: 0.2)
    model = se.lm.sparsify(make("Llama"), se.lm.TopShare(0.5))
    assert stepwise(model, token_ids()).isfinite().all()
    accelerated = se.accelerate(make("OPT", relu=True))  # half of its activations are zero
    assert stepwise(accelerated, token_ids()).isfinite().all()


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_autocast_and_gradients_of_biases(kind, calls):
    """Under autocast the dtypes are those of the plain model; where a bias alone learns, the dense code runs."""
    plain, model, ids = make(kind), se.lm.sparsify(make(kind), se.lm.TopShare(0.01)), token_ids(1, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, ours = (one(input_ids=ids).logits for one in (plain, model))
    assert calls and ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, atol=0.1, rtol=0.1)  # bfloat16 through two blocks
    calls.clear()
    model.requires_grad_(False)
    module = layers.skipping(model).popitem()[1]
    bias = torch.nn.Parameter(torch.zeros(32))
    (module if kind == "GPT2" else module.down_proj).bias = bias
    module(torch.randn(2, 128 if kind == "GPT2" else 32)).sum().backward()
    assert not calls and torch.equal(bias.grad, torch.full((32,), 2.0))


@pytest.mark.parametrize("kind", GATED)
def test_what_is_not_kept_is_not_read(kind, calls):
    """NaN in the rows of W_up and the columns of W_down that no token keeps leaves no trace."""
    model = make(kind)
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 32)
    se.lm.sparsify(model, se.lm.TopShare(0.75), at="gate")
    state = mlp._selection
    with torch.no_grad():
        expected = mlp(x)
        (gate, _), (up, _) = state.halves.matrices(mlp)
        a = state.halves.activated(mlp, x @ gate.T)
        unread = (state.rule.select(a, state.learned)[0] == 0).all(0)
        assert unread.any()
        up[unread] = torch.nan
        mlp.down_proj.weight[:, unread] = torch.nan
        assert torch.equal(mlp(x), expected)
