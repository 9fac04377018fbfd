"""Rows: what was measured, where, and with what. JSON lines in long form; tables and plots are made from them alone.

A row's key is everything in it that is no measurement. Writing a row replaces the one with the same key, and also what
an uncommitted tree left for the same cell (the key without commit and versions). What was to be measured and could not
be is a row as well: ``failed`` says why, and takes the place of the numbers.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # whoever only reads rows needs no torch
    import torch

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]

# What a row reports; all other fields identify it. Bytes and flops: kernels/operations.py.
MEASURED = frozenset({
    "ms_p50", "ms_p20", "ms_p80", "samples", "bytes", "flops", "peak_mem_bytes", "other_load", "utc",
    "mse", "mse_train", "fvu", "l0", "dead_fraction", "tokens_per_second", "seconds",
    "errors", "share_of_first", "host_us_min", "host_us_p50", "launches", "stock_operators",
    "host_ms", "graph_ms", "no_graph",
    "dense_fraction", "loss_recovered", "ce_clean", "ce_spliced", "ce_ablated", "strength", "failed",
})  # fmt: skip
PROVENANCE = frozenset({"commit", "dirty", "torch", "triton", "python", "driver", "cuda"})
VERSIONS = PROVENANCE | {"packages"}  # of other libraries, where a row has to do with them


def key(row: Row) -> str:
    """Everything that is no measurement, as one comparable string."""
    return _canonical(row, MEASURED)


def cell(row: Row) -> str:
    """The place of a row in a table: its key without commit, versions and whether others are compared with it."""
    return _canonical(row, MEASURED | VERSIONS | {"baseline"})


def _canonical(row: Row, without: frozenset[str]) -> str:
    return json.dumps({name: value for name, value in row.items() if name not in without}, sort_keys=True)


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """``old`` with ``new`` in place of the rows that they replace; order kept, new ones last."""
    new = list({key(row): row for row in new}.values())
    keys, cells = {key(row) for row in new}, {cell(row) for row in new}
    kept = [row for row in old if key(row) not in keys and not (row.get("dirty") is not False and cell(row) in cells)]
    return kept + new


def latest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each cell, in order of first appearance."""
    newest: dict[str, Row] = {}
    for row in rows:
        place = cell(row)
        if place not in newest or row["utc"] >= newest[place]["utc"]:
            newest[place] = row
    return list(newest.values())


def with_numbers(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each cell, where that holds numbers."""
    return [row for row in latest(rows) if "failed" not in row]


def failures(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each cell, where that says why there are none."""
    return [row for row in latest(rows) if "failed" in row]


def failure(about: Row, reason: str) -> Row:
    """The row of what has no numbers; ``about`` is all else that its row would say."""
    return {**about, "failed": reason, "utc": now_utc()}


def load(path: Path) -> list[Row]:
    """The rows of a file; none if it does not exist. ValueError names file and line of what is no row."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or "utc" not in row:
            raise ValueError(f"{path}, line {number} is no row: {line:.80}")
        rows.append(row)
    return rows


def store(path: Path, new: Iterable[Row]) -> None:
    """Merge rows into a file, which is replaced whole."""
    lines = [json.dumps(row, allow_nan=False) for row in merged(load(path), new)]
    write_atomically(path, "".join(line + "\n" for line in lines))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write to a temporary name in the same folder, then rename: nobody ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def short(x: float) -> float:
    """Six digits: what a measurement is worth."""
    return float(f"{x:.6g}")


def now_utc() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


# ------------------------------------------------------------------------------------------ where it ran


def environment(device: torch.device) -> Row:
    """Machine and versions: the fields that every row carries."""
    return {"device": device_name(device), **_versions(device.type), **_revision()}


@cache
def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads torch uses."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    # Clouds call several generations of a processor by one name, whose matrix products differ twofold.
    vectors = torch.backends.cpu.get_cpu_capability()
    processor = _processor() + (f" {vectors}" if vectors != "AVX512" else "")
    return f"{processor}, {threads} thread{'s' if threads > 1 else ''}"


def device_slug(device: torch.device) -> str:
    """The device as a folder name."""
    prefix = "" if device.type == "cuda" else "cpu-"
    return prefix + re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    name = found.group(1) if found else platform.processor() or platform.machine() or "unknown processor"
    return re.sub(r"\s*(\((R|TM)\)|CPU|Processor|@.*|\d+-Core)", "", name).strip() or name


@cache
def _versions(device_type: str) -> Row:
    import torch

    on_gpu = device_type == "cuda"
    return {
        "driver": _driver() if on_gpu else None,
        "cuda": (torch.version.cuda or torch.version.hip) if on_gpu else None,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "python": platform.python_version(),
    }


def installed(package: str) -> str | None:
    """The version of a package; None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    shown = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return shown.splitlines()[0].strip() if shown else None


@cache
def _revision() -> Row:
    """The commit, and whether the tree differs from it; both None where there is no repository.

    ``BENCH_COMMIT`` names the commit of a copy that came without its history; that it differs in nothing is on whoever
    sets it.
    """
    if given := os.environ.get("BENCH_COMMIT"):
        if not re.fullmatch("[0-9a-f]{7,40}", given):
            raise ValueError(f"BENCH_COMMIT must be 7 to 40 hexadecimal digits, got {given!r}")
        return {"commit": given, "dirty": False}
    commit = _output("git", "rev-parse", "--verify", "HEAD")
    changed = _output("git", "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {"commit": commit, "dirty": None if commit is None or changed is None else bool(changed)}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
