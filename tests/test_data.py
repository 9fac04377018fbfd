"""Activations of language models: what the hooks read, how text is packed, which texts there are."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import DOCUMENTS, MODELS, tiny_gpt2
from torch import nn

from sae_engine.data import (
    HELD_OUT_MODULES,
    evaluation_text,
    iter_text_files,
    read_activations,
    run_with_replacement,
    stdlib_texts,
    stream_activations,
)
from sae_engine.data.contexts import context_batches

RESIDUAL_SITES = ("resid_pre", "mlp_out", "resid_post")
FINAL_NORM = {
    "gpt2": "transformer.ln_f",
    "llama": "model.norm",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
}


@pytest.fixture
def lm():
    return tiny_gpt2()


@pytest.fixture(params=MODELS)
def family(request):
    return request.param, MODELS[request.param]().double().eval()


def ids(shape=(2, 9)):
    return torch.randint(300, shape)


# ------------------------------------------------------------------------------------------------- hooks


def test_residual_sites_are_the_hidden_states(family):
    name, model = family
    tokens = ids()
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
        assert len(states) == 4
        for layer in range(3):
            assert torch.equal(read_activations(model, tokens, layer=layer, site="resid_pre"), states[layer])
            after = read_activations(model, tokens, layer=layer, site="resid_post")
            # transformers reports the last state behind the final norm; the site lies before it.
            seen = after if layer < 2 else model.get_submodule(FINAL_NORM[name])(after)
            assert torch.equal(seen, states[layer + 1])


def test_mlp_out_is_what_the_mlp_computes(family):
    name, model = family
    tokens = ids()
    pre, out, post = (read_activations(model, tokens, layer=1, site=site) for site in RESIDUAL_SITES)
    middle = post - out  # the stream between attention and MLP
    with torch.no_grad():
        if name == "gpt2":
            block = model.transformer.h[1]
            expected = block.mlp(block.ln_2(middle))
        elif name == "llama":
            block = model.model.layers[1]
            expected = block.mlp(block.post_attention_layernorm(middle))
        elif name == "gpt_neox":  # MLP beside attention
            block = model.gpt_neox.layers[1]
            expected = block.mlp(block.post_attention_layernorm(pre))
        else:
            block = model.model.decoder.layers[1]
            expected = block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(middle))))
    # `middle` is rounded once more than in the model, and everything is fp64.
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("site", RESIDUAL_SITES)
def test_later_layers_are_not_computed(site):
    class Forbidden(nn.Module):
        def forward(self, *args, **kwargs):
            raise AssertionError("computed")

    model = MODELS["gpt2"]()
    expected = read_activations(model, tokens := ids(), layer=1, site=site)
    model.transformer.h[2] = Forbidden()
    model.lm_head = Forbidden()
    if site == "resid_pre":
        model.transformer.h[1].attn = Forbidden()
    assert torch.equal(read_activations(model, tokens, layer=1, site=site), expected)


def test_hooks_and_mode_are_restored_even_after_an_error():
    model = MODELS["gpt2"]().train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    for tokens, error in [(ids(), None), (ids((1, 99)), Exception)]:  # 99 positions do not fit this model
        if error is None:
            read_activations(model, tokens, layer=2, site="mlp_out")
        else:
            with pytest.raises(error):
                read_activations(model, tokens, layer=2, site="mlp_out")
        assert [module.training for module in model.modules()] == modes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Block(nn.Module):
    """A block whose output takes one of the forms that libraries have given it."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(x + 1)


class Blocks(nn.Module):
    """Two blocks over (batch, tokens, 4), in the order of dimensions that ``lead`` makes."""

    def __init__(self, form, lead=lambda x: x):
        super().__init__()
        self.layers, self.lead = nn.ModuleList([Block(form), Block(form)]), lead
        self.model = nn.Module()
        self.model.layers = self.layers

    def forward(self, input_ids, attention_mask, use_cache):
        x = self.lead(input_ids[..., None].float().expand(*input_ids.shape, 4))
        for block in self.layers:
            x = block(x)
            x = x[0] if isinstance(x, (tuple, list)) else x
        return SimpleNamespace(logits=x)


