"""What tables and figures compute from rows: speed-ups, rates, shares of the machine's roof, means over seeds."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rows import Row

GROUP_MAXIMA, GEMM_ALONE = "group maxima alone", "GEMM alone"  # yardsticks: parts that targets are stated in
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# What an operation waits for, where that is not the stream of its inputs and outputs.
BOUND_BY = {"encode": "gemm", "autoencoder": "gemm", "decode": "gather", "decode-backward_values": "gather",
            "decode-backward_weight": "gather"}  # fmt: skip

def is_ours(row: Row) -> bool:
    return row["provider"].startswith("ours")


@dataclass(frozen=True)
class Cell:
    """One operation at one size and dtype on one device: the rows of all its providers."""

    op_id: str
    case: str
    group: str
    shape: dict[str, int | str]
    dtype: str
    rows: list[Row]

    @property
    def ours(self) -> Row | None:
        return self.of("ours")

    @property
    def others(self) -> list[Row]:
        """What is neither ours nor the baseline: other ways of stock PyTorch, its compiler, other libraries."""
        return [row for row in self.rows if not (is_ours(row) or row is self.baseline or row.get("yardstick"))]

    def of(self, *providers: str) -> Row | None:
        """The row of the first of ``providers`` that was measured."""
        return next((row for name in providers for row in self.rows if row["provider"] == name), None)

    @property
    def baseline(self) -> Row | None:
        """The first of those that may be it: not every one runs in every dtype."""
        return next((row for row in self.rows if row["baseline"]), None)


def newest(rows: Iterable[Row]) -> Row:
    """The row that was measured last."""
    return max(rows, key=lambda row: row["utc"])


def same_code(row: Row, other: Row) -> bool:
    """Whether one commit made both, under one torch: only then is their ratio that of two contestants."""
    return all(row[name] == other[name] for name in ("commit", "dirty", "torch"))


def older_text(rows: Iterable[Row], last: Row) -> str:
    """``of 2b40db6, torch 2.13.0, 2026-11-21``: where those of ``rows`` are from that another commit or torch than
    that of ``last`` has made; empty if there are none."""
    found = [f"{(row['commit'] or 'no commit')[:7]}{' with changes' * bool(row['dirty'])}, torch {row['torch']}, "
             f"{row['utc'][:10]}" for row in rows if not same_code(row, last)]  # fmt: skip
    return f"of {'; '.join(dict.fromkeys(found))}" if found else ""


def dated(text: str, rows: Iterable[Row], last: Row) -> str:
    """``text``, and in brackets where those of ``rows`` are from that are older."""
    old = older_text(rows, last)
    return f"{text} ({old})" if old else text


def note_text(row: Row, last: Row) -> str:
    """What a row says of itself, and where it is from if it is older than the last."""
    return ", ".join(filter(None, [row["note"], older_text([row], last)]))


def op_id(row: Row) -> str:
    return row["op"] if row["mode"] == "forward" else f"{row['op']}-{row['mode']}"


def place_text(row: Row) -> str:
    """Where a row stands: ``topk S1 bfloat16``, ``training step main float32``, ``TopK k = 32 seed 0``."""
    if row["kind"] == "reconstruction":
        return f"{row['rule']} {knob_text(row)} seed {row['seed']}"
    names = {"step": "training step", "part": "parts of a step", "curve": "loss curve"}
    what = names.get(row["kind"]) or op_id(row)
    return " ".join([what, *(row[name] for name in ("case", "dtype") if name in row)])


def failure_text(row: Row) -> str:
    """One line about a row without numbers."""
    part = f", {row['part']}" if row["kind"] == "part" else ""
    return f"{place_text(row)}{part}, {row['provider']}: {row['failed']}"


def cells(rows: Iterable[Row]) -> list[Cell]:
    """Operation rows by cell, in order of first appearance. Pass :func:`rows.latest` rows."""
    found: dict[tuple, Cell] = {}
    for row in rows:
        if row["kind"] != "operation":
            continue
        place = (op_id(row), row["case"], json.dumps(row["shape"], sort_keys=True), row["dtype"], row["device"])
        if place not in found:
            found[place] = Cell(op_id(row), row["case"], row["group"], row["shape"], row["dtype"], [])
        found[place].rows.append(row)
    return list(found.values())


def speed_up(row: Row, cell: Cell) -> float:
    """How many times faster than the cell's baseline; NaN without one."""
    return cell.baseline["ms_p50"] / row["ms_p50"] if cell.baseline else float("nan")


def bandwidth_gbps(row: Row) -> float:
    """Unavoidable bytes over time, 1e9 bytes per second."""
    return row["bytes"] / row["ms_p50"] / 1e6


