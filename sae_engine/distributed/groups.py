"""The process groups of a mesh: ranks that share the latents, those that have the same ones, and all of them."""
from __future__ import annotations

import weakref
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist

from .nodes import OverNodes
from .wire import Wire

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Groups(NamedTuple):
    """Of a mesh with the dimension ``data``, each index of which is a group of ranks with all latents.

    Attributes:
        latents: the ranks of this one's group, those of a node next to one another.
        node: of these the ones of this one's node, and those of its place in the other nodes; None with one node.
        data: the ranks of all groups that have this one's latents.
        everyone: the whole mesh, group after group.
        updates: the mesh with ``data`` innermost: each group's rank updates a part of the latents that they share.
    """

    latents: dist.ProcessGroup | None
    node: tuple[dist.ProcessGroup, dist.ProcessGroup] | None
    data: dist.ProcessGroup | None
    everyone: dist.ProcessGroup | None
    updates: DeviceMesh

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Groups:
        """Those of this mesh, which its first use makes; all ranks call it.

        Raises:
            ValueError: some processes are not of a mesh with several groups.
        """
        world, known = _GROUPS.get(mesh, (None, None))
        if known is None or world is not dist.group.WORLD:  # meshes are equal where only their processes' groups differ
            known = cls._made(mesh)
            _GROUPS[mesh] = dist.group.WORLD, known
        return known

    @classmethod
    def _made(cls, mesh: DeviceMesh) -> Groups:
        from torch.distributed.device_mesh import DeviceMesh

        names = mesh.mesh_dim_names or ()
        node = (mesh.get_group("latent"), mesh.get_group("node")) if "node" in names else None
        if "data" not in names:
            all_ranks = mesh.get_group() if mesh.ndim == 1 else _group(mesh.mesh.flatten().tolist())
            return cls(all_ranks, node, None, all_ranks, mesh)
        if mesh.size() != dist.get_world_size():
            raise ValueError(f"mesh must hold all {dist.get_world_size()} processes where it has the dimension 'data', "
                             f"got {mesh.size()}")  # fmt: skip
        mine = mesh.mesh[mesh.get_local_rank("data")]
        latents = mesh.get_group("latent") if mine.dim() == 1 else _group(mine.flatten().tolist())
        inner = DeviceMesh(mesh.device_type, mesh.mesh.movedim(0, -1), mesh_dim_names=(*names[1:], "data"))
        return cls(latents, node, mesh.get_group("data"), _group(mesh.mesh.flatten().tolist()), inner)

    def wires(self) -> Wires:
        """Those of one autoencoder: what is sent over any of them is counted together."""
        counts: tuple[Counter[str], Counter[str]] = Counter(), Counter()
        latents, data = Wire(self.latents, counts), None if self.data is None else Wire(self.data, counts)
        inside, between = (None, None) if self.node is None else (Wire(group, counts) for group in self.node)
        of_rows = latents if inside is None or between is None else OverNodes(latents, inside, between)
        return Wires(latents, of_rows, data, latents if data is None else Wire(self.everyone, counts))


class Wires(NamedTuple):
    """To the ranks of this one's group, and the same for rows that are gathered and summed; to the ranks of the other
    groups that have its latents, where there are some; and to all."""

    latents: Wire
    rows: Wire | OverNodes
    data: Wire | None
    everyone: Wire


def _group(ranks: list[int]) -> dist.ProcessGroup | None:
    if ranks == list(range(dist.get_world_size())):
        return None
    return dist.new_group(ranks, use_local_synchronization=True)


_GROUPS: weakref.WeakKeyDictionary[DeviceMesh, tuple[object, Groups]] = weakref.WeakKeyDictionary()
