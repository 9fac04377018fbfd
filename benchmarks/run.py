"""The main job: time the operations, train autoencoders, write the report. ``make bench`` runs this.

    python benchmarks/run.py                       # everything, some minutes on two CPU cores
    python benchmarks/run.py --quick               # a smoke run, apart from the real results
    python benchmarks/run.py --only kernels        # or: --only reconstruction
    python benchmarks/run.py --only kernels --steps --seconds 200    # whole training steps too, in so much time
    python benchmarks/run.py --model openai-community/gpt2 --layer 8 --full

Rows, tables and figures go to ``benchmarks/results/<device>/``; every file is replaced whole. Interrupted, it keeps the
rows of what had been measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out; the repository root stays out

STEP_SECONDS = 75  # of --seconds that --steps keeps for itself
STORED = ("operations", "peers", "step", "curve", "reconstruction")  # files of rows in a device's folder
PREDICTED = Path(__file__).resolve().parent / "results" / "kernel-report" / "prediction.jsonl"
MISSING = "{name} is missing: `make bench` installs it, or `pip install 'sae-engine[bench]'`"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the operations, train autoencoders, write the report.")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="small sizes, under a minute or two; kept apart")
    extent.add_argument("--full", action="store_true", help="longer timings, larger autoencoders, every control")
    parser.add_argument("--only", choices=("kernels", "reconstruction"), help="one half of it")
    parser.add_argument("--steps", action="store_true", help="also whole training steps and their parts")
    parser.add_argument("--seconds", type=float, metavar="S", help="begin nothing after so long; the report is whole")
    parser.add_argument("--report-only", action="store_true", help="measure nothing: the report from stored rows")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results", metavar="FOLDER",
                        help="the device's folder is made inside it (default: benchmarks/results)")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    parser.add_argument("--model", help="reconstruction: hub name or folder (default: the embedded model)")
    parser.add_argument("--layer", type=int, help="reconstruction: default two thirds of the depth")
    parser.add_argument("--site", default="resid_pre", choices=("resid_pre", "mlp_out", "resid_post"))
    return parser.parse_args(arguments)


def chosen_device(name: str | None):
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        sys.exit(f"--device {name}: no such kind of device")
    if device.type not in ("cpu", "cuda"):
        sys.exit(f"--device {name}: the benchmarks run on cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device {name}: torch {torch.__version__} sees no GPU")
    return device


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        run(options)
    except KeyboardInterrupt:
        print("\ninterrupted; what had been measured is kept, the report is the last whole one", file=sys.stderr)
        sys.exit(130)


def is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def run(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    end = started + (math.inf if options.seconds is None else options.seconds)
    for package in ("torch", "sae_engine", "sae_kernels", "pytest"):  # pytest: the gate
        if is_missing(package):
            sys.exit(MISSING.format(name=package))
    import curve
    import operations
    import peers
    import reconstruction
    import torch
    from registry import OPS
    from rows import device_name, device_slug, store
    from verify import TIMEOUT_SECONDS, NotVerified, verify

    device = chosen_device(options.device)
    extent = "quick" if options.quick else "full" if options.full else "default"
    folder = options.out / (device_slug(device) + ("-quick" if options.quick else ""))
    if options.report_only:
        write_report(folder, [])
        return
    print(f"{device_name(device)}, torch {torch.__version__}; results in {folder}", flush=True)

    files = [file for op in OPS for file in op.tests] + (list(peers.GATE) if options.steps else [])
    print(f"tests of what will be timed ({len(set(files))} files; remembered while nothing changes) …", flush=True)
    try:
        verdicts = verify(files, device, timeout=min(TIMEOUT_SECONDS, end - time.perf_counter()))
    except NotVerified as error:
        sys.exit(f"nothing is timed: {error}")
    red = [verdict for verdict in dict.fromkeys(verdicts.values()) if verdict is not None]
    print("tests are green" if not red else "\n".join(f"RED: {verdict}" for verdict in red), flush=True)

    skipped: list[operations.Skipped] = []
    if options.only != "reconstruction":
        until = end - (STEP_SECONDS if options.steps else 0)
        for rows in operations.measure(device, extent, verdicts, skipped, until=until):
            store(folder / "operations.jsonl", rows)
    remarks = [str(entry) for entry in skipped]
    if options.steps:
        remarks += measure_steps(folder, device, extent, end, red)
    if options.only != "kernels":
        if red:
            remarks.append("reconstruction: not run, because operations that it uses are red")
        elif is_missing("transformers"):
            remarks.append("reconstruction: not run; " + MISSING.format(name="transformers"))
        else:
            setting = reconstruction.SETTINGS[extent]
            for row in reconstruction.measure(
                device, setting, model=options.model, layer=options.layer, site=options.site
            ):
                store(folder / "reconstruction.jsonl", [row])
            store(folder / "curve.jsonl", curve.measure(device, extent))

    write_report(folder, remarks)
    if device.type != "cuda":
        print("GPU: not measured (none here)")
    print(*(f"without numbers: {remark}" for remark in remarks), sep="\n")
    print(f"{time.perf_counter() - started:.0f} s")
    if red or any(entry.wrong for entry in skipped) or any("WRONG" in remark for remark in remarks):
        sys.exit(1)


def measure_steps(folder: Path, device, extent: str, end: float, red: list[str]) -> list[str]:
    """Whole steps and their parts at the first size, in the time that is left; what has no numbers, and why."""
    import peers
    import step
    import steps
    from rows import store

    if red:
        return ["training steps: not run, because operations that they use are red"]
    peers.prepare(device)
    remarks: list[str] = []
    even, skewed = step.cases(device, extent)
    whole = steps.cases(device, extent)[0]
    for name, (case, dtype) in (("parts of a step", even), ("whole steps", whole), ("parts of a step", skewed)):
        if time.perf_counter() > end - STEP_SECONDS / 3:
            remarks.append(f"{name} at {case.name}: out of time")
            continue
        try:
            if name == "whole steps":
                store(folder / "peers.jsonl", peers.measure(case, dtype, device, extent, remarks))
            else:
                store(folder / "step.jsonl", step.measure(case, dtype, device, extent))
        except RuntimeError as error:  # the report is written all the same
            remarks.append(f"{name} at {case.name}: WRONG: raised {str(error).strip().splitlines()[0]:.200}")
    return remarks


def write_report(folder: Path, remarks: list[str]) -> None:
    """Draws the figures, writes ``report.md`` and shows the summary, all from the rows in ``folder``."""
    import report
    from rows import load, write_atomically

    rows = [row for name in STORED for row in load(folder / f"{name}.jsonl")]
    predicted = [json.loads(line) for line in PREDICTED.read_text().splitlines()] if PREDICTED.exists() else []
    if not rows:
        sys.exit("\n".join([f"{folder} holds no rows: nothing has been measured", *remarks]))
    if is_missing("matplotlib"):
        figures = []
        remarks = [*remarks, "figures: " + MISSING.format(name="matplotlib")]
    else:
        import plot

        figures = plot.draw_all(rows, folder)
    write_atomically(folder / "report.md", report.markdown(rows, figures, remarks, predicted))
    print(f"\n{report.summary(rows)}\n\n{folder / 'report.md'}, {len(figures)} figures")


if __name__ == "__main__":
    main()
