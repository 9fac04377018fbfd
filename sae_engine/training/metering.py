"""What a run measures of itself without waiting for the device: means of the steps' reports, and where time goes."""
from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import Shards
from ..distributed.share import local


class Sums:
    """Means of what a step reports, summed on the device; and how many batches in a row were left out."""

    def __init__(self, device: torch.device) -> None:
        self.names: list[str] = []
        self.total = torch.zeros(0, dtype=torch.float64, device=device)  # (names,)
        self.count = torch.zeros(0, dtype=torch.float64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, report: Mapping[str, Tensor], skipped: Tensor) -> None:
        """One call's report; ``skipped`` () counts all batches that were left out, of which no number is summed."""
        if not self.names:
            self.names = [*dict.fromkeys([*report, "grad_norm"])]  # which only calls that update report
            self.total = self.total.new_zeros(len(self.names))
            self.count = torch.zeros_like(self.total)
        found = [report[name] for name in self.names if name in report]
        wide = functools.reduce(torch.promote_types, [value.dtype for value in found])
        if len(found) < len(self.names):
            missing = self.total.new_full((), float("nan"), dtype=wide)
            found = [report.get(name, missing) for name in self.names]
        values = torch.stack([value.to(wide) for value in found]).to(torch.float64)
        finite = values.isfinite()
        self.total += torch.where(finite, values, 0.0)
        self.count += finite
        self.in_a_row = torch.where(skipped > self.skipped, self.in_a_row + 1, 0)
        self.skipped = skipped.clone()

    def taken(self) -> dict[str, Tensor]:
        """Means by name, NaN of what nothing was finite of; the sums begin anew."""
        means = self.total / self.count
        self.total, self.count = torch.zeros_like(self.total), torch.zeros_like(self.count)
        return dict(zip(self.names, means.unbind(), strict=True))

    def state(self) -> dict[str, Any]:
        """In JSON's types, which hold fp64 exactly."""
        return {"names": self.names, **{name: getattr(self, name).tolist() for name in _STATE}}

    def load(self, state: Mapping[str, Any]) -> None:
        self.names = list(state["names"])
        for name in _STATE:
            here = getattr(self, name)
            setattr(self, name, torch.tensor(state[name], dtype=here.dtype, device=here.device))


_STATE = ("total", "count", "skipped", "in_a_row")  # of Sums


class Densities:
    """The share of tokens on which each latent fires, over the last updates: at least ``window`` of them, if so many
    there are, and fewer than twice as many. Counted on the device, exactly.
    """

    def __init__(self, d_sae: int, window: int, device: torch.device, sources: int = 1) -> None:
        self.window, self.updates, self._shape = window, 0, (2, sources, d_sae)
        # (2, sources d_sae + 1): of the window before and of the running one, each latent's tokens, and all tokens.
        self.counts = torch.zeros(2, sources * d_sae + 1, dtype=torch.float64, device=device)

    def add(self, fired: Tensor, tokens: int, skip: Tensor | None) -> None:
        """An update's ``fired`` (sources d_sae,), of so many tokens; not where ``skip`` () is set."""
        if self.updates and self.updates % self.window == 0:
            self.counts[0].copy_(self.counts[1])
            self.counts[1].zero_()
        self.updates += 1
        seen = torch.cat([fired, fired.new_full((1,), tokens)])
        self.counts[1].add_(seen if skip is None else torch.where(skip, 0, seen))

    def shares(self, shards: Shards | None = None) -> Tensor | None:
        """(sources d_sae,) fp64; None before the first update. With ``shards`` these are my latents of those that are
        cut over a mesh, and the shares are of all."""
        counts = self.counts.sum(0)
        if not counts[-1]:
            return None
        found = counts[:-1] / counts[-1]
        if shards is None:
            return found
        by_latent = found.view(self._shape[1:]).T.contiguous()
        return shards.all_latents(by_latent, "densities").T.flatten()

    def state(self, shards: Shards | None = None) -> dict[str, Any]:
        """With ``shards`` these are my latents of those that are cut over a mesh, and the state is of all."""
        if shards is None:
            return {"counts": self.counts, "updates": self.updates}
        by_latent = self.counts[:, :-1].view(self._shape).permute(2, 1, 0).flatten(1)
        fired = shards.as_whole(by_latent.contiguous(), 0)
        return {"fired": fired, "tokens": self.counts[:, -1].clone(), "updates": self.updates}

    def load(self, state: Mapping[str, Any]) -> None:
        if "counts" in state:
            self.counts.copy_(state["counts"])
        else:
            by_latent = local(state["fired"]).view(*reversed(self._shape))
            self.counts[:, :-1].copy_(by_latent.permute(2, 1, 0).flatten(1))
            self.counts[:, -1].copy_(state["tokens"])
        self.updates = state["updates"]


class Arriving:
    """Numbers (n,) that the host reads later: copied now, without waiting for what computes them."""

    def __init__(self, values: Tensor) -> None:
        self._event = None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


class Clock:
    """Time since it was last read, and what of it was spent where, in seconds of the host."""

    def __init__(self) -> None:
        self._since, self._parts = time.perf_counter(), dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done inside belongs to that one of :data:`PARTS`."""
        begun = time.perf_counter()
        yield
        self._parts[name] += time.perf_counter() - begun

    def taken(self) -> tuple[float, dict[str, float]]:
        """All of it, and the parts; both begin anew."""
        now = time.perf_counter()
        found = now - self._since, self._parts
        self._since, self._parts = now, dict.fromkeys(PARTS, 0.0)
        return found


PARTS = ("activations", "step", "logging", "evaluation", "saving")
