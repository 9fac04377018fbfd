"""Activations on disk: a folder of safetensors shards and a manifest, read back row by row."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import device_in, dtype_in, flag
from .._files import file_sha256
from ..provenance import Provenance
from ._require import require
from .contexts import check_int, rows_in_words
from .quantized import PARTS, restored

MANIFEST = "manifest.json"
FORMAT = 2
# By what a manifest has as dtype: what rows are read as, and what they are in a file.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.float32}
KEY = "activations"
_IN_FILES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "int8": "I8"}
# What format 1 did not say: there was no choice.
_OF_FORMAT_1 = {"separator": "eos", "first_token": "bos", "exclude_tokens": [], "exclude_positions": [],
                "token_ids": False, "earlier": []}  # fmt: skip
_REQUIRED = ("model", "revision", "sha256", "model_dtype", "layer", "site", "d_model", "context_length", "drop_first",
             "max_tokens", "text_source", "complete", *_OF_FORMAT_1)  # fmt: skip


class RowTokens(NamedTuple):
    """Which token each row is of: four tensors ``(rows,)`` of int32.

    ``token_ids``: the token. ``documents``: the number of its document (in batches: of its row) among all that were
    collected, from 0. ``offsets``: its place among that document's tokens, from 0; the separator's is behind them.
    ``positions``: its place in the context that the model saw, from 0 at the first token that is no padding. What was
    put before a context is of document -1 and has offset -1.
    """

    token_ids: Tensor
    documents: Tensor
    offsets: Tensor
    positions: Tensor


class ActivationStore:
    """Collected activations: rows of shape (d_model,), read shard by shard.

    Opening compares every file's size and header with the manifest and reads no activations; :meth:`verify` reads
    all of them and compares checksums.

    Args:
        path: folder written by :func:`collect_activations`.
        allow_incomplete: also open a collection that was cut off.

    Attributes:
        path, manifest, d_model, complete, provenance; dtype, of the rows: float32 where int8 is stored;
        ``len(store)`` is the number of rows.

    Raises:
        TypeError: ``path`` is no path.
        FileNotFoundError: no manifest there.
        ValueError: the manifest or a shard is damaged (names the file), or the collection is incomplete.

    Example:
        >>> import tempfile
        >>> lm = se.data.load_language_model()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = se.data.collect_activations(lm, ["A text."], folder, layer=1, progress=False)
        ...     sum(len(x) for x in ActivationStore(folder).batches(2)) == len(ActivationStore(folder))
        True
    """

    def __init__(self, path: str | Path, *, allow_incomplete: bool = False) -> None:
        self.path = folder_in("path", path)
        self.manifest = read_manifest(self.path)
        self.d_model: int = self.manifest["d_model"]
        self.dtype = DTYPES[self.manifest["dtype"]]
        self.complete: bool = self.manifest["complete"]
        if not self.complete and not allow_incomplete:
            done = self.manifest["tokens"]
            raise ValueError(
                f"path: the collection in {str(path)!r} was cut off after {done} rows; collect again to finish it, "
                "or pass allow_incomplete=True"
            )
        for shard in self.manifest["shards"]:
            _check_shard(self.path, shard, self.manifest)

    def __len__(self) -> int:
        return self.manifest["tokens"]

    def __repr__(self) -> str:
        m = self.manifest
        shape = f"{len(self)} x {self.d_model} {m['dtype']}"
        cut_off = "" if self.complete else ", incomplete"
        return f"ActivationStore({shape}, {m['model']} layer {m['layer']} {m['site']}{cut_off})"

    @property
    def provenance(self) -> Provenance:
        """Which activations these are, for the autoencoder that is trained on them."""
        m = self.manifest
        sources = [part["text_source"] for part in (*m["earlier"], m)]
        return Provenance(
            model=m["model"], revision=m["revision"], sha256=m["sha256"], layer=m["layer"], site=m["site"],
            d=m["d_model"], normalize="none", model_dtype=m["model_dtype"], dtype=m["dtype"], tokenizer=m["model"],
            text="; ".join(source or "not named" for source in sources) if any(sources) else None,
            **rows_in_words(m),
        )  # fmt: skip

    def verify(self) -> None:
        """Read every shard and compare its sha256 with the manifest; ValueError names the first that differs."""
        verify_shards(self.path, self.manifest)

    def tensor(self, dtype: torch.dtype | str | None = None) -> Tensor:
        """All rows in the order of the text, ``(len(self), d_model)``, on the CPU; ``dtype=None`` as stored."""
        shards = [self._load(index) for index in range(len(self.manifest["shards"]))]
        rows = torch.cat(shards) if shards else torch.empty(0, self.d_model, dtype=self.dtype, device="cpu")
        return rows if dtype is None else rows.to(dtype_in("dtype", dtype))

    def row_tokens(self, start: int = 0, stop: int | None = None) -> RowTokens:
        """Which tokens the rows ``start`` to ``stop`` are of, in the order of the text; no activations are read.

        Raises:
            ValueError: the collection holds no token ids, or ``start`` and ``stop`` are no range of rows.

        Example:
            >>> import tempfile
            >>> lm = se.data.load_language_model()
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     store = se.data.collect_activations(lm, ["A text."], folder, layer=1, progress=False)
            ...     lm.tokenizer.decode(store.row_tokens(0, len(store) - 1).token_ids)
            'A text.'
        """
        stop = len(self) if stop is None else check_int("stop", stop, 0, len(self))
        start = check_int("start", start, 0, stop)
        self._check_tokens()
        found, first = [torch.empty(4, 0, dtype=torch.int32, device="cpu")], 0
        for index, shard in enumerate(self.manifest["shards"]):
            low, high = max(start - first, 0), min(stop - first, shard["tokens"])
            if low < high:
                found.append(self._load_tokens(index, slice(low, high)))
            first += shard["tokens"]
        return RowTokens(*torch.cat(found, 1))

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        start: int = 0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        drop_last: bool = False,
        buffer_shards: int = 4,
        with_tokens: bool = False,
        check_finite: bool = True,
        prefetch: bool = False,
    ) -> Iterator[Any]:
        """One pass over all rows, each exactly once.

        Args:
            batch_size: rows per batch; the last has the rest, unless ``drop_last``.
            shuffle: take the shards in random order, ``buffer_shards`` at a time, and shuffle the rows of
                those together. False: the order of the text.
            seed: of the shuffle; the same seed gives the same batches. Use another for each epoch.
            start: leave out so many rows at the beginning of the pass, as where training was interrupted: the rest
                comes in the order that it has in the whole pass (of the same ``batch_size``, ``seed`` and
                ``buffer_shards``), and what comes before is not read.
            device, dtype: of the batches; None is the CPU, and the stored dtype.
            drop_last: leave out a last, smaller batch.
            buffer_shards: how many shards are in memory at once (twice that for a moment, while they are mixed).
            with_tokens: also say which tokens the rows are of.
            check_finite: refuse rows that are not finite, which nothing can learn from. False: hand them on.
            prefetch: read the next ``buffer_shards`` shards in a thread while these are served, twice the memory; to
                a CUDA device, rows then come from pinned memory without waiting. The batches are the same.

        Yields:
            ``(batch_size, d_model)``; with ``with_tokens`` a pair of that and :class:`RowTokens`.

        Raises:
            TypeError, ValueError: ``batch_size``, ``buffer_shards``, ``seed`` or ``start`` is not a fit integer,
                ``device`` or ``dtype`` is none, or there are no token ids. When it is reached: a shard that is damaged
                or holds a row that is not finite (names both).
        """
        batch_size, seed = check_int("batch_size", batch_size, 1), check_int("seed", seed, 0)
        start = check_int("start", start, 0, len(self))
        buffer_shards = check_int("buffer_shards", buffer_shards, 1)
        dtype = self.dtype if dtype is None else dtype_in("dtype", dtype)
        device = torch.device("cpu") if device is None else device_in("device", device)
        for name, value in (("shuffle", shuffle), ("drop_last", drop_last), ("with_tokens", with_tokens),
                            ("check_finite", check_finite), ("prefetch", prefetch)):  # fmt: skip
            flag(name, value)
        if with_tokens:
            self._check_tokens()
        blocks = self._blocks(batch_size, shuffle, seed, start, buffer_shards, with_tokens, check_finite)
        if prefetch:
            blocks = _read_ahead(blocks, pinned=device.type == "cuda")

        def there(t: Tensor, dtype: torch.dtype) -> Tensor:
            return t.to(device, non_blocking=prefetch).to(dtype)

        return (
            (there(x, dtype), RowTokens(*there(tokens, tokens.dtype))) if with_tokens else there(x, dtype)
            for x, tokens in _cut(blocks, batch_size, drop_last)
        )

    def _blocks(
        self, batch_size: int, shuffle: bool, seed: int, start: int, buffer_shards: int, tokens: bool, finite: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows in the order of the pass and, if asked for, their tokens (4, rows), from row ``start`` on.

        Rows that fill no batch are mixed with the shards that follow, so which rows those are has to be known before
        the first that is asked for; they alone are read.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        sizes = [shard["tokens"] for shard in self.manifest["shards"]]
        order = list(range(len(sizes)))
        if shuffle:
            order = torch.randperm(len(sizes), generator=generator, device="cpu").tolist()
        step = buffer_shards if shuffle else 1
        passed = 0
        # Of rows that were passed over: the shard and the place in it.
        rest = torch.empty(2, 0, dtype=torch.int64, device="cpu")
        carried: tuple[Tensor, Tensor] | None = None  # the same once rows are read
        for first in range(0, len(order), step):
            group = order[first : first + step]
            count = (rest.shape[1] if carried is None else len(carried[0])) + sum(sizes[index] for index in group)
            mix = torch.randperm(count, generator=generator, device="cpu") if shuffle else slice(None)
            whole = count // batch_size * batch_size
            if carried is None and passed + whole <= start:
                places = [_places_of(i, sizes[i]) for i in group]
                rest = torch.cat([rest, *places], 1)[:, mix][:, whole:]
                passed += whole
                continue
            x, tokens_of = self._read(group, tokens, finite)
            before = self._at(rest, tokens, finite) if carried is None else carried
            x = torch.cat([before[0], x])[mix]
            tokens_of = torch.cat([before[1], tokens_of], 1)[:, mix]
            skip = max(start - passed, 0)
            yield x[skip:whole], tokens_of[:, skip:whole]
            passed += whole
            carried = x[whole:].clone(), tokens_of[:, whole:].clone()  # a view would keep the whole buffer alive
        x, tokens_of = self._at(rest, tokens, finite) if carried is None else carried
        skip = max(start - passed, 0)
        yield x[skip:], tokens_of[:, skip:]

    def _read(self, group: list[int], tokens: bool, finite: bool) -> tuple[Tensor, Tensor]:
        shards = [self._load(index) for index in group]
        for index, x in zip(group, shards, strict=True):
            if finite:
                self._check_finite(index, x)
        # Where tokens are not asked for, as many columns of none: what is done with rows is done with both.
        found = zip(group, shards, strict=True)
        none = torch.empty(0, 1, dtype=torch.int32, device="cpu")
        columns = [self._load_tokens(index) if tokens else none.expand(0, len(x)) for index, x in found]
        return torch.cat(shards), torch.cat(columns, 1)

    def _at(self, places: Tensor, tokens: bool, finite: bool) -> tuple[Tensor, Tensor]:
        """Rows by shard and place, in that order."""
        count = places.shape[1]
        x = torch.empty(count, self.d_model, dtype=self.dtype, device="cpu")
        columns = torch.empty(4 if tokens else 0, count, dtype=torch.int32, device="cpu")
        for index in places[0].unique().tolist():
            here = places[0] == index
            read, read_tokens = self._read([index], tokens, finite)
            x[here], columns[:, here] = read[places[1, here]], read_tokens[:, places[1, here]]
        return x, columns

    def _check_finite(self, index: int, x: Tensor) -> None:
        if bool(x.sum(dtype=torch.float32).isfinite()):  # most often; a sum that overflows is no proof
            return
        wrong = (~x.isfinite().all(1)).nonzero()
        if len(wrong):
            row = sum(shard["tokens"] for shard in self.manifest["shards"][:index]) + int(wrong[0])
            raise ValueError(
                f"{self.path / self.manifest['shards'][index]['file']}: {len(wrong)} of {len(x)} rows are not finite, "
                f"the first is row {row} of the store; collect them anew with the model in bfloat16 or float32, or "
                "pass check_finite=False to have them all the same"
            )

    def _check_tokens(self) -> None:
        if not self.manifest["token_ids"]:
            raise ValueError(f"{str(self.path)!r} holds no token ids: it was collected with token_ids=False")

    def _load(self, index: int) -> Tensor:
        if self.manifest["dtype"] == "int8":
            return self._opened(index, lambda file: restored(file.get_tensor, KEY))
        return self._opened(index, lambda file: file.get_tensor(KEY))

    def _load_tokens(self, index: int, rows: slice = slice(None)) -> Tensor:
        """(4, rows) int32 of one shard."""
        return self._opened(index, lambda file: torch.stack([file.get_slice(name)[rows] for name in RowTokens._fields]))

    def _opened(self, index: int, read: Any) -> Tensor:
        file = self.path / self.manifest["shards"][index]["file"]
        try:
            # What safetensors reads would lie on torch's default device, which is not the store's.
            with torch.device("cpu"), require("safetensors").safe_open(file, framework="pt") as opened:
                return read(opened)
        except Exception as error:  # the file was sound when the store was opened
            raise ValueError(f"{file} is missing or damaged: {error}") from error


def _read_ahead(blocks: Iterator[tuple[Tensor, Tensor]], pinned: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The same blocks; a thread reads the next one while one is used."""

    readers = set()

    def following() -> tuple[Tensor, Tensor] | None:
        readers.add(threading.get_ident())
        block = next(blocks, None)
        return block if block is None or not pinned else (block[0].pin_memory(), block[1].pin_memory())

    thread = ThreadPoolExecutor(1, "sae-engine-shards")
    try:
        ahead = thread.submit(following)
        while (block := ahead.result()) is not None:
            ahead = thread.submit(following)
            yield block
    finally:  # the collector of garbage may close this in the thread itself, which cannot wait for its own end
        thread.shutdown(wait=threading.get_ident() not in readers)