def rate_tflops(row: Row) -> float:
    """Floating-point operations over time, 1e12 per second."""
    return row["flops"] / row["ms_p50"] / 1e9


def roof_of(rows: Iterable[Row], device: str, op: str, dtype: str | None = None) -> Row | None:
    """The measured roof ("copy", "memset", "gemm" or "gather") of a device."""
    for row in rows:
        matches = row["kind"] == "roof" and row["op"] == op and row["device"] == device
        if matches and (dtype is None or row["dtype"] == dtype):
            return row
    return None


def gathered_gbps(row: Row) -> float:
    """Rows of the decoder (or of the gradient) that an operation on codes asks for, repeats included, over time."""
    shape = row["shape"]
    moved = shape["B"] * shape["k"] * shape["d"] * ITEMSIZE[row["dtype"]]
    return moved / row["ms_p50"] / 1e6


def share_of_roof(row: Row, rows: Iterable[Row]) -> tuple[str, float] | None:
    """What binds the operation ("copy", "gemm" or "gather"), and the share of that roof's measured rate."""
    bound = BOUND_BY.get(op_id(row), "copy")
    roof = roof_of(rows, row["device"], bound, row["dtype"] if bound == "gemm" else None)
    if roof is None:
        return None
    rate = {"copy": bandwidth_gbps, "gemm": rate_tflops, "gather": gathered_gbps}[bound](row)
    return bound, rate / (rate_tflops(roof) if bound == "gemm" else bandwidth_gbps(roof))


def means(rows: Iterable[Row]) -> list[Row]:
    """Reconstruction rows averaged over seeds, with the lowest and highest error."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "reconstruction":
            groups[row["rule"], row["knob_name"], row["knob"], row["provider"]].append(row)
    averaged = ("mse", "fvu", "l0", "dead_fraction", "tokens_per_second")
    return [
        {
            "rule": rule, "knob_name": knob_name, "knob": knob, "provider": provider,
            "is_ours": provider == "sae_engine", "seeds": sorted(row["seed"] for row in found),
            **{name: mean(row[name] for row in found) for name in averaged},
            "mse_low": min(row["mse"] for row in found), "mse_high": max(row["mse"] for row in found),
        }
        for (rule, knob_name, knob, provider), found in groups.items()
    ]  # fmt: skip


def fmt_ms(ms: float) -> str:
    """Milliseconds to three digits; microseconds below 0.1 ms."""
    if ms < 0.1:
        return f"{ms * 1e3:.3g} µs"
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms:,.0f} ms"


def fmt_ratio(ratio: float) -> str:
    """``1.87×``; two digits below 0.1; empty where there is nothing to compare with."""
    if math.isnan(ratio):
        return ""
    return f"{ratio:.2g}×" if ratio < 0.1 else f"{ratio:.2f}×"


HOST_HEADER = ("host", "CUDA graph")


def host_columns(row: Row) -> tuple[str, str]:
    """What the host takes to submit a call, and a CUDA graph's time or why there is none."""
    graph = fmt_ms(row["graph_ms"]) if "graph_ms" in row else row.get("no_graph", "")
    return fmt_ms(row["host_ms"]) if "host_ms" in row else "", graph


def fmt_spread(row: Row) -> str:
    """``12.3 (12.1–12.9)``: median and the 20th and 80th percentile."""
    middle, low, high = (f"{row[name]:.3g}" if row[name] < 1000 else f"{row[name]:.0f}"
                         for name in ("ms_p50", "ms_p20", "ms_p80"))  # fmt: skip
    return f"{middle} ({low}–{high})"


def shape_text(shape: dict[str, int | str]) -> str:
    """``B=2048 d=768 F=16384 k=32``."""
    return " ".join(f"{name}={value}" for name, value in shape.items())


def knob_text(row: Row) -> str:
    """``k = 32`` or ``coeff = 1/32``."""
    value = row["knob"]
    return f"{row['knob_name']} = " + (f"{value:g}" if value >= 1 else f"1/{1 / value:g}")


def pictures(figures: Iterable[Path], prefix: str) -> str:
    """Markdown of the figures beside a report whose names begin so; empty where there is none."""
    return "\n\n".join(f"![{path.stem}]({path.name})" for path in figures if path.name.startswith(prefix))


def table(header: Sequence[str], lines: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table, padded so that it reads in a terminal too; the first ``left`` columns are left-aligned."""
    lines = [[str(field) for field in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def padded(fields: Sequence[str]) -> str:
        pairs = enumerate(zip(fields, widths, strict=True))
        return "| " + " | ".join(f.ljust(w) if i < left else f.rjust(w) for i, (f, w) in pairs) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([padded(header), rule, *map(padded, lines)])
