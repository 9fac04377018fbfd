"""The processes that train together: what a trainer asks of ``torch.distributed``."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(NamedTuple):
    """This process's number among ``world``, and on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    def average(self, tensors: list[Tensor]) -> None:
        """Over all processes, in place."""
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(self.world)

    def largest(self, number: int) -> int:
        """Over all processes, through the CPU: no device is waited for."""
        if self.world == 1:
            return number
        found = torch.tensor(number, device="cpu")
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def gathered(self, value: Any) -> list[Any]:
        """Everybody's value, of JSON's types, in the order of ranks."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found


@contextmanager
def distributed() -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone. A group that is there already is used and left.

    Raises:
        ValueError: torchrun's variables are incomplete.
    """
    if not dist.is_available() or (not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) == 1):
        yield Ranks()
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if ours:
            dist.destroy_process_group()