def _cut(blocks: Iterator[tuple[Tensor, Tensor]], size: int, drop_last: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of rows and columns to batches of ``size``."""
    left: tuple[Tensor, Tensor] | None = None
    for x, tokens in blocks:
        if left is not None and len(left[0]):
            x, tokens = torch.cat([left[0], x]), torch.cat([left[1], tokens], 1)
        whole = len(x) // size * size
        for first in range(0, whole, size):
            yield x[first : first + size], tokens[:, first : first + size]
        left = x[whole:].clone(), tokens[:, whole:].clone()
    if left is not None and len(left[0]) and not drop_last:
        yield left


# ------------------------------------------------------------------------------- what collecting shares with this


def _places_of(shard: int, rows: int) -> Tensor:
    """(2, rows): the number of the shard, and each row's place in it."""
    return torch.stack([torch.full((rows,), shard, device="cpu"), torch.arange(rows, device="cpu")])


def folder_in(name: str, path: str | Path) -> Path:
    if not isinstance(path, (str, Path)):
        raise TypeError(f"{name} must be a string or a Path, got {path!r}")
    if not str(path):
        raise ValueError(f"{name} must name a folder, got an empty string")
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{name}: {str(path)!r} is a file, and must be a folder")
    return folder


def verify_shards(folder: Path, manifest: dict[str, Any]) -> None:
    """Every shard is what the manifest says, by header and by sha256."""
    for shard in manifest["shards"]:
        _check_shard(folder, shard, manifest)
        if file_sha256(folder / shard["file"]) != shard["sha256"]:
            raise ValueError(
                f"{folder / shard['file']} is damaged: its sha256 is not the manifest's; copy it again from where it "
                "is sound, or collect into another folder"
            )


def _check_shard(folder: Path, shard: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Compare a shard's header, and so its length, with the manifest. Reads no activations."""
    file = folder / shard["file"]
    expected = {KEY: (_IN_FILES[manifest["dtype"]], [shard["tokens"], manifest["d_model"]])}
    if manifest["dtype"] == "int8":
        expected |= {name: (dtype, expected[KEY][1][:1] if name == "scale" else expected[KEY][1][1:])
                     for name, dtype in PARTS.items()}  # fmt: skip
    if manifest["token_ids"]:
        expected |= dict.fromkeys(RowTokens._fields, ("I32", [shard["tokens"]]))
    try:
        with require("safetensors").safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is no dictionary
            found = {name: (part.get_dtype(), list(part.get_shape())) for name, part in parts.items()}
    except Exception as error:  # safetensors has its own exceptions for truncated files and foreign headers
        raise ValueError(f"{file} is missing or damaged: {error}") from error
    for name, there in expected.items():
        if found.get(name) != there:
            raise ValueError(f"{file} is damaged: its {name} are {found.get(name)}, the manifest says {there}")


def read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"path: {str(folder)!r} has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format"]
        if version == 1:
            manifest = {**_OF_FORMAT_1, **manifest}
        sound = manifest["dtype"] in DTYPES and manifest["tokens"] == sum(s["tokens"] for s in manifest["shards"])
        if missing := [key for key in _REQUIRED if key not in manifest]:
            raise KeyError(missing[0])
        for shard in manifest["shards"]:
            sound &= {"file", "sha256", "text_sha256"} <= set(shard) and Path(shard["file"]).name == shard["file"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    if not sound or version not in (1, FORMAT):
        raise ValueError(f"{file} is damaged, or of another format than {FORMAT}")
    return manifest
