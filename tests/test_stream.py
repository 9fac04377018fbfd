"""Streams of rows: each token of a text once an epoch, aligned over sites, with the same bits after any stop."""

import json
import random
from collections import Counter

import pytest
import torch
from tiny_models import DOCUMENTS, collect, tiny_gpt2

from sae_engine.data import (
    RowStream,
    StoreStream,
    load_language_model,
    open_source,
    read_activations,
    rows,
    stream_activations,
)
from sae_engine.data.contexts import contexts_of

SITES = ("blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out")
TEXTS = [f"Text {i} says: " + "words and more words " * (i * i % 7) for i in range(30)]
SHAPE = {"chunk_rows": 96, "chunks": 3, "batch_rows": 8}
PACKING = pytest.mark.parametrize("packing", [True, False], ids=["packed", "a document a row"])


@pytest.fixture(scope="module")
def embedded():
    return load_language_model()


@pytest.fixture
def lm():
    return tiny_gpt2()


def stream_of(lm, texts=TEXTS, sites=SITES, *, opened=None, contexts=None, **options):
    ranks = {name: options[name] for name in ("rank", "world") if name in options}
    source = open_source(texts, **{"hold_out": None, **(opened or {}), **ranks})
    settings = contexts_of(lm, **{"context_length": 16, "batch_size": 3, **(contexts or {})})
    return RowStream(lm, source, sites, settings, **{**SHAPE, "seed": 0, **options})


def take(stream, count):
    return [stream.next() for _ in range(count)]


def same(first, second):
    return len(first) == len(second) and all(
        all(map(torch.equal, x, y)) for x, y in zip(first, second, strict=True)
    )


# ------------------------------------------------------------------------------------------------ exact resume


@PACKING
def test_a_stop_at_any_batch_changes_no_bit(embedded, packing):
    def make(**options):
        return stream_of(embedded, contexts={"packing": packing, "exclude_tokens": ["eos"]}, **options)

    running, states, found = make(), [], []
    for _ in range(90):
        states.append(json.dumps(running.state_dict()))
        found.append(running.next())
    assert running.counts["epoch"] >= 1
    assert max(map(len, states)) < 3000
    for number in [0, *random.Random(1).sample(range(1, 80), 5)]:
        resumed = make(prefetch=number % 2 == 1)
        resumed.load_state_dict(json.loads(states[number]))
        assert json.dumps(resumed.state_dict()) == states[number]
        assert same(take(resumed, 12), found[number : number + 12])
        resumed.settle()
    running.load_state_dict(json.loads(states[5]))  # back, in a stream that is elsewhere
    assert same(take(running, 6), found[5:11])


def test_a_thread_that_reads_ahead_changes_nothing(lm):
    plain, ahead = stream_of(lm), stream_of(lm, prefetch=True)  # which take turns with one model
    for _ in range(60):
        assert json.dumps(plain.state_dict()) == json.dumps(ahead.state_dict())
        assert plain.counts == ahead.counts
        assert all(map(torch.equal, plain.next(), ahead.next()))
    ahead.settle()


@pytest.mark.interop
def test_a_data_set_that_is_streamed_goes_on_where_it_was_also_from_a_stream_that_went_on(lm, tmp_path):
    """Of such a data set, one place has several spellings: a state that was saved after a resume has another."""
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def make(**options):
        streamed = datasets.load_dataset("json", data_files=str(file), split="train", streaming=True)
        return stream_of(lm, streamed, **options)

    running, states, found = make(), [], []
    for _ in range(150):
        states.append(json.dumps(running.state_dict()))
        found.append(running.next())
    for number in (3, 40, 77):
        resumed = make(prefetch=True)
        resumed.load_state_dict(json.loads(states[number]))
        assert same(take(resumed, 30), found[number : number + 30])
        again = make()
        again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
        assert same(take(again, 30), found[number + 30 : number + 60])
        resumed.settle()


def test_another_seed_is_another_order(lm):
    assert not same(take(stream_of(lm), 3), take(stream_of(lm, seed=1), 3))
    assert same(take(stream_of(lm), 3), take(stream_of(lm), 3))


# ------------------------------------------------------------------------------------------------- which rows


@pytest.fixture
def tokens_as_rows(monkeypatch):
    """Rows that say which token they are of: document, offset, id."""
    def batch_rows(lm, batch, *sites):
        columns = torch.stack([batch.documents, batch.offsets, batch.input_ids], -1).flatten(0, 1)[batch.kept]
        return tuple(columns.float() for _ in sites)

    monkeypatch.setattr(rows, "batch_rows", batch_rows)


