"""Documents of every kind of text: in order, from any place, epoch after epoch, dealt to ranks, some held out."""

import copy
import functools
import gzip
import json
import sys
import types
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny_models import tokenizer_of_bytes

from sae_engine.data import HELD_OUT_MODULES, evaluation_text, open_source, stdlib_texts

TEXTS = [f"Text {i}, " + "word " * (i % 5) for i in range(23)]


def first(source, count, cursor=None):
    return list(islice(source.documents(cursor), count))


def texts(source, count, cursor=None):
    return [text for _, text in first(source, count, cursor)]


def write(folder, kind):
    """A text of ``TEXTS``, and what opens it."""
    if kind == "list":
        return TEXTS
    if kind == "folder":
        for number, text in enumerate(TEXTS):
            (folder / f"{number:02d}.txt").write_text(text)
        return folder
    if kind == "file":
        (folder / "all.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
        return folder / "all.txt"
    records = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
    lines = [json.dumps(record) + "\n" for record in records]
    if kind == "jsonl":
        (folder / "a.jsonl").write_text("\n".join(lines[:9]))  # with empty lines
        (folder / "b.jsonl").write_text("".join(lines[9:]))
        return folder
    if kind == "jsonl.gz":
        with gzip.open(folder / "all.jsonl.gz", "wt") as file:
            file.writelines(lines)
        return folder / "all.jsonl.gz"
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, part in (("a", records[:16]), ("b", records[16:])):
        parquet.write_table(arrow.Table.from_pylist(part), folder / f"{name}.parquet", row_group_size=5)
    return folder


KINDS = ["list", "folder", "file", "jsonl", "jsonl.gz", "parquet"]


@pytest.fixture(params=[*KINDS[:-1], pytest.param("parquet", marks=pytest.mark.interop)])
def path(request, tmp_path):
    return write(tmp_path, request.param)


def stripped(found):
    return [text.strip() for text in found]


def test_every_text_comes_in_order_and_again(path):
    found = first(open_source(path, hold_out=None), 50)
    assert stripped(text for _, text in found) == stripped((TEXTS * 3)[:50])
    assert [cursor["epoch"] for cursor, _ in found] == [n // 23 for n in range(50)]
    assert [cursor["document"] for cursor, _ in found] == [n % 23 + 1 for n in range(50)]


def test_any_cursor_goes_on(path):
    whole = first(open_source(path, hold_out=4), 40)
    for number in (0, 1, 6, 11, 16, 17, 18, 30):
        cursor = json.loads(json.dumps(whole[number][0]))
        assert first(open_source(path, hold_out=4), 9, cursor) == whole[number + 1 : number + 10]


def test_some_are_held_out_at_every_rank(path):
    sources = [open_source(path, hold_out=5, rank=rank, world=3) for rank in range(3)]
    held_out = [TEXTS[i] for i in range(4, 23, 5)]
    for source in sources:
        assert stripped(source.held_out(99)) == stripped(held_out)
        assert stripped(source.held_out(2)) == stripped(held_out[:2])
    dealt = [stripped(text for cursor, text in first(source, 8) if cursor["epoch"] == 0) for source in sources]
    assert [len(found) for found in dealt] == [7, 6, 6]
    others = [text for text in TEXTS if text not in held_out]
    assert sorted(text for found in dealt for text in found) == sorted(stripped(others))


def test_no_more_is_held_out_than_is_asked_for():
    """Of a long text that is streamed, what is beyond is not read."""
    class Lazy(list):
        reads = 0

        def __getitem__(self, at):
            self.reads += 1
            return super().__getitem__(at)

    given = Lazy([f"{i:03d} " * 20 for i in range(1000)])  # of 80 characters, 10 tokens at the least
    source = open_source(given, hold_out=4)
    given.reads = 0
    assert source.held_out(500, tokens=25) == [given[3], given[7], given[11]]
    assert given.reads <= 12 + 3
    ids = open_source([[1] * 10] * 20, hold_out=4)
    assert [len(ids.held_out(9, tokens=n)) for n in (10, 11, 20, 999)] == [1, 2, 2, 5]
    assert len(open_source("stdlib").held_out(99, tokens=1)) == 1


def test_half_held_out_leaves_something_for_each_rank():
    sources = [open_source(TEXTS, hold_out=2, rank=rank, world=2) for rank in range(2)]
    assert [texts(source, 2) for source in sources] == [[TEXTS[0], TEXTS[4]], [TEXTS[2], TEXTS[6]]]


def test_what_an_order_depends_on_is_in_the_fingerprint(tmp_path, monkeypatch):
    write(tmp_path, "folder")
    options = [{}, {"hold_out": 5}, {"world": 2}, {"world": 2, "rank": 1}, {"hold_out": None}]
    found = {open_source(tmp_path, **option).fingerprint for option in options}
    assert len(found) == 5 and open_source(tmp_path).fingerprint in found
    (tmp_path / "07.txt").write_text("another")
    assert open_source(tmp_path).fingerprint not in found
    assert open_source(TEXTS).fingerprint != open_source(TEXTS[::-1]).fingerprint
    monkeypatch.setattr("sae_engine.data.sources.stdlib_texts", lambda: iter(TEXTS))
    assert open_source("stdlib", seed=1).fingerprint != open_source("stdlib").fingerprint


# --------------------------------------------------------------------------------------------------- plain text


def test_a_long_file_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path):
    file = tmp_path / "book.txt"
    paragraphs = ["".join(f"Line {i} of {p}: æøå 中文\r\n" for i in range(p % 9)) + "\r\n" for p in range(400)]
    file.write_bytes("".join(paragraphs).encode())
    whole = texts(open_source(file, hold_out=None), 9)
    one_epoch = [text for cursor, text in first(open_source(file, hold_out=None), 20) if cursor["epoch"] == 0]
    assert "".join(one_epoch) == "".join(paragraphs).replace("\r\n", "\n")
    assert 3 <= len(one_epoch) <= 9 and all(text.endswith("\n\n") for text in one_epoch)
    assert all(8192 <= len(text.replace("\n", "\r\n").encode()) < 9000 for text in one_epoch[:-1])
    assert one_epoch == whole[: len(one_epoch)]


@pytest.mark.parametrize("text", ["x" * 50000, "中" * 20000, "é\n" * 20000, "🙂" * 9000], ids=["x", "3", "lines", "4"])
def test_a_file_without_paragraphs_is_cut_between_characters(tmp_path, text):
    file = tmp_path / "long.txt"
    file.write_text(text, newline="")
    found = [t for cursor, t in first(open_source(file, hold_out=None), 20) if cursor["epoch"] == 0]
    assert "".join(found) == text and len(found) > 1 and max(map(len, found)) <= 3 * 8192


def test_a_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert texts(open_source(tmp_path / "a.txt"), 1) == ["abc"]


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path):
    (tmp_path / "a.txt").write_text("ok")
    (tmp_path / "b.txt").write_bytes(b"fine\n\xff\xfe")
    with pytest.raises(ValueError, match=r"dataset_path: '.*b\.txt' is not UTF-8 text: byte 5 is 0xff"):
        first(open_source(tmp_path), 2)


