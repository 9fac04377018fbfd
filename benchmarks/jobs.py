"""What a run measures, as jobs in the order of their importance: what is not begun in time is left out, and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import curve
import operations
import peers
import reconstruction
import step
import steps
import torch
from registry import OPS, Op
from roofs import roof
from rows import Row
from sizes import SMALL, Case, cases

# Shown first: what an autoencoder spends its time in. All other operations follow in the registry's order. The very
# first cell is a small one, so that something is seen at once also where others use the cores.
FIRST = ("decode", "topk", "autoencoder", "encode", "batch_topk", "norm_match")


@dataclasses.dataclass(frozen=True)
class Job:
    """``measure(without)`` yields rows as they come; providers named in ``without`` are left out."""

    stage: str
    name: str
    measure: Callable[[Collection[str]], Iterable[list[Row]]]


def plan(
    device: torch.device, extent: str, stages: Collection[str], *, model: str | None = None, layer: int | None = None,
    site: str = "resid_pre",
) -> list[Job]:  # fmt: skip
    """Jobs of the stages (see ``run.STAGES``), most important first."""
    setting = reconstruction.SETTINGS[extent]
    source = {"model": model, "layer": layer, "site": site}
    runs = [_training(run, device, setting, source) for run in reconstruction.plan(setting)]
    early = 2 * (len(setting.control_ks) * 2 + len(setting.control_afa_coeffs))  # runs and controls of the first seed
    even, skewed = (_parts(case, dtype, device, extent) for case, dtype in step.cases(device, extent))
    sizes = steps.cases(device, extent) + ([] if extent == "quick" else steps.published_cases(device))
    whole = [_steps(case, dtype, device, extent) for case, dtype in sizes]
    chosen = sorted(OPS, key=lambda op: FIRST.index(op.id) if op.id in FIRST else len(FIRST))
    cells = [
        (place, op, case, dtype) for op in chosen for place, (case, dtype) in enumerate(cases(op, device, extent))
    ]
    cells.sort(key=lambda cell: cell[0])
    sweeps = [cell for cell in cells if cell[2].group.startswith("sweep")]
    others = [cell for cell in cells[len(chosen) :] if cell not in sweeps]
    first, *rest = [_cell("operations", op, case, dtype, device, extent) for _, op, case, dtype in cells[: len(chosen)]]
    rates = Job("operations", "copy bandwidth, GEMM rate",
                lambda _: [roof(device, operations.seconds_of_a_cell(device, extent))])  # fmt: skip
    glance = [cell for cell in others if cell[1].id == FIRST[0] and cell[2] is SMALL]
    others = [cell for cell in others if cell not in glance]
    ordered = [
        *(_cell("sizes", op, case, dtype, device, extent) for _, op, case, dtype in glance),
        first, *rest[:5], whole[0], *rest[5:], *runs[:early], rates, even,
        *(_cell("sizes", op, case, dtype, device, extent) for _, op, case, dtype in others),
        *runs[early:], _curve(device, extent), *whole[1:], skewed,
        *_compiled(cells, device, extent),
        *(_cell("sweeps", op, case, dtype, device, extent) for _, op, case, dtype in sweeps),
    ]  # fmt: skip
    return [job for job in ordered if job.stage in stages]


def left_out(device: torch.device, stages: Collection[str]) -> list[str]:
    """What cannot be measured here, by reason."""
    found = operations.missing(device) if {"operations", "sizes", "sweeps", "compiled"} & set(stages) else {}
    found |= peers.missing(device) if "steps" in stages else {}
    named: dict[str, list[str]] = {}
    for name, reason in found.items():
        named.setdefault(reason.removeprefix(f"{name} "), []).append(name)
    return [f"{reason}: {'; '.join(names)}" for reason, names in named.items()] + (
        [] if device.type == "cuda" else ["GPU: not measured (none here)"]
    )


def _cell(
    stage: str, op: Op, case: Case, dtype: torch.dtype, device: torch.device, extent: str, *, compilers: bool = False
) -> Job:
    seconds = operations.seconds_of_a_cell(device, extent)

    def measure(without: Collection[str]) -> Iterator[list[Row]]:
        yield operations.measure_cell(op, case, dtype, device, seconds, compilers=compilers, without=without)

    return Job(stage, f"{op.id} {case.name} {operations.dtype_name(dtype)}{' compiled' * compilers}", measure)


def _compiled(cells: Iterable[tuple[int, Op, Case, torch.dtype]], device: torch.device, extent: str) -> Iterator[Job]:
    """Cells again, whole, with those that take seconds to compile: what is compared is timed in turn."""
    for _, op, case, dtype in cells:
        compiling = any(p.compiled and p.missing(device) is None for p in op.providers)
        if compiling and extent != "quick" and operations.worth_compiling(case, dtype, device):
            yield _cell("compiled", op, case, dtype, device, extent, compilers=True)
    case, dtype = steps.cases(device, extent)[0]
    if extent != "quick":
        stock = [c for c in steps.CONTESTANTS if c.package is None and not c.dead]
        yield _steps(case, dtype, device, extent, stage="compiled", contestants=stock)


def _steps(
    case: Case, dtype: torch.dtype, device: torch.device, extent: str, *, stage: str = "steps",
    contestants: Iterable[steps.Contestant] | None = None,
) -> Job:  # fmt: skip
    if contestants is None:
        contestants = [c for c in steps.contestants(case) if not c.compiled]
    chosen = tuple(contestants)

    def measure(without: Collection[str]) -> Iterator[list[Row]]:
        yield peers.measure(case, dtype, device, extent, chosen, without=without)

    return Job(stage, f"training step {case.name} {operations.dtype_name(dtype)}{' compiled' * (stage == 'compiled')}",
               measure)  # fmt: skip


def _parts(case: Case, dtype: torch.dtype, device: torch.device, extent: str) -> Job:
    def measure(without: Collection[str]) -> Iterator[list[Row]]:
        yield step.measure(case, dtype, device, extent, without=without)

    return Job("parts", f"parts of a step {case.name}", measure)


def _training(
    run: reconstruction.Run, device: torch.device, setting: reconstruction.Setting, source: dict[str, Any]
) -> Job:
    def measure(without: Collection[str]) -> Iterator[list[Row]]:
        if run.implementation not in without:
            data = reconstruction.activations(device, setting, **source)
            yield [reconstruction.train(run, data, setting, device)]

    name = f"reconstruction {run.rule} {run.knob_name}={run.knob:g} {run.implementation} seed {run.seed}"
    return Job("reconstruction", name, measure)


def _curve(device: torch.device, extent: str) -> Job:
    return Job("curve", "loss curves", lambda _: ([row] for row in curve.measure(device, extent)))