FORMS = {"tensor": lambda x: x, "tuple": lambda x: (x, None), "list": lambda x: [x, None]}
ORDERS = {"time first": lambda x: x.transpose(0, 1), "streams": lambda x: x.expand(4, *x.shape)}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("shape", [(2, 9), (3, 3), (1, 1)])
def test_blocks_may_return_tensors_tuples_and_lists(form, shape):
    model, input_ids = Blocks(form), ids(shape)
    expected = input_ids[..., None].float().expand(*shape, 4) + 2
    assert torch.equal(read_activations(model, input_ids, layer=1, site="resid_post"), expected)
    replaced = run_with_replacement(model, input_ids, lambda x: 2 * x, layer=0, site="resid_post")
    assert torch.equal(replaced, 2 * (expected - 1) + 1)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("lead", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("shape", [(2, 9), (3, 3)])
def test_hidden_states_in_another_order_are_refused(site, lead, shape):
    model = Blocks(lambda x: x, lead)
    said = r"Block has hidden states of shape .*only \(batch, tokens, d_model\)"
    with pytest.raises(ValueError, match=said):
        read_activations(model, ids(shape), layer=1, site=site)
    with pytest.raises(ValueError, match=said):
        run_with_replacement(model, ids(shape), torch.zeros_like, layer=1, site=site)


def test_an_output_that_says_not_what_it_holds_is_refused():
    model = Blocks(lambda x: SimpleNamespace(hidden=x))
    with pytest.raises(TypeError, match="a Block returns a SimpleNamespace at site 'resid_post'"):
        read_activations(model, ids(), layer=0, site="resid_post")


def test_text_that_is_no_text_is_named(lm):
    texts = ["good text "] * 3 + ["bad \ud83d text"]
    with pytest.raises(ValueError, match=r"texts: document 3 holds '\\ud83d' at position 4"):
        list(stream_activations(lm, texts, layer=1))


def test_activations_can_be_trained_on(lm):
    rows = next(stream_activations(lm, DOCUMENTS, layer=1))
    weight = torch.randn(32, 4, requires_grad=True)
    (rows @ weight).square().sum().backward()  # saves `rows`: not possible for a tensor of inference mode
    assert weight.grad.isfinite().all()
    assert not rows.requires_grad


def test_token_ids_are_checked():
    model = MODELS["gpt2"]()
    with pytest.raises(ValueError, match=r"input_ids.*\(9,\)"):
        read_activations(model, ids((9,)), layer=1)
    with pytest.raises(ValueError, match=r"input_ids.*at least one token.*\(2, 0\)"):
        read_activations(model, ids((2, 0)), layer=1)
    with pytest.raises(ValueError, match="input_ids: rows of 33 tokens, and GPT2LMHeadModel has 32 positions"):
        read_activations(model, ids((1, 33)), layer=1)
    for wrong in (None, tiny_gpt2()):
        with pytest.raises(TypeError, match="model must be a causal language model"):
            read_activations(wrong, ids(), layer=1)
    for number in (300, -1):
        with pytest.raises(ValueError, match=rf"input_ids: {number} is no token of GPT2LMHeadModel.* 0\.\.299"):
            read_activations(model, torch.full((1, 2), number), layer=1)
    for wrong in (torch.zeros(2, 3), [[1, 2]], torch.ones(2, 3, dtype=torch.bool)):
        with pytest.raises(TypeError, match="input_ids"):
            read_activations(model, wrong, layer=1)


class Homemade(nn.Module):
    def __init__(self, lists):
        super().__init__()
        self.stacks = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(5)) for _ in range(lists))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=5))

    def forward(self, input_ids, attention_mask, use_cache):
        x = torch.zeros(*input_ids.shape, 4)
        for block in self.stacks[0]:
            x = block(x)
        return x


def test_blocks_of_an_unknown_model_are_the_list_of_that_length():
    model = Homemade(1)
    expected = model.stacks[0][1](model.stacks[0][0](torch.zeros(2, 3, 4))).detach()
    assert torch.equal(read_activations(model, ids((2, 3)), layer=1, site="resid_post"), expected)
    with pytest.raises(ValueError, match=r"mlp_out.*Linear: there is no MLP among.*feed_forward"):
        read_activations(model, ids(), layer=1, site="mlp_out")
    with pytest.raises(ValueError, match=r"blocks of Homemade were not found.*transformer\.h.*stacks\.0.*stacks\.1"):
        read_activations(Homemade(2), ids(), layer=1)