def test_the_library_comes_in_another_order_each_epoch(monkeypatch):
    assert len(texts(open_source("stdlib"), 3)) == 3
    some = list(islice(stdlib_texts(), 40))
    monkeypatch.setattr("sae_engine.data.sources.stdlib_texts", lambda: iter(some))  # all of it takes a second to read
    source = open_source("stdlib", seed=3)
    found = first(source, 43)
    assert [cursor["epoch"] for cursor, _ in found] == [0] * 40 + [1] * 3
    assert sorted(text for _, text in found[:40]) == sorted(some)
    assert [text for _, text in found[40:]] != [text for _, text in found[:3]]
    assert first(open_source("stdlib", seed=3), 3, found[5][0]) == found[6:9]
    assert texts(open_source("stdlib", seed=4), 3) != [text for _, text in found[:3]]
    assert source.held_out(100) == evaluation_text()[:100] and len(source.held_out(2)) == 2
    assert len(source.held_out(100)) == len(HELD_OUT_MODULES)
    halves = [texts(open_source("stdlib", seed=3, rank=rank, world=2), 5) for rank in range(2)]
    assert halves == [[text for _, text in found[rank:10:2]] for rank in range(2)]


# ------------------------------------------------------------------------------------------------------ records


def test_token_ids_without_what_their_mask_leaves_out():
    rows = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}, {"input_ids": [0, 0, 8], "attention_mask": [0, 0, 1]},
        {"input_ids": [9, 4, 0], "attention_mask": [1, 1, 0]}, {"input_ids": [3], "attention_mask": [0]},
        {"input_ids": [], "attention_mask": []}, {"input_ids": torch.tensor([2, 1], dtype=torch.int32)},
    ]  # fmt: skip
    found = first(open_source(rows, column="input_ids", hold_out=None), 5)
    assert [ids.tolist() for _, ids in found] == [[5, 6, 7], [8], [9, 4], [2, 1], [5, 6, 7]]
    assert {ids.dtype for _, ids in found} == {torch.int64}
    assert [cursor["masked"] for cursor, _ in found] == [0, 2, 3, 4, 4]
    plain = first(open_source([[1, 2], [3]], hold_out=None), 3)
    assert [ids.tolist() for _, ids in plain] == [[1, 2], [3], [1, 2]]


