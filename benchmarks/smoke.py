"""Each operation once on the GPU, against the reference: the first minute of ``make gpu``.

    python benchmarks/smoke.py topk                  # or another operation's id, or "train": one process each
    python benchmarks/smoke.py --machine FILE        # versions and GPU on the terminal and, for a program, in FILE

At the size that is timed first, so that the kernels lie compiled in Triton's cache when the timing begins.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import steps
import torch
from registry import OPS, Op, check_provider, find
from rows import installed
from sizes import BF16, S1

TRAIN = "train"
SEED = 0


def names() -> list[str]:
    return [op.id for op in OPS] + [TRAIN]


def describe(file: Path) -> None:
    """Versions, GPU and its memory; ``file`` gets what decides how many processes follow."""
    cuda, hip = torch.version.cuda, torch.version.hip
    print(f"python {platform.python_version()} · torch {torch.__version__} · CUDA {cuda} · HIP {hip}")
    for package in ("triton", "pytest"):
        print(package, installed(package) or "is not installed")
    facts = {"gpu": None, "free_gib": None, "operations": names()}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        facts |= {"gpu": torch.cuda.get_device_name(), "free_gib": free / 2**30}
        properties = torch.cuda.get_device_properties(0)
        print(
            f"{facts['gpu']}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
    file.write_text(json.dumps(facts))


def operation(op: Op, device: torch.device) -> list[str]:
    """Runs every way in which we provide it, and our yardsticks: what is wrong, or raised, a line for each."""
    inputs, wrong = op.make_inputs(S1, BF16, device, SEED), []
    for provider in [p for p in op.providers if p.name.startswith("ours") or p.yardstick]:
        reason = provider.missing(device)
        if reason is not None:
            print(f"{provider.name}: {reason}")
            continue
        try:
            with torch.no_grad():
                taken = _seconds(lambda provider=provider: check_provider(op, provider, inputs), device)
            print(f"{provider.name}: right; {taken:.1f} s with compilation", flush=True)
        except Exception as error:  # whatever it is: the others still say whether they are right
            wrong.append(f"{provider.name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
            print(wrong[-1], flush=True)
    return wrong


def train(device: torch.device) -> list[str]:
    """Our training steps at the size that is timed first: the first error is right, and falls."""
    setup, wrong = steps.make_setup(S1, device, BF16), []
    expected = steps.true_error(setup)
    for contestant in [c for c in (*steps.CONTESTANTS, *steps.FORWARD_BACKWARD) if c.kind == "ours"]:
        try:
            taken = _seconds(lambda c=contestant: steps.check(c, c.build(setup), setup, expected), device)
            print(f"{contestant.name}: right; {taken:.1f} s with compilation", flush=True)
        except Exception as error:
            wrong.append(f"{contestant.name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
            print(wrong[-1], flush=True)
    return wrong


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # an error of a kernel is raised here
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Is it right on this GPU?")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", nargs="?", choices=names(), help="an operation, or training steps")
    what.add_argument("--machine", type=Path, metavar="FILE", help="versions and GPU")
    options = parser.parse_args(arguments)
    if options.machine is not None:
        describe(options.machine)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = train(device) if options.name == TRAIN else operation(find(options.name), device)
    print("; ".join(wrong) if wrong else f"{options.name} is right")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
