"""Contestants that may fail: each is prepared and checked, those that are right are timed in turn, and the others get a
row too, which says what went wrong. Only a device that answers no more (a sticky CUDA error) ends it.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from progress import announce
from rows import Row, failure, now_utc
from timing import Call, OtherLoad, graph_ms, host_ms, time_interleaved


class Wrong(AssertionError):
    """A result differs from what it has to be."""


class DeviceLost(RuntimeError):
    """The device answers no more: nothing else can be measured in this process."""


@dataclass(frozen=True)
class Prepared:
    """What is timed: a call for each copy of the inputs; and what else the row says."""

    calls: Sequence[Call]
    extra: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Entrant:
    """One row to be. ``about``: the row without its numbers; ``prepare`` builds, checks and returns what is timed."""

    about: Row
    prepare: Callable[[], Prepared]


def reason(error: BaseException) -> str:
    """One line for a row and for the terminal."""
    lines = str(error).strip().splitlines()
    text = f"{lines[0] if lines else 'no message':.200}"
    if isinstance(error, Wrong):
        return f"WRONG: {text}"
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return f"out of memory: {text}"
    return f"raised {type(error).__name__}: {text}"


def failed(about: Row, error: Exception, device: torch.device) -> Row:
    """The row of what raised. DeviceLost where nothing can follow."""
    traceback.print_exception(error)
    error.__traceback__ = None  # its frames hold the tensors
    text = reason(error)
    try:
        still_there(device)
    except DeviceLost as lost:
        raise DeviceLost(f"{text}; {lost}") from error
    return failure(about, text)


def still_there(device: torch.device) -> None:
    """After an error: DeviceLost if the device has gone with it, free memory otherwise."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except Exception as error:  # whatever it is, the next launch meets it too
            raise DeviceLost(f"the device answers no more: {reason(error)}") from error


def time_in_turn(
    entrants: Sequence[Entrant], device: torch.device, where: str, *, budget_seconds: float, least_rounds: int = 3,
    before_timing: Callable[[], object] = lambda: None,
) -> list[Row]:  # fmt: skip
    """A row for each entrant: its times, or why it has none."""
    ready: list[tuple[Entrant, Prepared]] = []
    rows: list[Row] = []
    for entrant in entrants:
        announce(f"{where}: checking {name_of(entrant.about)}", [entrant.about])
        try:
            ready.append((entrant, entrant.prepare()))
        except DeviceLost:
            raise
        except Exception as error:
            rows.append(failed(entrant.about, error, device))
    if not ready:
        return rows
    before_timing()
    announce(f"{where}: timing", [entrant.about for entrant, _ in ready])
    others = OtherLoad()
    try:
        timings = time_interleaved(
            [prepared.calls for _, prepared in ready], device, budget_seconds=budget_seconds, least_rounds=least_rounds
        )
    except Exception as error:
        return rows + [failed(entrant.about, error, device) for entrant, _ in ready]
    load = others.cores()
    measured = [{**timing.fields(), **prepared.extra} for (_, prepared), timing in zip(ready, timings, strict=True)]
    if device.type == "cuda":
        for (entrant, prepared), numbers in zip(ready, measured, strict=True):
            announce(f"{where}: host and CUDA graph of {name_of(entrant.about)}", [entrant.about])
            numbers.update(beside_the_device(prepared.calls[0], device))
    done = now_utc()
    return [
        {**entrant.about, **numbers, "other_load": load, "utc": done}
        for (entrant, _), numbers in zip(ready, measured, strict=True)
    ] + rows


def beside_the_device(call: Call, device: torch.device) -> Row:
    """What the host takes to submit a call, and a CUDA graph to run it again, or why there is none."""
    found: Row = {"host_ms": float(f"{host_ms(call, device):.5g}")}
    try:
        found["graph_ms"] = float(f"{graph_ms(call, device):.5g}")
    except Exception as error:
        error.__traceback__ = None
        found["no_graph"] = reason(error)
        still_there(device)
    return found


def name_of(row: Row) -> str:
    return row.get("part") or row["provider"]