def test_chats_are_written_by_the_tokenizer(tmp_path):
    tokenizer = types.SimpleNamespace(
        chat_template="x",
        apply_chat_template=lambda messages, tokenize: "|".join(f"{m['role']}:{m['content']}" for m in messages),
    )
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}))
    options = {"column": "messages", "hold_out": None}
    source = open_source(tmp_path / "chat.jsonl", tokenizer=tokenizer, **options)
    assert texts(source, 2) == ["user:Hi|assistant:Hello"] * 2
    with pytest.raises(ValueError, match=r"column 'messages' of document 0 of .* is a chat, and no tokenizer was giv"):
        texts(open_source(tmp_path / "chat.jsonl", **options), 1)
    real = copy.deepcopy(tokenizer_of_bytes())
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        texts(open_source([{"messages": chat}], tokenizer=real, **options), 1)
    real.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    assert texts(open_source([{"messages": chat}], tokenizer=real, **options), 1) == ["<user>Hi\n<assistant>Hello\n"]

    def refuse(messages, tokenize):
        raise RuntimeError("roles must alternate")

    tokenizer.apply_chat_template = refuse
    with pytest.raises(ValueError, match="chat template refuses it: roles must alternate"):
        texts(source, 1)


def test_empty_records_are_left_out_and_a_text_of_them_is_none():
    assert texts(open_source([{"text": ""}, {"text": None}, {"text": "a"}], hold_out=None), 2) == ["a", "a"]
    for given in ([], [""], [{"text": None}], ["", "", "held out"]):
        with pytest.raises(ValueError, match="dataset_path: there is no text in "):
            first(open_source(given, hold_out=3), 1)
    with pytest.raises(ValueError, match="there is no text for rank 2 of 3 in 2 documents that were given"):
        first(open_source(["a", "b"], rank=2, world=3), 1)
    source = open_source(["a"])
    cursor = first(source, 1)[0][0]
    assert texts(source, 1, cursor) == ["a"]  # the rest of an epoch may be empty


@pytest.mark.parametrize(("line", "said"), [
    ('{"text": 1', r"line 2 of '.*t\.jsonl' is not JSON"), ("[1]", r"line 2 of '.*' must be an object, got \[1\]"),
    ('{"texts": "a"}', "column: .* has no 'text', it has 'texts'; did you mean 'texts'"),
    ('{"text": {"a": 1}}', "column 'text' of document 1 of .* must be a text, a list of token ids or a list of mess"),
    ('{"text": [1.5]}', "must be a text, a list of token ids"), ('{"text": [[1]]}', "must be a text, a list of token"),
])  # fmt: skip
def test_what_is_wrong_with_a_line_is_said(tmp_path, line, said):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises((ValueError, TypeError), match=said):
        first(open_source(tmp_path / "t.jsonl"), 2)


@pytest.mark.parametrize(("mask", "said"), [
    ([1, 0, 1], "padding between tokens"), ([1, 1], "must be 3 numbers, 0 and 1"), ([1, 2, 1], "must be 3 numbers"),
])  # fmt: skip
def test_masks_that_are_none(mask, said):
    with pytest.raises(ValueError, match=f"column 'input_ids' of document 0 of .*attention_mask .*{said}"):
        first(open_source([{"input_ids": [1, 2, 3], "attention_mask": mask}], column="input_ids"), 1)


def test_padding_without_a_mask_is_refused_where_it_is_known_to_be_padding():
    rows = [{"input_ids": [5, 6, 7, 9, 9]}]
    tokenizer = types.SimpleNamespace(pad_token_id=9, eos_token_id=2)
    with pytest.raises(ValueError, match=r"document 0 of .* holds the tokenizer's padding token, 9"):
        first(open_source(rows, column="input_ids", tokenizer=tokenizer), 1)
    masked = [{**rows[0], "attention_mask": [1, 1, 1, 0, 0]}]
    assert texts(open_source(masked, column="input_ids", tokenizer=tokenizer), 1)[0].tolist() == [5, 6, 7]
    for same in ({"eos_token_id": 9}, {"eos_token_id": 2, "pad_token_id": None}):  # as GPT-2's, which says nothing
        tokenizer = types.SimpleNamespace(**{"pad_token_id": 9, **same})
        assert len(texts(open_source(rows, column="input_ids", tokenizer=tokenizer), 1)[0]) == 5


