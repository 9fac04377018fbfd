"""The rows of a run on a mesh: dealt into streams, of which each process serves some."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.memory import TensorStream
from ..data.stream import RowStream, StoreStream
from .ranks import Ranks

OneStream = RowStream | StoreStream | TensorStream


class DealtStreams:
    """Some streams of a run as one, with their methods: a batch is theirs, one below the other.

    Args:
        streams: at least one.
        serves: False: rows are other processes' matter, and the stream is there for its widths.

    Attributes:
        widths: of the rows at each site.
    """

    def __init__(self, streams: Sequence[OneStream], *, serves: bool = True) -> None:
        self._streams, self._serves = list(streams), serves
        self.widths = streams[0].widths

    def next(self) -> tuple[Tensor, ...]:
        """The next batches: ``(rows, width)`` for each site, of the same tokens; no rows where none are served."""
        if not self._serves:
            return tuple(torch.empty(0, width, device="cpu") for width in self.widths)
        return _below([stream.next() for stream in self._streams])

    def first_chunk(self) -> tuple[Tensor, ...]:
        """The first rows of each; :meth:`next` still begins with them."""
        return _below([stream.first_chunk() for stream in self._streams])

    @property
    def counts(self) -> dict[str, int]:
        """Of all of them together, the epoch that of the last."""
        return counted([stream.counts for stream in self._streams]) if self._serves else {}

    def settle(self) -> None:
        """Wait until no thread runs the language model."""
        for stream in self._streams:
            stream.settle()

    def state_dict(self) -> dict[str, Any]:
        """Where each is, in their order: JSON types."""
        return {"streams": [stream.state_dict() for stream in self._streams] if self._serves else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what would have come next.

        Raises:
            ValueError: it is the state of other streams; names what differs.
        """
        if self._serves:
            for stream, own in zip(self._streams, state["streams"], strict=True):
                stream.load_state_dict(own)


def dealt(ranks: Ranks, make: Callable[[int, int, bool], OneStream]) -> OneStream | DealtStreams:
    """What this process serves. ``make(rank, world, alone)`` is one stream of ``world``, alone in its process or not.
    """
    own = ranks.own_streams
    if not ranks.parts:
        return make(own[0], ranks.world, True)
    numbers = own if own else range(1)
    return DealtStreams([make(n, ranks.parts, len(own) == 1) for n in numbers], serves=bool(own))


def counted(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    """Counts of several streams as those of one: sums, but for the epoch."""
    total: Counter[str] = Counter()
    for one in counts:
        total.update({name: number for name, number in one.items() if name != "epoch"})
    epochs = [one["epoch"] for one in counts if "epoch" in one]
    return {**total, **({"epoch": max(epochs)} if epochs else {})}


def _below(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(site) for site in zip(*parts, strict=True))
