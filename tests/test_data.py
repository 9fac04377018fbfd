"""Activations of language models: what the hooks read, how text is packed, what the shards hold."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from sae_engine.data import (
    HELD_OUT_MODULES,
    SITES,
    ActivationStore,
    LanguageModel,
    collect_activations,
    evaluation_text,
    iter_text_files,
    load_language_model,
    read_activations,
    stdlib_texts,
    stream_activations,
)
from sae_engine.data._require import require
from sae_engine.data.activations import context_batches

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 300}
WIDE = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 32}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=300, n_positions=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=32)),
}
FINAL_NORM = {
    "gpt2": "transformer.ln_f",
    "llama": "model.norm",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
}
DOCUMENTS = [f"def f_{i}(x):\n    return x ** {i}  # the power {i}\n" * (1 + i % 4) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE of 300 tokens, in the files of GPT-2's tokenizer."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(DOCUMENTS, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    return GPT2TokenizerFast.from_pretrained(folder)


@pytest.fixture(params=MODELS)
def family(request):
    return request.param, MODELS[request.param]().double().eval()


@pytest.fixture
def lm(tokenizer):
    return LanguageModel(
        model=MODELS["gpt2"]().eval(), tokenizer=tokenizer, name="tiny", revision=None, sha256="0" * 64,
        d_model=32, num_layers=3, max_length=32, is_embedded=False,
    )  # fmt: skip


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
    pre, out, post = (read_activations(model, tokens, layer=1, site=site) for site in SITES)
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


@pytest.mark.parametrize("site", SITES)
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
    for wrong in (torch.zeros(2, 3), [[1, 2]]):
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
    with pytest.raises(ValueError, match=r"mlp_out.*Linear has no MLP among.*feed_forward"):
        read_activations(model, ids(), layer=1, site="mlp_out")
    with pytest.raises(ValueError, match=r"blocks of Homemade were not found.*transformer\.h.*stacks\.0.*stacks\.1"):
        read_activations(Homemade(2), ids(), layer=1)


# ----------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize(("context_length", "batch_size"), [(2, 1), (7, 3), (32, 8), (32, 1000)])
def test_every_token_is_in_exactly_one_context(lm, tokenizer, context_length, batch_size):
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
        ({"site": "resid_mid"}, ValueError, "site.*resid_mid"),
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
    with pytest.raises(FileNotFoundError, match=r"paths.*nowhere"):
        iter_text_files([tmp_path, tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"paths.*\.rst"):
        iter_text_files(tmp_path, (".rst",))
    with pytest.raises(ValueError, match="suffixes"):
        iter_text_files(tmp_path, ".txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt.*UTF-8"):
        list(iter_text_files(tmp_path))


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


def test_evaluation_text_is_whole_modules():
    texts = evaluation_text()
    assert len(texts) == len(HELD_OUT_MODULES)
    assert 150_000 < sum(len(text.encode()) for text in texts) < 250_000
    for text in texts:
        compile(text, "evaluation", "exec", dont_inherit=True)


# ------------------------------------------------------------------------------------------------- store


def collect(lm, folder, texts=DOCUMENTS, **options):
    defaults = {"layer": 1, "shard_tokens": 300, "batch_size": 4, "progress": False, "text_source": "powers"}
    return collect_activations(lm, texts, folder, **{**defaults, **options})


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("max_tokens", [None, 700])
def test_store_round_trip(lm, tmp_path, dtype, max_tokens):
    store = collect(lm, tmp_path / "s", dtype=dtype, max_tokens=max_tokens, site="mlp_out")
    stream = stream_activations(lm, DOCUMENTS, layer=1, site="mlp_out", batch_size=4, max_tokens=max_tokens)
    expected = torch.cat(list(stream)).to(dtype)
    assert torch.equal(store.tensor(), expected)
    assert (len(store), store.d_model, store.dtype, store.complete) == (len(expected), 32, dtype, True)
    assert torch.equal(store.tensor(torch.float64), expected.double())
    assert torch.equal(torch.cat(list(store.batches(64, shuffle=False))), expected)
    manifest = store.manifest
    assert [shard["tokens"] for shard in manifest["shards"][:-1]] == [300] * (len(expected) // 300)
    assert manifest["site"] == "mlp_out"
    assert manifest["text_source"] == "powers"
    assert set(manifest) >= {"model", "revision", "sha256", "layer", "context_length", "drop_first", "sae_engine"}
    assert sorted(contents(tmp_path / "s")) == sorted(["manifest.json", *(s["file"] for s in manifest["shards"])])
    store.verify()


def test_shuffled_batches_hold_every_row_once(lm, tmp_path):
    store = collect(lm, tmp_path)
    rows = store.tensor()
    first = list(store.batches(50, seed=1, dtype=torch.float32, buffer_shards=2))
    assert [len(batch) for batch in first[:-1]] == [50] * (len(rows) // 50)
    assert first[0].dtype == torch.float32
    shuffled = torch.cat(first)
    assert not torch.equal(shuffled, rows.float())
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, rows.float().tolist()))
    again = torch.cat(list(store.batches(50, seed=1, dtype=torch.float32, buffer_shards=2)))
    other = torch.cat(list(store.batches(50, seed=2, dtype=torch.float32, buffer_shards=2)))
    assert torch.equal(again, shuffled)
    assert not torch.equal(other, shuffled)
    assert {len(batch) for batch in store.batches(50, drop_last=True)} == {50}
    for name in ("batch_size", "buffer_shards"):
        with pytest.raises(ValueError, match=name):
            store.batches(**{"batch_size": 4, name: 0})


@pytest.mark.parametrize("documents_read", [0, 1, 13, 25, 39])
def test_resumed_run_equals_an_uninterrupted_one(lm, tmp_path, documents_read):
    def interrupted():
        yield from DOCUMENTS[:documents_read]
        raise KeyboardInterrupt

    collect(lm, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        collect(lm, tmp_path / "cut", interrupted())
    done = json.loads((tmp_path / "cut" / "manifest.json").read_text())
    assert not done["complete"]
    assert done["tokens"] % 300 == 0
    assert len(contents(tmp_path / "cut")) == 1 + done["tokens"] // 300
    with pytest.raises(ValueError, match="cut off after"):
        ActivationStore(tmp_path / "cut")
    cut = ActivationStore(tmp_path / "cut", allow_incomplete=True)
    assert len(cut) == done["tokens"] and repr(cut).endswith(", incomplete)")

    passes = []
    handle = lm.model.register_forward_pre_hook(lambda module, args, kwargs: passes.append(1), with_kwargs=True)
    store = collect(lm, tmp_path / "cut")
    handle.remove()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    # No forward pass for what was there; the batch that crosses the seam is run again.
    assert len(passes) <= -(-(len(store) - done["tokens"]) // (4 * 31)) + 2
    assert collect(lm, tmp_path / "cut", interrupted()).complete  # complete: the texts are not even read


def test_write_that_fails_leaves_no_file(lm, tmp_path, monkeypatch):
    import os

    def refuse(source, target):
        if str(target).endswith("00001.safetensors"):
            raise KeyboardInterrupt
        return rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(KeyboardInterrupt):
        collect(lm, tmp_path)
    assert sorted(contents(tmp_path)) == ["manifest.json", "shard-00000.safetensors"]


def test_request_that_differs_is_refused(lm, tmp_path):
    collect(lm, tmp_path)
    before = contents(tmp_path)
    for field, value in [
        ("layer", 2), ("site", "resid_post"), ("context_length", 16), ("batch_size", 8), ("drop_first", False),
        ("max_tokens", 5), ("dtype", torch.float32), ("shard_tokens", 100), ("text_source", "other"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{field}: .*asks for"):
            collect(lm, tmp_path, **{field: value})
    with pytest.raises(ValueError, match=r"^sha256: "):
        collect(replace(lm, sha256="1" * 64), tmp_path)
    with pytest.raises(FileExistsError, match="out_dir"):
        collect(lm, tmp_path, resume=False)
    assert contents(tmp_path) == before


def test_texts_that_differ_are_refused(lm, tmp_path):
    def interrupted():
        yield from DOCUMENTS[:30]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(lm, tmp_path, interrupted())
    with pytest.raises(ValueError, match="texts are not those"):
        collect(lm, tmp_path, ["something else", *DOCUMENTS])
    with pytest.raises(ValueError, match="texts are shorter"):
        collect(lm, tmp_path, DOCUMENTS[:2])
    with pytest.raises(ValueError, match="no text"):
        collect(lm, tmp_path / "empty", ["", ""])


def test_damage_names_the_file(lm, tmp_path):
    store = collect(lm, tmp_path)
    file = tmp_path / "shard-00001.safetensors"
    sound = file.read_bytes()
    flipped = sound[:-1] + bytes([sound[-1] ^ 1])
    other_shape = (tmp_path / store.manifest["shards"][-1]["file"]).read_bytes()
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"shard-00001.*sha256"):
        ActivationStore(tmp_path).verify()
    for broken in (sound[:-1], sound[:20], b"", other_shape):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"shard-00001.*damaged"):
            ActivationStore(tmp_path)
        with pytest.raises(ValueError, match=r"shard-00001.*damaged"):
            collect(lm, tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.*missing"):
        store.tensor()
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        ActivationStore(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        ActivationStore(tmp_path / "nowhere")


def test_overflow_of_the_stored_dtype_is_an_error(lm, tmp_path):
    lm.model.transformer.wte.weight.data *= 1e7
    with pytest.raises(ValueError, match=r"dtype.*overflows float16"):
        collect(lm, tmp_path / "half")
    assert collect(lm, tmp_path / "wide", dtype=torch.bfloat16).tensor().isfinite().all()
    with pytest.raises(ValueError, match="dtype"):
        collect(lm, tmp_path / "never", dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ models


def test_checkpoint_of_gpt2s_sizes_end_to_end(tokenizer, tmp_path):
    """What ``openai-community/gpt2`` is, except for its weights: 12 layers of 768, 50257 tokens, in a local folder."""
    folder = tmp_path / "gpt2"
    model = GPT2LMHeadModel(GPT2Config())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lm = load_language_model(folder)
    assert (lm.d_model, lm.num_layers, lm.max_length, lm.is_embedded) == (768, 12, 1024, False)
    assert lm.name == str(folder)
    assert lm.model.dtype == torch.float32
    store = collect(lm, tmp_path / "out", DOCUMENTS[:4], layer=8, max_tokens=150)
    assert store.tensor().shape == (150, 768)
    tokens = next(context_batches(lm, DOCUMENTS[:4], 256, 4))
    with torch.no_grad():
        expected = lm.model(input_ids=tokens, output_hidden_states=True).hidden_states[8]
    assert torch.equal(store.tensor(), expected[:, 1:].flatten(0, 1)[:150].half())
    shutil.rmtree(folder)  # half a gigabyte that pytest would keep


def test_hub_that_does_not_answer(monkeypatch, caplog, tmp_path):
    import huggingface_hub

    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    with pytest.raises(OSError, match=r"hub did not answer for 'openai-community/gpt2' \(Name or service"):
        load_language_model("openai-community/gpt2")
    with caplog.at_level(logging.WARNING):
        lm = load_language_model("openai-community/gpt2", fallback=True)
    assert lm.is_embedded
    assert lm.name == "embedded"
    [record] = [r for r in caplog.records if r.name.startswith("sae_engine")]
    assert "using the embedded model instead" in record.getMessage()


def test_hub_that_refuses_is_an_error_all_the_same(monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise huggingface_hub.errors.HFValidationError("no such name")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(OSError, match=r"hub refused.*no such name"):
        load_language_model("nobody/none", fallback=True)


def test_hub_model_comes_from_its_cache(tokenizer, monkeypatch, tmp_path):
    import huggingface_hub

    commit = "c" * 40
    folder = tmp_path / commit
    MODELS["gpt2"]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    offline = lambda *args, **kwargs: str(folder / "config.json")  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", offline)
    lm = load_language_model("someone/tiny", dtype=torch.bfloat16)  # HF_HUB_OFFLINE=1: no network is asked
    assert (lm.name, lm.revision, lm.d_model, lm.model.dtype) == ("someone/tiny", commit, 32, torch.bfloat16)


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin", "onnx/model.onnx"], "model*.safetensors"),
        (["pytorch_model.bin"], "pytorch_model*.bin"),
    ],
)
def test_hub_that_answers_is_asked_for_one_commit_and_one_format(tokenizer, monkeypatch, tmp_path, files, weights):
    import huggingface_hub

    def download(name, **options):
        assert (name, options["revision"]) == ("someone/tiny", "d" * 40)
        assert weights in options["allow_patterns"]
        return str(tmp_path)

    info = SimpleNamespace(sha="d" * 40, siblings=[SimpleNamespace(rfilename=file) for file in files])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    MODELS["gpt2"]().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_language_model("someone/tiny", revision="main").revision == "d" * 40


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"name_or_path": 3}, TypeError, "name_or_path"),
        ({"name_or_path": "./nowhere"}, FileNotFoundError, "nowhere"),
        ({"name_or_path": "a/b/c"}, ValueError, "name_or_path.*a/b/c"),
        ({"revision": "main"}, ValueError, "revision"),
        ({"revision": 3, "name_or_path": "a/b"}, TypeError, "revision"),
        ({"dtype": "bf16"}, ValueError, "dtype"),
        ({"dtype": torch.int8}, TypeError, "dtype"),
    ],
)
def test_load_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        load_language_model(**arguments, fallback=True)


def test_folder_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_language_model(tmp_path)


def test_import_needs_torch_alone():
    code = """
import sys
for name in ("transformers", "safetensors", "tqdm", "tokenizers", "huggingface_hub"):
    sys.modules[name] = None
import sae_engine.data as data
for name in data.__all__:
    getattr(data, name)
try:
    data.load_language_model()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "sae_engine.data needs the package 'transformers': pip install transformers"


def test_require_leaves_other_errors_alone(monkeypatch, tmp_path):
    (tmp_path / "brokenpackage.py").write_text("import surely_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="surely_not_there"):
        require("brokenpackage")
