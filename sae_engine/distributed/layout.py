"""Who owns which latents: contiguous shards, cut as DTensor's ``Shard`` cuts over the mesh's dimensions."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .wire import shares


class Ownership(NamedTuple):
    """Latents over ranks: rank r has those from ``bounds[r]`` to ``bounds[r + 1]``.

    Example:
        >>> Ownership.over(10, [4], rank=1)
        Ownership(bounds=(0, 3, 6, 9, 10), rank=1)
        >>> Ownership.over(10, [2, 2], rank=1).mine  # nodes first, then what each has in it
        slice(3, 5, None)
    """

    bounds: tuple[int, ...]
    rank: int

    @classmethod
    def over(cls, num_latents: int, sizes: Sequence[int], rank: int) -> Ownership:
        """``sizes`` of the mesh's dimensions that cut latents, the outer one first."""
        numbers = [num_latents]
        for size in sizes:
            numbers = [part for number in numbers for part in shares(number, size)]
        bounds = [0]
        for number in numbers:
            bounds.append(bounds[-1] + number)
        return cls(tuple(bounds), rank)

    @property
    def num_latents(self) -> int:
        """All of them."""
        return self.bounds[-1]

    @property
    def numbers(self) -> list[int]:
        """Of latents, of each rank."""
        return [end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def mine(self) -> slice:
        return slice(self.bounds[self.rank], self.bounds[self.rank + 1])

    @property
    def largest(self) -> int:
        """Latents of the largest shard."""
        return max(self.numbers)
