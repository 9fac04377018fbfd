"""Figures of training steps as a pure function of stored rows; ``plot.draw_all`` draws and writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from derived import fmt_ms, fmt_ratio
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rows import Row
from step_report import REST, WHOLE, _title, figure_name, floor_ms, grouped, grouped_curves, parts_of

OURS_COLOUR, BASELINE_COLOUR, OTHER_COLOUR, INK, FAINT = "#0f6fb4", "#8a8f98", "#cdd2d9", "#22262b", "#d9dde2"
COLOURS = {"ours": OURS_COLOUR, "PyTorch": BASELINE_COLOUR, "peer": OTHER_COLOUR}
PART_COLOURS = {
    "encoder GEMM": "#8a8f98", "selection": "#0f6fb4", "decode + loss": "#58a5d8", "transposing the codes": "#a8cfe8",
    "value gradients": "#f0b35c", "weight gradients + Adam": "#c8501e", REST: "#d9dde2",
}  # fmt: skip


def figures(rows: Sequence[Row]) -> dict[str, tuple[list[Row], Callable[[], Figure]]]:
    """By file name: the rows that a figure shows, and what draws it."""
    planned: dict[str, tuple[list[Row], Callable[[], Figure]]] = {}
    steps, parts, curves = ([row for row in rows if row["kind"] == kind] for kind in ("step", "part", "curve"))
    for found in grouped([row for row in steps if row["group"] != "published"]).values():
        planned[figure_name(found[0])] = found, partial(step_bars, found)
    if parts:
        planned["step-parts"] = parts, partial(part_bars, list(grouped(parts).values()))
    if curves:
        planned["step-curve"] = curves, partial(loss_curves, grouped_curves(curves)[0])
    return planned


def step_bars(found: Sequence[Row]) -> Figure:
    """One bar a step, in milliseconds; a line at the encoder's GEMM plus fused Adam."""
    shown = sorted((row for row in found if row["contestant"] != "yardstick"), key=lambda r: (r["auxk"], r["ms_p50"]))
    floor = floor_ms(found)
    figure, axes = plt.subplots(figsize=(7.6, 0.3 * len(shown) + 1.3))
    for place, row in enumerate(shown):
        middle, low, high = row["ms_p50"], row["ms_p20"], row["ms_p80"]
        axes.barh(place, middle, height=0.66, color=COLOURS[row["contestant"]], linewidth=0)
        axes.plot([low, high], [place, place], color=INK, linewidth=1)
        text = fmt_ms(middle) + ("" if floor is None else f"   {fmt_ratio(middle / floor)} floor")
        axes.annotate(text, (high, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7.5,
                      fontweight="bold" if row["contestant"] == "ours" else "normal")  # fmt: skip
    if floor is not None:
        axes.axvline(floor, color=INK, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.annotate(f"floor: encoder GEMM + fused Adam, {fmt_ms(floor)}", (floor, -0.9), xytext=(4, 0),
                      textcoords="offset points", fontsize=7.5, va="center")  # fmt: skip
    axes.set_yticks(range(len(shown)), [row["provider"] for row in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -1.4)
    axes.set_xlim(0, max(row["ms_p80"] for row in shown) * 1.3)
    axes.set_xlabel("milliseconds of one training step, optimizer included")
    _plain(axes)
    figure.suptitle(f"{_title(found[0])}\n{found[0]['device']}", x=0.01, ha="left", fontsize=9)
    figure.tight_layout()
    return figure


def part_bars(groups: Sequence[Sequence[Row]]) -> Figure:
    """A stacked bar for each provider, even and skewed firing beneath each other."""
    bars = [(found[0]["case"], name, parts) for found in groups for name, parts in parts_of(found).items()]
    figure, axes = plt.subplots(figsize=(7.6, 0.42 * len(bars) + 1.7))
    for place, (_, _, parts) in enumerate(bars):
        left = 0.0
        for part, colour in PART_COLOURS.items():
            width = max(parts.get(part, 0.0), 0.0)
            axes.barh(place, width, left=left, height=0.66, color=colour, linewidth=0,
                      label=part if place == 0 else None)  # fmt: skip
            left += width
        if WHOLE in parts:
            axes.annotate(fmt_ms(parts[WHOLE]), (max(left, parts[WHOLE]), place), xytext=(5, 0), va="center",
                          textcoords="offset points", fontsize=7.5)  # fmt: skip
    axes.set_yticks(range(len(bars)), [f"{name}, {case}" for case, name, _ in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
    axes.set_xlabel("milliseconds; the label is the whole step")
    _plain(axes)
    axes.legend(frameon=False, fontsize=7, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), borderpad=0)
    first = groups[0][0]
    figure.suptitle(f"Where a step's time goes; {first['device']}, {first['dtype']}", x=0.01, ha="left", fontsize=9)
    figure.tight_layout()
    return figure


def loss_curves(found: Sequence[Row]) -> Figure:
    """Error by step: dense PyTorch wide and pale, ours thin on top of it; below, how far they are apart."""
    by_name = {row["provider"]: row["errors"] for row in found}
    dense, ours = by_name.get("dense PyTorch"), by_name.get("sae_engine")
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.0, 3.8), sharex=True, height_ratios=(3, 1))
    if dense:
        top.plot(dense, color=OTHER_COLOUR, linewidth=4, label="dense PyTorch")
    if ours:
        top.plot(ours, color=OURS_COLOUR, linewidth=1.2, label="TrainStep")
    for row in found:
        if dense and row["errors"] is not dense:
            gap = [100 * (a - b) / b for a, b in zip(row["errors"], dense, strict=True)]
            is_ours = row["errors"] is ours
            named = not is_ours and row["seed"] == 0
            bottom.plot(gap, color=OURS_COLOUR if is_ours else BASELINE_COLOUR, linewidth=1 if is_ours else 0.7,
                        label=row["provider"] if named else None)  # fmt: skip
    top.set_yscale("log")
    top.legend(frameon=False, fontsize=8)
    top.set_ylabel("squared error per token")
    bottom.set_ylabel("apart, %")
    bottom.set_xlabel("step")
    if bottom.get_legend_handles_labels()[0]:
        bottom.legend(frameon=False, fontsize=7)
    for axes in (top, bottom):
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.tick_params(length=0, which="both")
    first = found[0]
    figure.suptitle(
        f"{first['model']}, d={first['d']} F={first['d_sae']} k={first['k']}, batches of {first['batch_tokens']}",
        x=0.01, ha="left", fontsize=9,
    )  # fmt: skip
    figure.tight_layout()
    return figure


def _plain(axes) -> None:
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
