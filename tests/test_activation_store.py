"""ActivationStore: what the shards hold, runs that were cut off, requests and files that are refused."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import DOCUMENTS, collect, tiny_gpt2

from sae_engine.data import ActivationStore, stream_activations


@pytest.fixture
def lm():
    return tiny_gpt2()


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


def test_activations_that_are_not_finite_are_not_stored(lm, tmp_path):
    with torch.no_grad():
        lm.model.transformer.wte.weight[lm.tokenizer("17")["input_ids"][0]] = torch.inf
    said = r"texts: \d+ of \d+ activations are not finite, the first at token \d+ .*float32"
    with pytest.raises(ValueError, match=said):
        collect(lm, tmp_path)
    with pytest.raises(ValueError, match="cut off"):
        ActivationStore(tmp_path)


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