def test_damaged_and_foreign_files(tmp_path):
    packed = write(tmp_path, "jsonl.gz")
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"all\.jsonl\.gz' is cut off or damaged"):
        first(open_source(packed), 30)
    packed.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"all\.jsonl\.gz' is cut off or damaged"):
        first(open_source(packed), 1)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a\.json' must be plain text, or a record a line in \.jsonl"):
        open_source(tmp_path / "a.json")


def test_arguments_that_fit_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_engine.data.sources.stdlib_texts", lambda: iter(TEXTS))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    for given, options, kind, said in [
        (tmp_path / "empty", {}, ValueError, r"folder '.*empty' has no file ending in one of \.txt"),
        (tmp_path / "none", {}, FileNotFoundError, "dataset_path: '.*none' does not exist"),
        ("./data", {}, FileNotFoundError, r"'\./data' does not exist"),
        ("corpus.jsonl", {}, FileNotFoundError, r"'corpus\.jsonl' does not exist"),
        ("", {}, ValueError, "got an empty string"),
        (tmp_path, {"column": "txt"}, ValueError, "column: .* is plain text, without columns; got 'txt'"),
        ("stdlib", {"column": "txt"}, ValueError, "column: the Python standard library is plain text"),
        (tmp_path, {"dataset_name": "x"}, ValueError, "dataset_name is for data sets on the hub, got 'x'"),
        (tmp_path, {"split": "test"}, ValueError, "split is for data sets on the hub, got 'test'"),
        (iter(["a"]), {}, TypeError, "documents that can be read more than once, got list_iterator"),
        (7, {}, TypeError, "dataset_path must be a path"), ({"text": ["a"]}, {}, TypeError, "dataset_path must be"),
        (tmp_path, {"hold_out": 1}, ValueError, "hold_out must be at least 2"),
        (tmp_path, {"rank": 2, "world": 2}, ValueError, r"rank must be in 0\.\.1"),
        (tmp_path, {"world": 0}, ValueError, "world must be at least 1"),
        ("name/of-data", {"split": None}, ValueError, "split: which part of the data set"),
    ]:  # fmt: skip
        with pytest.raises(kind, match=said):
            open_source(given, **options)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        open_source(tmp_path).held_out(0)


# ------------------------------------------------------------------------------------------ other packages


class Shared:
    """As the cache of file systems that data sets share, to which other threads write."""

    def __deepcopy__(self, memo):
        raise RuntimeError("dictionary changed size during iteration")


class Streamed:
    """What ``datasets`` streams, as far as it is used."""

    column_names = ("id", "text")
    info = types.SimpleNamespace(dataset_name="played")

    def __init__(self, numbers):
        self.at, self._numbers, self._files_cache, self.num_shards = 0, numbers, Shared(), 1

    def __iter__(self):
        while self.at < len(self._numbers):
            number = self._numbers[self.at]
            self.at += 1
            yield {"id": number, "text": TEXTS[number]}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]

    def shard(self, num_shards, index):
        size = len(self._numbers) // num_shards
        last = None if index == num_shards - 1 else (index + 1) * size
        return Streamed(self._numbers[index * size : last])


@pytest.fixture
def hub(monkeypatch):
    asked = []

    def load_dataset(path, name, *, split, streaming):
        asked.append((path, name, split, streaming))
        if path == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub or cannot be accessed.\nMore.")
        if name == "wrong":
            raise ValueError("BuilderConfig 'wrong' not found. Available: ['default']")
        found = Streamed(range(len(TEXTS)))
        found.num_shards = 5 if path == "many/files" else 1
        return found

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_data_sets_on_the_hub_are_streamed(hub):
    source = open_source("some/text", dataset_name="small", split="validation", hold_out=4)
    assert hub == [("some/text", "small", "validation", True)] and source.description == "some/text/small/validation"
    documents = source.documents()
    found = [next(documents) for _ in range(5)]
    assert source.held_out(2) == [TEXTS[3], TEXTS[7]]  # another iteration does not move this one
    found += islice(documents, 30)
    assert [text for _, text in found] == [TEXTS[i] for i in (*range(23), *range(23)) if i % 4 != 3][:35]
    again = open_source("some/text", dataset_name="small", split="validation", hold_out=4)
    assert first(again, 9, json.loads(json.dumps(found[11][0]))) == found[12:21]


