"""Tokens gathered and parts summed over ranks, for autograd: each is the other's gradient."""
from __future__ import annotations

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .wire import shares, tree_sum


class GatheredRows(Function):
    """(my rows, …) of each rank as (all rows, …)."""

    @staticmethod
    def forward(ctx, mine: Tensor, wire, rows: list[int], name: str) -> Tensor:
        ctx.wire, ctx.rows, ctx.name = wire, rows, name
        return wire.gather_rows(mine, rows, name)

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor):
        return ctx.wire.sum_rows(outer, ctx.rows, f"{ctx.name}: gradient"), None, None, None


class SummedParts(Function):
    """Each rank's (all rows, …) summed by the rows' owners: (my rows, …)."""

    @staticmethod
    def forward(ctx, part: Tensor, wire, rows: list[int], name: str) -> Tensor:
        ctx.wire, ctx.rows, ctx.name = wire, rows, name
        return wire.sum_rows(part, rows, name)

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor):
        return ctx.wire.gather_rows(outer, ctx.rows, f"{ctx.name}: gradient"), None, None, None


class SummedRanks(Function):
    """The sum of every rank's tensor, on every rank, each of which goes on with it by itself."""

    @staticmethod
    def forward(ctx, mine: Tensor, wire, name: str) -> Tensor:
        ctx.wire, ctx.name = wire, name
        return tree_sum(list(wire.gather(mine, name)))

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor):
        return tree_sum(list(ctx.wire.gather(outer, f"{ctx.name}: gradient"))), None, None


class ExchangedEntries(Function):
    """(N,) entries in pieces, one for each rank, as (M,) in those that have come from each."""

    @staticmethod
    def forward(ctx, entries: Tensor, wire, sent: list[int], received: list[int], name: str) -> Tensor:
        ctx.wire, ctx.sent, ctx.received, ctx.name = wire, sent, received, name
        return wire.exchange(entries, sent, received, name)

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor):
        back = ctx.wire.exchange(outer, ctx.received, ctx.sent, f"{ctx.name}: gradient")
        return back, None, None, None, None


class SummedGradient(Function):
    """A tensor that is the same on every rank of a wire, whose gradient is the sum of what each rank has for it."""

    @staticmethod
    def forward(ctx, everywhere: Tensor, wire, name: str) -> Tensor:
        ctx.wire, ctx.name = wire, name
        return everywhere.view_as(everywhere)

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor):
        return tree_sum(list(ctx.wire.gather(outer.contiguous(), f"{ctx.name}: gradient"))), None, None


class SummedLatents(SummedGradient):
    """The same of a tensor with a row for each of a rank's latents: each rank of the wire adds up some rows."""

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor):
        rows = shares(len(outer), ctx.wire.size)
        summed = ctx.wire.sum_rows(outer.contiguous(), rows, f"{ctx.name}: gradient")
        return ctx.wire.gather_rows(summed, rows, f"{ctx.name}: gradient"), None, None
