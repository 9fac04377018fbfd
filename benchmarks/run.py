"""The main job: time the operations and whole training steps, train autoencoders, write the report. ``make bench``.

    python benchmarks/run.py                       # what four minutes hold, the most important first
    python benchmarks/run.py --seconds 3600        # more of it
    python benchmarks/run.py --quick               # a smoke run, apart from the real results
    python benchmarks/run.py --only operations sweeps
    python benchmarks/run.py --only reconstruction --model openai-community/gpt2 --layer 8 --full

This process touches no device: ``worker.py`` measures, and what it dies of is in the report (``supervisor.py``). The
report is written after every job. Rows, tables and figures go to ``benchmarks/results/<device>/``; every file is
replaced whole.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out; the repository root stays out

import report
from rows import Row, cell, latest, load, store, write_atomically
from supervisor import SILENT_SECONDS, Gone, Refused, Supervisor, grace
from terminal import Terminal

HERE = Path(__file__).resolve().parent
# Roughly in the order of a run, in which what is quoted comes first: jobs.plan.
STAGES = ("operations", "steps", "reconstruction", "parts", "sizes", "curve", "compiled", "sweeps")
TOGETHER = {"training": ("steps", "parts", "curve"), "quality": ("reconstruction",)}
SECONDS = 240.0
FILES = {"operation": "operations", "roof": "operations", "step": "peers", "part": "step", "curve": "curve",
         "reconstruction": "reconstruction"}  # fmt: skip
PREDICTED = HERE / "results" / "kernel-report" / "prediction.jsonl"
MISSING = "{name} is missing: `make bench` installs it, or `pip install 'sae-engine[bench]'`"
WORKER = (sys.executable, str(HERE / "worker.py"))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the operations, train autoencoders, write the report.")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="small sizes, a minute or two; kept apart")
    extent.add_argument("--full", action="store_true", help="longer timings, larger autoencoders, every control")
    parser.add_argument("--only", nargs="+", choices=(*STAGES, *TOGETHER), default=STAGES, metavar="STAGE",
                        help=f"of {', '.join(STAGES)}; training: {', '.join(TOGETHER['training'])}; quality: "
                        "reconstruction")  # fmt: skip
    parser.add_argument("--seconds", type=float, metavar="S",
                        help=f"begin nothing after so long (default: {SECONDS:g}; with --full no end)")  # fmt: skip
    parser.add_argument("--report-only", action="store_true", help="measure nothing: the report from stored rows")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="FOLDER",
                        help="the device's folder is made inside it (default: benchmarks/results)")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    parser.add_argument("--model", help="reconstruction: hub name or folder (default: the embedded model)")
    parser.add_argument("--layer", type=int, help="reconstruction: default two thirds of the depth")
    parser.add_argument("--site", default="resid_pre", choices=("resid_pre", "mlp_out", "resid_post"))
    options = parser.parse_args(arguments)
    chosen = {stage for name in options.only for stage in TOGETHER.get(name, (name,))}
    options.only = tuple(stage for stage in STAGES if stage in chosen)
    return options


def main(arguments: list[str] | None = None, worker: Sequence[str] = WORKER) -> None:
    options = parse(arguments)
    for package in ("torch", "sae_engine", "sae_kernels"):
        if is_missing(package):
            sys.exit(MISSING.format(name=package))
    if options.report_only:
        sys.exit(report_only(options))
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(run(options, worker))
    finally:
        signal.signal(signal.SIGTERM, before)


def is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


class _Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, but for the exit status."""


def _terminated(*_: object) -> None:
    raise _Terminated