def test_files_of_a_data_set_on_the_hub_come_in_an_order_that_the_seed_says(hub):
    """Each document once an epoch, in its file's order; what is held out is never trained on, in any epoch."""
    files = [*(TEXTS[start : start + 4] for start in (0, 4, 8, 12)), TEXTS[16:]]
    orders = []
    for seed in (0, 1, 0):
        source = open_source("many/files", hold_out=None, seed=seed)
        documents = first(source, 2 * len(TEXTS))
        found = [text for _, text in documents]
        assert found[: len(TEXTS)] == found[len(TEXTS) :] and sorted(found[: len(TEXTS)]) == sorted(TEXTS)
        order = sorted(range(5), key=lambda number: found.index(files[number][0]))
        assert found[: len(TEXTS)] == [text for number in order for text in files[number]]
        orders.append(order)
        for number in (0, 3, 4, 21, 22, 30):  # within a file, at the end of one, of the epoch
            cursor = json.loads(json.dumps(documents[number][0]))
            again = open_source("many/files", hold_out=None, seed=seed)
            assert first(again, 9, cursor) == documents[number + 1 : number + 10]
    assert orders[0] == orders[2] != orders[1]
    held = open_source("many/files", hold_out=4, seed=1)
    kept = held.held_out(10)
    assert len(kept) == 5 and not {*kept} & {text for _, text in first(held, 60)}
    assert held.fingerprint != open_source("many/files", hold_out=4, seed=2).fingerprint


def test_what_the_hub_refuses_is_named(hub):
    with pytest.raises(OSError, match=r"dataset_path: 'no/such', dataset_name=None, split='train' is neither a file no"
                                      r"r a data set that the hub has: Dataset 'no/such' doesn't exist on the Hub"):
        open_source("no/such")
    with pytest.raises(ValueError, match=r"dataset_name='wrong'.* Available"):
        open_source("some/text", dataset_name="wrong")
    with pytest.raises(ValueError, match="column: some/text/train has no 'txt', it has 'id', 'text'; did you mean 'te"):
        open_source("some/text", column="txt")


def test_missing_packages_say_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")

    def missing(module):
        package = module.partition(".")[0]
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("importlib.import_module", missing)
    for package, given in (("datasets", "some/text"), ("pyarrow", tmp_path)):
        with pytest.raises(ImportError, match=f"pip install {package}"):
            open_source(given)


@pytest.mark.interop
def test_parquet_reads_the_columns_that_it_needs(tmp_path):
    path = write(tmp_path, "parquet")
    with pytest.raises(ValueError, match=r"column: .* has no 'txt', it has 'id', 'text'; did you mean 'text'"):
        open_source(path, column="txt")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0], "text": "x"}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "tokens.parquet")
    source = open_source(tmp_path / "tokens.parquet", column="input_ids")
    assert next(source.documents())[1].tolist() == [1, 2]
    (tmp_path / "tokens.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"tokens\.parquet' is no parquet file, or damaged"):
        open_source(tmp_path / "tokens.parquet", column="input_ids")


@pytest.mark.interop  # SAELens brings datasets and pyarrow
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_real_streamed_data_sets_go_on_from_any_cursor(tmp_path, kind, monkeypatch):
    """One that is given, in its own order; one of the hub, for which these files stand in: the second first."""
    datasets = pytest.importorskip("datasets")
    files = sorted(map(str, Path(write(tmp_path, kind)).glob(f"*.{kind}")))
    reader = {"jsonl": "json"}.get(kind, kind)
    load = functools.partial(datasets.load_dataset, reader, data_files=files)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, **options: load(**options))
    cut = {"jsonl": 9, "parquet": 16}[kind]
    given = (lambda: open_source(load(split="train", streaming=True), hold_out=5)), TEXTS
    of_the_hub = (lambda: open_source("some/texts", hold_out=5, seed=0)), [*TEXTS[cut:], *TEXTS[:cut]]
    for opened, expected in (given, of_the_hub):
        whole = first(opened(), 40)
        assert [text for _, text in whole] == [t for i, t in [*enumerate(expected)] * 3 if i % 5 != 4][:40]
        for number in (0, 3, 9, 14, 18, 19, 25):
            cursor = json.loads(json.dumps(whole[number][0]))
            # Its state says the same place in several ways: which chunk of a file was read since when.
            assert [(c["document"], text) for c, text in first(opened(), 6, cursor)] == [
                (c["document"], text) for c, text in whole[number + 1 : number + 7]
            ]
    mapped = load(split="train")
    assert texts(open_source(mapped, hold_out=5), 40) == texts(given[0](), 40)
