"""Language models from folders, from the hub and from its cache; and what is imported for them."""

import json
import logging
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import DOCUMENTS, MODELS, collect, tokenizer_of_bytes
from torch import nn
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from sae_engine.data import load_language_model, loading, models, read_sites, stream_activations
from sae_engine.data._require import require
from sae_engine.data.contexts import context_batches


@pytest.fixture
def tokenizer():
    return tokenizer_of_bytes()


def test_checkpoint_of_gpt2s_sizes_end_to_end(tokenizer, tmp_path):
    """What ``openai-community/gpt2`` is, except for its weights: 12 layers of 768, 50257 tokens, in a local folder."""
    folder = tmp_path / "gpt2"
    model = GPT2LMHeadModel(GPT2Config())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lm = load_language_model(folder, dtype="float32")
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


def test_a_cache_that_holds_a_part_is_not_taken_for_all_there_is(tokenizer, monkeypatch, tmp_path, caplog):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json"))
    MODELS["gpt2"]().save_pretrained(tmp_path)
    assert load_language_model("someone/tiny").tokenizer is None
    assert "its cache holds no tokenizer: load it once with a network, or give token ids" in caplog.text
    tokenizer.save_pretrained(tmp_path)
    whole = tmp_path / "model.safetensors"
    whole.rename(tmp_path / "model-00001-of-00003.safetensors")
    parts = {name: f"model-0000{1 + number % 3}-of-00003.safetensors" for number, name in enumerate("abcd")}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    with pytest.raises(FileNotFoundError, match=r"lacks 2 of 3 files of weights, as 'model-00002-of-00003\.safe"):
        load_language_model("someone/tiny")
    index.write_text("{")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json' is damaged"):
        load_language_model(tmp_path)
    index.unlink(), (tmp_path / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(OSError, match=r"did not answer for 'someone/tiny'.*its cache holds .* without its weights"):
        load_language_model("someone/tiny")


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
        ({"name_or_path": ""}, ValueError, "name_or_path.*empty"),
        ({"name_or_path": __file__}, NotADirectoryError, "name_or_path.*is a file"),
        ({"device": "gpu"}, ValueError, "device.*'gpu'"),
        ({"device": "cuda:99"}, ValueError, "device: 'cuda:99' cannot be used on this machine"),
        ({"device": 1.5}, TypeError, "device"),
    ],
)
def test_load_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        load_language_model(**arguments, fallback=True)
    with pytest.raises(TypeError, match="fallback"):
        load_language_model(fallback=1)


@pytest.fixture
def saved(tokenizer, tmp_path):
    """A folder with a model of several files of weights."""
    MODELS["gpt2"]().save_pretrained(tmp_path, max_shard_size="60KB")
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def changed_tensor(folder, change):
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if (key := "transformer.h.1.mlp.c_proj.weight") in tensors:
            change(tensors, key)
            save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda f: (f / "model-00002-of-00004.safetensors").write_bytes(b"\0"), ValueError, r"model-00002.* cut off"),
        (lambda f: (f / "model-00004-of-00004.safetensors").unlink(), OSError, "model-00004"),
        (lambda f: changed_tensor(f, lambda t, key: t.pop(key)), ValueError,
         r"lack 1 parameters of GPT2LMHeadModel, .* random numbers: transformer\.h\.1\.mlp\.c_proj\.weight"),
        (lambda f: changed_tensor(f, lambda t, key: t.update({key: torch.zeros(3, 3)})), ValueError,
         r"have in another shape 1 parameters .*transformer\.h\.1\.mlp\.c_proj\.weight"),
        (lambda f: (f / "config.json").write_text("{}"), ValueError, "cannot be loaded as a causal language model"),
        (lambda f: (f / "tokenizer.json").write_text("{"), ValueError, "the tokenizer of .* cannot be read"),
    ],
    ids=["cut off", "missing file", "missing parameter", "other shape", "no architecture", "tokenizer"],
)  # fmt: skip
def test_damage_to_a_model_is_named(saved, damage, error, said):
    assert len(list(saved.glob("*.safetensors"))) == 4
    damage(saved)
    with pytest.raises(error, match=said):
        load_language_model(saved)


def test_a_folder_without_a_tokenizer_has_none(saved, tokenizer, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (saved / file).unlink()
    lm = load_language_model(saved)  # transformers would make one that knows no token
    assert lm.tokenizer is None
    with pytest.raises(ValueError, match="has no tokenizer"):
        collect(lm, tmp_path / "out")
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in DOCUMENTS]
    assert collect(lm, tmp_path / "out", ids, first_token=0, separator=0).complete


