"""Fills a table of launch configurations for the shapes that one names, on the GPU that is here: ``make tune``.

Every operation of the table (``kernels/operations.py``) runs at each shape with every candidate for what the table
lacks. What a table means, and how it applies, is in ``kernels/device/_autotune.py``.
"""
from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae_kernels.device import _autotune
from sae_kernels.operations import OPERATIONS
from sae_kernels.ops import ops
from sae_kernels.stock import densified


class Shape(NamedTuple):
    """B tokens, width d, F latents, k entries a token."""

    B: int
    d: int
    F: int
    k: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``4096,768,32768,32``: B, d, F, k."""
        try:
            found = cls(*map(int, text.split(",")))
        except (TypeError, ValueError):
            raise ValueError(f"a shape must be four integers B,d,F,k, got {text!r}") from None
        if min(found) < 1 or found.k > found.F:
            raise ValueError(f"a shape must have sizes of at least 1 and k ≤ F, got {text!r}")
        return found


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def calls(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every operation under its name, on normal pre-activations and uniform codes."""
    for name, row in OPERATIONS.items():
        yield name, functools.partial(getattr(ops, name), *row.example(shape, dtype, device), "triton")


# --- the search ----------------------------------------------------------------------------------------------------

GAIN = 0.97  # of the default's time: what is not faster by more than a clock's noise does not replace it
Timer = Callable[[Callable[[], Any], torch.device], float]


def fill(timer: Timer, session: _autotune.Session, call: Callable[[], Any], device: torch.device) -> None:
    """Searches for what the table lacks for ``call``, one by one: a choice may follow from another that was found."""
    while True:
        session.missing.clear()
        call()
        if not session.missing:
            return
        key, (choice, arguments) = next(iter(session.missing.items()))
        times = functools.partial(timer, call, device)
        session.table.add(key, session.batch, _fastest(session, key, list(choice.by_label(*arguments)), times))


def _fastest(
    session: _autotune.Session, key: _autotune.Key, labels: list[str], time: Callable[[], float]
) -> dict[str, Any]:
    """The fastest configuration, its time and the default's; in two rounds, so that a warming clock favours none."""
    times: dict[str, list[float]] = {}
    for round_ in range(2):
        for name in labels if round_ == 0 else reversed(labels):
            if round_ and name not in times:
                continue
            session.forced[key] = name
            try:
                taken = time()
            except Exception as error:
                if name == labels[0] or type(error).__name__ != "OutOfResources":  # Triton's
                    raise
                continue  # this GPU has not the shared memory
            finally:
                del session.forced[key]
            times.setdefault(name, []).append(taken)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    best, default = min(medians, key=medians.__getitem__), labels[0]
    chosen = best if medians[best] < GAIN * medians[default] else default
    return {"configuration": chosen, "ms": medians[chosen], "default_ms": medians[default]}


# --- the command ---------------------------------------------------------------------------------------------------


def default_path() -> Path:
    """A file in the user's cache, named after these kernels."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sae-engine" / f"autotune-{_autotune.fingerprint()}.json"


def tune(
    shapes: list[Shape], dtypes: list[str], device: torch.device, path: Path | None, say: Callable[[str], object],
    timer: Timer = _autotune.gpu_ms,
) -> tuple[Path, list[dict[str, Any]]]:  # fmt: skip
    """The table's path, and all that it holds now. RuntimeError: there is nothing here to compare times on."""
    if timer is _autotune.gpu_ms and not (device.type == "cuda" and torch.cuda.is_available()):
        raise RuntimeError("a search compares times on a GPU, and torch sees none here")
    table = _autotune.Table(path or default_path())
    # codes gather, however many entries: a GEMM has no configuration of ours
    token = densified.DENSE_CHOICE.set(False)
    try:
        with _autotune.searching(table, functools.partial(fill, timer)):
            for shape in shapes:
                for dtype in dtypes:
                    for name, call in calls(shape, DTYPES[dtype], device):
                        say(f"{name}, B={shape.B} d={shape.d} F={shape.F} k={shape.k}, {dtype}")
                        call()
    finally:
        densified.DENSE_CHOICE.reset(token)
    return table.path, table.entries()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Search the launch configurations of every operation on the GPU that is here. "
        "The table applies where SAE_AUTOTUNE_TABLE names it; results do not depend on it, save the rounding of sums."
    )
    parser.add_argument(
        "shapes", nargs="*", default=["4096,768,32768,32"], metavar="B,d,F,k",
        help="tokens, width, latents, entries a token; 4096,768,32768,32",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["bf16"], help="bf16")
    parser.add_argument("--table", type=Path, metavar="FILE", help="SAE_AUTOTUNE_TABLE, or one in the user's cache")
    parser.add_argument("--device", type=torch.device, default="cuda", help="cuda, cuda:1 …")
    args = parser.parse_args(argv)
    table = args.table or (Path(os.environ["SAE_AUTOTUNE_TABLE"]) if os.environ.get("SAE_AUTOTUNE_TABLE") else None)
    try:
        shapes = [Shape.parse(text) for text in args.shapes]
        path, entries = tune(shapes, args.dtype, args.device, table, functools.partial(print, file=sys.stderr))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1
    for entry in entries:
        arguments = ", ".join(map(str, entry["arguments"]))
        gain = f"{entry['default_ms'] / entry['ms']:.2f}x" if entry["ms"] else ""
        print(f"{entry['operation']:<24} {entry['dtype']:<9} batch ≤ {entry['batch']:<8} "
              f"{entry['choice']}({arguments}): {entry['configuration']}  {entry['ms']:.4g} ms {gain}")  # fmt: skip
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
