"""Batches of activations that are in memory already, on whatever device they are."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .contexts import check_int
from .shuffle import seed_of


class TensorStream:
    """Batches of rows in memory, with the methods of :class:`~sae_engine.data.stream.RowStream`.

    Each epoch is a permutation of all rows; those that fill no batch at its end begin the next epoch's first.

    Args:
        rows: one ``(N, width)`` a site, of the same tokens, on one device, on which batches are made.
        batch_rows: rows of a batch.
        seed: of the permutations.
        rank, world: of the rows, every ``world``-th is this rank's.
        chunk_rows: of :meth:`first_chunk`, at most.

    Attributes:
        widths: of the rows at each site.

    Raises:
        TypeError, ValueError: an argument is not of its kind or range, or the tensors have not as many rows.

    Example:
        >>> stream = TensorStream([torch.randn(10, 4)], batch_rows=4, seed=0)
        >>> [stream.next()[0].shape[0] for _ in range(3)], stream.counts["epoch"]
        ([4, 4, 4], 1)
    """

    def __init__(
        self, rows: Sequence[Tensor], *, batch_rows: int, seed: int, rank: int = 0, world: int = 1,
        chunk_rows: int = 65536,
    ) -> None:  # fmt: skip
        if isinstance(rows, Tensor) or not isinstance(rows, Sequence) or not rows:
            raise TypeError(f"rows must be a sequence of tensors, one a site, got {type(rows).__name__}")
        world = check_int("world", world, 1)
        rank = check_int("rank", rank, 0, world - 1)
        for x in rows:
            check.floating("rows", x, dims=2)
            check.same_device("rows", x, rows[0])
            if len(x) != len(rows[0]) or len(x) < world:
                raise ValueError(f"rows must be as many at each site, at least {world}, got {[len(x) for x in rows]}")
        self._rows = tuple(x.detach()[rank::world] for x in rows)
        self._batch_rows, self._seed = check_int("batch_rows", batch_rows, 1), check_int("seed", seed, 0)
        self._chunk_rows = check_int("chunk_rows", chunk_rows, 1)
        self._links = {"rank": rank, "world": world, "batch_rows": self._batch_rows, "seed": self._seed,
                       "shapes": [list(x.shape) for x in rows]}  # fmt: skip
        self.widths = tuple(x.shape[1] for x in rows)
        self._taken, self._epoch = 0, -1
        self._order = torch.empty(0, dtype=torch.int64, device="cpu")

    def next(self) -> tuple[Tensor, ...]:
        """The next batch: ``(batch_rows, width)`` for each site, of the same tokens."""
        found, missing = [], self._batch_rows
        while missing:
            epoch, start = divmod(self._taken, len(self._rows[0]))
            part = self._permutation(epoch)[start : start + missing]
            found.append(part)
            missing -= len(part)
            self._taken += len(part)
        chosen = found[0] if len(found) == 1 else torch.cat(found)
        return tuple(x.index_select(0, chosen) for x in self._rows)  # on a CPU several times as fast as x[chosen]

    def first_chunk(self) -> tuple[Tensor, ...]:
        """The first rows of the first epoch, at most ``chunk_rows`` a site; :meth:`next` begins with them too."""
        chosen = self._permutation(0)[: self._chunk_rows]
        return tuple(x.index_select(0, chosen) for x in self._rows)

    @property
    def counts(self) -> dict[str, int]:
        """Rows that were taken, and the epoch (from 0) that the next one is of."""
        return {"rows": self._taken, "epoch": self._taken // len(self._rows[0])}

    def settle(self) -> None:
        """Nothing to wait for."""

    def state_dict(self) -> dict[str, Any]:
        """How many rows were taken, and of what: JSON types."""
        return {**self._links, "rows": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the batch that would have come next when :meth:`state_dict` was called.

        Raises:
            ValueError: it is the state of another stream; names what differs.
        """
        for name, value in self._links.items():
            if state.get(name) != value:
                raise ValueError(f"state: {name} was {state.get(name)!r} when it was saved, and is {value!r} now")
        self._taken = check_int("state: rows", state["rows"], 0)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator("cpu").manual_seed(seed_of(self._seed, "epoch", epoch))
            order = torch.randperm(len(self._rows[0]), generator=generator, device="cpu")
            device = self._rows[0].device
            self._order = order.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else order
            self._epoch = epoch
        return self._order
