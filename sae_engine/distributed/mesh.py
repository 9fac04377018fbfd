"""The mesh: made from what torchrun says, or one of the user's; checked before anything is built on it."""
from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .. import _checks as check
from .agreement import Agreement

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DIMENSIONS = ("data", "node", "latent")  # outer first; the last two cut latents
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def from_env(latent: int | None = None, *, node: int = 1, data: int = 1, timeout: float = 300) -> DeviceMesh:
    """The mesh of the processes that ``torchrun`` has started; joins them where that has not happened yet.

    Every process takes the GPU of its ``LOCAL_RANK``, and NCCL, where there are GPUs; otherwise the CPU, and gloo.

    Args:
        latent: processes over which the latents are cut; by default all of them, over ``node`` and ``data``.
        node: machines, where latents are cut over several.
        data: groups of ``node * latent`` processes. Each has all latents, and sees the tokens of its own ranks only;
            gradients are summed over the groups. See :func:`estimate` for what that is worth.
        timeout: seconds after which a process that does not answer is given up.

    Returns:
        A ``DeviceMesh`` with the dimension ``latent``, after ``node`` and before that ``data`` where there are several.

    Raises:
        RuntimeError: the processes were not started by torchrun; or torch cannot join processes.
        ValueError: ``latent`` times ``node`` times ``data`` is not the number of processes.

    Example:
        >>> mesh = se.distributed.from_env(latent=8, data=2)  # doctest: +SKIP
    """
    if not dist.is_available():
        raise RuntimeError("this PyTorch was built without torch.distributed, which a mesh needs")
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing and not dist.is_initialized():
        raise RuntimeError(f"the environment lacks {', '.join(missing)}: start the processes with torchrun, or call "
                           "torch.distributed.init_process_group first")  # fmt: skip
    node, data = check.integer_k(node, name="node"), check.integer_k(data, name="data")
    latent = None if latent is None else check.integer_k(latent, name="latent")
    seconds = timedelta(seconds=check.positive("timeout", timeout))
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    latent = max(world // (node * data), 1) if latent is None else latent
    if latent * node * data != world:
        raise ValueError(f"latent must be such that latent * node * data = {world}, the number of processes, "
                         f"got latent={latent}, node={node}, data={data}")  # fmt: skip
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", dist.get_rank() if dist.is_initialized() else 0)))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=seconds)
    from torch.distributed.device_mesh import init_device_mesh

    sizes = {name: size for name, size in zip(DIMENSIONS, (data, node, latent), strict=True)
             if size > 1 or name == "latent"}  # fmt: skip
    mesh = init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    Agreement.of(mesh, timeout)
    return mesh


def checked_mesh(mesh: object, d_sae: int, device: torch.device | None) -> DeviceMesh:
    """A mesh with the dimensions that are known, no larger than there are latents, on the device that was asked for."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch DeviceMesh, as se.distributed.from_env makes it, got {mesh!r:.80}")
    names = mesh.mesh_dim_names or ()
    known = [name for name in DIMENSIONS if name in names]
    if "latent" not in names or list(names) != known:
        raise ValueError(f"mesh must have the dimension 'latent', and of {DIMENSIONS} no others, in this order, "
                         f"got {names}")  # fmt: skip
    if mesh.get_coordinate() is None:
        raise ValueError("mesh must hold this process, which it does not")
    shards = mesh.size() // mesh.mesh.shape[0] if "data" in names else mesh.size()
    if d_sae < shards:
        raise ValueError(f"mesh must cut latents over at most d_sae = {d_sae} ranks, one for each, got {shards}")
    if device is not None and device.type != mesh.device_type:
        raise ValueError(f"mesh must be of device {device.type!r}, as the argument device says, "
                         f"got one of {mesh.device_type!r}")  # fmt: skip
    return mesh