def tokens_of(stream, epochs):
    """How often each token came in the chunks that lie in so many epochs."""
    found = []
    while stream.counts["epoch"] < epochs:
        found += take(stream, 12)
    found += take(stream, SHAPE["chunk_rows"] * 4 // 8)  # the chunks that were begun
    return Counter(tuple(row) for batch in found for row in batch[0].int().tolist() if row[0] >= 0)


@PACKING
def test_every_token_comes_once_an_epoch(lm, tokens_as_rows, packing):
    stream = stream_of(lm, contexts={"packing": packing, "drop_first": False, "separator": None})
    seen = tokens_of(stream, 3)
    for number, text in enumerate(TEXTS):
        for offset, token in enumerate(lm.tokenizer(text)["input_ids"]):
            assert seen.pop((number, offset, token)) in (3, 4, 5)  # the last chunks are of the epochs that follow
    assert not seen


@PACKING
def test_ranks_share_the_documents(lm, tokens_as_rows, packing):
    of_ranks = []
    for rank in range(3):
        stream = stream_of(lm, rank=rank, world=3, opened={"hold_out": 5}, contexts={"packing": packing})
        of_ranks.append({document for document, _, _ in tokens_of(stream, 2)})
    assert set.union(*of_ranks) == {i for i in range(30) if i % 5 != 4}
    assert sum(map(len, of_ranks)) == 24


def test_rows_are_those_of_the_text_and_sites_are_aligned(lm):
    """Of one chunk: those that :func:`stream_activations` gives, with what the other site has there."""
    stream = stream_of(lm, chunk_rows=84, chunks=1, batch_rows=4)
    found = [torch.cat(part) for part in zip(*take(stream, 21), strict=True)]
    settings = {"context_length": 16, "batch_size": 3}
    wanted = [
        torch.cat(list(stream_activations(lm, TEXTS, site=site, **settings)))[:84] for site in SITES
    ]
    order = [torch.cat(pair, 1)[:, 0].argsort() for pair in (found, wanted)]
    assert not torch.equal(found[0], wanted[0])
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x[order[0]], y[order[1]])
    first = stream_of(lm, chunk_rows=84, chunks=3, batch_rows=4).first_chunk()
    assert torch.equal(first[0][first[0][:, 0].argsort()], wanted[0][order[1]])


def test_widths_and_dtypes(lm):
    stream = stream_of(lm, sites=["blocks.1.mlp.hook_post", "blocks.0.hook_resid_post"], dtype="bfloat16")
    assert stream.widths == (128, 32)
    assert [(x.shape, x.dtype) for x in stream.next()] == [((8, 128), torch.bfloat16), ((8, 32), torch.bfloat16)]
    exact = stream_of(lm, sites=["blocks.1.mlp.hook_post", "blocks.0.hook_resid_post"])
    exact.next()
    assert all(torch.equal(x.bfloat16(), y) for x, y in zip(exact.next(), stream.next(), strict=True))


# ------------------------------------------------------------------------------------- padding, masks, what is left out


def test_padded_rows_are_those_of_each_document_alone(lm):
    contexts = {"packing": False, "drop_first": False}
    stream = stream_of(lm, contexts=contexts, chunk_rows=480, chunks=1, sites=SITES[:1])
    found = torch.cat([batch[0] for batch in take(stream, 60)])
    begin = torch.tensor([lm.tokenizer.eos_token_id])
    wanted = []
    for text in TEXTS:
        for run in torch.tensor(lm.tokenizer(text)["input_ids"]).split(15):
            wanted.append(read_activations(lm.model, torch.cat([begin, run])[None], site=SITES[0])[0])
    wanted = torch.cat(wanted)[:480]
    order = [x[:, :4].sum(1).argsort() for x in (found, wanted)]
    torch.testing.assert_close(found[order[0]], wanted[order[1]])
    assert stream.counts["mask"] == 0


