"""Figures as a pure function of stored rows. By itself: ``python benchmarks/plot.py benchmarks/results/<device>``.

A figure holds the digest of the rows that it was drawn from, and is drawn again only where these have changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import matplotlib

matplotlib.use("Agg")

from derived import Cell, cells, fmt_ms, fmt_ratio, means, newest, note_text, shape_text, share_of_roof, speed_up
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from rows import Row, load, with_numbers, write_atomically
from step_plot import figures as step_figures

OURS_COLOUR, BASELINE_COLOUR, OTHER_COLOUR, INK, FAINT = "#0f6fb4", "#8a8f98", "#cdd2d9", "#22262b", "#d9dde2"
RULES = {"TopK": ("#0f6fb4", "o"), "BatchTopK": ("#c8501e", "s"), "top-AFA": ("#2f8a4c", "D")}
STYLE = {
    "font.size": 9, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    "axes.titlesize": 11, "axes.titleweight": "bold", "figure.dpi": 150, "savefig.dpi": 150,
}  # fmt: skip


def draw_all(rows: Iterable[Row], folder: Path, *, seconds: float = math.inf) -> tuple[list[Path], list[str]]:
    """Draws every figure that the rows allow and that is not there yet, each written whole; none is begun after
    ``seconds``. Returns the files of all that are there, and the names of those left out."""
    started, files, left = time.monotonic(), [], []
    for name, (drawn_from, draw) in figures(with_numbers(rows)).items():
        file = folder / f"{name}.png"
        digest = hashlib.sha256(json.dumps(drawn_from, sort_keys=True).encode()).hexdigest()
        if not (file.exists() and digest.encode() in file.read_bytes()):
            if time.monotonic() - started > seconds:
                left.append(name)
                continue
            write_atomically(file, png(draw, Rows=digest))
        files.append(file)
    return files, left


def png(draw: Callable[[], Figure], **metadata: str) -> bytes:
    """The figure that ``draw`` makes, in the style of all: the same bytes for the same figure and metadata."""
    with plt.rc_context(STYLE):
        figure, buffer = draw(), BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None, **metadata})
        plt.close(figure)
    return buffer.getvalue()


def figures(rows: Sequence[Row]) -> dict[str, tuple[list[Row], Callable[[], Figure]]]:
    """By file name: the rows that a figure shows, and what draws it."""
    planned = step_figures(rows)
    by_group: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells(rows):
        if cell.baseline:
            by_group[cell.group, cell.dtype].append(cell)
    quoted: dict[str, list[Cell]] = defaultdict(list)
    for (group, dtype), found in by_group.items():
        if group.startswith("sweep-"):
            planned[f"{group}-{dtype}"] = _rows_of(found), partial(sweep, found, group.removeprefix("sweep-"))
        elif not group.endswith(("-zipf", "-wide")):
            shown = _ordered(found + by_group.get((f"{group}-wide", dtype), []))  # skewed codes stand in the tables
            planned[f"operations-{group}-{dtype}"] = _rows_of(shown), partial(speed_ups, shown)
            quoted[dtype] += found
    roofs = [row for row in rows if row["kind"] == "roof"]
    for dtype, found in quoted.items():
        shares = [(cell, *share) for cell in found if cell.ours and (share := share_of_roof(cell.ours, rows))]
        if shares:
            planned[f"roofline-{dtype}"] = [cell.ours for cell, *_ in shares] + roofs, partial(roofline, shares)
    trained: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "reconstruction":
            trained[row["sha256"][:8], row["layer"], row["d_sae"], row["train_tokens"]].append(row)
    for (sha, layer, d_sae, tokens), found_rows in trained.items():
        name = f"reconstruction-{sha}-layer{layer}-{d_sae}-{tokens}"
        planned[name] = found_rows, partial(frontier, found_rows)
    return planned


def _rows_of(found: Iterable[Cell]) -> list[Row]:
    return [row for cell in found for row in cell.rows]


def _ordered(found: Sequence[Cell]) -> list[Cell]:
    """Cells of one operation next to each other, in the order in which the operations first appear."""
    first: dict[str, int] = {}
    for cell in found:
        first.setdefault(cell.op_id, len(first))
    return sorted(found, key=lambda cell: first[cell.op_id])


def speed_ups(found: Sequence[Cell]) -> Figure:
    """Bars that start at the baseline and end where a provider's speed lies, each labelled with its milliseconds."""
    lines: list[tuple[float, Row, Cell]] = []  # y position, row, cell
    headings: list[tuple[float, str]] = []
    y = 0.0
    for cell in found:
        headings.append((y, _heading(cell)))
        shown = (row for row in cell.rows if not row.get("yardstick"))
        for row in sorted(shown, key=lambda row: (not row["provider"].startswith("ours"), row is not cell.baseline)):
            y += 1.0
            lines.append((y, row, cell))
        y += 1.6
    ratios = [speed_up(row, cell) for _, row, cell in lines]
    left, right = max(min(0.5, *ratios) * 0.8, 0.02), max(2.0, *ratios) * 2.2
    figure, axes = plt.subplots(figsize=(8.0, 0.185 * y + 1.0))
    for (position, row, cell), ratio in zip(lines, ratios, strict=True):
        ours = row["provider"].startswith("ours")
        is_baseline = row is cell.baseline
        colour = OURS_COLOUR if ours else BASELINE_COLOUR if is_baseline else OTHER_COLOUR
        if is_baseline:
            axes.plot([1.0], [position], marker="D", markersize=4, color=colour)
        else:
            axes.barh(position, max(ratio, left) - 1.0, left=1.0, height=0.72, color=colour, linewidth=0)
        text = fmt_ms(row["ms_p50"]) + ("" if is_baseline else f"   {fmt_ratio(ratio)}")
        axes.annotate(text, (max(ratio, 1.0), position), xytext=(6, 0), textcoords="offset points", va="center",
                      fontsize=7.5, fontweight="bold" if ours else "normal")  # fmt: skip
    axes.axvline(1.0, color=INK, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_xticks([x for x in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if left <= x <= right])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    last = newest(row for _, row, _ in lines)
    names = [_provider_text(row, last) for _, row, _ in lines]
    axes.set_yticks([position for position, _, _ in lines], names, fontsize=7.5)
    for tick, (_, row, _) in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if row["provider"].startswith("ours") else "normal")
    for position, text in headings:
        axes.annotate(text, (0, position), xycoords=("axes fraction", "data"), xytext=(-4, 0), ha="right", va="center",
                      textcoords="offset points", fontsize=8.5, fontweight="bold")  # fmt: skip
    axes.set_ylim(y - 0.8, -0.9)
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel("slower   ←   speed relative to the baseline (diamond), log scale   →   faster")
    title, device = f"{shape_text(_widest(found))}, {found[0].dtype}", found[0].rows[0]["device"]
    figure.text(0.01, 1.0, title, fontsize=11, fontweight="bold", va="bottom")
    figure.text(0.01, 0.995, f"{device}; median time of one call", fontsize=8, color=BASELINE_COLOUR, va="top")
    figure.tight_layout(rect=(0, 0, 1, 0.99 - 0.15 / figure.get_figheight()))
    return figure


