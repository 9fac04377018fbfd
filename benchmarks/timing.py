"""Timing: interleaved rounds and medians, on a CPU by the clock, on a GPU by events over rotated inputs.

All variants of one cell are timed in turn, round by round, so that a machine that slows down slows all of them alike.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
ENOUGH_SECONDS = 12.0
SUBMISSIONS, REPLAYS = 5, 10

CPU_METHOD = "perf_counter; variants interleaved round by round; median and 20th/80th percentile"
GPU_METHOD = "CUDA events behind a busy queue; inputs rotated past the L2 cache; variants interleaved; medians"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    ms_p50: float
    ms_p20: float
    ms_p80: float
    samples: int

    def fields(self) -> dict[str, float | int]:
        rounded = {name: float(f"{getattr(self, name):.5g}") for name in ("ms_p50", "ms_p20", "ms_p80")}
        return {**rounded, "samples": self.samples}


def method(device: torch.device) -> str:
    return GPU_METHOD if device.type == "cuda" else CPU_METHOD


def copies_past_cache(input_bytes: int, device: torch.device) -> int:
    """How many copies of an input to rotate through so that none is still in the L2 cache; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    return min(max(math.ceil(2 * cache / max(input_bytes, 1)), 1), 8)


def time_interleaved(
    variants: Sequence[Sequence[Call]],
    device: torch.device,
    *,
    budget_seconds: float,
    least_rounds: int = 3,
    most_rounds: int = 50,
) -> list[Timing]:
    """Times each variant, a list of calls on different copies of the input, until the budget is spent.

    One call of each comes first, unmeasured. At least ``least_rounds`` rounds are measured, but that one is enough
    where they take more than ``ENOUGH_SECONDS``: on an overloaded machine more would say no more, and cost the others.
    """
    if not variants or not all(variants):
        raise ValueError(f"variants must be non-empty lists of calls, got {variants!r}")
    for calls in variants:  # builds, first-use costs, and on a GPU the compilation of kernels
        for call in calls:
            call()
    once = [functools.partial(_events, cycles=spin_cycles(_submission_ms(calls[0], device))) if device.type == "cuda"
            else _clock for calls in variants]  # fmt: skip
    samples: list[list[float]] = [[] for _ in variants]
    started = time.perf_counter()
    for round_ in range(most_rounds):
        for calls, timed, taken in zip(variants, once, samples, strict=True):
            taken.append(timed(calls[round_ % len(calls)], device))
        taken_seconds = time.perf_counter() - started
        if taken_seconds > (budget_seconds if round_ + 1 >= least_rounds else max(budget_seconds, ENOUGH_SECONDS)):
            break
    return [summarize(taken) for taken in samples]


def summarize(times_ms: Sequence[float]) -> Timing:
    """Median and the 20th and 80th percentile."""
    if len(times_ms) < 2:
        return Timing(times_ms[0], times_ms[0], times_ms[0], len(times_ms))
    low, *_, high = statistics.quantiles(times_ms, n=5, method="inclusive")
    return Timing(statistics.median(times_ms), low, high, len(times_ms))


def peak_memory_bytes(call: Call, device: torch.device) -> int | None:
    """GPU memory that one call needs beyond what was allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def host_ms(call: Call, device: torch.device) -> float:
    """The least that the host takes to submit a call to a GPU; of one that waits for the device, the whole call."""
    return min(_submission_ms(call, device) for _ in range(SUBMISSIONS))


def graph_ms(call: Call, device: torch.device) -> float:
    """Median of a CUDA graph's replays of ``call``, which has been called before. Raises where there can be none.

    One that waits for the device is refused before the capture, which it would break for everybody.
    """
    stream, mode = torch.cuda.current_stream(device), torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own
    graph.replay()
    return statistics.median(_events(graph.replay, device, cycles=spin_cycles(1.0)) for _ in range(REPLAYS))


class OtherLoad:
    """CPU cores that other processes kept busy since it was made: on a busy machine, times mean little."""

    def __init__(self) -> None:
        self.start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Clock, CPU seconds of the whole machine, CPU seconds of this process and its children."""
        try:
            with open("/proc/stat", encoding="ascii") as stream:
                user, nice, system, _idle, _wait, irq, softirq = map(int, stream.readline().split()[1:8])
        except (OSError, ValueError):  # not Linux
            return None
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, sum(os.times()[:4])

    def cores(self) -> float | None:
        """None where the system does not say."""
        now = self._read()
        if now is None or self.start is None:
            return None
        elapsed, busy, own = (b - a for a, b in zip(self.start, now, strict=True))
        return round(max(busy - own, 0.0) / max(elapsed, 1e-9), 2)


def _clock(call: Call, device: torch.device) -> float:
    started = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - started
    del result  # freed outside the measured time, for every variant alike
    return elapsed * 1e3


def _submission_ms(call: Call, device: torch.device) -> float:
    """What the host takes to submit a call; of one that waits for the device, the whole call."""
    synchronize(device)
    started = time.perf_counter()
    call()
    taken = time.perf_counter() - started
    synchronize(device)
    return taken * 1e3


def spin_cycles(submission_ms: float) -> int:
    """Clock cycles for which a queue has to be busy until a call is submitted: twice that long at 2 GHz, 1 to 20 ms."""
    return int(2_000_000 * min(max(2 * submission_ms, 1.0), 20.0))


def _events(call: Call, device: torch.device, *, cycles: int) -> float:
    """Milliseconds between two events around ``call``, on a queue that is busy until the host has submitted it all."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(cycles)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