@PACKING
def test_token_data_with_padding_is_the_text_without_it(lm, packing):
    ids = [lm.tokenizer(text)["input_ids"] for text in TEXTS]
    padded = [
        {"input_ids": [-100] * (i % 4) + row + [0] * (i % 3),
         "attention_mask": [0] * (i % 4) + [1] * len(row) + [0] * (i % 3)}
        for i, row in enumerate(ids)
    ]
    stream = stream_of(lm, padded, opened={"column": "input_ids"}, contexts={"packing": packing})
    plain = stream_of(lm, contexts={"packing": packing})
    assert same(take(stream, 50), take(plain, 50))
    assert stream.counts["mask"] > 0
    assert {**stream.counts, "mask": 0} == plain.counts


def test_a_document_that_begins_with_the_first_token_gets_no_second(lm, tokens_as_rows):
    first = lm.tokenizer.eos_token_id
    texts = [[first, 5, 6], [7, 8]]
    stream = stream_of(lm, texts, contexts={"packing": False, "drop_first": False}, chunks=1)
    found = {tuple(row) for row in take(stream, 1)[0][0].int().tolist()}
    assert found <= {(0, 0, first), (0, 1, 5), (0, 2, 6), (-1, -1, first), (1, 0, 7), (1, 1, 8)}
    assert stream.counts["tokens"] * 3 == stream.counts["rows"] * 3
    dropped = stream_of(lm, texts, contexts={"packing": False}, chunks=1)
    rows_seen = {tuple(row) for batch in take(dropped, 3) for row in batch[0].int().tolist()}
    assert rows_seen == {(0, 1, 5), (0, 2, 6), (1, 0, 7), (1, 1, 8)}


def planted(monkeypatch, plant):
    true = rows.batch_rows

    def batch_rows(lm, batch, *sites):
        found = true(lm, batch, *sites)
        plant(batch, found)
        return found

    monkeypatch.setattr(rows, "batch_rows", batch_rows)


def test_rows_that_are_not_finite_or_too_long_are_left_out_at_all_sites(lm, monkeypatch):
    plain = stream_of(lm, chunk_rows=960)
    wanted = [torch.cat(part) for part in zip(*take(plain, 40), strict=True)]
    wrong = {"norm": 0, "nonfinite": 0}

    def plant(batch, found):
        at = int(batch.input_ids.sum())  # some batches, by what they hold
        if at % 7 == 1:
            found[1][3, 2] = torch.nan
            found[0][4, 1] = torch.inf
        if at % 5 == 1:
            found[0][7] *= 1e4

    planted(monkeypatch, plant)
    stream = stream_of(lm, chunk_rows=960, max_norm_multiple=30.0)
    found = [torch.cat(part) for part in zip(*take(stream, 40), strict=True)]
    wrong = {name: stream.counts[name] for name in wrong}
    assert wrong["norm"] > 0 and wrong["nonfinite"] > 0
    assert stream.counts["tokens"] == sum(stream.counts[name] for name in ("rows", "excluded", "norm", "nonfinite"))
    assert all(bool(x.isfinite().all()) and float(x.norm(dim=1).max()) < 1e3 for x in found)
    pairs = {tuple(row) for row in torch.cat([wanted[0][:, :2], wanted[1][:, :2]], 1).tolist()}
    rows_found = [tuple(row) for row in torch.cat([found[0][:, :2], found[1][:, :2]], 1).tolist()]
    assert sum(row in pairs for row in rows_found) > 0.5 * len(rows_found)  # mixed otherwise, since some are missing
    states = json.dumps(stream.state_dict())
    after = take(stream, 5)
    stream.load_state_dict(json.loads(states))
    assert same(take(stream, 5), after)


def test_too_many_rows_that_are_not_finite_end_it(lm):
    with torch.no_grad():
        lm.model.transformer.wte.weight[lm.tokenizer("17")["input_ids"][0]] = torch.inf
    stream = stream_of(lm, DOCUMENTS)
    said = (r"40 documents that were given: \d+ of \d+ rows were not finite, more than 1% of them or of a chunk: .*"
            r"'tiny' makes such numbers of document \d+ after '.*1', first in module 'transformer\.wte'")
    with pytest.raises(FloatingPointError, match=said):
        take(stream, 200)
    with pytest.raises(FloatingPointError, match=said):  # it does not go on with other rows
        take(stream, 200)


def test_numbers_that_the_rows_dtype_cannot_hold(lm, monkeypatch):
    planted(monkeypatch, lambda batch, found: found[0].mul_(1e6))
    with pytest.raises(FloatingPointError, match="in float16, larger numbers overflow; use bfloat16 or float32"):
        take(stream_of(lm, dtype=torch.float16), 9)


