"""Files of text, JSON lines or parquet, read record by record from any place in them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ._require import require
from .text import END_OF_TEXT

TEXT = (".txt", ".md", ".py", ".rst")
JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
PARQUET = (".parquet",)

DOCUMENT_OF_A_FILE = 8192  # bytes, of a file that is the whole text: enough documents that some can be held out
DOCUMENT_IN_A_FOLDER = 1 << 20


def files_of(path: Path) -> list[Path]:
    """The file, or those of the folder that are of the first kind it has: text, JSON lines, parquet; in sorted order.

    Raises:
        ValueError: a folder has none of them.
    """
    if path.is_file():
        return [path]
    there = sorted(p for p in path.rglob("*") if p.is_file())
    for suffixes in (TEXT, JSON_LINES, PARQUET):
        if found := [p for p in there if p.name.endswith(suffixes)]:
            return found
    kinds = ", ".join((*TEXT, *JSON_LINES, *PARQUET))
    raise ValueError(f"dataset_path: folder {str(path)!r} has no file ending in one of {kinds}")


class FileRecords:
    """Records of files behind each other. A place is the number of the file and a place in it."""

    SUFFIXES = (*TEXT, *JSON_LINES, *PARQUET, ".gz", ".json")
    held_out: list[Any] | None = None

    def __init__(self, files: list[Path], description: str, column: str) -> None:
        self._files, self.description = files, description
        self.identity: Any = ["files", [[file.name, file.stat().st_size] for file in files]]
        self.columns: Any = None
        self._read: Callable[[Path, Any], Iterator[tuple[Any, Any]]]
        if files[0].name.endswith(JSON_LINES):
            self._read = _json_lines
        elif files[0].name.endswith(PARQUET):
            self.columns = _parquet_file(files[0]).schema_arrow.names
            columns = [c for c in self.columns if c == column or (column, c) == ("input_ids", "attention_mask")]
            self._read = lambda file, at: _parquet(file, at, columns)
        elif files[0].suffix in (".json", ".gz"):
            raise ValueError(
                f"dataset_path: {str(files[0])!r} must be plain text, or a record a line in .jsonl or .jsonl.gz, or "
                ".parquet"
            )
        else:
            self.columns = []
            size = DOCUMENT_OF_A_FILE if len(files) == 1 else DOCUMENT_IN_A_FOLDER
            self._read = lambda file, at: _text(file, at, size)

    def read(self, epoch: int, at: Any) -> Iterator[tuple[Any, Any]]:
        first, within = at or (0, None)
        for number in range(first, len(self._files)):
            for after, record in self._read(self._files[number], within if number == first else None):
                yield [number, after], record


def _text(file: Path, at: Any, size: int) -> Iterator[tuple[Any, Any]]:
    """Whole lines, ``size`` bytes and up to the end of a paragraph; at twice the size at the end of any line."""
    with file.open("rb") as stream:
        stream.seek(first := at or 0)
        lines: list[bytes] = []
        length = 0
        for line in _lines(stream, size):
            is_end = line.strip() == END_OF_TEXT.encode()
            if not is_end:
                lines.append(line)
                length += len(line)
            if is_end or (length >= size and not line.strip()) or length >= 2 * size:
                yield stream.tell(), _decoded(file, first, b"".join(lines))
                first, lines, length = stream.tell(), [], 0
        if lines:
            yield stream.tell(), _decoded(file, first, b"".join(lines))


def _lines(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """Lines, and what has no end of line in pieces of whole characters."""
    while line := stream.readline(size):
        while not line.endswith(b"\n") and (following := stream.read(1)):
            if following[0] & 0xC0 != 0x80:  # the beginning of another character
                stream.seek(-1, 1)
                break
            line += following
        yield line


def _decoded(file: Path, first: int, data: bytes) -> str:
    try:
        return data.decode("utf-8" if first else "utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"dataset_path: {str(file)!r} is not UTF-8 text: byte {first + error.start} is "
            f"{data[error.start]:#04x} ({error.reason})"
        ) from error


def _json_lines(file: Path, at: Any) -> Iterator[tuple[Any, Any]]:
    """Places are a byte, of what is packed in a .gz, and the number of the line there."""
    first, number = at or (0, 0)
    is_packed = file.suffix == ".gz"
    try:
        with gzip.open(file) if is_packed else file.open("rb") as stream:
            stream.seek(first)
            while line := stream.readline():
                number += 1
                if line.strip():
                    yield [stream.tell(), number], _record(file, number, line)
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"dataset_path: {str(file)!r} is cut off or damaged: {error}") from error


def _record(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"dataset_path: line {number} of {str(file)!r} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"dataset_path: line {number} of {str(file)!r} must be an object, got {line.decode():.80}")
    return record


def _parquet(file: Path, at: Any, columns: list[str]) -> Iterator[tuple[Any, Any]]:
    """Row group by row group; a place is the number of the next row."""
    opened = _parquet_file(file)
    row = 0
    for group in range(opened.num_row_groups):
        rows = opened.metadata.row_group(group).num_rows
        if at is not None and row + rows <= at:
            row += rows
            continue
        for batch in opened.iter_batches(batch_size=256, row_groups=[group], columns=columns):
            for record in batch.to_pylist():
                row += 1
                if at is None or row > at:
                    yield row, record


def _parquet_file(file: Path) -> Any:
    parquet = require("pyarrow.parquet")
    try:
        return parquet.ParquetFile(file)
    except Exception as error:  # of pyarrow
        raise ValueError(f"dataset_path: {str(file)!r} is no parquet file, or damaged: {error}") from error