ROOFS = {"copy": ("copy bandwidth", "o"), "gemm": ("GEMM rate", "s"), "gather": ("L2 gather rate", "D")}


def roofline(shares: Sequence[tuple[Cell, str, float]]) -> Figure:
    """How near our operations come to the measured roof that binds each: its bytes, flops or gathered rows per second
    over the same card's rate; a point a size."""
    by_op: dict[str, list[tuple[Cell, str, float]]] = defaultdict(list)
    for found in shares:
        by_op[found[0].op_id].append(found)
    figure, axes = plt.subplots(figsize=(7.0, 0.16 * (len(shares) + len(by_op)) + 1.2))
    ticks, y, named = [], 0.0, set()
    for found in by_op.values():
        ticks.append(y + (len(found) - 1) / 2)
        for cell, bound, share in found:
            text, marker = ROOFS[bound]
            axes.scatter(100 * share, y, s=26, marker=marker, color=OURS_COLOUR, linewidth=0,
                         label=None if bound in named else f"of the {text}")  # fmt: skip
            axes.annotate(cell.case, (100 * share, y), xytext=(6, 0), textcoords="offset points", va="center",
                          fontsize=7, color=BASELINE_COLOUR)  # fmt: skip
            named.add(bound)
            y += 1.0
        y += 1.0
    axes.axvline(100, color=INK, linewidth=0.8)
    axes.set_xlim(0, max(112.0, *(112 * share for _, _, share in shares)))
    axes.set_ylim(y - 1.2, -0.9)
    axes.set_yticks(ticks, list(by_op), fontsize=8)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} %"))
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_xlabel("of the roof measured on the same machine; more than 100 %: data stayed in a cache")
    first_row = shares[0][0].rows[0]
    axes.set_title(f"Share of the roof, {first_row['device']}, {shares[0][0].dtype}", pad=22)
    axes.legend(frameon=False, fontsize=7.5, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), borderpad=0)
    figure.tight_layout()
    return figure


def _provider_text(row: Row, last: Row) -> str:
    return row["provider"] + (f" ({note})" if (note := note_text(row, last)) else "")


def _heading(cell: Cell) -> str:
    name = cell.op_id.replace("-backward_", ", gradient of ")
    return f"{name}, k = {cell.shape['k']}" if cell.group.endswith("-wide") else name


