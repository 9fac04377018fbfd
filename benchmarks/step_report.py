"""The part of the report that is about training steps: tables and figures as pure functions of stored rows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import published
from derived import (
    HOST_HEADER,
    dated,
    fmt_ms,
    fmt_ratio,
    fmt_spread,
    host_columns,
    newest,
    note_text,
    pictures,
    shape_text,
    table,
)
from rows import Row

GEMM, ADAM = "encoder GEMM", "fused Adam"  # the yardsticks of a step
OURS = "ours"
WHOLE, REST = "whole step", "the rest"


def sections(rows: Sequence[Row], figures: Sequence[Path]) -> list[str]:
    """Markdown of what there is of steps, parts and curves; ``rows`` are :func:`rows.latest`."""
    steps, parts, curves = ([row for row in rows if row["kind"] == kind] for kind in ("step", "part", "curve"))
    if not (steps or parts or curves):
        return []
    text, last = ["## A training step"], newest(rows)
    if steps:
        text.append(_how_to_read(steps))
    for found in grouped([row for row in steps if row["group"] != "published"]).values():
        shown = pictures(figures, f"{figure_name(found[0])}.")
        text += [f"### {_title(found[0])}", shown, step_table(found, last)]
    if parts:
        text += ["### Where the time goes", pictures(figures, "step-parts"), PARTS_TEXT]
        text += [part_table(found, last) for found in grouped(parts).values()]
    text += published.section(steps, last)
    if curves:
        text += ["### The same loss", pictures(figures, "step-curve")]
        text += [curve_text(found, last) for found in grouped_curves(curves)]
    return [paragraph for paragraph in text if paragraph]


PARTS_TEXT = (
    "Median milliseconds of each part alone, in turn with the whole steps. *The rest* is what the whole step takes "
    "beyond the sum of its parts: counters, the report, small gradients; negative where one part leaves data in a "
    "cache that the next finds there."
)


def _how_to_read(steps: Sequence[Row]) -> str:
    versions: dict[str, str] = {}
    for row in steps:
        versions.update(row["packages"])
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) or "none installed"
    return (
        "Median milliseconds of one whole step, optimizer included (20th–80th percentile), all in turn, round by "
        "round, in one process. *× floor* divides by the encoder's matrix product plus fused Adam over all parameters, "
        "measured in the same rounds: what no exact step with dense Adam can avoid. *ours is* says how many times "
        "faster the default TrainStep is (with AuxK: than the other steps with AuxK). Everyone has the same initial "
        "weights and inputs and torch's fused Adam, and was held to the right first error and a falling one before it "
        f"was timed. Other libraries: {named}."
    )


def grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of one size, dtype and device."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[json.dumps([row["case"], row["shape"], row["dtype"], row["device"]], sort_keys=True)].append(row)
    return groups


def _title(row: Row) -> str:
    sizes = shape_text({name: value for name, value in row["shape"].items() if name != "indices"})
    return f"{row['case']}, {row['dtype']}, torch {row['torch']}: {sizes}"


def figure_name(row: Row) -> str:
    """Without extension, of the figure of a size."""
    return f"step-{row['case']}-{row['dtype']}".replace("=", "").replace(", ", "-")


def floor_ms(found: Iterable[Row]) -> float | None:
    """Encoder GEMM + fused Adam, where both were measured."""
    times = {row["provider"]: row["ms_p50"] for row in found}
    return times[GEMM] + times[ADAM] if {GEMM, ADAM} <= times.keys() else None


def step_table(found: Sequence[Row], last: Row) -> str:
    floor = floor_ms(found)
    # with and without AuxK, each beside the default TrainStep of its own kind
    ours = {row["auxk"]: row for row in found if row["provider"] in (OURS, f"{OURS} + AuxK")}
    memory = any(row["peak_mem_bytes"] is not None for row in found)
    lines = []
    for row in found:
        name = f"**{row['provider']}**" if row["contestant"] == "ours" else row["provider"]
        mine = ours.get(row["auxk"])
        comparable = mine is not None and row["contestant"] != "yardstick" and row is not mine
        line = [
            name, note_text(row, last), fmt_spread(row),
            "" if floor is None or row["contestant"] == "yardstick" else fmt_ratio(row["ms_p50"] / floor),
            fmt_ratio(row["ms_p50"] / mine["ms_p50"]) if comparable and mine is not None else "",
        ]  # fmt: skip
        if memory:
            line.append("" if row["peak_mem_bytes"] is None else f"{row['peak_mem_bytes'] / 1e6:.0f}")
            line += host_columns(row)
        lines.append(line)
    header = ["step", "what it includes", "ms", "× floor", "ours is", *(["peak MB", *HOST_HEADER] if memory else [])]
    text = table(header, lines, left=2)
    return text if floor is None else f"Floor (GEMM + fused Adam): {fmt_ms(floor)}.\n\n{text}"


def parts_of(found: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Milliseconds by provider and part, the rest included."""
    times: dict[str, dict[str, float]] = defaultdict(dict)
    for row in found:
        times[row["provider"]][row["part"]] = row["ms_p50"]
    for parts in times.values():
        if WHOLE in parts:
            parts[REST] = 2 * parts[WHOLE] - sum(parts.values())
    return times


def part_table(found: Sequence[Row], last: Row) -> str:
    times = parts_of(found)
    names = list(dict.fromkeys(part for parts in times.values() for part in parts if part not in (WHOLE, REST)))
    lines = [
        [part, *(f"{parts[part]:.3g}" if part in parts else "" for parts in times.values())]
        for part in [*names, REST, WHOLE]
    ]
    share = 100 * found[0]["share_of_first"]
    caption = f"{_title(found[0])}; the most active latent fires on {share:.1f} % of the tokens"
    return f"{dated(caption, found, last)}\n\n{table(['part, ms', *times], lines)}"


def grouped_curves(curves: Sequence[Row]) -> list[list[Row]]:
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in curves:
        groups[row["sha256"], row["d_sae"], row["k"], row["batch_tokens"], row["device"]].append(row)
    return list(groups.values())


def curve_text(found: Sequence[Row], last: Row) -> str:
    by_name = {row["provider"]: row["errors"] for row in found}
    nearby = [row["errors"] for row in found if row["provider"].endswith("other roundings")]
    first = found[0]
    where = dated(
        f"{first['model']}, layer {first['layer']}, d={first['d']} F={first['d_sae']} k={first['k']}, "
        f"{len(first['errors'])} steps of {first['batch_tokens']} tokens, same initial weights and batches",
        found, last,
    )  # fmt: skip
    if not {"sae_engine", "dense PyTorch"} <= by_name.keys():
        return f"{where}: one side has not been trained."
    gap = _gap(by_name["sae_engine"], by_name["dense PyTorch"])
    others = [_gap(errors, by_name["dense PyTorch"]) for errors in nearby]
    beside = ""
    if others:
        drift = 100 * max(others)
        beside = f"; dense PyTorch from weights sqrt(d) roundings away is up to {drift:.2g} % from itself"
    return f"{where}: TrainStep and dense PyTorch are at most {100 * gap:.2g} % apart at any step{beside}."


def _gap(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) / y for x, y in zip(a, b, strict=True))
