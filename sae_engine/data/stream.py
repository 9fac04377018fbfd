"""Shuffled batches of activations to train on, from a language model's text or from stores, which stop and go on."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import device_in, dtype_in, flag, number_in
from .contexts import Contexts, check_int
from .models import LanguageModel
from .places import input_device
from .rows import COUNTS, LanguageModelRows
from .shuffle import Staircase, seed_of
from .sites import Site
from .sources import Source
from .store import ActivationStore


class RowStream:
    """Batches of activations of a text, at several sites in one pass of the language model, without an end.

    Rows are mixed over ``chunks`` chunks (see :mod:`sae_engine.data.shuffle`), each exactly once an epoch. All sites
    have the rows of the same tokens. Which batches come is a function of the arguments: the state is cursors alone, and
    :meth:`load_state_dict` reads at most ``chunks`` chunks again to go on with the bits that would have come.

    Rows that are not finite, or longer than ``max_norm_multiple`` times the median of their batch in the language
    model, at one of the sites, are left out at all of them, and counted.

    Args:
        lm: the language model.
        source: its text, as :func:`open_source` makes it; its rank and world are the stream's.
        sites: as :meth:`Site.of` reads them, each with its block.
        contexts: how documents become contexts, as ``contexts_of`` makes it.
        chunk_rows: rows of a chunk, a multiple of ``chunks * batch_rows``.
        chunks: over how many chunks rows are mixed. ``(chunks + 3) / 2 * chunk_rows`` rows are in memory at most.
        batch_rows: rows of a batch.
        seed: of the shuffle.
        rank, world: mixed into the seed. ``source`` was dealt to the same ones.
        max_norm_multiple: see above; None leaves long rows in.
        dtype: of the rows; None is what the language model has at each site.
        device: of the rows; None is where the language model takes its tokens.
        prefetch: let a thread read the next chunk while this one is served. What this library does with the language
            model meanwhile, as an evaluation, waits for its turn. Whoever calls the model itself has to call
            :meth:`settle` after :meth:`next`, since the thread's hooks would read that batch.

    Attributes:
        widths: of the rows at each site.

    Raises:
        TypeError, ValueError: an argument is not of its kind or range.

    Example:
        >>> from sae_engine.data.contexts import contexts_of
        >>> lm = se.data.load_language_model()
        >>> source = se.data.open_source(["A text.", "Another text."])
        >>> stream = RowStream(lm, source, ["blocks.1.hook_resid_pre"], contexts_of(lm, context_length=8, batch_size=2),
        ...                    chunk_rows=16, chunks=2, batch_rows=4, seed=0)
        >>> state = stream.state_dict()
        >>> (x,) = stream.next()
        >>> stream.load_state_dict(state)
        >>> torch.equal(x, stream.next()[0]), x.shape
        (True, torch.Size([4, 256]))
    """

    def __init__(
        self,
        lm: LanguageModel,
        source: Source,
        sites: Sequence[str | Site],
        contexts: Contexts,
        *,
        chunk_rows: int,
        chunks: int,
        batch_rows: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        max_norm_multiple: float | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        prefetch: bool = False,
    ) -> None:
        for name, value, kind in (("lm", lm, LanguageModel), ("source", source, Source),
                                  ("contexts", contexts, Contexts)):  # fmt: skip
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
        if isinstance(sites, (str, Site)) or not isinstance(sites, Sequence):
            raise TypeError(f"sites must be a sequence of sites, got {sites!r}")
        if not sites:
            raise ValueError("sites must name at least one site, got none")
        world, seed = check_int("world", world, 1), check_int("seed", seed, 0)
        rank = check_int("rank", rank, 0, world - 1)
        if (source.rank, source.world) != (rank, world):
            raise ValueError(f"source was opened for rank {source.rank} of {source.world}, not {rank} of {world}")
        if max_norm_multiple is not None and not math.isfinite(number_in(max_norm_multiple) or math.nan):
            raise ValueError(f"max_norm_multiple must be a number above 0 or None, got {max_norm_multiple!r}")
        if max_norm_multiple is not None and max_norm_multiple <= 0:
            raise ValueError(f"max_norm_multiple must be a number above 0 or None, got {max_norm_multiple!r}")
        device = input_device(lm.model) if device is None else device_in("device", device)
        self._source = source
        self._links = {"sites": [str(Site.of(site)) for site in sites], "rank": rank, "world": world}
        rows = LanguageModelRows(
            lm, source, [Site.of(site) for site in sites], contexts, max_norm_multiple=max_norm_multiple,
            dtype=None if dtype is None else dtype_in("dtype", dtype), device=device,
            chunk_rows=check_int("chunk_rows", chunk_rows, 1),
        )  # fmt: skip
        self.widths = rows.widths
        seed = seed if world == 1 else seed_of(seed, "rank", rank)
        self._staircase = Staircase(
            rows, chunk_rows=chunk_rows, chunks=chunks, batch_rows=batch_rows, seed=seed,
            prefetch=flag("prefetch", prefetch), device=device,
        )  # fmt: skip

    def next(self) -> tuple[Tensor, ...]:
        """The next batch: ``(batch_rows, width)`` for each site, of the same tokens.

        Raises:
            FloatingPointError: more than one row in a hundred was not finite: says which text, token and module.
            ValueError: the text has no rows, or is not the one of the state that was loaded.
        """
        return self._staircase.next()

    def first_chunk(self) -> tuple[Tensor, ...]:
        """The rows of the first chunk, ``(chunk_rows, width)`` for each site; :meth:`next` still begins with them.

        Raises:
            RuntimeError: batches of it were taken already.
        """
        return self._staircase.first_chunk()

    @property
    def counts(self) -> dict[str, int]:
        """What was read up to the end of the newest chunk that batches are of.

        ``tokens`` that the language model was given, ``rows`` that were made of them, ``epoch`` (from 0), and why
        tokens made none: ``mask`` (an attention_mask of the text), ``excluded`` (a token or position that is), ``norm``
        and ``nonfinite``.
        """
        position = self._staircase.position
        return {**position["counts"], "epoch": position["source"]["epoch"]}

    def settle(self) -> None:
        """Wait until no thread runs the language model; the next one starts in :meth:`next`."""
        self._staircase.settle()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, in JSON types: cursors and counts, no rows."""
        return {**self._staircase.state_dict(), **self._links, "source": self._source.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the batch that would have come next when :meth:`state_dict` was called.

        Raises:
            ValueError: it is no such state, or one of another text, other sites, ranks or schedule: names what differs.
        """
        _check_links(state, self._links)
        if state.get("source") != self._source.fingerprint:
            raise ValueError(
                f"state: {self._source.description} is not the text, or not in the order, that it was saved for: its "
                "files, their sizes, the column, hold_out or the ranks differ"
            )
        self._staircase.load_state_dict(state)


class StoreStream:
    """Batches of collected activations, of one store a site, with the methods of :class:`RowStream`.

    An epoch is one shuffled pass over the stores (:meth:`ActivationStore.batches`); the rows that fill no batch at its
    end are the first of the next epoch's first batch, so that none is lost.

    Args:
        stores: one a site, collected of the same texts with the same settings: their rows are of the same tokens.
        batch_rows: rows of a batch.
        seed: of the shuffle.
        rank, world: of the shards, every ``world``-th is this rank's.
        chunk_rows: of :meth:`first_chunk`, at most.
        buffer_shards: how many shards are mixed, and in memory.
        dtype, device: of the rows; None is as stored, on the CPU.
        prefetch: read the next shards in a thread (see :meth:`ActivationStore.batches`).

    Raises:
        TypeError, ValueError: an argument is not of its kind or range, the stores differ, or have fewer shards than
            there are ranks.

    Example:
        >>> import tempfile
        >>> lm = se.data.load_language_model()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = se.data.collect_activations(lm, ["A short text."], folder, layer=1, progress=False)
        ...     stream = StoreStream([store], batch_rows=4, seed=0)
        ...     stream.next()[0].shape, stream.state_dict()["rows"]
        (torch.Size([4, 256]), 4)
    """

    def __init__(
        self,
        stores: Sequence[ActivationStore],
        *,
        batch_rows: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        chunk_rows: int = 65536,
        buffer_shards: int = 4,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        prefetch: bool = False,
    ) -> None:
        if not isinstance(stores, Sequence) or not all(isinstance(store, ActivationStore) for store in stores):
            raise TypeError(f"stores must be a sequence of ActivationStore, got {stores!r:.80}")
        if not stores:
            raise ValueError("stores must hold at least one store, got none")
        for store in stores[1:]:
            _check_aligned(stores[0], store)
        world = check_int("world", world, 1)
        rank = check_int("rank", rank, 0, world - 1)
        self._stores = [_of_rank(store, rank, world) for store in stores]
        self._batch_rows, self._seed = check_int("batch_rows", batch_rows, 1), check_int("seed", seed, 0)
        self._chunk_rows = check_int("chunk_rows", chunk_rows, 1)
        self._options: dict[str, Any] = {
            "dtype": None if dtype is None else dtype_in("dtype", dtype),
            "device": None if device is None else device_in("device", device),
            "buffer_shards": check_int("buffer_shards", buffer_shards, 1),
            "prefetch": flag("prefetch", prefetch),
        }
        self._links = {
            "sites": [str(Site.of(s.manifest["site"], s.manifest["layer"])) for s in stores], "rank": rank,
            "world": world, "batch_rows": batch_rows, "seed": seed, "buffer_shards": buffer_shards,
            "stores": hashlib.sha256(repr([store.manifest["shards"] for store in stores]).encode()).hexdigest(),
        }  # fmt: skip
        self.widths = tuple(store.d_model for store in stores)
        self._taken = 0
        self._left: tuple[Tensor, ...] | None = None  # read, and not taken
        self._blocks = self._from(0)

    def next(self) -> tuple[Tensor, ...]:
        """The next batch: ``(batch_rows, width)`` for each site, of the same tokens."""
        while self._left is None or len(self._left[0]) < self._batch_rows:
            found = next(self._blocks)
            self._left = found if self._left is None else _joined(self._left, found)
        batch = tuple(rows[: self._batch_rows] for rows in self._left)
        is_used_up = len(self._left[0]) == self._batch_rows
        self._left = None if is_used_up else tuple(rows[self._batch_rows :] for rows in self._left)
        self._taken += self._batch_rows
        return batch

    def first_chunk(self) -> tuple[Tensor, ...]:
        """The first rows, at most ``chunk_rows`` for each site; :meth:`next` still begins with them."""
        found: tuple[Tensor, ...] | None = None
        for block in self._from(0):
            found = block if found is None else _joined(found, block)
            if len(found[0]) >= min(self._chunk_rows, len(self._stores[0])):
                break
        assert found is not None
        return tuple(rows[: min(self._chunk_rows, len(self._stores[0]))] for rows in found)

    @property
    def counts(self) -> dict[str, int]:
        """As :attr:`RowStream.counts`: rows that were taken; what was left out was never stored."""
        return {**dict.fromkeys(COUNTS, 0), "rows": self._taken, "epoch": self._taken // len(self._stores[0])}

    def settle(self) -> None:
        """As :meth:`RowStream.settle`; there is nothing to wait for."""

    def state_dict(self) -> dict[str, Any]:
        """How many rows were taken, and what of: JSON types."""
        return {**self._links, "rows": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :meth:`RowStream.load_state_dict`."""
        _check_links(state, self._links)
        self._go_to(check_int("state: rows", state.get("rows", -1), 0))

    def _go_to(self, taken: int) -> None:
        self._taken, self._left, self._blocks = taken, None, self._from(taken)

    def _from(self, taken: int) -> Iterator[tuple[Tensor, ...]]:
        """Blocks of rows, epoch after epoch."""
        epoch, start = divmod(taken, len(self._stores[0]))
        while True:
            options = {**self._options, "seed": seed_of(self._seed, "epoch", epoch), "start": start}
            yield from zip(*(store.batches(self._batch_rows, **options) for store in self._stores), strict=True)
            epoch, start = epoch + 1, 0


def _joined(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(pair) for pair in zip(first, second, strict=True))


def _check_links(state: dict[str, Any], links: dict[str, Any]) -> None:
    for name, value in links.items():
        if not isinstance(state, dict) or name not in state:
            raise ValueError(f"state is none of a stream, or damaged: it has no {name!r}")
        if state[name] != value:
            raise ValueError(f"state: {name} was {state[name]!r:.80} when it was saved, and is {value!r:.80} now")


def _check_aligned(first: ActivationStore, other: ActivationStore) -> None:
    """Whether the rows of two stores are of the same tokens: shards of one length, with one hash of what was read."""
    def of(store: ActivationStore) -> list[Any]:
        m = store.manifest
        excluded = [m[name] for name in ("drop_first", "exclude_tokens", "exclude_positions")]
        return [[shard["tokens"], shard["text_sha256"]] for shard in m["shards"]] + excluded

    if of(first) != of(other):
        raise ValueError(
            f"stores: the rows of {str(first.path)!r} and {str(other.path)!r} are not of the same tokens: collect both "
            "of the same texts, with the same settings and shard_tokens"
        )


def _of_rank(store: ActivationStore, rank: int, world: int) -> ActivationStore:
    shards = store.manifest["shards"][rank::world]
    if not shards:
        raise ValueError(f"stores: {str(store.path)!r} has {len(store.manifest['shards'])} shards for {world} ranks")
    part = copy.copy(store)
    part.manifest = {**store.manifest, "shards": shards, "tokens": sum(shard["tokens"] for shard in shards)}
    return part