def _widest(found: Sequence[Cell]) -> dict[str, int | str]:
    """The sizes of a figure: those of the cell that depends on most of them."""
    usual = [cell for cell in found if not cell.group.endswith("-wide")] or list(found)
    return {k: v for k, v in max((cell.shape for cell in usual), key=len).items() if k != "indices"}


def sweep(found: Sequence[Cell], letter: str) -> Figure:
    """Time against F or k, one panel an operation: ours and the baseline."""
    by_op: dict[str, list[Cell]] = defaultdict(list)
    for cell in found:
        by_op[cell.op_id].append(cell)
    columns = min(3, len(by_op))
    lines = -(-len(by_op) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(3.1 * columns, 2.4 * lines), squeeze=False, sharex=True)
    for panel, at in zip(panels.flat, by_op.values(), strict=False):
        at = sorted(at, key=lambda cell: cell.shape[letter])
        for is_ours, colour in ((False, BASELINE_COLOUR), (True, OURS_COLOUR)):
            points = [
                (cell.shape[letter], row["ms_p50"])
                for cell in at
                for row in cell.rows
                if (row["provider"] == "ours" if is_ours else row is cell.baseline)
            ]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=colour, linewidth=1.4)
                name = "ours" if is_ours else at[-1].baseline["provider"]
                panel.annotate(name, points[-1], xytext=(0, 5), textcoords="offset points", ha="right",
                               fontsize=7, color=colour)  # fmt: skip
        panel.set_title(_heading(at[0]), fontsize=9, pad=8)
        panel.margins(y=0.2)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.grid(axis="y", color=FAINT, linewidth=0.6)
        panel.tick_params(length=0, labelsize=7)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    for panel in panels.flat[len(by_op) :]:
        panel.set_visible(False)
    figure.supxlabel(letter, fontsize=9)
    figure.supylabel("ms", fontsize=9)
    fixed = shape_text({name: size for name, size in _widest(found).items() if name != letter})
    figure.suptitle(f"{found[0].rows[0]['device']}, {found[0].dtype}, {fixed}", x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    return figure


def frontier(rows: Sequence[Row]) -> Figure:
    """Held-out error against entries per token: means over seeds, a line a rule, dense controls as open marks."""
    figure, axes = plt.subplots(figsize=(6.6, 4.2))
    summary = means(rows)
    for rule, (colour, marker) in RULES.items():
        ours = sorted((m for m in summary if m["rule"] == rule and m["is_ours"]), key=lambda m: m["l0"])
        dense = [m for m in summary if m["rule"] == rule and not m["is_ours"]]
        if ours:
            axes.plot([m["l0"] for m in ours], [m["mse"] for m in ours], color=colour, marker=marker, markersize=5,
                      linewidth=1.4, label=rule)  # fmt: skip
        for m in ours:
            name = "k" if m["knob_name"] == "k" else "coeff"
            value = f"{m['knob']:g}" if m["knob"] >= 1 else f"1/{1 / m['knob']:g}"
            up = rule == "BatchTopK"
            axes.annotate(f"{name} = {value}", (m["l0"], m["mse"]), xytext=(5, 6) if up else (-5, -10),
                          ha="left" if up else "right", textcoords="offset points", fontsize=7,
                          color=colour)  # fmt: skip
        if dense:
            axes.plot([m["l0"] for m in dense], [m["mse"] for m in dense], linestyle="none", marker=marker,
                      markersize=11, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.0)  # fmt: skip
    if any(not m["is_ours"] for m in summary):
        axes.plot([], [], linestyle="none", marker="o", markersize=10, markerfacecolor="none", markeredgecolor=INK,
                  label="the same, dense PyTorch")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12, y=0.12)
    axes.grid(color=FAINT, linewidth=0.6, which="major")
    axes.tick_params(length=0, which="both")
    first = rows[0]
    axes.set_xlabel("entries per token (L0), held-out tokens")
    axes.set_ylabel("squared error per element, normalized space")
    axes.set_title("Reconstruction error against sparsity", pad=28)
    caption = (
        f"{first['model']}, layer {first['layer']} {first['site']}, d = {first['d']}\n{first['d_sae']} latents, "
        f"{first['train_tokens']:,} training tokens, means of {len({row['seed'] for row in rows})} seed(s)"
    )
    axes.annotate(caption, (0, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points", fontsize=7.5,
                  color=BASELINE_COLOUR)  # fmt: skip
    axes.legend(frameon=False, fontsize=8, loc="best")
    return figure


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python benchmarks/plot.py FOLDER-WITH-ROWS")
    folder = Path(sys.argv[1])
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in load(file)]
    if not rows:
        sys.exit(f"{folder} holds no rows (*.jsonl)")
    print(*draw_all(rows, folder)[0], sep="\n")


if __name__ == "__main__":
    main()
