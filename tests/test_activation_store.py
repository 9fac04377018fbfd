"""ActivationStore: what the shards hold, runs that were cut off, requests and files that are refused."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny_models import DOCUMENTS, collect, tiny_gpt2

from sae_engine import _files
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
    said = (
        r"texts: \d+ of 124 activations are not finite, the first is row \d+ of the stream\. In float32, 'tiny' makes "
        r"such numbers of document \d+ after '.*1', first in module 'transformer\.wte'; its weights may be damaged"
    )
    with pytest.raises(ValueError, match=said):
        collect(lm, tmp_path)
    with pytest.raises(ValueError, match="cut off"):
        ActivationStore(tmp_path)


def test_a_model_that_overflows_is_named_with_the_way_out(lm, tmp_path):
    lm.model.half()
    lm.model.transformer.h[0].mlp.c_proj.bias.data[7] = 6e4
    lm.model.transformer.h[1].mlp.c_proj.bias.data[7] = 6e4
    said = r"In float16, 'tiny' makes .* document 0 after .*, first in module 'transformer\.h\.1'; load it in bfloat16"
    for run in (lambda: list(stream_activations(lm, DOCUMENTS, layer=2)), lambda: collect(lm, tmp_path, layer=2)):
        with pytest.raises(ValueError, match=said):
            run()
    assert not any(module._forward_hooks for module in lm.model.modules())
    assert collect(lm, tmp_path, layer=1).complete  # what failed before its first shard blocks nothing


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
    ahead = store.batches(50, seed=1, dtype=torch.float32, buffer_shards=2, prefetch=True)
    assert torch.equal(torch.cat(list(ahead)), shuffled)
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


def test_two_that_collect_into_one_folder(lm, tmp_path):
    """The second is refused at once, in this process or another; of one that is killed nothing is in the way."""
    code = """
import runpy, sys
from pathlib import Path
with runpy.run_path(sys.argv[1])["only_writer"](Path(sys.argv[2]), "busy"):  # without the package, and so without torch
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, _files.__file__, str(tmp_path)]

    def documents():
        assert subprocess.run(command, capture_output=True, text=True).stderr.endswith("RuntimeError: busy\n")
        with pytest.raises(RuntimeError, match=r"^out_dir: another call is collecting into"):
            collect(lm, tmp_path)
        yield from DOCUMENTS

    (tmp_path / ".lock").touch()  # as one leaves it that is killed
    store = collect(lm, tmp_path, documents())
    store.verify()
    assert not (tmp_path / ".lock").exists()
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match="another call is collecting"):
            collect(lm, tmp_path)
        other.kill()
    assert (tmp_path / ".lock").exists() and len(collect(lm, tmp_path)) == len(store)


