"""Sums of parts over ranks of several nodes: in each node first, so that a node sends another one sum of its parts."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .wire import Wire


class OverNodes:
    """The wire of a group whose ranks are in several nodes, as far as rows are gathered and parts of them summed.

    Args:
        wire: to all ranks of the group, those of a node next to one another.
        inside: to the ranks of this one's node.
        between: to the ranks that have this one's place in the other nodes.
    """

    def __init__(self, wire: Wire, inside: Wire, between: Wire) -> None:
        self.wire, self.inside, self.between = wire, inside, between

    def gather_rows(self, part: Tensor, rows: Sequence[int], name: str) -> Tensor:
        """As :meth:`.Wire.gather_rows`."""
        return self.wire.gather_rows(part, rows, name)

    def sum_rows(self, whole: Tensor, rows: Sequence[int], name: str) -> Tensor:
        """As :meth:`.Wire.sum_rows`: the same bits, where a node has a power of two of ranks.

        In a node each rank adds up what all of its ranks have made for the rows of one place, the same in every node;
        then the ranks of that place exchange those of each.
        """
        places, nodes = self.inside.size, self.between.size
        of_ranks = whole.split(list(rows))
        by_place = torch.cat([of_ranks[node * places + place] for place in range(places) for node in range(nodes)])
        numbers = [sum(rows[place::places]) for place in range(places)]
        of_node = self.inside.sum_rows(by_place, numbers, name)
        return self.between.sum_rows(of_node, list(rows[self.inside.rank :: places]), name)
