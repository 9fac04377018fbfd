"""What the language model is given, and which tokens become rows: separators, first tokens, exclusion, batches."""

from dataclasses import replace

import pytest
import torch
from tiny_models import DOCUMENTS, collect, tiny_gpt2, tokenizer_of_bytes

from sae_engine.data import read_activations, stream_activations
from sae_engine.data.contexts import contexts_of, token_batches


@pytest.fixture(scope="module")
def lm():
    return tiny_gpt2()


def batches(lm, texts, **settings):
    return list(token_batches(lm, texts, contexts_of(lm, **{"context_length": 8, "batch_size": 2, **settings})))


def ids_of(text):
    return tokenizer_of_bytes()(text, verbose=False)["input_ids"]


EOS = tokenizer_of_bytes().eos_token_id


@pytest.mark.parametrize(("separator", "id"), [("eos", EOS), (None, None), (7, 7)])
@pytest.mark.parametrize(("first_token", "first"), [("bos", EOS), (None, None), (5, 5)])
def test_what_stands_between_documents_and_before_contexts(lm, separator, id, first_token, first):
    texts = ["one", "", "two three", ids_of("four")]
    found = batches(lm, texts, separator=separator, first_token=first_token)
    run = 8 - (first is not None)
    stream = [t for text in ("one", "two three", "four") for t in [*ids_of(text), *([] if id is None else [id])]]
    front = [] if first is None else [first]
    expected = [[*front, *stream[at : at + run]] for at in range(0, len(stream), run)]
    assert [row for batch in found for row in batch.input_ids.tolist()] == expected
    documents = torch.cat([batch.documents.flatten() for batch in found])
    assert documents.unique().tolist() == ([-1] if front else []) + [0, 2, 3]  # empty documents count


def test_excluded_tokens_and_positions_are_seen_and_not_kept(lm):
    whole = batches(lm, ["a b c a b"], batch_size=9, drop_first=False)[0]
    wanted = ids_of("b")[0]
    batch = batches(lm, ["a b c a b"], batch_size=9, exclude_tokens=["eos", wanted], exclude_positions=[2])[0]
    assert torch.equal(batch.input_ids, whole.input_ids)
    flat, positions = batch.input_ids.flatten(), batch.positions.flatten()
    keep = [i for i in range(len(flat)) if flat[i] not in (EOS, wanted) and positions[i] not in (0, 2)]
    assert batch.kept.tolist() == keep and 0 < len(keep) < len(whole.kept)


def test_rows_of_stream_and_store_are_those_that_are_kept(lm, tmp_path):
    settings = {"exclude_tokens": ["eos", ids_of("x")[0]], "exclude_positions": range(1, 3), "separator": None}
    rows = torch.cat(list(stream_activations(lm, DOCUMENTS, layer=1, batch_size=4, **settings)))
    parts = token_batches(lm, DOCUMENTS, contexts_of(lm, batch_size=4, **settings))
    expected = [read_activations(lm.model, b.input_ids, layer=1).flatten(0, 1)[b.kept] for b in parts]
    assert torch.equal(rows, torch.cat(expected))
    store = collect(lm, tmp_path, dtype=torch.float32, **settings)
    assert torch.equal(store.tensor(), rows)
    tokens = store.row_tokens()
    assert not torch.isin(tokens.token_ids, torch.tensor([EOS, ids_of("x")[0]])).any()
    assert tokens.positions.min() == 3
    place = store.provenance
    assert (place.separator, place.excluded[0]) == ("none", "first")
    assert set(place.excluded) == {"first", "eos", str(ids_of("x")[0]), "position 1", "position 2"}


def padded(side):
    lengths, length = (4, 7, 1), 7
    ids, mask = torch.full((3, length), 299), torch.zeros(3, length, dtype=torch.bool)
    for row, count in enumerate(lengths):
        at = slice(length - count, length) if side == "left" else slice(0, count)
        ids[row, at], mask[row, at] = torch.arange(count) + 10 * row, True
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_are_rows_of_their_tokens_alone(lm, tmp_path, side):
    given = [padded(side), padded(side)["input_ids"]]  # the second without a mask: nothing is padding
    rows = torch.cat(list(stream_activations(lm, given[:1], layer=2)))
    documents = [torch.arange(count)[None] + 10 * row for row, count in enumerate((4, 7, 1))]
    alone = [read_activations(lm.model, ids, layer=2)[0, 1:] for ids in documents]
    torch.testing.assert_close(rows, torch.cat(alone), rtol=1e-5, atol=1e-6)
    store = collect(lm, tmp_path, given, layer=2, drop_first=False)
    tokens = store.row_tokens()
    assert len(store) == 12 + 21 and tokens.documents.unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(tokens.token_ids[:12], torch.tensor([0, 1, 2, 3, *range(10, 17), 20], dtype=torch.int32))
    assert tokens.positions[:12].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 0]
    other = padded(side)
    other["input_ids"] = other["input_ids"].masked_fill(other["attention_mask"] == 0, -100)
    again = collect(lm, tmp_path, [other, given[1]], layer=2, drop_first=False, max_tokens=99)  # the same texts
    assert torch.equal(again.tensor(), store.tensor())


def test_a_batch_of_excluded_tokens_is_passed_over(lm, tmp_path):
    given = [torch.full((1, 3), 9), torch.tensor([[9, 8, 7]])]
    rows = list(stream_activations(lm, given, layer=1, exclude_tokens=[9]))
    assert [len(x) for x in rows] == [2]
    store = collect(lm, tmp_path / "wide", [*given, *given], exclude_tokens=[9], site="mlp_post")  # wider than d_model
    assert store.tensor().shape == (4, 128) and store.row_tokens().token_ids.tolist() == [8, 7, 8, 7]
    with pytest.raises(ValueError, match="texts: every token of them is excluded"):
        collect(lm, tmp_path, given[:1], exclude_tokens=[9])
    with pytest.raises(ValueError, match="no text"):
        collect(lm, tmp_path, [])