def test_tokens_of_another_tokenizer_are_named(lm):
    with pytest.raises(ValueError, match=r"document 1 of .* holds token id 300, and 'tiny' has tokens 0\.\.299"):
        stream_of(lm, [[1, 2], [3, 300]]).next()
    with pytest.raises(ValueError, match=r"document 0 of .* holds token id -100"):
        stream_of(lm, [[1, -100]]).next()


def test_a_text_without_a_row_ends_instead_of_going_on_for_ever(lm):
    with pytest.raises(ValueError, match=r"in a whole epoch of 2 documents .* there is no row to train on"):
        stream_of(lm, [[5, 5], [5]], contexts={"exclude_tokens": [5, "eos"]}).next()
    with pytest.raises(ValueError, match="there is no text"):
        stream_of(lm, ["", ""]).next()


# --------------------------------------------------------------------------------------------- what is refused


def test_states_of_other_streams_are_refused(lm):
    stream = stream_of(lm)
    take(stream, 20)
    state = stream.state_dict()
    for other, said in [
        (stream_of(lm, TEXTS[:-1]), "30 documents|29 documents that were given is not the text, or not in the order"),
        (stream_of(lm, opened={"hold_out": 4}), "is not the text, or not in the order, that it was saved for"),
        (stream_of(lm, sites=SITES[:1]), r"state: sites was \['blocks.1.hook_resid_pre', 'blocks.0"),
        (stream_of(lm, rank=1, world=2), "state: rank was 0 when it was saved, and is 1 now"),
        (stream_of(lm, seed=1), "state: seed was 0 when it was saved, and is 1 now"),
        (stream_of(lm, chunk_rows=192), "state: chunk_rows was 96"),
    ]:
        with pytest.raises(ValueError, match=said):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="state is none of a stream, or damaged: it has no 'sites'"):
        stream.load_state_dict({})
    for change in ({"token": 10**6}, {"used": 10**4}):
        moved = json.loads(json.dumps(state))
        moved["positions"][0].update(change)
        with pytest.raises(ValueError, match="is not what it was when the state was saved"):
            (stream.load_state_dict(moved), stream.next())


def test_arguments_are_checked(lm):
    for options, kind, said in [
        ({"sites": []}, ValueError, "sites must name at least one site"),
        ({"sites": "blocks.0.hook_resid_pre"}, TypeError, "sites must be a sequence of sites"),
        ({"sites": ["blocks.9.hook_resid_pre"]}, ValueError, r"layer must be in 0\.\.2"),
        ({"batch_rows": 7}, ValueError, r"chunk_rows must be a multiple of chunks \* batch_rows = 3 \* 7"),
        ({"max_norm_multiple": 0}, ValueError, "max_norm_multiple must be a number above 0"),
        ({"max_norm_multiple": "2"}, ValueError, "max_norm_multiple must be a number above 0"),
        ({"prefetch": 1}, TypeError, "prefetch must be True or False"),
        ({"dtype": "int8"}, (TypeError, ValueError), "dtype"),
        ({"device": "nowhere"}, (TypeError, ValueError), "device"),
    ]:
        with pytest.raises(kind, match=said):
            stream_of(lm, **options)
    source = open_source(TEXTS, rank=1, world=2)
    with pytest.raises(ValueError, match="source was opened for rank 1 of 2, not 0 of 1"):
        RowStream(lm, source, SITES, contexts_of(lm), **SHAPE, seed=0)
    with pytest.raises(TypeError, match="source must be a Source, got list"):
        RowStream(lm, TEXTS, SITES, contexts_of(lm), **SHAPE, seed=0)


# -------------------------------------------------------------------------------------------- from collections


@pytest.fixture
def stores(tmp_path):
    lm = tiny_gpt2()
    texts = DOCUMENTS[:20]
    return [collect(lm, tmp_path / site, texts, site=site, shard_tokens=70) for site in ("resid_pre", "mlp_out")]


