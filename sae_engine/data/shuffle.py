"""The staircase shuffle: every row exactly once, mixed over a bounded stretch of the stream, with cursors as its state.

The stream is cut into chunks of C rows, and each chunk, by a permutation, into W parts. Period p serves part j of chunk
p - j, for every j, mixed: in the long run one part of each of the W newest chunks, C rows. ::

    period       0     1     2     3          W = 3: each chunk comes in over three periods, and then is gone
    chunk 0    part0 part1 part2
    chunk 1          part0 part1 part2
    chunk 2                part0 part1

All permutations are functions of the seed and of the numbers of chunk and period. What is still to be served is so
known from (period, place in it) and from where in the text the W chunks begin: reading them again gives the same bits,
and no row is ever saved. A buffer that is refilled by halves keeps some rows for ever, and cannot be derived again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .contexts import check_int


class RowReader(Protocol):
    """Rows in the order of the text, without an end."""

    @property
    def position(self) -> dict[str, Any]:
        """Where the next row is, in JSON types; :meth:`seek` goes there."""

    def seek(self, position: dict[str, Any]) -> None: ...

    def is_same(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        """Whether two positions are of the same row: a text may spell one in several ways."""

    def read(self, count: int) -> tuple[Tensor, ...]:
        """The next rows, one tensor a site: at least one row, at most ``count``."""


@dataclass
class _Chunk:
    """``parts[j]`` holds, a site each, the rows of part j that are not served yet; ``end`` is where the next begins.

    ``order`` is where rows go in the period whose newest chunk this is. It is made with the chunk, so that a thread
    that reads ahead moves it to the device: from memory that is not pinned, that waits for what the device is doing.
    """

    parts: dict[int, list[Tensor]]
    order: Tensor
    end: dict[str, Any]
    ready: torch.cuda.Event | None = None


class Staircase:
    """Batches of a reader's rows, shuffled. At most ``(W + 3) / 2 * C`` rows are held, beside what the reader holds.

    Args:
        reader: where rows come from.
        chunk_rows: C, a multiple of ``chunks * batch_rows``.
        chunks: W, over how many chunks rows are mixed; 1: within each chunk.
        batch_rows: rows of a batch.
        seed: of all permutations.
        prefetch: read the next chunk in a thread, on a CUDA device on a stream of its own. Which rows come next is
            the schedule's matter alone, so that they are the same.
        device: where the reader's rows lie; None is the CPU.

    Raises:
        TypeError, ValueError: a number is none, is below 1 (``seed``: 0), or ``chunk_rows`` is not such a multiple.

    Example:
        >>> class Numbers:
        ...     position = {"row": 0}
        ...     def seek(self, position):
        ...         self.position = position
        ...     def is_same(self, one, other):
        ...         return one == other
        ...     def read(self, count):
        ...         first = self.position["row"]
        ...         self.position = {"row": first + count}
        ...         return (torch.arange(first, first + count),)
        >>> shuffled = Staircase(Numbers(), chunk_rows=8, chunks=2, batch_rows=4, seed=0)
        >>> sorted(torch.cat([shuffled.next()[0] for _ in range(5)]).tolist())[:8]  # periods 0 to 2: chunk 0 is served
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(
        self,
        reader: RowReader,
        *,
        chunk_rows: int,
        chunks: int,
        batch_rows: int,
        seed: int,
        prefetch: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self._reader = reader
        self.chunks = check_int("chunks", chunks, 1)
        self.batch_rows = check_int("batch_rows", batch_rows, 1)
        self.chunk_rows = check_int("chunk_rows", chunk_rows, 1)
        self.seed = check_int("seed", seed, 0)
        if self.chunk_rows % (self.chunks * self.batch_rows):
            raise ValueError(
                f"chunk_rows must be a multiple of chunks * batch_rows = {chunks} * {batch_rows} = "
                f"{chunks * batch_rows}, got {chunk_rows}"
            )
        self._part_rows = self.chunk_rows // self.chunks
        self._device = device or torch.device("cpu")
        self._worker = _Worker(self._device) if prefetch else None
        self._period = self._offset = 0
        self._block: tuple[Tensor, ...] = ()  # what this period serves, once its first batch was asked for
        self._chunks: dict[int, _Chunk] = {}
        self._ahead: Future[_Chunk] | None = None  # the chunk after the newest
        self._positions = {0: reader.position}  # where chunks begin

    def next(self) -> tuple[Tensor, ...]:
        """The next ``batch_rows`` rows, a site each: views of memory that is free once no batch of a period is held."""
        if not self._block:
            self._enter()
        batch = tuple(rows[self._offset : self._offset + self.batch_rows] for rows in self._block)
        self._offset += self.batch_rows
        if self._offset == len(self._block[0]):
            self._period, self._offset, self._block = self._period + 1, 0, ()
            self._positions = {c: at for c, at in self._positions.items() if c >= self._oldest}
        return batch

    def first_chunk(self) -> tuple[Tensor, ...]:
        """All rows of chunk 0, a site each, in the order of its parts; :meth:`next` still begins with them."""
        if self._period or self._block:
            raise RuntimeError("first_chunk: rows of it were served already; ask before the first batch")
        chunk = self._filled(0)
        parts = [self._readable(chunk, chunk.parts[j]) for j in range(self.chunks)]
        return tuple(torch.cat(rows) for rows in zip(*parts, strict=True))

    @property
    def position(self) -> dict[str, Any]:
        """The reader's position at the end of the newest chunk that is being served, whatever was read ahead."""
        return self._positions[self._period + (self._offset > 0)]

    @property
    def rows_held(self) -> int:
        """How many rows are in memory, without those that a thread is reading now."""
        of_chunks = sum(len(part[0]) for chunk in self._chunks.values() for part in chunk.parts.values())
        return of_chunks + (len(self._block[0]) if self._block else 0)

    def settle(self) -> None:
        """Wait until no thread reads; the next one starts in :meth:`next`."""
        if self._ahead is not None:
            self._ahead.exception()

    def state_dict(self) -> dict[str, Any]:
        """Period, place in it, and where its chunks begin: JSON types."""
        return {
            **self._settings(),
            "period": self._period,
            "offset": self._offset,
            "positions": [self._positions[c] for c in range(self._oldest, self._period + 1 + (self._offset > 0))],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was asked for; chunks are read again by the next :meth:`next`."""
        try:
            period, offset, positions = state["period"], state["offset"], list(state["positions"])
            there = {name: state[name] for name in self._settings()}
            rows = min(period + 1, self.chunks) * self._part_rows
            expected = min(period + 1, self.chunks) + (offset > 0)
            sound = period >= 0 and 0 <= offset < rows and offset % self.batch_rows == 0 and len(positions) == expected
        except (KeyError, TypeError) as error:
            raise ValueError(f"state is none of a stream, or damaged: {error!r}") from error
        for name, value in self._settings().items():
            if there[name] != value:
                raise ValueError(f"state: {name} was {there[name]!r} when it was saved, and is {value!r} now")
        if not sound:
            raise ValueError(f"state is damaged: period {period}, offset {offset}, {len(positions)} positions")
        self.settle()
        self._go_to(period, offset, positions)

    def _settings(self) -> dict[str, int]:
        names = ("chunk_rows", "chunks", "batch_rows", "seed")
        return {name: getattr(self, name) for name in names}

    # ------------------------------------------------------------------------------------------ periods

    @property
    def _oldest(self) -> int:
        """The oldest chunk of which this period serves a part."""
        return max(0, self._period - self.chunks + 1)

    def _go_to(self, period: int, offset: int, positions: list[dict[str, Any]]) -> None:
        self._reader.seek(positions[0])
        self._period, self._offset = period, offset
        self._block, self._chunks, self._ahead = (), {}, None
        self._positions = dict(enumerate(positions, self._oldest))

    def _enter(self) -> None:
        """Mix the parts that this period serves."""
        newest, oldest = self._period, self._oldest
        chunks = {chunk: self._filled(chunk) for chunk in range(oldest, newest + 1)}
        (order,) = self._readable(chunks[newest], [chunks[newest].order])
        block: list[Tensor] = []
        for j, chunk in enumerate(chunks[newest - j] for j in range(newest + 1 - oldest)):
            for site, rows in enumerate(self._readable(chunk, chunk.parts[j])):
                if j == 0:
                    block.append(rows.new_empty(len(order), *rows.shape[1:]))
                block[site].index_copy_(0, order[j * self._part_rows : (j + 1) * self._part_rows], rows)
            del rows, chunk.parts[j]
        self._chunks.pop(newest - self.chunks + 1, None)  # its last part was served
        self._block = tuple(block)
        if self._worker is not None:
            self._ahead = self._worker.start(lambda: self._read(newest + 1))

    def _filled(self, number: int) -> _Chunk:
        """The chunk, read if it is not there: then it is the next of the reader."""
        if number not in self._chunks:
            chunk = self._read(number) if self._worker is None else self._read_by(self._worker, number)
            known = self._positions.setdefault(number + 1, chunk.end)
            if not self._reader.is_same(known, chunk.end):
                raise ValueError(
                    f"the text or the model is not what it was when the state was saved: chunk {number} ended at "
                    f"{known}, and now ends at {chunk.end}"
                )
            self._chunks[number] = chunk
        return self._chunks[number]

    def _read_by(self, worker: _Worker, number: int) -> _Chunk:
        """Reads in the worker's thread, as for every chunk: what the reader keeps for the next one is of its stream."""
        if self._ahead is None:
            self._ahead = worker.start(lambda: self._read(number))
        ahead = self._ahead
        try:
            return ahead.result()
        finally:
            if ahead.done():  # it is not where waiting was interrupted
                self._ahead = None

    def _readable(self, chunk: _Chunk, tensors: list[Tensor]) -> list[Tensor]:
        """``tensors`` of a chunk, after this stream waits for them to be written, and held until it has read them."""
        if chunk.ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(chunk.ready)
            for t in tensors:  # whose memory the other stream would take back
                t.record_stream(stream)
        return tensors

    def _read(self, number: int) -> _Chunk:
        """The reader's next ``chunk_rows`` rows, in those parts that are still to be served."""
        before = self._reader.position
        try:
            return self._read_parts(number)
        except BaseException:
            self._reader.seek(before)  # whoever tries again gets the rows that would have come
            raise

    def _read_parts(self, number: int) -> _Chunk:
        slots = torch.randperm(self.chunk_rows, generator=self._generator("chunk", number), device="cpu")
        kept = range(max(0, self._period - number), self.chunks)
        parts: dict[int, list[Tensor]] = {}
        done = 0
        while done < self.chunk_rows:
            found = self._reader.read(self.chunk_rows - done)
            if not parts:
                size = self._part_rows
                parts = {j: [rows.new_empty(size, *rows.shape[1:]) for rows in found] for j in kept}
            to, order = slots[done : done + len(found[0])].sort()
            bounds = torch.searchsorted(to, torch.arange(self.chunks + 1, device="cpu") * self._part_rows).tolist()
            for site, rows in enumerate(found):
                within, rows = (to % self._part_rows).to(rows.device), rows[order.to(rows.device)]
                for j in kept:
                    of_part = slice(bounds[j], bounds[j + 1])
                    parts[j][site].index_copy_(0, within[of_part], rows[of_part])
            done += len(found[0])
        served = min(number + 1, self.chunks) * self._part_rows
        order = torch.randperm(served, generator=self._generator("period", number), device="cpu").to(found[0].device)
        return _Chunk(
            parts, order, self._reader.position, None if self._worker is None else self._worker.written()
        )

    def _generator(self, what: str, number: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed_of(self.seed, what, number))


def seed_of(*parts: int | str) -> int:
    """A seed in 0 .. 2^63 - 1 for each sequence of numbers and words: neighbours have nothing in common."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class _Worker:
    """One thread that reads ahead, where rows lie on a CUDA device on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        threads = torch.get_num_threads()
        # The number of OpenMP threads is a setting of each thread, and the bits of rows on a CPU depend on it.
        self._pool = ThreadPoolExecutor(1, "sae-engine-rows", lambda: torch.set_num_threads(threads))
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # on which the model's weights were written

    def start(self, read: Callable[[], _Chunk]) -> Future[_Chunk]:
        def on_stream() -> _Chunk:
            with torch.cuda.stream(self._stream):  # of None: nothing
                return read()

        return self._pool.submit(on_stream)

    def written(self) -> torch.cuda.Event | None:
        """What another stream waits for before it reads what this thread's stream wrote until now."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event
