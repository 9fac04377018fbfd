"""Every collective of a mesh, each counted by name: they move bits, add integers and take minima; none adds floats.

What a collective adds depends on the algorithm that a library picks for a topology. Sums of floats are made by the
receiver from gathered parts, as a tree in order of ranks (:func:`tree_sum`), and so have the same bits everywhere.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def shares(number: int, ranks: int) -> list[int]:
    """How many of ``number`` each rank has, cut as ``torch.chunk`` and DTensor do: the last may have fewer, or none.

    Example:
        >>> shares(9, 4), shares(2, 3)
        ([3, 3, 3, 0], [1, 1, 0])
    """
    size = -(-number // ranks)
    return [max(min(size, number - rank * size), 0) for rank in range(ranks)]


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum, neighbours first: aligned halves or quarters of it may be made elsewhere without another bit.

    Example:
        >>> tree_sum([torch.ones(2), torch.ones(2), torch.ones(2)])
        tensor([3., 3.])
    """
    parts = list(parts)
    while len(parts) > 1:
        parts = [parts[i] + parts[i + 1] if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    return parts[0]


class Wire:
    """The ranks of a process group, as one of them sees them.

    Attributes:
        bytes: what this rank has sent, by name of the collective; of a sum or a minimum as a ring sends it.
        calls: how often. Several wires may count together.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, counts: tuple[Counter[str], Counter[str]] | None = None
    ) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.bytes, self.calls = (Counter(), Counter()) if counts is None else counts

    def gather(self, part: Tensor, name: str) -> Tensor:
        """(ranks, *shape): every rank's ``part``, all of one shape."""
        self._count(name, (self.size - 1) * part.nbytes)
        if self.size == 1:
            return part.detach()[None]
        out = part.detach().new_empty(self.size, *part.shape)
        if not part.numel():
            return out
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        all_gather(_bits(out), _bits(part), group=self.group)
        return out

    def gather_rows(self, part: Tensor, rows: Sequence[int], name: str) -> Tensor:
        """(all rows, …) in order of ranks, of which this one has ``rows[rank]``. Uneven parts travel padded."""
        if self.size == 1:
            return part.detach()
        longest = max(rows)
        if part.shape[0] < longest:
            part = torch.cat([part.detach(), part.new_zeros(longest - part.shape[0], *part.shape[1:])])
        every = self.gather(part.contiguous(), name)
        if min(rows) == longest:
            return every.flatten(0, 1)
        return torch.cat([every[rank, :number] for rank, number in enumerate(rows)])

    def scatter_rows(self, whole: Tensor, rows: Sequence[int], name: str) -> Tensor:
        """(ranks, my rows, …): what each rank has made for the rows that are mine; ``whole`` (all rows, …)."""
        mine, width = rows[self.rank], whole.element_size() * whole.shape[1:].numel()
        self._count(name, (sum(rows) - mine) * width)
        if self.size == 1:
            return whole.detach()[None]
        out = whole.new_empty(self.size, mine, *whole.shape[1:])
        self._all_to_all(out, whole, [mine * width] * self.size, [number * width for number in rows])
        return out

    def sum_rows(self, whole: Tensor, rows: Sequence[int], name: str) -> Tensor:
        """(my rows, …): the sum of what each rank has made for them, as a tree; ``whole`` (all rows, …)."""
        return tree_sum(list(self.scatter_rows(whole, rows, name)))

    def return_rows(self, parts: Tensor, rows: Sequence[int], name: str) -> Tensor:
        """The way back: ``parts`` (ranks, my rows, …), one for each rank; (all rows, …), what was made for me."""
        mine, width = rows[self.rank], parts.element_size() * parts.shape[2:].numel()
        self._count(name, (self.size - 1) * mine * width)
        if self.size == 1:
            return parts.detach()[0]
        out = parts.new_empty(sum(rows), *parts.shape[2:])
        self._all_to_all(out, parts, [number * width for number in rows], [mine * width] * self.size)
        return out

    def exchange(self, entries: Tensor, sent: Sequence[int], received: Sequence[int], name: str) -> Tensor:
        """``entries`` (N,), the first ``sent[0]`` of them for rank 0 and so on; what has come, in order of ranks."""
        size = entries.element_size()
        self._count(name, (sum(sent) - sent[self.rank]) * size)
        if self.size == 1:
            return entries.detach()
        out = entries.new_empty(sum(received))
        self._all_to_all(out, entries, [number * size for number in received], [number * size for number in sent])
        return out

    def add(self, numbers: Tensor, name: str) -> Tensor:
        """The sum of every rank's integers, which is exact in any order.

        Raises:
            TypeError: they are floats.
        """
        if numbers.is_floating_point():
            raise TypeError(f"numbers must be integers, got {numbers.dtype}: no collective adds floats")
        return self._reduced(numbers, dist.ReduceOp.SUM, name)

    def least(self, numbers: Tensor, name: str) -> Tensor:
        """The least of every rank's numbers, element by element."""
        return self._reduced(numbers, dist.ReduceOp.MIN, name)

    def first(self, tensor: Tensor, name: str) -> Tensor:
        """Rank 0's, in place."""
        self._count(name, tensor.nbytes if self.rank == 0 else 0)
        if self.size > 1 and tensor.numel():
            dist.broadcast(_bits(tensor), self._global(0), group=self.group)
        return tensor

    def send(self, part: Tensor, rank: int, name: str) -> None:
        """To one rank, which receives it."""
        self._count(name, part.nbytes)
        dist.send(part, self._global(rank), group=self.group)

    def receive(self, out: Tensor, rank: int | None) -> int:
        """Into ``out`` what a rank sends, or the first of all that do; returns which."""
        sender = dist.recv(out, None if rank is None else self._global(rank), group=self.group)
        return sender if self.group is None else dist.get_group_rank(self.group, sender)

    def hosts(self, numbers: Sequence[int], name: str) -> list[list[int]]:
        """Every rank's integers, from host to host: no device is asked or waited for."""
        return self.gather(torch.tensor(numbers, dtype=torch.int64, device="cpu"), name).tolist()

    def _reduced(self, numbers: Tensor, operation: dist.ReduceOp.RedOpType, name: str) -> Tensor:
        self._count(name, 2 * (self.size - 1) * numbers.nbytes / self.size)
        numbers = numbers.detach().clone()
        if self.size > 1 and numbers.numel():
            dist.all_reduce(numbers, operation, group=self.group)
        return numbers

    def _all_to_all(self, out: Tensor, given: Tensor, received: list[int], sent: list[int]) -> None:
        dist.all_to_all_single(_bits(out), _bits(given), received, sent, group=self.group)

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _count(self, name: str, sent: float) -> None:
        self.bytes[name] += int(sent)
        self.calls[name] += 1


def _bits(tensor: Tensor) -> Tensor:
    """The bytes: not every back end knows every dtype."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
