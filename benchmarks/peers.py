"""A whole training step, optimizer included: ours, plain PyTorch and other libraries, side by side in one process.

    make bench-peers                      # an environment of its own with the other libraries; then this
    make bench-peers BENCH_ARGS=--quick   # a smoke run, apart from the real results
    python benchmarks/peers.py            # here; what is not installed is left out and named

Rows go to ``benchmarks/results/<device>/peers.jsonl``, tables and figures into the device's report.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from progress import ProgressBar
from rows import ROOT, Row, device_name, device_slug, environment, now_utc, store
from run import chosen_device, is_missing, write_report
from sizes import Case
from steps import SEED, Contestant, cases, check, make_setup, peer_versions, published_cases, true_error
from steps import contestants as contestants_at
from timing import OtherLoad, method, peak_memory_bytes, time_interleaved

BUDGET_SECONDS = {"quick": 0.5, "default": 150.0, "full": 400.0}  # of one size; a GPU needs a tenth
LEAST_ROUNDS = {"quick": 2, "default": 5, "full": 10}
GATE = ("test_training.py", "test_decode.py", "test_row_topk.py", "test_encode.py")


def measure(
    case: Case, dtype: torch.dtype, device: torch.device, extent: str, skipped: list[str],
    contestants: tuple[Contestant, ...] | None = None,
) -> list[Row]:  # fmt: skip
    """All contestants at one size: each checked, then all timed in turn, round by round."""
    contestants = contestants_at(case) if contestants is None else contestants
    setup = make_setup(case, device, dtype)
    expected = true_error(setup)
    calls, peaks = {}, {}
    with ProgressBar(total=len(contestants), desc=f"first steps, {case.name}", unit="step") as bar:
        for contestant in contestants:
            bar.set_postfix_str(contestant.name)
            reason = contestant.missing(device)
            if reason is None:
                try:
                    call = contestant.build(setup)
                    check(contestant, call, setup, expected)
                    calls[contestant], peaks[contestant] = call, peak_memory_bytes(call, device)
                except AssertionError as error:
                    reason = f"WRONG: {error}"
                except torch.cuda.OutOfMemoryError:
                    reason = f"out of memory at {case.name}"
                    torch.cuda.empty_cache()
                except Exception as error:  # other libraries raise what they like; ours has tests
                    if contestant.kind == "ours":
                        raise
                    reason = f"raised {type(error).__name__}: {str(error).strip().splitlines()[0]:.200}"
            if reason is not None:
                skipped.append(f"training step at {case.name}, {contestant.name}: {reason}")
            bar.update()
    others = OtherLoad()
    timings = time_interleaved(
        [[call] for call in calls.values()], device, least_rounds=LEAST_ROUNDS[extent],
        budget_seconds=BUDGET_SECONDS[extent] / (10 if device.type == "cuda" else 1),
    )  # fmt: skip
    load = others.cores()
    rows = [
        {
            "kind": "step", "case": case.name, "group": case.group, "shape": case.shape("BdFki"),
            "dtype": str(dtype).removeprefix("torch."), "seed": SEED, "method": method(device),
            "provider": contestant.name, "contestant": contestant.kind, "baseline": contestant.baseline,
            "auxk": contestant.dead, "note": contestant.note, **environment(device), "packages": peer_versions(),
            **timing.fields(), "peak_mem_bytes": peaks[contestant], "other_load": load, "utc": now_utc(),
        }
        for contestant, timing in zip(calls, timings, strict=True)
    ]  # fmt: skip
    del calls, setup
    gc.collect()
    return rows


def prepare(device: torch.device) -> None:
    """Before another library is imported: what they need, and what they warn about."""
    if device.type == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its Triton decoder takes no CPU tensors; read at its import
    warnings.filterwarnings("ignore", module=r"(sae_lens|sparsify|dictionary_learning|nnsight|transformer_lens)\b")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time whole training steps, ours and those of other libraries.")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="a small size; kept apart")
    extent.add_argument("--full", action="store_true", help="more rounds, more sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER",
                        help="the device's folder is made inside it (default: benchmarks/results)")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    from verify import NotVerified, verify

    started = time.perf_counter()
    device = chosen_device(options.device)
    prepare(device)
    extent = "quick" if options.quick else "full" if options.full else "default"
    folder = options.out / (device_slug(device) + ("-quick" if options.quick else ""))
    print(f"{device_name(device)}, torch {torch.__version__}, {peer_versions()}; results in {folder}", flush=True)
    if is_missing("pytest"):
        sys.exit("nothing is timed: pytest is missing, which runs the tests first")
    print(f"tests of what will be timed ({len(GATE)} files; remembered while nothing changes) …", flush=True)
    try:
        red = {file: verdict for file, verdict in verify(GATE, device).items() if verdict is not None}
    except NotVerified as error:
        sys.exit(f"nothing is timed: {error}")
    if red:
        sys.exit("nothing is timed: " + "; ".join(red.values()))
    skipped: list[str] = []
    for case, dtype in cases(device, extent) + ([] if extent == "quick" else published_cases(device)):
        store(folder / "peers.jsonl", measure(case, dtype, device, extent, skipped))
    write_report(folder, skipped)
    print(*(f"without numbers: {reason}" for reason in skipped), sep="\n")
    print(f"{time.perf_counter() - started:.0f} s")
    if any("WRONG" in reason for reason in skipped):
        sys.exit(1)


def main(arguments: list[str] | None = None) -> None:
    try:
        run(parse(arguments))
    except KeyboardInterrupt:
        print("\ninterrupted; the sizes that had been measured are kept", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
