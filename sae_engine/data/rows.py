"""Activations of a source's documents, read on from any row: what the shuffle is made of.

A row's bits depend on which tokens passed the model together with its own. So a position names a batch by where its
first token stands in the text, and then how many of the batch's rows were taken: the same batch is run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .activations import batch_rows, check_finite
from .contexts import Contexts, TokenBatch, packed, token_ids_of, unpacked
from .models import LanguageModel, vocabulary_size
from .places import find_place
from .sites import Site
from .sources import Source

COUNTS = ("tokens", "rows", "mask", "excluded", "norm", "nonfinite")
MOST_NONFINITE = 0.01


class LanguageModelRows:
    """The rows of several sites, aligned; a :class:`RowReader`.

    ``position`` is where in the source the batch begins (``source``, ``token``), how many of its rows were taken
    (``used``), and what was counted before that batch (``counts``).
    """

    def __init__(
        self,
        lm: LanguageModel,
        source: Source,
        sites: Sequence[Site],
        contexts: Contexts,
        *,
        max_norm_multiple: float | None,
        dtype: torch.dtype | None,
        device: torch.device,
        chunk_rows: int,
    ) -> None:
        self._lm, self._source, self._sites, self._contexts = lm, source, tuple(sites), contexts
        self._max_norm_multiple, self._dtype, self._device = max_norm_multiple, dtype, device
        self._chunk_rows = chunk_rows
        self._vocabulary = vocabulary_size(lm)
        self.widths = tuple(find_place(lm.of(site).model, site).width for site in self._sites)
        self.seek({"source": source.start, "token": 0, "used": 0, "counts": dict.fromkeys(COUNTS, 0)})

    @property
    def position(self) -> dict[str, Any]:
        if self._rows:
            return {**self._batch_at, "used": self._used, "counts": dict(self._counted_before)}
        return {**self._tokens.cursor, "used": self._skip, "counts": dict(self._counts)}

    def seek(self, position: dict[str, Any]) -> None:
        self._tokens = _Tokens(self._lm, self._source, self._contexts, position)
        self._counts = dict(position["counts"])
        self._rows: tuple[Tensor, ...] = ()  # of the batch that is being taken
        self._used = 0
        self._skip = position["used"]  # of the next batch
        self._barren_since: int | None = None  # the epoch in which the last row was, if none came since

    def is_same(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        # Without its place in the file: what a data set of the hub says of that depends on where reading began.
        one, other = ({**position, "source": {**position["source"], "at": None}} for position in (one, other))
        return one == other

    def read(self, count: int) -> tuple[Tensor, ...]:
        while not self._rows:
            self._run()
        taken = tuple(rows[self._used : self._used + count] for rows in self._rows)
        self._used += len(taken[0])
        if self._used == len(self._rows[0]):
            self._rows = ()
        return taken

    def _run(self) -> None:
        """The next batch through the model."""
        self._batch_at, self._counted_before = self._tokens.cursor, dict(self._counts)
        batch = self._batch()
        rows = batch_rows(self._lm, batch, *self._sites)
        rows = tuple(x.to(self._device, self._dtype or x.dtype) for x in rows)
        kept = self._kept(rows, batch)
        if kept is not None:
            rows = tuple(x[kept] for x in rows)
        self._counts["rows"] += len(rows[0])
        skip, self._skip = self._skip, 0
        if skip < len(rows[0]):
            self._rows, self._used, self._barren_since = rows, skip, None
        elif skip > len(rows[0]):
            raise ValueError(
                f"the text or the model is not what it was when the state was saved: the batch at {self._batch_at} "
                f"has {len(rows[0])} rows, of which {skip} were taken"
            )
        else:
            self._check_epoch()

    def _batch(self) -> TokenBatch:
        contexts = self._contexts
        if contexts.packing:
            batch = packed(self._tokens.take(contexts.batch_size * contexts.run), contexts, contexts.run)
        else:
            rows = [self._tokens.take(contexts.run, of_one=True) for _ in range(contexts.batch_size)]
            batch = unpacked(rows, contexts)
        if (largest := int(batch.input_ids.max())) >= self._vocabulary or int(batch.input_ids.min()) < 0:
            wrong = largest if largest >= self._vocabulary else int(batch.input_ids.min())
            document = int(batch.documents.flatten()[(batch.input_ids.flatten() == wrong).nonzero()[0]])
            raise ValueError(
                f"dataset_path: document {document} of {self._source.description} holds token id {wrong}, and "
                f"{self._lm.name!r} has tokens 0..{self._vocabulary - 1}: it was made with another tokenizer"
            )
        present = batch.input_ids.numel() if batch.attention_mask is None else int(batch.attention_mask.sum())
        self._counts["tokens"] += present
        self._counts["excluded"] += present - len(batch.kept)
        self._counts["mask"] = self._tokens.cursor["source"]["masked"]
        return batch

    def _kept(self, rows: Sequence[Tensor], batch: TokenBatch) -> Tensor | None:
        """Which rows are finite and no longer than they may be, at all sites; None: all of them."""
        finite = torch.stack([x.isfinite().all(1) for x in rows]).all(0)
        wrong = len(finite) - int(finite.sum())
        if wrong:
            self._counts["nonfinite"] += wrong
            self._check_nonfinite(rows, batch)
        kept = finite
        if self._max_norm_multiple is not None and bool(finite.any()):
            for x in rows:
                norms = x.float().norm(dim=1)
                kept = kept & (norms <= self._max_norm_multiple * norms[finite].median())
            self._counts["norm"] += int(finite.sum()) - int(kept.sum())
        return None if bool(kept.all()) else kept

    def _check_nonfinite(self, rows: Sequence[Tensor], batch: TokenBatch) -> None:
        wrong, seen = self._counts["nonfinite"], self._counts["nonfinite"] + self._counts["rows"]
        if wrong <= MOST_NONFINITE * max(seen, self._chunk_rows):
            return
        why = f"in {str(self._dtype).removeprefix('torch.')}, larger numbers overflow; use bfloat16 or float32"
        try:
            for x in batch_rows(self._lm, batch, *self._sites):
                check_finite(x, self._counts["rows"], self._lm, batch)
        except ValueError as error:
            why = str(error)
        raise FloatingPointError(
            f"{self._source.description}: {wrong} of {seen} rows were not finite, more than "
            f"{MOST_NONFINITE:.0%} of them or of a chunk: {why}"
        )

    def _check_epoch(self) -> None:
        """After a batch without rows: raises if a whole epoch had none."""
        epoch = self._tokens.cursor["source"]["epoch"]
        if self._barren_since is None:
            self._barren_since = epoch
        elif epoch > self._barren_since + 1:
            raise ValueError(
                f"dataset_path: in a whole epoch of {self._source.description} there is no row to train on: every "
                "token is excluded, or its row is dropped"
            )


class _Tokens:
    """The tokens of documents, behind each other where contexts are packed, and a cursor for every one of them."""

    def __init__(self, lm: LanguageModel, source: Source, contexts: Contexts, position: dict[str, Any]) -> None:
        self._lm, self._separator = lm, contexts.separator if contexts.packing else None
        self._next = position["source"]  # the cursor of the next document
        self._documents = source.documents(self._next)
        self._before = self._next  # of the document that is being taken
        self._ids = torch.empty(0, dtype=torch.int64, device="cpu")
        self._number = self._at = 0
        if position["token"]:
            self._fetch()
            self._at = position["token"]
            if self._at >= len(self._ids):
                raise ValueError(
                    f"the text or the tokenizer is not what it was when the state was saved: document {self._number} "
                    f"has {len(self._ids)} tokens, of which {self._at} were taken"
                )

    @property
    def cursor(self) -> dict[str, Any]:
        """Of the next token."""
        if self._at < len(self._ids):
            return {"source": self._before, "token": self._at}
        return {"source": self._next, "token": 0}

    def take(self, count: int, *, of_one: bool = False) -> Tensor:
        """Token ids, documents' numbers and offsets (3, count); fewer at the end of a document where ``of_one``."""
        found: list[Tensor] = []
        while count:
            while self._at == len(self._ids):
                self._fetch()
            ids = self._ids[self._at : self._at + count]
            offsets = torch.arange(self._at, self._at + len(ids), device="cpu")
            found.append(torch.stack([ids, torch.full_like(ids, self._number), offsets]))
            self._at += len(ids)
            count = 0 if of_one else count - len(ids)
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def _fetch(self) -> None:
        self._before = self._next
        self._next, document = next(self._documents)
        self._number, self._at = self._next["document"] - 1, 0
        self._ids = token_ids_of(self._lm, document, self._number, self._separator)
