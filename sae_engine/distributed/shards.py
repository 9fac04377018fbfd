"""One autoencoder's latents over a mesh, as one of its ranks sees them: what is its own, and the way to the others."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._slabs import default_budget_bytes
from ..codes import SparseCodes
from ..rules.per_source import PerSource
from . import entries, selection
from .agreement import Agreement
from .groups import Groups
from .layout import Ownership
from .sums import GatheredRows, SummedParts, SummedRanks
from .wire import shares, tree_sum

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["Shards"]


class Shards:
    """A rank has some latents whole, and sees the tokens of every rank of its group; a batch is the concatenation of
    all ranks' tokens, by rank and so group by group. There is one group, unless the mesh has the dimension ``data``.

    Attributes:
        mesh: a ``DeviceMesh``.
        layout: which latents are whose.
        wire: to the other ranks of the group; it counts what is sent, together with the two below.
        across: to the ranks of the other groups that have my latents; None where there is one group.
        everyone: to all ranks of the mesh.
        group: the number of mine.
        rows: tokens of each rank of the group in the batch at hand (:meth:`begin`).
        every_rows: of each rank of the mesh.
        trims: whether codes are as long as there are entries, which the host reads: on a CPU, where nobody waits.
            Otherwise they have room for all that this rank may have to keep.
    """

    def __init__(self, mesh: DeviceMesh, num_latents: int) -> None:
        self.mesh, self._groups = mesh, Groups.of(mesh)
        self.wire, self._of_rows, self.across, self.everyone = self._groups.wires()
        self.group = 0 if self.across is None else self.across.rank
        self.layout = Ownership.on(mesh, num_latents)
        self.agreement = Agreement.of(mesh)
        self.rows: list[int] = []
        self.every_rows: list[int] = []
        self._budget: int | None = None
        self.blocks: int | None = None  # of all latents and of all tokens, by which sums over either are made, as trees
        self.trims = mesh.device_type == "cpu"

    @property
    def rank(self) -> int:
        return self.wire.rank

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self.wire.size

    @property
    def groups(self) -> int:
        """How many there are."""
        return 1 if self.across is None else self.across.size

    @property
    def num_latents(self) -> int:
        """Of all ranks together."""
        return self.layout.num_latents

    @property
    def mine(self) -> slice:
        """My latents, among all."""
        return self.layout.mine

    @property
    def updated(self) -> slice:
        """Of my latents, those that this rank updates for all groups."""
        numbers = shares(self.mine.stop - self.mine.start, self.groups)
        return slice(sum(numbers[: self.group]), sum(numbers[: self.group + 1]))

    @property
    def tokens(self) -> int:
        """Of the whole batch."""
        return sum(self.every_rows)

    @property
    def rows_here(self) -> int:
        """Of my group."""
        return sum(self.rows)

    @property
    def first_row(self) -> int:
        """My first token's place among those of my group."""
        return sum(self.rows[: self.rank])

    @property
    def latent_blocks(self) -> int:
        """Of :attr:`blocks`, how many my latents are."""
        return 1 if self.blocks is None else self.blocks // self.size

    @property
    def token_blocks(self) -> int:
        """How many the tokens of my group are."""
        return 1 if self.blocks is None else self.blocks // self.groups

    @property
    def pieces(self) -> int:
        """How many my own tokens are."""
        return self.token_blocks if self.blocks is None else self.token_blocks // self.size

    def begin(self, rows: int, blocks: int | None = None) -> None:
        """Meets the others, host to host, and tells them how many tokens are mine.

        Raises:
            ValueError: nobody has any tokens; or they cannot be cut into ``blocks``, as many on each rank.
            RuntimeError: a rank has an error, or does not come; names it.
        """
        self.blocks = blocks
        self.begun(self.agreement.meet("step", rows))
        if not self.tokens:
            raise ValueError("x must hold at least one token on some rank of the mesh, got none on all")
        if blocks is not None and (len({*self.every_rows}) > 1 or rows % self.pieces):
            raise ValueError(f"x must have as many tokens on all ranks with blocks, a multiple of {self.pieces}, "
                             f"got {self.every_rows}")  # fmt: skip

    def begun(self, every_rows: Sequence[int]) -> None:
        """The batch at hand has so many tokens of each rank of the mesh."""
        self.every_rows = list(every_rows)
        self.rows = self.every_rows[self.group * self.size :][: self.size]

    def memory_budget(self, given: int | None) -> int:
        """Bytes of pre-activations that may exist at a time: those given, or what every rank has free at first."""
        if given is not None:
            return given
        if self._budget is None:
            self._budget = min(self.agreement.said(default_budget_bytes(torch.device(self.mesh.device_type))))
        return self._budget

    # --- tokens and latents to and fro, for autograd too -----------------------------------------------------------

    def gather_rows(self, mine: Tensor, name: str) -> Tensor:
        """(the group's tokens, …) from mine; its gradient is the sum over its ranks, as a tree."""
        return GatheredRows.apply(mine, self._of_rows, self.rows, name)

    def sum_parts(self, part: Tensor, name: str) -> Tensor:
        """(my tokens, …): the sum of each of the group's ranks' ``part`` (its tokens, …), as a tree; in nodes first."""
        return SummedParts.apply(part, self._of_rows, self.rows, name)

    def sum(self, part: Tensor, name: str) -> Tensor:
        """The sum of each of the group's ranks' floats, as a tree; integers' by the wire."""
        if not part.is_floating_point():
            return self.wire.add(part, name)
        return SummedRanks.apply(part, self.wire, name)

    def sum_everywhere(self, part: Tensor, name: str) -> Tensor:
        """The sum of every rank's floats, as a tree."""
        return tree_sum(list(self.everyone.gather(part, name)))

    def over_groups(self, part: Tensor, name: str) -> Tensor:
        """What each group has of my latents, summed: integers by the wire, floats as a tree."""
        if self.across is None:
            return part
        if not part.is_floating_point():
            return self.across.add(part, name)
        return tree_sum(list(self.across.gather(part, name)))

    def least_over_groups(self, part: Tensor, name: str) -> Tensor:
        """The least of what each group has of my latents."""
        return part if self.across is None else self.across.least(part, name)

    def sums(self, numbers: Sequence[Tensor], name: str) -> list[Tensor]:
        """The sums () of every rank's numbers, in its dtype, by way of fp64.

        Each is (), or (token_blocks,) of what this rank has of its group's tokens: a block is summed over the group's
        ranks, then blocks are. Of several rows of such numbers each row is summed by itself.
        """
        rows = [number.reshape(-1, number.shape[-1] if number.dim() else 1) for number in numbers]
        mine = torch.zeros(sum(map(len, rows)), self.token_blocks, dtype=torch.float64, device=numbers[0].device)
        for place, of_number in zip(mine.split([len(of_number) for of_number in rows]), rows, strict=True):
            place[:, : of_number.shape[1]] = of_number
        every = self.everyone.gather(mine, name).unflatten(0, (self.groups, self.size))
        blocks = tree_sum(list(every.unbind(1))).transpose(1, 2).flatten(0, 1)
        totals = tree_sum(list(blocks)).split([len(of_number) for of_number in rows])
        return [tree_sum(list(total)).to(number.dtype) for total, number in zip(totals, numbers, strict=True)]

    def of_my_blocks(self, pieces: Sequence[Tensor]) -> Tensor:
        """(token_blocks,) of my group, from the numbers () of my own: 0 at the others."""
        found = pieces[0].new_zeros(self.token_blocks)
        found[self.rank * self.pieces :][: self.pieces] = torch.stack(list(pieces))
        return found

    def of_batch(self, parts: Sequence[Tensor], name: str) -> Tensor:
        """The sum over the whole batch of what each token block of my group adds to something of my latents."""
        return self.over_groups(tree_sum(parts), name)

    def pieces_of(self, rows: Tensor) -> list[Tensor]:
        """My tokens' ``rows``, piece by piece."""
        return [rows] if self.pieces == 1 else list(rows.split(len(rows) // self.pieces))

    def token_blocks_of(self, rows: Tensor) -> list[Tensor]:
        """The ``rows`` of my group's tokens, block by block."""
        return [rows] if self.token_blocks == 1 else list(rows.split(len(rows) // self.token_blocks))

    def latent_blocks_of(self, mine: Tensor) -> list[Tensor]:
        """Something of my latents, block by block."""
        return [mine] if self.latent_blocks == 1 else list(mine.split(len(mine) // self.latent_blocks))

    def spread(self, rows: Tensor, name: str) -> Tensor:
        """() fp64: the squared distances of every rank's ``rows`` (n, d) from the mean of them all."""
        found = []
        for piece in self.pieces_of(rows.double()):
            mean = piece.mean(0) if len(piece) else piece.new_zeros(rows.shape[1])
            found.append(torch.cat([mean, (piece - mean).square().sum()[None]]))
        every = self.everyone.gather(torch.stack(found), name).flatten(0, 1)
        sizes = [size // self.pieces for size in self.every_rows for _ in range(self.pieces)]
        counts = torch.stack([every.new_full((), size) for size in sizes])  # filled: nothing comes from the host
        means, squares = every[:, :-1], every[:, -1]
        middle = tree_sum(list(counts[:, None] * means)) / self.tokens
        return tree_sum(list(squares + counts * (means - middle).square().sum(1)))

    def all_latents(self, mine: Tensor, name: str) -> Tensor:
        """(F,) of every rank's latents, from (my latents,)."""
        return self.wire.gather_rows(mine, self.layout.numbers, name)

    def widths_of_mine(self, widths: Sequence[int]) -> list[int]:
        """Of prefixes of all latents, how many of mine each has."""
        return [min(max(width, self.mine.start), self.mine.stop) - self.mine.start for width in widths]

    # --- selection: see selection.py --------------------------------------------------------------------------------

    def kept_of_rows(self, by: Tensor, allowed: Tensor | None, k: int, sources: int = 1) -> Tensor:
        return selection.row_mask(self, by, allowed, k, sources)

    def kept_of_batch(
        self, codes: SparseCodes, total: int, allowed: Tensor | None = None, among: int = 1
    ) -> Tensor:
        return selection.batch_mask(self, codes, total, allowed, among)

    def kept_of_latents(self, codes: SparseCodes, budgets: Tensor) -> Tensor | None:
        """(N,) bool, or None: all of them."""
        return None if self.across is None else selection.latent_mask(self.across, codes, budgets)

    def batch_topk(self, pre: Tensor, total: int, mask: Tensor | None, backend: str) -> SparseCodes:
        return selection.batch_topk(self, pre, total, mask, backend)

    def norm_match(self, pre: Tensor, target: Tensor, weight_norm: Tensor | None, capacity: int | None) -> SparseCodes:
        return selection.norm_match(self, pre, target, weight_norm, capacity)

    def narrowed(self, codes: SparseCodes, kept: Tensor, *others: Tensor | None, room: int | None = None) -> tuple:
        """The codes where ``kept`` (N,), and ``others`` (N,) there; of not more than ``room`` entries."""
        return selection.narrowed(codes, kept, others, trims=self.trims, room=room)

    # --- codes of all latents of my tokens, and codes of my latents of all tokens ----------------------------------

    def to_owners(self, codes: SparseCodes) -> SparseCodes:
        return entries.to_owners(self, codes)

    def to_latents(self, codes: SparseCodes) -> SparseCodes:
        return entries.to_latents(self, codes)

    # --- tensors of which each rank has a part ----------------------------------------------------------------------

    def as_whole(self, mine: Tensor, dim: int | None, *, updated: bool = False) -> DTensor:
        """A DTensor over ``mine``, in the same memory: cut along ``dim``, or the same on every rank with None.

        Each group has one, or with ``updated`` each rank only those of its latents that it updates.
        """
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh = self._groups.updates if updated else self.mesh
        placements: list[Any] = [
            Replicate() if dim is None or (name == "data" and not updated) else Shard(dim)
            for name in mesh.mesh_dim_names or ()
        ]
        shape = list(mine.shape)
        if dim is not None:
            shape[dim] = self.num_latents
        transposed = dim == 1 and mine.stride(0) == 1 != mine.stride(1)
        strides = torch.empty(shape[::-1] if transposed else shape, device="meta").stride()
        return DTensor.from_local(
            mine, mesh, placements, run_check=False, shape=torch.Size(shape),
            stride=strides[::-1] if transposed else strides,
        )  # fmt: skip

    def __reduce__(self):
        raise TypeError("what lies on a mesh can be neither copied nor pickled: its process group is this process's")


def check_rules(rules: Sequence[Any]) -> None:
    """Raises TypeError for a rule that cannot say how it selects where a rank has some of the latents only."""
    for rule in [one for given in rules for one in (given if isinstance(given, PerSource) else [given])]:
        if not getattr(rule, "selects_over_shards", False):
            raise TypeError(
                f"{type(rule).__name__} cannot say how it selects over latents that are cut over a mesh: make its "
                "selection heed Activation.shards and set selects_over_shards = True, or train without mesh"
            )
