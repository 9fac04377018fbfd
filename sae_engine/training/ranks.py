"""The processes that train together: what a trainer asks of ``torch.distributed``."""
from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.agreement import Agreement
from ..distributed.mesh import DIMENSIONS
from ..distributed.wire import Wire, shares, tree_sum

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .config import MeshConfig


class Ranks(NamedTuple):
    """This process's number among ``world``, and on its machine.

    Attributes:
        parts: of the run's rows on a mesh, each a stream of its own; else 0, and there is one stream. A run that goes
            on with other processes keeps its parts.
        mesh: of them all; None where there is one alone, which was asked for none.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    parts: int = 0
    mesh: DeviceMesh | None = None

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    @property
    def streams(self) -> int:
        """Into how many the rows are dealt."""
        return self.parts or self.world

    @property
    def own_streams(self) -> range:
        """Which of them this process serves: neighbours, so that a batch is the same over any number of processes."""
        if not self.parts:
            return range(self.rank, self.rank + 1)
        numbers = shares(self.parts, self.world)
        first = sum(numbers[: self.rank])
        return range(first, first + numbers[self.rank])

    def mean(self, tensors: list[Tensor]) -> None:
        """Of a few numbers, over all processes, in place; the same bits on any topology."""
        wire = Wire(None)
        for tensor in tensors:
            tensor.copy_(tree_sum(list(wire.gather(tensor.contiguous(), "mean"))) / self.world)

    def largest(self, number: int) -> int:
        """Over all processes, which are on a mesh by now: no device is waited for."""
        if self.world == 1:
            return number
        assert self.mesh is not None
        return max(Agreement.of(self.mesh).meet("agreed", number))

    def gathered(self, value: Any) -> list[Any]:
        """Everybody's value, of JSON's types, in the order of ranks."""
        if self.world == 1:
            return [value]
        if self.mesh is not None:  # where one that does not come has a name
            return Agreement.of(self.mesh).said(value)
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def alone(self, work: Callable[[], object]) -> None:
        """What the process that writes does while the others wait for it; where it fails, they do not wait for ever.

        Raises:
            RuntimeError: in the others, that it has failed: quotes it.
            As ``work`` in that process.
        """
        failed: BaseException | None = None
        if self.writes:
            try:
                work()
            except Exception as error:
                failed = error
        said = self.gathered(None if failed is None else f"{type(failed).__name__}: {failed}")[0]
        if failed is not None:
            raise failed
        if said is not None:
            raise RuntimeError(f"rank 0: {said}")

    def on_mesh(self, mesh: MeshConfig, device: torch.device) -> Ranks:
        """The same processes with the mesh over which latents are cut; it lives as long as they do."""
        if not dist.is_initialized():  # one process, which no torchrun has started
            _join(store=dist.HashStore(), rank=0, world_size=1)
        key = mesh.data, mesh.node, mesh.latent, device.type
        if _MESHES.get("group") is not dist.group.WORLD:
            _MESHES.clear()
            _MESHES["group"] = dist.group.WORLD
        if key not in _MESHES:
            from torch.distributed.device_mesh import init_device_mesh

            sizes = {name: getattr(mesh, name) for name in DIMENSIONS}
            sizes = {name: size for name, size in sizes.items() if size > 1 or name == "latent"}
            _MESHES[key] = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        Agreement.of(_MESHES[key], mesh.timeout)
        return self._replace(mesh=_MESHES[key])


_MESHES: dict[Any, Any] = {}  # those of the group at hand: an equal one shares what its processes have agreed on


def distributed() -> Ranks:
    """The ranks that torchrun started, or this process alone. A group that is there already is used.

    One that is made here stays until the process ends: two groups of the same processes one after the other would meet
    under the same names in torchrun's store, where a process that is ahead reads what is left of the first.

    Raises:
        ValueError: torchrun's variables are incomplete.
    """
    if not dist.is_available():
        return Ranks()
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Ranks()
        _join()
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def _join(**options: Any) -> None:
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", **options)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