def test_request_that_differs_is_refused(lm, tmp_path):
    collect(lm, tmp_path)
    before = contents(tmp_path)
    for field, value in [
        ("layer", 2), ("site", "resid_post"), ("context_length", 16), ("batch_size", 8), ("drop_first", False),
        ("max_tokens", 5), ("dtype", torch.float32), ("shard_tokens", 100), ("text_source", "other"),
        ("separator", None), ("first_token", 7), ("exclude_tokens", ["eos"]), ("exclude_positions", [3]),
        ("token_ids", False),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{field}: .*asks for.*name another folder, or delete this one"):
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
    for call in (ActivationStore(tmp_path).verify, lambda: collect(lm, tmp_path),
                 lambda: collect(lm, tmp_path, text_source="more", extend=True)):  # fmt: skip
        with pytest.raises(ValueError, match=r"shard-00001.*sha256"):
            call()
    for broken in (sound[:-1], sound[:20], b"", other_shape):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"shard-00001.*damaged"):
            ActivationStore(tmp_path)
        with pytest.raises(ValueError, match=r"shard-00001.*damaged"):
            collect(lm, tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.*missing"):
        store.tensor()
    manifest = (tmp_path / "manifest.json").read_text()
    changes = ('"complete"', '"over"'), ("shard-00001", "../x"), ('"file"', '"name"'), ('"layer"', '"block"')
    for wrong in ("[]", '{"format": 2}', *(manifest.replace(*change) for change in changes)):
        (tmp_path / "manifest.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            ActivationStore(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        ActivationStore(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        ActivationStore(tmp_path / "nowhere")


def test_overflow_of_the_stored_dtype_is_an_error(lm, tmp_path):
    lm.model.transformer.wte.weight.data *= 1e7
    with pytest.raises(ValueError, match=r"dtype.*overflows float16"):
        collect(lm, tmp_path / "half")
    with pytest.raises(ValueError, match=r"dtype.*overflows float16"):
        next(stream_activations(lm, DOCUMENTS, layer=1, dtype="float16"))
    assert collect(lm, tmp_path / "wide", dtype=torch.bfloat16).tensor().isfinite().all()
    with pytest.raises(ValueError, match="dtype"):
        collect(lm, tmp_path / "never", dtype=torch.float64)


# ------------------------------------------------------------------------------------- tokens, start, extension


def test_tokens_of_rows_are_those_of_the_text(lm, tmp_path):
    store = collect(lm, tmp_path, drop_first=False)
    tokens = store.row_tokens()
    assert [t.dtype for t in tokens] == [torch.int32] * 4 and {len(t) for t in tokens} == {len(store)}
    whole = [[*lm.tokenizer(text, verbose=False)["input_ids"], lm.tokenizer.eos_token_id] for text in DOCUMENTS]
    inner = tokens.documents >= 0
    assert torch.equal(inner, tokens.positions > 0)  # what stands before a context is of no document
    assert tokens.offsets[~inner].eq(-1).all() and tokens.token_ids[~inner].eq(lm.tokenizer.eos_token_id).all()
    for document, text in enumerate(whole):
        here = tokens.documents == document
        assert tokens.token_ids[here].tolist() == text
        assert tokens.offsets[here].tolist() == list(range(len(text)))
    some = store.row_tokens(290, 620)  # across shards of 300 rows
    assert all(torch.equal(a, b[290:620]) for a, b in zip(some, tokens, strict=True))
    assert store.row_tokens(5, 5).documents.shape == (0,)
    with pytest.raises(ValueError, match="stop"):
        store.row_tokens(0, len(store) + 1)


def test_batches_say_which_tokens_their_rows_are_of(lm, tmp_path):
    store = collect(lm, tmp_path)
    rows, tokens = store.tensor(), store.row_tokens()
    place = {row: at for at, row in enumerate(zip(tokens.documents.tolist(), tokens.offsets.tolist(), strict=True))}
    for x, of in store.batches(50, seed=1, with_tokens=True):
        at = [place[row] for row in zip(of.documents.tolist(), of.offsets.tolist(), strict=True)]
        assert torch.equal(x, rows[at])
        assert torch.equal(of.token_ids, tokens.token_ids[at]) and torch.equal(of.positions, tokens.positions[at])
    bare = collect(lm, tmp_path / "bare", token_ids=False)
    assert torch.equal(bare.tensor(), rows)
    for call in (bare.row_tokens, lambda: bare.batches(5, with_tokens=True)):
        with pytest.raises(ValueError, match="no token ids"):
            call()


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_pass_can_start_in_the_middle(lm, tmp_path, monkeypatch, shuffle):
    store = collect(lm, tmp_path)
    options = {"shuffle": shuffle, "seed": 3, "buffer_shards": 2}
    whole = torch.cat(list(store.batches(64, **options)))
    for start in (0, 1, 64, 320, 641, 1300, len(whole) - 1, len(whole)):
        tail = list(store.batches(64, start=start, **options))
        assert torch.equal(torch.cat([whole[:0], *tail]), whole[start:])
        assert {len(x) for x in tail[:-1]} <= {64}
        dropped = list(store.batches(64, start=start, drop_last=True, **options))
        assert torch.equal(torch.cat([whole[:0], *dropped]), whole[start:][: (len(whole) - start) // 64 * 64])
    read, load = [], ActivationStore._load
    monkeypatch.setattr(ActivationStore, "_load", lambda self, index: read.append(index) or load(self, index))
    list(store.batches(60, start=len(whole) - 10, shuffle=False))  # 300 rows a shard are five such batches
    assert set(read) == {len(store.manifest["shards"]) - 1}
    with pytest.raises(ValueError, match="start"):
        store.batches(64, start=len(whole) + 1)


def test_a_finished_collection_is_extended(lm, tmp_path):
    first, second = DOCUMENTS[:25], DOCUMENTS[25:]
    alone = collect(lm, tmp_path / "first", first, text_source="a")
    other = collect(lm, tmp_path / "second", second, text_source="b")
    both = collect(lm, tmp_path / "both", first, text_source="a")
    sound = contents(tmp_path / "both")
    with pytest.raises(ValueError, match="no text"):
        collect(lm, tmp_path / "both", [""], text_source="b", extend=True)
    assert contents(tmp_path / "both") == sound  # an extension that fails takes nothing away

    def interrupted():
        yield from second[:8]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(lm, tmp_path / "both", interrupted(), text_source="b", extend=True)
    with pytest.raises(ValueError, match="cut off"):
        ActivationStore(tmp_path / "both")
    for options, said in (({"text_source": "b"}, "extend=True carries on"), ({"text_source": "a"}, "^text_source"),
                          ({"text_source": "c", "extend": True}, "extend: .*'b' was cut off")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            collect(lm, tmp_path / "both", second, **options)
    both = collect(lm, tmp_path / "both", second, text_source="b", extend=True)
    assert torch.equal(both.tensor(), torch.cat([alone.tensor(), other.tensor()]))
    documents = torch.cat([alone.row_tokens().documents, other.row_tokens().documents + len(first)])
    assert torch.equal(both.row_tokens().documents, documents)
    assert both.provenance.text == "a; b" and len(ActivationStore(tmp_path / "both")) == len(alone) + len(other)
    done = contents(tmp_path / "both")
    for source, extend in (("a", False), ("a", True), ("b", False), ("b", True)):  # there already: nothing is read
        assert len(collect(lm, tmp_path / "both", interrupted(), text_source=source, extend=extend)) == len(both)
    assert contents(tmp_path / "both") == done
    for changed in ({"layer": 2}, {"exclude_tokens": ["eos"]}, {"dtype": torch.float32}):
        with pytest.raises(ValueError, match=f"^{next(iter(changed))}: "):
            collect(lm, tmp_path / "both", second, text_source="c", extend=True, **changed)
    with pytest.raises(FileNotFoundError, match="no collection to extend"):
        collect(lm, tmp_path / "none", second, extend=True)


def test_a_larger_max_tokens_goes_on_where_the_first_stopped(lm, tmp_path):
    collect(lm, tmp_path, max_tokens=700)
    collect(lm, tmp_path, max_tokens=800)
    expected = torch.cat(list(stream_activations(lm, DOCUMENTS, layer=1, batch_size=4))).half()
    assert torch.equal(collect(lm, tmp_path).tensor(), expected)
    assert collect(lm, tmp_path, max_tokens=len(expected) + 5).complete  # there are no more
    with pytest.raises(ValueError, match="texts are not those"):
        collect(lm, tmp_path, [*DOCUMENTS, "more"], max_tokens=len(expected) + 6)


def test_stores_of_the_first_format_are_read_and_extended(lm, tmp_path):
    store = collect(lm, tmp_path, token_ids=False)
    manifest = {"format": 1, **{k: v for k, v in store.manifest.items() if k not in (
        "format", "separator", "first_token", "exclude_tokens", "exclude_positions", "token_ids", "earlier",
        "documents")}}  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    old = ActivationStore(tmp_path)
    assert torch.equal(old.tensor(), store.tensor()) and old.provenance == store.provenance
    with pytest.raises(ValueError, match=r"^token_ids: "):
        collect(lm, tmp_path)
    assert len(collect(lm, tmp_path, token_ids=False)) == len(store)
    more = collect(lm, tmp_path, ["more " * 90], token_ids=False, text_source="more", extend=True)
    assert len(more) > len(store) and more.manifest["format"] == 2


def test_rows_that_are_not_finite_are_not_handed_out_unsaid(lm, tmp_path):
    from safetensors.torch import load_file, save_file

    store = collect(lm, tmp_path)
    file = tmp_path / "shard-00001.safetensors"
    shard = load_file(file)
    shard["activations"][[7, 9], 3] = torch.inf
    save_file(shard, file)  # as a library that did not look had written it
    for shuffle in (False, True):
        with pytest.raises(ValueError, match=r"shard-00001\.safetensors: 2 of 300 rows are not finite.* row 307 "):
            list(store.batches(50, shuffle=shuffle))
    assert int((~torch.cat(list(store.batches(50, check_finite=False))).isfinite()).sum()) == 2
    assert len(list(store.batches(300, shuffle=False, start=600))) > 0  # they are not among those


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"device": "gpu"}, ValueError, "device.*'gpu'"),
        ({"device": "cuda:99"}, ValueError, "device.*'cuda:99' cannot be used"),
        ({"device": 1.5}, TypeError, "device"),
        ({"dtype": "fp16"}, ValueError, "dtype"),
        ({"start": -1}, ValueError, "start"),
        ({"shuffle": None}, TypeError, "shuffle"),
        ({"drop_last": 1}, TypeError, "drop_last"),
        ({"seed": 1.0}, TypeError, "seed"),
    ],
)
def test_errors_of_batches_come_before_the_first(lm, tmp_path, changed, error, match):
    store = collect(lm, tmp_path, max_tokens=10)
    with pytest.raises(error, match=match):
        store.batches(4, **changed)


def test_folders_that_are_none(lm, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for wrong, error in ((file, NotADirectoryError), (3, TypeError), (None, TypeError), ("", ValueError)):
        with pytest.raises(error, match="out_dir"):
            collect(lm, wrong)
        with pytest.raises(error, match="path"):
            ActivationStore(wrong)
