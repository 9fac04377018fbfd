"""Codes on disk: those of the model and the autoencoder, read by tokens and by latents; interrupted, damaged."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import DOCUMENTS, tiny_gpt2

import sae_engine as se
from sae_engine.data import read_activations
from sae_engine.latents import Features, collect, max_activating, write_delphi

PLACE = {"layer": 1, "site": "resid_post"}
OPTIONS = {**PLACE, "batch_size": 4, "progress": False, "text_source": "powers"}


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    return tiny_gpt2()


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(1)
    return se.SparseAutoencoder(32, 48, se.TopK(4))


@pytest.fixture(scope="module")
def features(lm, sae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    return collect(sae, lm, DOCUMENTS, folder, shard_tokens=300, dtype="float32", **OPTIONS)


def whole_contexts(features):
    """Token ids (contexts, length) of all but the last context, and its tokens."""
    tokens = features.tokens()
    starts = (tokens.positions == 0).nonzero().flatten().tolist()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(tokens.positions)], strict=True)], tokens


@torch.no_grad()
def test_codes_are_those_of_the_model_and_the_autoencoder(lm, sae, features):
    """Recomputed context by context, without the stream."""
    contexts, tokens = whole_contexts(features)
    assert len(features.manifest["shards"]) > 2 and features.complete
    assert len(contexts) > 40
    for context in (contexts[0], contexts[17], contexts[-1]):
        ids = tokens.token_ids[context].long()
        x = read_activations(lm.model, ids[None], **PLACE)[0]
        expected = sae.encode(x).to_dense()
        expected[0] = 0  # the first position is not encoded
        found = features.codes(context.start, context.stop).to_dense()
        assert torch.allclose(found, expected, atol=1e-5)
        assert tokens.encoded[context].tolist() == [False] + [True] * (len(ids) - 1)
        assert tokens.positions[context].tolist() == list(range(len(ids)))
    own = tokens.documents == 5
    assert lm.tokenizer.decode(tokens.token_ids[own][:-1]) == DOCUMENTS[5]  # the last is the separator
    assert tokens.offsets[own].tolist() == list(range(int(own.sum())))


def test_any_range_of_tokens_is_that_of_the_whole(features):
    """Across shards, too."""
    whole, tokens = features.codes().to_dense(), features.tokens()
    size = features.manifest["shards"][0]["tokens"]
    for start, stop in ((0, 0), (0, 1), (size - 3, size + 5), (5, len(features)), (len(features), len(features))):
        assert torch.equal(features.codes(start, stop).to_dense(), whole[start:stop])
        for found, all_of_them in zip(features.tokens(start, stop), tokens, strict=True):
            assert torch.equal(found, all_of_them[start:stop])
    with pytest.raises(ValueError, match="stop must be in"):
        features.codes(0, len(features) + 1)
    with pytest.raises(TypeError, match="start must be an int"):
        features.tokens("first")


def test_by_latent_is_the_transpose(features):
    dense = features.codes().to_dense()
    for latent in range(features.d_sae):
        tokens, values = features.by_latent(latent)
        assert torch.equal(tokens, dense[:, latent].nonzero().flatten())
        assert torch.equal(values, dense[tokens, latent])
    assert torch.equal(features.counts(), (dense != 0).sum(0))
    with pytest.raises(ValueError, match=r"latent must be in 0\.\.47"):
        features.by_latent(48)


def test_the_index_is_made_once_and_anew_where_it_is_not_this_ones(features, monkeypatch):
    features.counts()
    again = Features(features.path)
    monkeypatch.setattr(again, "_all_codes", lambda: pytest.fail("sorted again"))
    assert torch.equal(again.counts(), features.counts())
    (features.path / "by_latent" / "values.npy").unlink()  # the fixture has it mapped: it goes on with what was there
    (features.path / "by_latent" / "values.npy").write_bytes(b"cut off")
    repaired = Features(features.path)
    expected = features.codes().to_dense()[:, 3]
    assert torch.equal(repaired.by_latent(3).values, expected[expected != 0])


def test_a_run_that_was_cut_off_ends_with_the_same_bits(lm, sae, features, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def killed(write=se.latents.features.replace_file, count=[0]):  # noqa: B006 - counts its calls
        def replace(path, how):
            count[0] += 1
            if count[0] == 6:
                raise Killed
            write(path, how)

        return replace

    with monkeypatch.context() as patch:
        patch.setattr(se.latents.features, "replace_file", killed())
        with pytest.raises(Killed):
            collect(sae, lm, DOCUMENTS, tmp_path, shard_tokens=300, dtype="float32", **OPTIONS)
    with pytest.raises(ValueError, match="were cut off after"):
        Features(tmp_path)
    partial = Features(tmp_path, allow_incomplete=True)
    stored = len(partial.manifest["shards"])
    assert 0 < stored < len(features.manifest["shards"])
    runs = []
    forward = lm.model.forward
    monkeypatch.setattr(lm.model, "forward", lambda *a, **k: runs.append(1) or forward(*a, **k))
    finished = collect(sae, lm, DOCUMENTS, tmp_path, shard_tokens=300, dtype="float32", **OPTIONS)
    done = sum(shard["batches"] for shard in finished.manifest["shards"][:stored])
    assert len(runs) == sum(shard["batches"] for shard in finished.manifest["shards"]) - done  # none for what is there
    for shard in features.manifest["shards"]:
        assert (tmp_path / shard["file"]).read_bytes() == (features.path / shard["file"]).read_bytes()
    assert finished.manifest == features.manifest
    runs.clear()
    assert len(collect(sae, lm, (), tmp_path, shard_tokens=300, dtype="float32", **OPTIONS)) == len(features)
    assert not runs


def test_another_request_other_texts_and_damage_are_refused(lm, sae, features, tmp_path):
    folder = tmp_path / "features"
    options = {"shard_tokens": 300, "dtype": "float32", **OPTIONS}
    collect(sae, lm, DOCUMENTS, folder, **options)
    other = se.SparseAutoencoder(32, 48, se.TopK(4))
    for name, call in {
        "max_tokens": lambda: collect(sae, lm, DOCUMENTS, folder, **options, max_tokens=9),
        "dtype": lambda: collect(sae, lm, DOCUMENTS, folder, **{**options, "dtype": "float16"}),
        "site": lambda: collect(sae, lm, DOCUMENTS, folder, **{**options, "site": "resid_pre"}),
        "sae_sha256": lambda: collect(other, lm, DOCUMENTS, folder, **options),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: .* this call asks for"):
            call()
    manifest = json.loads((folder / "features.json").read_text())
    cut = {**manifest, "complete": False}
    (folder / "features.json").write_text(json.dumps(cut))
    with pytest.raises(ValueError, match="documents are not those"):
        collect(sae, lm, DOCUMENTS[1:], folder, **options)
    with pytest.raises(ValueError, match="documents are shorter"):
        collect(sae, lm, DOCUMENTS[:2], folder, **options)
    shard = folder / manifest["shards"][1]["file"]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"shard-00001.* is damaged: its sha256"):
        Features(folder, allow_incomplete=True).verify()
    with pytest.raises(ValueError, match=r"shard-00001.* is damaged: its sha256"):
        collect(sae, lm, DOCUMENTS, folder, **options)
    shard.write_bytes(data[:-8])
    with pytest.raises(ValueError, match=r"shard-00001.* missing or damaged"):
        Features(folder, allow_incomplete=True)
    for broken in ({**manifest, "tokens": 3}, {**manifest, "format": 9}, {"format": 1}, []):
        (folder / "features.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=r"features\.json is damaged"):
            Features(folder)
    with pytest.raises(FileNotFoundError, match=r"has no features\.json"):
        Features(tmp_path)


def test_what_is_asked_for_is_checked_before_the_model_runs(lm, sae, tmp_path):
    narrow = se.SparseAutoencoder(31, 48, se.TopK(4))
    for said, own, documents, options in (
        ("site must be given", sae, DOCUMENTS, {}),
        ("dtype must be one of float16, float32", sae, DOCUMENTS, {"dtype": "bfloat16", **PLACE}),
        ("shard_tokens must be at least 1", sae, DOCUMENTS, {"shard_tokens": 0, **PLACE}),
        ("sae has d_in = 31", narrow, DOCUMENTS, PLACE),
        ("there is no text", sae, [""], {"progress": False, **PLACE}),
    ):
        with pytest.raises(ValueError, match=said):
            collect(own, lm, documents, tmp_path, **options)
    with pytest.raises(RuntimeError, match="threshold"):
        collect(se.SparseAutoencoder(32, 48, se.BatchTopK(4)), lm, DOCUMENTS, tmp_path, **PLACE)
    with pytest.raises(TypeError, match="lm must be a LanguageModel"):
        collect(sae, lm.model, DOCUMENTS, tmp_path, **PLACE)
    loud = se.SparseAutoencoder(32, 48, se.TopK(4))
    torch.nn.init.constant_(loud.b_enc, 1e6)
    with pytest.raises(ValueError, match="activation of 1e\\+06 is none in float16"):
        collect(loud, lm, DOCUMENTS, tmp_path, **PLACE, progress=False)


def test_two_calls_do_not_write_to_one_folder(lm, sae, tmp_path):
    def documents():
        with pytest.raises(RuntimeError, match=r"are being collected into .* by another call"):
            collect(sae, lm, DOCUMENTS, tmp_path, **OPTIONS)
        yield DOCUMENTS[0]

    assert len(collect(sae, lm, documents(), tmp_path, **OPTIONS)) > 0
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        collect(sae, lm, DOCUMENTS, tmp_path / "file", **OPTIONS)


def test_six_bytes_an_entry(lm, sae, tmp_path):
    """And what the documentation says a token takes."""
    features = collect(sae, lm, DOCUMENTS, tmp_path, **OPTIONS)
    assert features.dtype == torch.float16 and len(features.manifest["shards"]) == 1
    size = (tmp_path / "shard-00000.safetensors").stat().st_size
    assert abs(size - 6 * features.manifest["entries"] - 21 * len(features)) < 1024
    assert features.provenance.site == "resid_post" and features.provenance.excluded == ("first",)


def test_max_tokens_excluded_tokens_and_padded_batches(lm, sae, tmp_path):
    some = collect(sae, lm, DOCUMENTS, tmp_path / "some", max_tokens=100, exclude_tokens=["eos"], **OPTIONS)
    tokens = some.tokens()
    assert int(tokens.encoded.sum()) == some.manifest["encoded"] == 100
    assert not tokens.encoded[tokens.token_ids == lm.tokenizer.eos_token_id].any()
    ids = torch.arange(60).view(4, 15) + 20
    mask = torch.ones_like(ids)
    mask[1, :6] = mask[2, 11:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}]
    padded = collect(sae, lm, batches, tmp_path / "padded", dtype="float32", **OPTIONS)
    assert padded.tokens().token_ids.tolist() == ids[mask.bool()].tolist()
    alone = collect(sae, lm, [ids[1:2, 6:]], tmp_path / "alone", dtype="float32", **OPTIONS)
    assert torch.allclose(padded.codes(15, 24).to_dense(), alone.codes().to_dense(), atol=1e-5)


# ----------------------------------------------------------------------------------------- the largest activations


def test_the_contexts_are_those_of_the_largest_activations(lm, features):
    """Against a search through everything."""
    contexts, tokens = whole_contexts(features)
    dense = features.codes().to_dense()
    latent = int((dense != 0).sum(0).argmax())
    found = max_activating(features, latent, 6, window=12, tokenizer=lm.tokenizer)
    best = sorted(((float(dense[c, latent].max()), -c.start) for c in contexts), reverse=True)[:6]
    assert [c.activation for c in found] == [value for value, _ in best]
    for context, (_, start) in zip(found, best, strict=True):
        own = next(c for c in contexts if c.start == -start)
        assert own.start <= context.token < own.stop
        first = context.token - context.peak
        shown = slice(first, first + len(context.token_ids))
        assert own.start <= shown.start and shown.stop <= own.stop
        assert len(context.token_ids) == min(12, own.stop - own.start)
        assert torch.equal(context.token_ids, tokens.token_ids[shown])
        assert torch.equal(context.activations, dense[shown, latent])
        assert torch.equal(context.positions, tokens.positions[shown])
        assert context.document == int(tokens.documents[context.token])
        assert context.activation == float(context.activations[context.peak])
        assert context.tokens == tuple(lm.tokenizer.decode([t]) for t in context.token_ids.tolist())
        assert f"«{context.tokens[context.peak]}»".replace("\n", "↵") in str(context)


def test_ties_come_in_the_order_of_the_text(lm, tmp_path):
    """The same batch of texts again and again: every context has the same activations as another."""
    sae = se.SparseAutoencoder(32, 48, se.TopK(4))
    ids = torch.arange(24).view(2, 12) + 30
    features = collect(sae, lm, [ids, ids, ids], tmp_path, dtype="float32", **{**OPTIONS, "batch_size": 2})
    latent = int(features.counts().argmax())
    found = max_activating(features, latent, 6)
    ranked = [(-c.activation, c.token) for c in found]
    assert ranked == sorted(ranked) and len({value for value, _ in ranked}) < len(ranked)
    assert [c.tokens for c in found] == [None] * len(found) and "«[" in str(found[0])
    assert max_activating(features, int((features.counts() == 0).nonzero()[0]), 3) == []


def test_an_autoencoder_with_texts_gives_what_its_features_give(lm, sae, features):
    options = {key: value for key, value in OPTIONS.items() if key not in ("progress", "text_source")}
    latent = int(features.counts().argmax())
    direct = se.max_activating(sae, latent, 3, lm=lm, documents=DOCUMENTS, dtype="float32", **options)
    assert [(c.token, c.activation) for c in direct] == [
        (c.token, c.activation) for c in se.max_activating(features, latent, 3)]  # fmt: skip
    assert direct[0].tokens is not None
    for error, said, call in (
        (TypeError, "documents must be given", lambda: max_activating(sae, 3, lm=lm)),
        (TypeError, "features must be Features", lambda: max_activating(Path("."), 3)),
        (TypeError, "layer is for an autoencoder", lambda: max_activating(features, 3, layer=2)),
        (ValueError, "n must be at least 1", lambda: max_activating(features, 3, 0)),
        (ValueError, "latent must be in", lambda: max_activating(features, -1)),
    ):
        with pytest.raises(error, match=said):
            call()


# ------------------------------------------------------------------------------------------------- delphi's layout


def load_as_delphi(path):
    """What delphi's loader makes of a file: each latent's locations and activations, and the tokens.

    It opens files with NumPy, adds the first latent's number, which the file's name says, sorts by latent and splits.
    """
    from safetensors.numpy import load_file

    data = load_file(path)
    first = int(str(path).split("/")[-1].split("_")[0])
    locations = torch.from_numpy(data["locations"].astype("int64"))
    locations[:, 2] += first
    return locations, torch.tensor(data["activations"]), torch.tensor(data["tokens"].astype("int64"))


def test_delphi_reads_the_same_codes(lm, sae, features, tmp_path):
    module = write_delphi(features, tmp_path, splits=5)
    contexts, tokens = whole_contexts(features)
    contexts = [c for c in contexts if c.stop - c.start == 32]
    dense = torch.stack([features.codes(c.start, c.stop).to_dense() for c in contexts])
    files = sorted(module.glob("*.safetensors"), key=lambda file: int(file.stem.split("_")[0]))
    edges = [tuple(map(int, file.stem.split("_"))) for file in files]
    assert edges == [(0, 8), (9, 18), (19, 27), (28, 37), (38, 47)]  # torch.linspace(0, 48, 6), as delphi divides them
    found = torch.zeros_like(dense)
    for file in files:
        locations, activations, ids = load_as_delphi(file)
        assert torch.equal(ids, torch.stack([tokens.token_ids[c] for c in contexts]).long())
        assert activations.dtype == torch.float16
        found[tuple(locations.T)] = activations.float()
    assert torch.equal(found, dense.half().float())
    config = json.loads((module / "config.json").read_text())
    assert config["cache_ctx_len"] == 32 and config["model_name"] == "tiny" and config["n_tokens"] == ids.numel()


def test_what_delphi_cannot_hold_is_refused(lm, sae, features, tmp_path):
    short = collect(sae, lm, ["x"], tmp_path / "short", **OPTIONS)
    for said, call in {
        "no context has the whole length of 32": lambda: write_delphi(short, tmp_path),
        "splits must be in": lambda: write_delphi(features, tmp_path, splits=49),
        "module must be the name": lambda: write_delphi(features, tmp_path, module="../up"),
    }.items():
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(TypeError, match="features must be Features"):
        write_delphi(tmp_path, tmp_path)