# ----------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize(("context_length", "batch_size"), [(2, 1), (7, 3), (32, 8), (32, 1000)])
def test_every_token_is_in_exactly_one_context(lm, context_length, batch_size):
    tokenizer = lm.tokenizer
    eos = tokenizer.eos_token_id
    documents = ["", *DOCUMENTS, "", "x"]
    stream = [t for text in documents if text for t in [*tokenizer(text, verbose=False)["input_ids"], eos]]
    batches = list(context_batches(lm, iter(documents), context_length, batch_size))
    assert torch.cat([batch[:, 1:].flatten() for batch in batches]).tolist() == stream
    assert all((batch[:, 0] == eos).all() for batch in batches)
    contexts = -(-len(stream) // (context_length - 1))
    assert sum(len(batch) for batch in batches) == contexts
    ragged = len(stream) % (context_length - 1)
    full = batches[:-1] if ragged else batches
    assert all(batch.shape[1] == context_length and len(batch) <= batch_size for batch in full)
    assert all(len(batch) == batch_size for batch in full[:-1])
    assert not ragged or batches[-1].shape == (1, ragged + 1)


def test_rows_are_those_of_each_context_alone(lm):
    whole = torch.cat(list(stream_activations(lm, DOCUMENTS, layer=2, drop_first=False)))
    inner = torch.cat(list(stream_activations(lm, DOCUMENTS, layer=2, context_length=32, batch_size=8)))
    batches = list(context_batches(lm, DOCUMENTS, 32, 8))
    expected = [read_activations(lm.model, batch, layer=2) for batch in batches]
    assert torch.equal(whole, torch.cat([rows.flatten(0, 1) for rows in expected]))
    assert torch.equal(inner, torch.cat([rows[:, 1:].flatten(0, 1) for rows in expected]))


def test_stream_options(lm):
    every = torch.cat(list(stream_activations(lm, DOCUMENTS, layer=1)))
    for count in (1, 100, 8 * 31, len(every) - 1):
        some = list(stream_activations(lm, DOCUMENTS, layer=1, max_tokens=count, dtype=torch.bfloat16))
        assert torch.equal(torch.cat(some), every[:count].bfloat16())
    assert len(torch.cat(list(stream_activations(lm, DOCUMENTS, layer=1, max_tokens=10**9)))) == len(every)
    assert list(stream_activations(lm, [""], layer=1)) == []


def test_progress_goes_to_standard_error(lm, capfd):
    next(stream_activations(lm, DOCUMENTS, layer=1, progress=True))
    out, err = capfd.readouterr()
    assert out == ""
    assert "tok" in err


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"lm": None}, TypeError, "lm"),
        ({"texts": "a string"}, TypeError, "texts"),
        ({"texts": [b"bytes"]}, TypeError, "texts"),
        ({"layer": 3}, ValueError, r"layer.*0\.\.2.*3"),
        ({"layer": -1}, ValueError, "layer"),
        ({"layer": 1.0}, TypeError, "layer"),
        ({"site": "resid_middle"}, ValueError, "has no module .resid_middle.*one of resid_pre"),
        ({"context_length": 33}, ValueError, "context_length.*33"),
        ({"context_length": 1}, ValueError, "context_length"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"drop_first": 1}, TypeError, "drop_first"),
        ({"max_tokens": 0}, ValueError, "max_tokens"),
        ({"dtype": torch.int64}, TypeError, "dtype"),
    ],
)
def test_stream_errors(lm, changed, error, match):
    arguments = {"lm": lm, "texts": DOCUMENTS, "layer": 1, **changed}
    with pytest.raises(error, match=match):
        list(stream_activations(arguments.pop("lm"), arguments.pop("texts"), **arguments))


# ------------------------------------------------------------------------------------------------- texts


def test_text_files_in_sorted_order(tmp_path):
    for name, text in {"b.md": "b", "a.txt": "a", "sub/c.py": "c", "d.bin": "d", "e.txt": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(iter_text_files(tmp_path)) == ["a", "b", "c"]
    assert list(iter_text_files(tmp_path, [".md"])) == ["b"]
    assert list(iter_text_files([tmp_path / "sub", tmp_path / "d.bin"])) == ["c", "d"]
    assert list(iter_text_files("/dev/null")) == []  # neither file nor folder, as what a shell's <(command) gives
    with pytest.raises(FileNotFoundError, match=r"paths.*nowhere"):
        iter_text_files([tmp_path, tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"paths.*\.rst"):
        iter_text_files(tmp_path, (".rst",))
    with pytest.raises(ValueError, match="suffixes"):
        iter_text_files(tmp_path, ".txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt.*UTF-8 text: byte 3 is 0xe9"):
        list(iter_text_files(tmp_path))
    for wrong, error in ((3, TypeError), ([3], TypeError), (None, TypeError), ([], ValueError), ("", ValueError)):
        with pytest.raises(error, match="paths"):
            iter_text_files(wrong)
    for wrong, error in (((), ValueError), ([3], ValueError), (None, TypeError)):
        with pytest.raises(error, match="suffixes"):
            iter_text_files(tmp_path, wrong)


def test_standard_library_without_the_held_out_modules():
    import heapq
    import json.encoder
    from pathlib import Path

    texts = list(stdlib_texts())
    assert len(texts) == len(set(texts))
    assert sum(map(len, texts)) > 5_000_000
    assert Path(json.encoder.__file__).read_text() in texts
    assert Path(heapq.__file__).read_text() not in texts
    assert Path(heapq.__file__).read_text() in list(stdlib_texts(exclude=()))
    assert not set(texts) & set(evaluation_text())
    with pytest.raises(TypeError, match="exclude"):
        stdlib_texts("heapq.py")
    with pytest.raises(ValueError, match=r"exclude.*has no 'json/decodr\.py'"):
        stdlib_texts(["heapq.py", "json/decodr.py"])


def test_evaluation_text_is_whole_modules():
    texts = evaluation_text()
    assert len(texts) == len(HELD_OUT_MODULES)
    assert 150_000 < sum(len(text.encode()) for text in texts) < 250_000
    for text in texts:
        compile(text, "evaluation", "exec", dont_inherit=True)
