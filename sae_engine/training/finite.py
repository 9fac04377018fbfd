"""Batches whose loss or gradients are not finite: found on the device, told to the host when that costs no waiting."""
from __future__ import annotations

import torch
from torch import Tensor

from sae_kernels.dispatch import capturing

from .backward import Backward

MODES = ("raise", "skip")


class Finite:
    """Counts such batches in ``count`` () int64, on the device, and raises for them with ``mode="raise"``."""

    def __init__(self, mode: str, device: torch.device) -> None:
        if mode not in MODES:
            raise ValueError(f"nonfinite must be one of {MODES}, got {mode!r}")
        self.mode = mode
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self._told = 0  # of the count, how many were raised for
        self._on_the_way: tuple[Tensor, torch.cuda.Event] | None = None

    def of(self, loss: Tensor, pending: Backward, *, has_capacity: bool) -> Tensor | None:
        """A flag () that the batch's update must not happen; None where the host knows that it may (on a CPU).

        A gradient is a sum of products of slopes with inputs or values, and so at most the product of their norms.
        Where that has a finite square, which is what Adam keeps, an update writes nothing that is not finite.
        """
        grads, values, offered, _, offsets, *_ = pending.terms
        if has_capacity:  # what lies behind the last row is nobody's
            values, offered = ([_owned(t, ends) for t, ends in zip(ts, offsets, strict=True)]
                               for ts in (values, offered))  # fmt: skip
        slopes = [*grads, *offered, *pending.dense, *pending.small.values()]
        slopes += [] if pending.along is None else [pending.along]
        multiplied = [pending.x, *values]
        norms = torch.stack(torch._foreach_norm([*slopes, *multiplied], 2, dtype=loss.dtype))
        bound = norms[: len(slopes)].sum() * (1 + norms[len(slopes) :].sum())
        bad = ~(loss + bound.square()).isfinite()
        if bad.is_cpu:
            return bad if bool(bad) else None
        return bad

    def note(self, bad: Tensor | None) -> None:
        """After the update: counts, and starts telling the host."""
        if bad is not None:
            self.count.add_(bad)
        if not capturing(self.count):
            self.told()

    def told(self) -> None:
        """Raises FloatingPointError, with "raise", where the host has heard of a batch that was not finite."""
        if self.mode != "raise":
            return
        if self.count.is_cpu:
            return self._raise_for(int(self.count))
        if self._on_the_way is not None and self._on_the_way[1].query():
            number = int(self._on_the_way[0])
            self._on_the_way = None
            self._raise_for(number)
        if self._on_the_way is None:
            number_there, event = torch.empty((), dtype=torch.int64, pin_memory=True), torch.cuda.Event()
            number_there.copy_(self.count, non_blocking=True)
            event.record()
            self._on_the_way = number_there, event

    def _raise_for(self, number: int) -> None:
        new, self._told = number - self._told, number
        if new > 0:
            late = "" if self.count.is_cpu else " (of an earlier call: a GPU tells later)"
            raise FloatingPointError(
                f"input, loss or gradients of {new} batch(es) held NaN or Inf, or numbers too large{late}; parameters, "
                'moments and counters are those before it. Look at the batch, or pass nonfinite="skip" to leave it out'
            )


def _owned(entries: Tensor, offsets: Tensor) -> Tensor:
    """The entries (N,) that belong to a row, 0 for the others."""
    return torch.where(torch.arange(entries.numel(), device=entries.device) < offsets[-1], entries, 0.0)
