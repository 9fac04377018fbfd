"""Who owns which latents: contiguous shards, cut as DTensor's ``Shard`` cuts over the mesh's dimensions."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .wire import shares

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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

    @classmethod
    def on(cls, mesh: DeviceMesh, num_latents: int) -> Ownership:
        """In each group of a mesh, whose dimension ``data`` cuts no latents."""
        rank, sizes = 0, []
        coordinate = mesh.get_coordinate() or ()
        for name, size, at in zip(mesh.mesh_dim_names or (), mesh.mesh.shape, coordinate, strict=True):
            if name != "data":
                rank = rank * size + at
                sizes.append(size)
        return cls.over(num_latents, sizes, rank)

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
