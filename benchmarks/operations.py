"""Times the operations of the registry: each provider of a cell is checked, then those that are right are timed."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from guarded import Entrant, Prepared, failed, time_in_turn
from progress import announce
from registry import OPS, Op, Provider, check_provider, input_bytes
from rows import Row, environment
from sizes import Case
from timing import copies_past_cache, method, peak_memory_bytes

SEED = 0
BUDGET_SECONDS = {"quick": 0.3, "default": 1.5, "full": 15.0}  # of one cell; a GPU needs a fifth


def seconds_of_a_cell(device: torch.device, extent: str) -> float:
    return BUDGET_SECONDS[extent] / (5 if device.type == "cuda" else 1)


def measure_cell(
    op: Op, case: Case, dtype: torch.dtype, device: torch.device, budget_seconds: float, *, compilers: bool = True,
    without: Collection[str] = (),
) -> list[Row]:  # fmt: skip
    """A row for each provider of one operation at one size that can run here: its times, or why it has none.

    Args:
        compilers: whether those take part whose compilation takes seconds.
        without: names of providers that are left out.
    """
    where = f"{op.id} {case.name} {dtype_name(dtype)}"
    about = {
        "kind": "operation", "op": op.name, "mode": op.mode, "case": case.name, "group": case.group,
        "shape": case.shape(op.sizes), "dtype": dtype_name(dtype), "seed": SEED, "method": method(device),
        **environment(device),
    }  # fmt: skip
    chosen = {
        provider: {
            **about, "provider": provider.name, "baseline": provider.baseline, "note": provider.note,
            **({"yardstick": True} if provider.yardstick else {}),
            **({"packages": packages} if (packages := provider.packages()) else {}),
        }
        for provider in op.providers
        if provider.name not in without and (compilers or not provider.compiled) and provider.missing(device) is None
    }  # fmt: skip
    with torch.no_grad():
        announce(f"{where}: inputs", list(chosen.values()))
        try:
            inputs = [op.make_inputs(case, dtype, device, SEED)]
            copies = copies_past_cache(input_bytes(inputs[0]), device)
            inputs += [op.make_inputs(case, dtype, device, SEED + i) for i in range(1, copies)]
            cost = op.traffic(inputs[0])
        except Exception as error:
            return [failed(row, error, device) for row in chosen.values()]

        def prepare(provider: Provider) -> Prepared:
            if provider.compiled:
                torch._dynamo.reset()
            calls: list[Callable[[], object]] = [check_provider(op, provider, inputs[0])]
            calls += [provider.build(i) for i in inputs[1:]]
            peak = peak_memory_bytes(calls[0], device)
            return Prepared(calls, {"bytes": cost.bytes, "flops": cost.flops, "peak_mem_bytes": peak})

        entrants = [Entrant(row, lambda p=provider: prepare(p)) for provider, row in chosen.items()]
        return time_in_turn(
            entrants, device, where, budget_seconds=budget_seconds,
            before_timing=lambda: vars(inputs[0]).pop("known", None),  # what the checks knew takes memory
        )  # fmt: skip


def worth_compiling(case: Case, dtype: torch.dtype, device: torch.device) -> bool:
    """A compilation takes seconds: one for each of the sizes that are quoted."""
    quoted = dtype == torch.bfloat16 if device.type == "cuda" else dtype == torch.float32
    return quoted and not case.group.startswith("sweep") and not case.group.endswith(("-zipf", "-wide"))


def missing(device: torch.device) -> dict[str, str]:
    """Providers that cannot run here, and why; each library once."""
    absent = ((op, provider, provider.missing(device)) for op in OPS for provider in op.providers)
    return {provider.package or f"{op.id}, {provider.name}": reason for op, provider, reason in absent if reason}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
