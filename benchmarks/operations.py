"""Times every operation of the registry: gate, check, then measure, one row per provider and size."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from progress import ProgressBar
from registry import OPS, Op, Provider, check_inputs, check_provider, input_bytes
from roofs import roof
from rows import Row, environment, now_utc
from sizes import Case, cases
from timing import OtherLoad, copies_past_cache, method, peak_memory_bytes, time_interleaved

SEED = 0
BUDGET_SECONDS = {"quick": 0.3, "default": 1.5, "full": 15.0}  # of one cell; a GPU needs a fifth


@dataclass(frozen=True)
class Skipped:
    """What has no numbers, and why. ``wrong``: the result differed from the reference, or the tests are red."""

    op: str
    provider: str
    reason: str
    wrong: bool = False

    def __str__(self) -> str:
        return f"{self.op}, {self.provider}: {self.reason}"


def measure(
    device: torch.device,
    extent: str,
    verdicts: dict[str, str | None],
    skipped: list[Skipped],
    *,
    progress: bool = True,
    until: float = math.inf,
) -> Iterator[list[Row]]:
    """Rows as they come: first the machine's own rates, then all operations at the first size, the second, ...

    Args:
        extent: "quick", "default" or "full".
        verdicts: from :func:`verify.verify`; what is red is skipped.
        skipped: is filled with what was not measured, each reason once.
        until: of ``time.perf_counter()``; no cell is begun after it.
    """
    seconds = BUDGET_SECONDS[extent] / (5 if device.type == "cuda" else 1)
    due: list[tuple[int, Op, Case, torch.dtype]] = []
    for op in OPS:
        red = next((verdicts[file] for file in op.tests if verdicts[file] is not None), None)
        if red is None:
            due += [(place, op, case, dtype) for place, (case, dtype) in enumerate(cases(op, device, extent))]
        else:
            skipped.append(Skipped(op.id, "all", red, wrong=True))
    due.sort(key=lambda cell: cell[0])
    absent = {p.package: p for op in OPS for p in op.providers if p.package and not p.is_installed()}
    skipped += [Skipped("other libraries", package, "not installed") for package in absent]
    with ProgressBar(total=len(due) + 1, desc="operations", disable=not progress, unit="cell") as bar:
        bar.set_postfix_str("copy bandwidth, GEMM rate")
        yield roof(device, seconds)
        bar.update()
        for number, (_, op, case, dtype) in enumerate(due):
            if time.perf_counter() > until:
                left = f"{len(due) - number} of {len(due)} cells, from {op.id} at {case.name}, {_dtype_name(dtype)} on"
                skipped.append(Skipped("operations", left, "out of time"))
                break
            bar.set_postfix_str(f"{op.id} {case.name} {_dtype_name(dtype)}")
            yield measure_cell(op, case, dtype, device, seconds, skipped)
            bar.update()


def measure_cell(
    op: Op, case: Case, dtype: torch.dtype, device: torch.device, budget_seconds: float, skipped: list[Skipped]
) -> list[Row]:
    """All providers of one operation at one size, each checked, then timed in turn."""

    def skip(provider: Provider, reason: str, *, wrong: bool = False) -> None:
        entry = Skipped(op.id, provider.name, reason, wrong)
        if entry not in skipped:
            skipped.append(entry)

    where = f"at {case.name}, {_dtype_name(dtype)}"
    calls: dict[Provider, list[Callable[[], object]]] = {}
    peaks: dict[Provider, int | None] = {}
    with torch.no_grad():
        small = check_inputs(op, case, dtype, device, SEED)
        inputs = [op.make_inputs(case, dtype, device, SEED)]
        copies = copies_past_cache(input_bytes(inputs[0]), device)
        inputs += [op.make_inputs(case, dtype, device, SEED + i) for i in range(1, copies)]
        for provider in op.providers:
            if provider.compiled and not _worth_compiling(case, dtype, device):
                continue
            if not provider.is_installed():
                continue  # said once, for all operations
            missing = provider.missing(device)
            if missing is not None:
                skip(provider, missing)
                continue
            torch._dynamo.reset()
            try:
                check_provider(op, provider, small)
                torch._dynamo.reset()
                built = [provider.build(i) for i in inputs]
                built[0]()
                peaks[provider] = peak_memory_bytes(built[0], device)
                calls[provider] = built
            except AssertionError as error:
                skip(provider, str(error), wrong=True)
            except torch.cuda.OutOfMemoryError:
                skip(provider, f"out of memory {where}")
                torch.cuda.empty_cache()
            except (RuntimeError, NotImplementedError) as error:
                skip(provider, f"raised {where}: {str(error).strip().splitlines()[0]:.200}", wrong=_is_ours(provider))
        if not calls:
            return []
        others = OtherLoad()
        timings = time_interleaved(list(calls.values()), device, budget_seconds=budget_seconds)
        other_load = others.cores()
        cost = op.traffic(inputs[0])
    about = {
        "kind": "operation", "op": op.name, "mode": op.mode, "case": case.name, "group": case.group,
        "shape": case.shape(op.sizes), "dtype": _dtype_name(dtype), "seed": SEED, "method": method(device),
    }  # fmt: skip
    rows = [
        {
            **about, "provider": provider.name, "baseline": provider.baseline, "note": provider.note,
            **({"yardstick": True} if provider.yardstick else {}),
            **environment(device), **({"packages": packages} if (packages := provider.packages()) else {}),
            **timing.fields(), "bytes": cost.bytes, "flops": cost.flops, "peak_mem_bytes": peaks[provider],
            "other_load": other_load, "utc": now_utc(),
        }
        for provider, timing in zip(calls, timings, strict=True)
    ]  # fmt: skip
    del inputs, calls
    gc.collect()
    return rows


def _worth_compiling(case: Case, dtype: torch.dtype, device: torch.device) -> bool:
    """A compilation takes seconds: one for each of the sizes that are quoted."""
    quoted = dtype == torch.bfloat16 if device.type == "cuda" else dtype == torch.float32
    return quoted and not case.group.startswith("sweep") and not case.group.endswith(("-zipf", "-wide"))


def _is_ours(provider: Provider) -> bool:
    return provider.name.startswith("ours")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")