def run(options: argparse.Namespace, worker: Sequence[str]) -> int:
    """Measures and reports; the exit status."""
    extent = "quick" if options.quick else "full" if options.full else "default"
    seconds = options.seconds if options.seconds is not None else math.inf if options.full else SECONDS
    asked = {"device": options.device, "extent": extent, "stages": list(options.only), "model": options.model,
             "layer": options.layer, "site": options.site}  # fmt: skip
    terminal = Terminal("no end" if math.isinf(seconds) else f"{seconds:g} s")
    folder = options.out / "unknown-device"
    options.out.mkdir(parents=True, exist_ok=True)
    log_file = options.out / f"run{''.join(f'-{stage}' for stage in options.only if options.only != STAGES)}.log"

    measured: list[Row] = []

    def keep(rows: list[Row]) -> None:
        measured.extend(rows)
        for row in rows:
            store(folder / f"{FILES[row['kind']]}.jsonl", [row])
        if not rows:
            write_report(folder, supervisor.remarks + still_to_come(supervisor))

    with open(log_file, "w", encoding="utf-8") as log:
        supervisor = Supervisor(
            [*worker, json.dumps(asked)], log, terminal, keep, seconds=seconds,
            silence=math.inf if options.full else SILENT_SECONDS,
        )  # fmt: skip
        status = 0
        try:
            terminal.progress("starting: importing torch")
            hello = supervisor.start()
            folder = options.out / (hello["slug"] + ("-quick" if options.quick else ""))
            supervisor.remarks += hello["remarks"]
            stored_rows(folder)  # what is damaged is found now, not at the end
            terminal.say(f"{hello['device']}, torch {hello['torch']}; results in {folder}")
            supervisor.work()
        except KeyboardInterrupt as interrupt:
            status = 143 if isinstance(interrupt, _Terminated) else 130
            supervisor.remarks.append("interrupted")
        except Refused as refused:
            terminal.end()
            sys.exit(str(refused))
        except Gone as gone:
            supervisor.remarks.append(f"nothing has been measured: {gone}")
            supervisor.bad = True
        finally:
            supervisor.end()
            terminal.end()
    remarks = supervisor.remarks + left_out(supervisor)
    write_report(folder, remarks)  # before the figures, which take a while
    try:
        if not status:
            print("the tables are written; drawing the figures whose rows are new …", flush=True)
            remarks = write_report(folder, remarks, figure_seconds=math.inf if options.full else grace(seconds))
    except KeyboardInterrupt:
        status = 130
    print(f"\n{report.summary(measured)}\n")
    here = {cell(row) for row in measured}
    earlier = sum(cell(row) not in here for row in latest(stored_rows(folder)))
    if earlier:
        print(f"{earlier} results of earlier runs stand in the report alone, with their commit where that is another")
    print(*(f"without numbers: {remark}" for remark in remarks), sep="\n")
    print(f"{folder / 'report.md'}; what was printed meanwhile: {log_file}; {terminal.elapsed:.0f} s", flush=True)
    return status or int(supervisor.bad)


def still_to_come(supervisor: Supervisor) -> list[str]:
    left = len(supervisor.left())
    return [f"this report was written while the run went on: {left} of {len(supervisor.jobs)} jobs were to come"]


def left_out(supervisor: Supervisor) -> list[str]:
    left = supervisor.left()
    return [f"left out for want of time ({len(left)} of {len(supervisor.jobs)} jobs): {'; '.join(left)}"] * bool(left)


def report_only(options: argparse.Namespace) -> int:
    from rows import device_slug
    from worker import chosen_device

    try:
        slug = device_slug(chosen_device(options.device))
    except ValueError as error:
        sys.exit(str(error))
    folder = options.out / (slug + ("-quick" if options.quick else ""))
    rows = stored_rows(folder)
    if not rows:
        sys.exit(f"{folder} holds no rows: nothing has been measured")
    write_report(folder, [], figure_seconds=math.inf)
    print(f"{report.summary(rows)}\n\n{folder / 'report.md'}")
    return 0


def stored_rows(folder: Path) -> list[Row]:
    return [row for name in dict.fromkeys(FILES.values()) for row in load(folder / f"{name}.jsonl")]


def write_report(folder: Path, remarks: Iterable[str], *, figure_seconds: float | None = None) -> list[str]:
    """Writes ``report.md`` from the rows in ``folder``; draws figures too, for so long; returns all remarks."""
    rows, remarks, drawn = stored_rows(folder), list(remarks), []
    predicted = [json.loads(line) for line in PREDICTED.read_text().splitlines()] if PREDICTED.exists() else []
    if figure_seconds is not None:
        try:
            import plot

            drawn, left = plot.draw_all(rows, folder, seconds=figure_seconds)
            if left:
                remarks.append(f"figures left out for want of time: {', '.join(left)}; --report-only draws them")
        except ModuleNotFoundError as error:
            remarks.append("figures: " + MISSING.format(name=error.name))
        except Exception as error:  # the tables stand without
            remarks.append(f"figures: raised {type(error).__name__}: {error}")
    write_atomically(folder / "report.md", report.markdown(rows, drawn, remarks, predicted))
    return remarks


if __name__ == "__main__":
    main()