@pytest.mark.parametrize(
    ("texts", "error", "match"),
    [
        (["text", torch.zeros(2, 3, dtype=torch.int64)], TypeError, "texts: item 1 is a batch"),
        ([{"input_ids": [[1, 2]]}, [1, 2]], TypeError, "texts: item 1 is a document"),
        ([{"ids": [[1, 2]]}], ValueError, "texts: batch 0 has no 'input_ids', only.*ids"),
        ([{"input_ids": [1, 2]}], ValueError, r"texts: batch 0: input_ids must be \(B, T\)"),
        ([{"input_ids": [[1.0, 2.0]]}], TypeError, "texts: batch 0: input_ids must be integers"),
        ([{"input_ids": [[1, 2], [1]]}], TypeError, "texts: batch 0: input_ids must be integers"),
        ([{"input_ids": torch.zeros(1, 40, dtype=torch.int64)}], ValueError, "batch 0 has 40 tokens.*length=32"),
        ([{"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}], ValueError, "batch 0: attention_mask: row 0"),
        ([{"input_ids": [[1, 2]], "attention_mask": [[1.0, 0.0]]}], TypeError, "0: attention_mask must be integers"),
        ([[1, 2, 300]], ValueError, "300 is no token"),
        ([[1, -2]], ValueError, "-2 is no token"),
        ([None], TypeError, "texts: document 0 must be strings or token ids, got NoneType"),
        ([{1, 2}], TypeError, "texts: document 0 must be strings or token ids, got set"),
        ([torch.zeros(2)], TypeError, "texts: document 0 .*float32"),
        (torch.zeros(2, 3), TypeError, "texts must be an iterable"),
        ({"input_ids": [[1]]}, TypeError, "texts must be an iterable"),
        (3, TypeError, "texts must be an iterable"),
    ],
)
def test_texts_that_are_none_are_named(lm, texts, error, match):
    with pytest.raises(error, match=match):
        list(stream_activations(lm, texts, layer=1))


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"separator": "sep"}, ValueError, "separator must be a token id or one of.*'eos'"),
        ({"separator": "pad"}, ValueError, "separator: the tokenizer of 'tiny' has no PAD token; .*None"),
        ({"separator": 1.0}, TypeError, "separator"),
        ({"separator": -1}, ValueError, "separator"),
        ({"separator": 300}, ValueError, r"separator must be in 0\.\.299, got 300"),
        ({"first_token": True}, TypeError, "first_token"),
        ({"exclude_tokens": "eos"}, TypeError, "exclude_tokens must be a collection"),
        ({"exclude_tokens": [None]}, TypeError, "exclude_tokens"),
        ({"exclude_tokens": ["pad"]}, ValueError, "exclude_tokens: the tokenizer of 'tiny' has no PAD token; name"),
        ({"exclude_positions": 3}, TypeError, "exclude_positions must be a collection"),
        ({"exclude_positions": [-1]}, ValueError, r"exclude_positions must be in 0\.\.31, got -1"),
        ({"exclude_positions": [32]}, ValueError, "exclude_positions"),
        ({"exclude_positions": ["first"]}, TypeError, "exclude_positions"),
    ],
)
def test_settings_that_are_none_are_named(lm, changed, error, match):
    with pytest.raises(error, match=match):
        next(stream_activations(lm, DOCUMENTS, layer=1, **changed))


def test_a_model_without_a_tokenizer_takes_token_ids(lm):
    bare = replace(lm, tokenizer=None)
    with pytest.raises(ValueError, match=r"first_token: 'tiny' has no tokenizer to say what 'bos'.*first_token=None"):
        stream_activations(bare, [[1, 2]], layer=1)
    settings = {"first_token": EOS, "separator": EOS, "layer": 1}
    rows = torch.cat(list(stream_activations(bare, [ids_of(text) for text in DOCUMENTS], **settings)))
    assert torch.equal(rows, torch.cat(list(stream_activations(lm, DOCUMENTS, layer=1))))
    with pytest.raises(ValueError, match=r"texts: 'tiny' has no tokenizer.*token ids, not strings"):
        next(stream_activations(bare, ["text"], **settings))


def test_documents_that_are_not_packed_have_contexts_of_their_own(lm):
    contexts = contexts_of(lm, context_length=6, batch_size=3, packing=False, exclude_tokens=[7])
    first = lm.tokenizer.eos_token_id
    documents = [[5, 7, 8], [], [9] * 12, [first, 4], [6]]
    found = list(token_batches(lm, map(torch.tensor, documents), contexts))
    assert [batch.input_ids.tolist() for batch in found] == [
        [[first, 5, 7, 8, 0, 0], [first, *[9] * 5], [first, *[9] * 5]], [[first, 9, 9], [first, 4, 0], [first, 6, 0]]
    ]  # fmt: skip
    assert found[1].attention_mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]
    assert found[1].documents.tolist() == [[-1, 2, 2], [3, 3, -1], [-1, 4, -1]]
    assert found[1].offsets.tolist() == [[-1, 10, 11], [0, 1, -1], [-1, 0, -1]]
    assert [batch.kept.tolist() for batch in found] == [[1, 3, *range(7, 12), *range(13, 18)], [1, 2, 4, 7]]
    with pytest.raises(TypeError, match="packing must be True or False"):
        contexts_of(lm, packing=None)
