"""Text to train on: documents one by one, epoch after epoch, from any place that a cursor names.

Nothing is read before it is needed. A cursor is of JSON types: the epoch, the number of the next document in it, and
where that lies. Documents are dealt to ranks by number, and every ``hold_out``-th is kept for evaluation.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._require import require
from .contexts import check_int
from .files import FileRecords, files_of
from .shuffle import seed_of
from .text import evaluation_text, stdlib_texts

HOLD_OUT = 256


class Document(NamedTuple):
    """What a language model is given of a record: a string or token ids; how many tokens an attention_mask left out."""

    content: str | Tensor
    masked: int = 0


class Source:
    """Documents in a fixed order, without an end: behind the last comes the first, in the next epoch.

    Made by :func:`open_source`.

    Attributes:
        description: what the text is, in words.
        fingerprint: of what the documents' order depends on: a cursor is for sources with the same one.
        start: the cursor of the first document.
        rank, world: to whom the documents are dealt.
    """

    def __init__(
        self, records: Any, description: str, *, column: str | None, hold_out: int | None, rank: int, world: int,
        tokenizer: Any,
    ) -> None:  # fmt: skip
        self.description = description
        self.start: dict[str, Any] = {"epoch": 0, "document": 0, "at": None, "masked": 0}
        self._records, self._column, self._tokenizer = records, column, tokenizer
        self._hold_out = None if hold_out is None else check_int("hold_out", hold_out, 2)
        self.world = check_int("world", world, 1)
        self.rank = check_int("rank", rank, 0, self.world - 1)
        depends = [records.identity, column, self._hold_out, self.rank, self.world]
        self.fingerprint = hashlib.sha256(json.dumps(depends).encode()).hexdigest()

    def documents(self, cursor: dict[str, Any] | None = None) -> Iterator[tuple[dict[str, Any], Any]]:
        """Pairs of the cursor behind a document and the document, from ``cursor`` on (None: the first), without an end.

        Documents are strings, or one-dimensional tensors of token ids. Empty ones are left out.

        Raises:
            ValueError: there is no text in a whole epoch, no such column, or what stands there is no text.
            OSError: a file cannot be read.

        Example:
            >>> from itertools import islice
            >>> source = open_source(["one", "two", "three"], hold_out=3)
            >>> [text for _, text in islice(source.documents(), 3)], source.held_out(1)
            (['one', 'two', 'one'], ['three'])
        """
        cursor = self.start if cursor is None else cursor
        epoch, number, at, masked = (cursor[name] for name in self.start)
        is_whole, found = at is None, False
        while True:
            for at, record in self._records.read(epoch, at):  # noqa: B020, the place goes on
                number += 1
                if self._is_held_out(number - 1) or self._turn(number - 1) % self.world != self.rank:
                    continue
                document = self._document(record, number - 1)
                masked += document.masked
                if len(document.content):
                    found = True
                    after = (epoch, number, at, masked)
                    yield dict(zip(self.start, after, strict=True)), document.content
            if is_whole and not found:
                of_rank = f" for rank {self.rank} of {self.world}" if self.world > 1 else ""
                raise ValueError(f"dataset_path: there is no text{of_rank} in {self.description}: {number} documents")
            epoch, number, at, is_whole, found = epoch + 1, 0, None, True, False

    def held_out(self, limit: int, *, tokens: int | None = None) -> list[Any]:
        """At most ``limit`` documents that :meth:`documents` never has, at any rank; [] where there are none.

        ``tokens``: stop once the documents hold so many tokens, taking a token for eight characters of text, which
        underestimates. So only a few documents of a streamed data set are read.

        Example:
            >>> len(open_source("stdlib").held_out(3))  # of the standard library, whole modules
            3
        """
        check_int("limit", limit, 1)
        fixed = self._records.held_out
        found: list[Any] = []
        missing = None if tokens is None else check_int("tokens", tokens, 1)
        for content in islice(self._held_out_documents() if fixed is None else fixed, limit):
            found.append(content)
            if missing is not None:
                missing -= len(content) // 8 if isinstance(content, str) else len(content)
                if missing <= 0:
                    break
        return found

    def _held_out_documents(self) -> Iterator[Any]:
        for number, (_, record) in enumerate(self._records.read(0, None)):
            if self._is_held_out(number) and len(content := self._document(record, number).content):
                yield content

    def _is_held_out(self, number: int) -> bool:
        every = self._hold_out
        return self._records.held_out is None and every is not None and number % every == every - 1

    def _turn(self, number: int) -> int:
        """The number of document ``number`` among those that are trained on."""
        is_all = self._hold_out is None or self._records.held_out is not None
        return number if is_all else number - number // self._hold_out  # type: ignore[operator]

    # --------------------------------------------------------------------------- from a record to a document

    def _document(self, record: Any, number: int) -> Document:
        where = f"document {number} of {self.description}"
        mask = None
        if isinstance(record, dict):
            column = str(self._column)
            if column not in record:
                raise no_column(column, list(record), self.description)
            mask = record.get("attention_mask") if column == "input_ids" else None
            record = record[column]
            where = f"column {column!r} of {where}"
        if record is None:
            return Document("")
        if isinstance(record, str):
            return Document(record)
        if isinstance(record, (list, tuple)) and record and isinstance(record[0], dict):
            return Document(self._chat(record, where))
        found = _token_ids(record, mask, where)
        if mask is None and (pad := self._padding) is not None and pad in found.content:
            raise ValueError(
                f"{where} holds the tokenizer's padding token, {pad}, and no attention_mask says where it is: a model "
                "would take it for text; give that column, or leave padding out"
            )
        return found

    @property
    def _padding(self) -> int | None:
        """The tokenizer's padding token, if it means nothing else."""
        others = {getattr(self._tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")}
        pad = getattr(self._tokenizer, "pad_token_id", None)
        return None if pad in others else pad

    def _chat(self, messages: Any, where: str) -> str:
        if getattr(self._tokenizer, "chat_template", None) is None:
            why = "no tokenizer was given" if self._tokenizer is None else "the tokenizer has no chat template"
            raise ValueError(f"{where} is a chat, and {why} to write it as text")
        try:
            return self._tokenizer.apply_chat_template(list(messages), tokenize=False)
        except Exception as error:  # of Jinja, or whatever the template raises
            raise ValueError(f"{where}: the tokenizer's chat template refuses it: {error}") from error


def _token_ids(value: Any, mask: Any, where: str) -> Document:
    """The tokens of a record that its attention_mask has; padding is made anew where rows of a batch differ."""
    try:
        ids = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        ids = None
    if ids is not None and not ids.numel():
        return Document(torch.empty(0, dtype=torch.int64, device="cpu"))
    if ids is None or ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{where} must be a text, a list of token ids or a list of messages, got {value!r:.80}")
    if mask is None:
        return Document(ids.to(torch.int64))
    present = torch.as_tensor(mask, device="cpu")
    if present.shape != ids.shape or not bool(((present == 0) | (present == 1)).all()):
        raise ValueError(f"{where}: its attention_mask must be {len(ids)} numbers, 0 and 1, got {mask!r:.80}")
    at = present.nonzero().flatten()
    if len(at) and int(at[-1] - at[0]) + 1 != len(at):
        raise ValueError(f"{where}: its attention_mask has padding between tokens, at {mask!r:.80}")
    return Document(ids[at].to(torch.int64), len(ids) - len(at))


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8", "replace")).digest())
    return digest.hexdigest()


def no_column(column: str, there: Sequence[str], description: str) -> ValueError:
    near = get_close_matches(column, there, 1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"column: {description} has no {column!r}, it has {', '.join(map(repr, there))}{meant}")


# ------------------------------------------------------------------------------------------------- opening


def open_source(
    dataset_path: Any,
    *,
    dataset_name: str | None = None,
    split: str | None = "train",
    column: str = "text",
    hold_out: int | None = HOLD_OUT,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    tokenizer: Any = None,
) -> Source:
    """The documents of a text, to be read in any number of epochs, from any place.

    Args:
        dataset_path: one of

            - ``"stdlib"``: the modules of this Python's library, in an order that ``seed`` and the epoch say. Held out
              are those of :data:`HELD_OUT_MODULES`, as :func:`evaluation_text` has them;
            - a text file, cut into documents of some 8,000 characters where a paragraph ends, or at lines
              ``<|endoftext|>``; a folder, of which each text file is a document (one above 1 MiB: several);
            - a file ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` (needs pyarrow), or a folder of such: a document a line;
            - the name of a data set on the hub (needs datasets), which is streamed, its files in an order that ``seed``
              says;
            - a sequence of documents or of records, or a data set of the library datasets.
        dataset_name, split: of data sets on the hub.
        column: of records: where the text is, a list of token ids (of ``input_ids`` those that ``attention_mask``
            has), or a list of messages, which become a text by the tokenizer's chat template.
        hold_out: every ``hold_out``-th document is kept out of :meth:`Source.documents`; None: none is.
        rank, world: the documents are dealt to ``world`` ranks; this is one of them.
        seed: of the order of ``"stdlib"``, and of the files of a data set on the hub.
        tokenizer: for chats; of token ids without a mask, it tells padding.

    Raises:
        TypeError: ``dataset_path`` is not of that kind.
        ValueError: a number is out of range, an argument is given that such a text has no use for, there is no such
            column (names those that there are), or a folder holds no text.
        OSError: there is no such file, or no such data set.
        ImportError: the package that reads it is missing.

    Example:
        >>> source = open_source([{"text": "A text."}, {"text": "Another."}])
        >>> cursor, text = next(source.documents())
        >>> text, next(source.documents(cursor))[1]
        ('A text.', 'Another.')
    """
    records = _records(dataset_path, dataset_name, split, column, seed)
    is_plain = getattr(records, "columns", None) == []
    if is_plain and column != "text":
        raise ValueError(f"column: {records.description} is plain text, without columns; got {column!r}")
    if records.columns and column not in records.columns:
        raise no_column(column, records.columns, records.description)
    if not isinstance(records, _Hub) and dataset_name is not None:
        raise ValueError(f"dataset_name is for data sets on the hub, got {dataset_name!r} for {records.description}")
    if not isinstance(records, _Hub) and split not in (None, "train"):
        raise ValueError(f"split is for data sets on the hub, got {split!r} for {records.description}")
    said = records.description if is_plain or column == "text" else f"{records.description}, column {column!r}"
    return Source(records, said, column=column, hold_out=hold_out, rank=rank, world=world, tokenizer=tokenizer)


def _records(path: Any, name: str | None, split: str | None, column: str, seed: int) -> Any:
    """What has ``read(epoch, at)``, ``identity``, ``description``, ``columns`` and ``held_out``."""
    if not isinstance(path, (str, Path)):
        if hasattr(path, "state_dict") and hasattr(path, "load_state_dict"):  # datasets.IterableDataset
            return _Hub(path, f"the data set {getattr(path.info, 'dataset_name', None) or 'given'}", [])
        if isinstance(path, (bytes, dict)) or not hasattr(path, "__len__") or not hasattr(path, "__getitem__"):
            raise TypeError(
                "dataset_path must be a path, the name of a data set, or a sequence of documents that can be read more "
                f"than once, got {type(path).__name__}"
            )
        return _Listed(path)
    if str(path) == "":
        raise ValueError("dataset_path must name a text, got an empty string")
    if str(path) == "stdlib":
        return _Library(check_int("seed", seed, 0))
    if (there := Path(path).expanduser()).exists():
        return FileRecords(files_of(there), str(path), column)
    text = str(path)
    is_path = isinstance(path, Path) or text.startswith((".", "/", "~")) or Path(text).suffix in FileRecords.SUFFIXES
    if is_path or text.count("/") > 1 or any(c.isspace() for c in text):
        raise FileNotFoundError(f"dataset_path: {text!r} does not exist")
    return _on_the_hub(text, name, split, check_int("seed", seed, 0))


class _Listed:
    """Documents or records in memory, or a data set that is read by number."""

    held_out: list[Any] | None = None

    def __init__(self, items: Any) -> None:
        self._items = items
        self.description = f"{len(items)} documents that were given"
        self.columns: Any = getattr(items, "column_names", None)
        is_text = isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items)
        self.identity: Any = ["given", len(items), _digest(items) if is_text else None]

    def read(self, epoch: int, at: Any) -> Iterator[tuple[Any, Any]]:
        for number in range(at or 0, len(self._items)):
            yield number + 1, self._items[number]


class _Library:
    """This Python's library, in another order in each epoch."""

    description = "the Python standard library"
    columns: Any = []  # noqa: RUF012, there are none

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._texts = list(stdlib_texts())  # a few megabytes
        self.held_out: list[Any] | None = evaluation_text()
        self.identity: Any = ["stdlib", _digest(self._texts), seed]

    def read(self, epoch: int, at: Any) -> Iterator[tuple[Any, Any]]:
        generator = torch.Generator("cpu").manual_seed(seed_of(self._seed, "stdlib", epoch))
        order = torch.randperm(len(self._texts), generator=generator, device="cpu").tolist()
        for place in range(at or 0, len(order)):
            yield place + 1, self._texts[order[place]]


class _Hub:
    """A data set that the library ``datasets`` streams; its own state says where it is.

    The ``seed`` decides in which order its files are read, the same in every epoch, so that the documents at every n-th
    place, which are held out, are the same ones. Documents within a file are not shuffled: the state of a shuffle
    buffer does not say what the buffer held.
    """

    held_out: list[Any] | None = None

    def __init__(self, dataset: Any, description: str, identity: list[Any], seed: int | None = None) -> None:
        self._dataset, self.description = dataset, description
        self.columns: Any = dataset.column_names
        self._order: list[int] = []  # of the files, where it is not their own
        if seed is not None and dataset.num_shards > 1:
            generator = torch.Generator("cpu").manual_seed(seed_of(seed, "shards"))
            self._order = torch.randperm(dataset.num_shards, generator=generator, device="cpu").tolist()
        self.identity: Any = ["datasets", description, *identity, self._order]

    def read(self, epoch: int, at: Any) -> Iterator[tuple[Any, Any]]:
        # A copy, since a data set keeps its place in itself; but for the cache of file systems that all of them share,
        # which another thread may be writing to.
        shared = {id(part): part for name, part in vars(self._dataset).items() if name.endswith("_cache")}
        dataset = copy.deepcopy(self._dataset, shared)
        place, state = at or (0, None)
        for place in range(place, max(len(self._order), 1)):  # noqa: B020, the place goes on
            part = dataset.shard(len(self._order), self._order[place]) if self._order else dataset
            if state is not None:
                part.load_state_dict(state)
            state = None
            for record in part:
                yield [place, part.state_dict()], record


def _on_the_hub(path: str, name: str | None, split: str | None, seed: int) -> _Hub:
    if split is None:
        raise ValueError(f"split: which part of the data set {path!r} is to be read must be said")
    datasets = require("datasets")
    try:
        found = datasets.load_dataset(path, name, split=split, streaming=True)
    except Exception as error:  # each version has its own errors, of the network among them
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = ValueError if isinstance(error, ValueError) else OSError
        which = f"{path!r}, dataset_name={name!r}, split={split!r}"
        raise kind(f"dataset_path: {which} is neither a file nor a data set that the hub has: {said}") from error
    if not hasattr(found, "shard"):
        raise ImportError("datasets must be 3.2 or newer: pip install --upgrade datasets")
    return _Hub(found, "/".join(filter(None, (path, name, split))), [path, name, split], seed)