class OfBytes(nn.Module):
    """A linear map whose weights are int8 and a scale, as quantized models have them."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.weight.to(x) * self.scale).T


def test_a_model_that_is_loaded_already(tokenizer):
    model = MODELS["llama"]().to(torch.bfloat16).train()
    lm = load_language_model(model, tokenizer=tokenizer)
    assert lm.model is model and model.dtype == torch.bfloat16 and not model.training
    assert (lm.name, lm.revision, lm.d_model, lm.num_layers) == ("LlamaForCausalLM", None, 32, 3)
    assert lm.sha256 == load_language_model(model).sha256
    [rows] = stream_activations(lm, DOCUMENTS[:1], site="blocks.1.hook_mlp_out")
    assert rows.dtype == torch.bfloat16 and rows.shape[1] == 32
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert lm.sha256 != load_language_model(model).sha256
    for name, value in (("dtype", "float32"), ("device", "cpu"), ("device_map", "auto"), ("revision", "main")):
        with pytest.raises(ValueError, match=f"^{name}: a model that is loaded already"):
            load_language_model(model, **{name: value})
    with pytest.raises(TypeError, match="a Linear is no model of transformers"):
        load_language_model(nn.Linear(2, 2))


def test_a_quantized_model_is_read_at_every_site():
    model = MODELS["llama"]().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(parent, name, OfBytes(child))
    lm = load_language_model(model)
    names = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    sites = [f"blocks.1.hook_{name}" for name in names]
    pre, attention, middle, mlp, post = read_sites(lm.model, torch.tensor([[5, 6, 7]]), sites)
    assert torch.equal(pre + attention, middle) and torch.equal(middle + mlp, post)


def test_options_reach_transformers(tokenizer, monkeypatch, tmp_path):
    import transformers

    MODELS["gpt2"]().to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_language_model(tmp_path).model.dtype == torch.bfloat16  # the checkpoint's own
    assert load_language_model().model.dtype == torch.float32
    seen = {}

    def load(folder, **options):
        seen.update(options)
        options.pop("device_map"), options.pop("quantization_config")  # accelerate and bitsandbytes are not needed here
        return original(folder, **options)

    original = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(loading, "require_installed", lambda *_: None)
    load_language_model(tmp_path, device_map="auto", quantization_config={"load_in_8bit": True}, trust_remote_code=True)
    assert (seen["device_map"], seen["quantization_config"], seen["trust_remote_code"], seen["dtype"]) == (
        "auto", {"load_in_8bit": True}, True, "auto"
    )  # fmt: skip
    with pytest.raises(ValueError, match="device: 'cpu' and device_map='auto' both"):
        load_language_model(tmp_path, device="cpu", device_map="auto")
    monkeypatch.undo()
    lm = load_language_model(tmp_path, model_kwargs={"attn_implementation": "eager"})
    assert lm.model.config._attn_implementation == "eager"
    for error, kwargs, message in (
        (TypeError, "eager", "^model_kwargs must map names to values"),
        (ValueError, {"torch_dtype": "float16"}, "^model_kwargs: 'torch_dtype' has an argument of its own"),
        (ValueError, {"device_map": "auto"}, "^model_kwargs: 'device_map' has an argument of its own"),
        (ValueError, {"local_files_only": False}, "^model_kwargs: 'local_files_only' is not for the caller"),
        (ValueError, {"attention": "eager"}, "unexpected keyword argument 'attention'"),
    ):
        with pytest.raises(error, match=message):
            load_language_model(tmp_path, model_kwargs=kwargs)


@pytest.mark.parametrize(("options", "package", "what"), [
    ({"device_map": "auto"}, "accelerate", "device_map"), ({"device_map": {"": "cpu"}}, "accelerate", "device_map"),
    ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes", "quantization_config: loading in 8 or 4 bits"),
    ({"model_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}}, "bitsandbytes",
     "quantization_config: loading in 8 or 4 bits"),
])  # fmt: skip
def test_a_package_that_an_option_needs_is_asked_for_before_anything_is_loaded(monkeypatch, options, package, what):
    monkeypatch.setattr(models, "_hub_folder", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else "there")
    with pytest.raises(ImportError, match=f"^{what} needs the package '{package}': pip install {package}$"):
        load_language_model("some/model", **options)


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