def test_stores_give_every_row_once_an_epoch_and_aligned(stores):
    wanted = torch.cat([store.tensor() for store in stores], 1)
    stream = StoreStream(stores, batch_rows=32, seed=1)
    count = 3 * len(wanted)
    found = torch.cat([torch.cat(batch, 1) for batch in take(stream, -(-count // 32))])
    assert stream.widths == (32, 32) and len(wanted) % 32
    for epoch in range(3):
        part = found[epoch * len(wanted) : (epoch + 1) * len(wanted)]
        assert sorted(map(tuple, part.tolist())) == sorted(map(tuple, wanted.tolist()))
    assert not torch.equal(found[: len(wanted)], found[len(wanted) : 2 * len(wanted)])
    assert stream.counts["epoch"] == 3 and stream.counts["rows"] == len(found)


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_stream_of_stores_stops_and_goes_on(stores, prefetch):
    running, states, found = StoreStream(stores, batch_rows=32, seed=1, prefetch=prefetch), [], []
    for _ in range(3 * len(stores[0]) // 32):
        states.append(json.dumps(running.state_dict()))
        found.append(running.next())
    for number in random.Random(0).sample(range(len(states)), 12):
        resumed = StoreStream(stores, batch_rows=32, seed=1, prefetch=not prefetch)
        resumed.load_state_dict(json.loads(states[number]))
        assert json.dumps(resumed.state_dict()) == states[number]
        rest = found[number:]
        assert same(take(resumed, len(rest)), rest)


def test_the_first_rows_of_stores_are_asked_for_without_taking_them(stores):
    stream = StoreStream(stores, batch_rows=32, seed=1, chunk_rows=100)
    first = stream.first_chunk()
    assert [x.shape for x in first] == [(100, 32)] * 2
    batches = take(stream, 3)
    assert torch.equal(torch.cat([x for x, _ in batches]), first[0][:96])
    assert len(StoreStream(stores, batch_rows=32, seed=1).first_chunk()[0]) == len(stores[0])


def test_ranks_share_the_shards(stores):
    wanted = stores[0].tensor()
    found = []
    for rank in range(2):
        stream = StoreStream(stores, batch_rows=10, seed=1, rank=rank, world=2)
        mine = sum(shard["tokens"] for shard in stores[0].manifest["shards"][rank::2])
        found.append(torch.cat([x for x, _ in take(stream, -(-mine // 10))])[:mine])
    assert sorted(map(tuple, torch.cat(found).tolist())) == sorted(map(tuple, wanted.tolist()))


def test_stores_that_do_not_fit_are_refused(stores, tmp_path):
    lm = tiny_gpt2()
    other = collect(lm, tmp_path / "other", DOCUMENTS[1:21], shard_tokens=70)
    for given, options, kind, said in [
        ([stores[0], other], {}, ValueError, "are not of the same tokens: collect both of the same texts"),
        ([], {}, ValueError, "stores must hold at least one"), ([DOCUMENTS], {}, TypeError, "sequence of ActivationSt"),
        (stores, {"world": 99, "rank": 98}, ValueError, "shards for 99 ranks"),
        (stores, {"batch_rows": 0}, ValueError, "batch_rows must be at least 1"),
        (stores, {"buffer_shards": 0}, ValueError, "buffer_shards must be at least 1"),
        (stores, {"prefetch": 1}, TypeError, "prefetch must be True or False"),
    ]:
        with pytest.raises(kind, match=said):
            StoreStream(given, **{"batch_rows": 32, "seed": 0, **options})
    state = StoreStream(stores, batch_rows=32, seed=0).state_dict()
    for options, said in [({"seed": 1}, "seed was 0"), ({"batch_rows": 16}, "batch_rows was 32")]:
        with pytest.raises(ValueError, match=f"state: {said} when it was saved"):
            StoreStream(stores, **{"batch_rows": 32, "seed": 0, **options}).load_state_dict(state)
    with pytest.raises(ValueError, match="state: stores was"):
        StoreStream([other, other], batch_rows=32, seed=0).load_state_dict({**state, "sites": [
            "blocks.1.hook_resid_pre"] * 2})  # fmt: skip


# ------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
def test_reading_ahead_on_a_gpu_changes_no_bit(stores):
    lm = load_language_model(device="cuda")
    plain, ahead = stream_of(lm, chunk_rows=384), stream_of(lm, chunk_rows=384, prefetch=True)
    for _ in range(300):
        x, y = plain.next(), ahead.next()
        assert x[0].is_cuda and all(map(torch.equal, x, y))
    ahead.settle()
    options = {"batch_rows": 32, "seed": 1, "device": "cuda"}
    plain, ahead = (StoreStream(stores, prefetch=prefetch, **options) for prefetch in (False, True))
    assert same(take(plain, 60), take(ahead, 60))
