"""Targets and predictions beside what was measured on a GPU: pure functions of stored rows.

Targets are stated against roofs and yardsticks of the same card and run. A prediction (``predict.py``) is confirmed by
a time within a factor of 1.5, and refuted by any other. Rows of other commits than a card's last judge nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from derived import (
    GEMM_ALONE,
    GROUP_MAXIMA,
    ITEMSIZE,
    Cell,
    bandwidth_gbps,
    cells,
    fmt_ms,
    fmt_ratio,
    newest,
    roof_of,
    same_code,
    share_of_roof,
    table,
)
from rows import Row

MET, MISSED, NOT_MEASURED = "met", "**missed**", "not measured"
DTYPE = "bfloat16"
WITHIN = 1.5
NO_HOST_READ = ("ours, capacity", "ours")


@dataclass(frozen=True)
class Target:
    """``measure(cell, rows)`` is what is compared with ``limit``, or None where a row is missing."""

    text: str
    op_id: str
    case: str
    limit: float
    measure: Callable[[Cell, Sequence[Row]], float | None]
    show: Callable[[float], str]
    at_most: bool = True


def _share(cell: Cell, rows: Sequence[Row]) -> float | None:
    found = share_of_roof(cell.ours, rows) if cell.ours else None
    return found[1] if found else None


def _beyond_group_maxima(cell: Cell, rows: Sequence[Row]) -> float | None:
    ours, maxima = cell.ours, cell.of(GROUP_MAXIMA)
    return ours["ms_p50"] - maxima["ms_p50"] if ours and maxima else None


def _reads(cell: Cell, rows: Sequence[Row]) -> float | None:
    ours = cell.of(*NO_HOST_READ)
    copy = roof_of(rows, ours["device"], "copy") if ours else None
    if not (ours and copy):
        return None
    one_read = cell.shape["B"] * cell.shape["F"] * ITEMSIZE[cell.dtype] / bandwidth_gbps(copy) / 1e6  # ms
    return ours["ms_p50"] / one_read


def _over_gemm(cell: Cell, rows: Sequence[Row]) -> float | None:
    ours, gemm = cell.ours, cell.of(GEMM_ALONE)
    return ours["ms_p50"] / gemm["ms_p50"] if ours and gemm else None


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


TARGETS = (
    Target("row top-k, of copy bandwidth", "topk", "S2", 0.85, _share, _percent, at_most=False),
    Target("batch top-k, beyond one pass of group maxima", "batch_topk", "S1", 0.080, _beyond_group_maxima, fmt_ms),
    Target("norm match, over one read of the matrix", "norm_match", "S1", 2.5, _reads, fmt_ratio),
    Target("encoder and selection, over the bare GEMM", "encode", "S1", 1.12, _over_gemm, fmt_ratio),
    Target("decode, of the L2 gather rate", "decode", "S1", 0.70, _share, _percent, at_most=False),
)


def targets(rows: Sequence[Row], device: str) -> list[tuple[Target, float | None, str]]:
    """Each target with what was measured on ``device`` and the verdict."""
    rows = _of_last_commit(rows, device)
    there = {(cell.op_id, cell.case, cell.dtype): cell for cell in cells(rows)}
    judged = []
    for target in TARGETS:
        cell = there.get((target.op_id, target.case, DTYPE))
        value = target.measure(cell, rows) if cell else None
        met = value is not None and (value <= target.limit if target.at_most else value >= target.limit)
        judged.append((target, value, NOT_MEASURED if value is None else MET if met else MISSED))
    return judged


def _of_last_commit(rows: Sequence[Row], device: str) -> list[Row]:
    found = [row for row in rows if row["device"] == device]
    last = newest(found) if found else {}
    return [row for row in found if same_code(row, last)]


def target_table(rows: Sequence[Row], device: str) -> str:
    lines = [
        [target.text, f"{target.case}, {DTYPE}", ("≤ " if target.at_most else "≥ ") + target.show(target.limit),
         "" if value is None else target.show(value), verdict]
        for target, value, verdict in targets(rows, device)
    ]  # fmt: skip
    return table(("target", "size", "allowed", "measured", "verdict"), lines, left=2)


# --- predictions ---------------------------------------------------------------------------------------------------

# Predicted calls build a graph and transpose the codes for it; measured ones do so in the gradient of the weight.
BOTH_WAYS = ("decode", "decode-backward_values", "decode-backward_weight")
Compared = tuple[str, tuple[tuple[str, str], ...], tuple[str, ...]]  # name; predicted calls; measured operations
TOGETHER: tuple[Compared, ...] = (
    ("encode", (("encoder GEMM and topk", "forward"),), ("encode",)),
    ("decode and its gradients", (("decode", "forward"), ("decode", "backward")), BOTH_WAYS),
)


def compared(predicted: Iterable[dict[str, Any]]) -> list[Compared]:
    """What predictions and measurements have in common: operations by themselves, and those that belong together."""
    parts = {call for _, calls, _ in TOGETHER for call in calls}
    alone = dict.fromkeys(p["op"] for p in predicted if p["mode"] == "forward" and (p["op"], "forward") not in parts)
    return [*((name, ((name, "forward"),), (name,)) for name in alone), *TOGETHER]


def predictions(rows: Sequence[Row], predicted: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Lines of a table: operation, size, predicted and measured time, their ratio, verdict; where both exist."""
    long_names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    expected = {(p["gpu"], p["shape"], long_names[p["dtype"]], p["op"], p["mode"]): p for p in predicted}
    lines = []
    for device in dict.fromkeys(row["device"] for row in rows):
        there = {(cell.case, cell.dtype, cell.op_id): cell for cell in cells(_of_last_commit(rows, device))}
        for gpu, case, dtype in dict.fromkeys(place[:3] for place in expected if place[0] in device):
            for name, calls, op_ids in compared(expected.values()):
                parts = [expected.get((gpu, case, dtype, *call)) for call in calls]
                found = [there.get((case, dtype, op_id)) for op_id in op_ids]
                measured = [cell.of(*NO_HOST_READ) if cell else None for cell in found]
                if all(parts) and all(measured):
                    lines.append(_compare(name, f"{case}, {dtype}", parts, measured))
    return lines


def _compare(name: str, size: str, parts: Sequence[Any], measured: Sequence[Any]) -> list[str]:
    expected = sum(part["predicted_microseconds"] for part in parts) / 1e3
    taken = sum(row["ms_p50"] for row in measured)
    verdict = "confirmed" if 1 / WITHIN <= taken / expected <= WITHIN else "**refuted**"
    return [name, size, fmt_ms(expected), fmt_ms(taken), fmt_ratio(taken / expected), verdict]


def prediction_table(lines: Sequence[Sequence[str]]) -> str:
    return table(("operation", "size", "predicted", "measured", "measured / predicted", "verdict"), lines, left=2)
