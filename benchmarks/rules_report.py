"""``rules.md`` and its picture: the comparison of rules as a pure function of stored rows."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import TYPE_CHECKING

from derived import table
from recipes import CLAIMS, PUBLISHED, PUBLISHED_BUDGET, PUBLISHED_TOP_AFA, Claim
from report import by_setting, machine, setting_text
from rows import Row, latest, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATCHED = 0.1  # relative distance of the held-out L0 from the wanted one beyond which a row is marked
HIGHER_IS_BETTER = {"loss_recovered"}
METRIC_NAMES = {"fvu": "FVU", "loss_recovered": "loss recovered", "dead_fraction": "dead latents"}
AVERAGED = ("mse", "fvu", "l0", "loss_recovered", "dead_fraction", "dense_fraction", "tokens_per_second")
MARKS = "os^Dv<>pPX*hd"


def write(rows: Sequence[Row], folder: Path) -> str:
    """Writes the report of all rows, each file whole; returns the tables, for the terminal."""
    rows = latest(rows)
    parts, shown = ["# Selection rules at equal L0", machine(rows)], []
    for number, found in enumerate(by_setting(rows, "rule").values()):
        tables = [*_tables(found), published(found)]
        text = "\n\n".join(part for part in tables if part)
        shown.append(text)
        parts += [f"## {found[0]['model']}, layer {found[0]['layer']} {found[0]['site']}", setting_text(found)]
        if importlib.util.find_spec("matplotlib") is not None:
            name = f"rules-{found[0]['sha256'][:8]}-{number}.png"
            write_atomically(folder / name, picture(found))
            parts.append(f"![rules]({name})")
        parts += [_recipes(found), _legend(found), text]
        parts += ["### What the papers say, and what happened here", claims(found)]
    write_atomically(folder / "rules.md", "\n\n".join(parts) + "\n")
    return "\n\n".join([*shown, str(folder / "rules.md")])


def summarised(rows: Iterable[Row]) -> dict[tuple[str, int], Row]:
    """By rule and k: means over seeds, and the lowest and highest of each measurement."""
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["rule"], row["k"]].append(row)
    return {
        place: {
            "rule": place[0], "k": place[1], "seeds": len(found),
            **{name: mean(row[name] for row in found) for name in AVERAGED},
            **{f"{name}_low": min(row[name] for row in found) for name in AVERAGED},
            **{f"{name}_high": max(row[name] for row in found) for name in AVERAGED},
        }
        for place, found in groups.items()
    }  # fmt: skip


def is_matched(summary: Row) -> bool:
    return abs(summary["l0"] / summary["k"] - 1) <= MATCHED


def _recipes(rows: Sequence[Row]) -> str:
    own = {row["rule"]: row["recipe"] for row in rows if row["recipe"]}
    return "\n".join(f"- {rule}: {text}" for rule, text in own.items())


def _legend(rows: Sequence[Row]) -> str:
    first = rows[0]
    return (
        f"Means over seeds (lowest–highest), best FVU first. Held-out tokens: {first['eval_tokens']:,}, rules in the "
        "form that inference has (learned thresholds instead of batch rules). Loss recovered: (zeros − spliced) / "
        f"(zeros − clean) of the next-token loss on {first['loss_tokens']:,} tokens of the same text, each context's "
        "first position left as it is in all three. Dead: fires on no held-out token; dense: on more than 10 %. "
        f"Tokens/s: of training. L0 in *italics* is more than {MATCHED:.0%} from the wanted one: such a row does not "
        "compare."
    )


def _tables(rows: Sequence[Row]) -> list[str]:
    header = ("rule", "L0", "FVU", "loss recovered", "dead", "dense", "tokens/s", "seeds")
    summary = summarised(rows)
    parts = []
    for k in sorted({k for _, k in summary}):
        lines = []
        for m in sorted((m for m in summary.values() if m["k"] == k), key=lambda m: m["fvu"]):
            l0 = f"{m['l0']:.1f}"
            lines.append([
                m["rule"], l0 if is_matched(m) else f"*{l0}*", _spread(m, "fvu", ".4f"),
                _spread(m, "loss_recovered", ".4f"), _spread(m, "dead_fraction", ".1%"), f"{m['dense_fraction']:.1%}",
                f"{m['tokens_per_second']:,.0f}", str(m["seeds"]),
            ])  # fmt: skip
        parts.append(f"### L0 = {k}\n\n{table(header, lines)}")
    return parts


def _spread(m: Row, name: str, form: str) -> str:
    return f"{m[name]:{form}} ({m[f'{name}_low']:{form}}–{m[f'{name}_high']:{form}})"


def claims(rows: Sequence[Row]) -> str:
    """Each paper's claim at each L0, where both rules have been measured."""
    summary, lines = summarised(rows), []
    for claim in CLAIMS:
        verdicts: dict[str, list[str]] = defaultdict(list)
        for k in sorted({k for _, k in summary}):
            mine, other = summary.get((claim.rule, k)), summary.get((claim.better_than, k))
            if mine and other:
                verdicts[verdict(claim, mine, other)].append(str(k))
        if verdicts:
            found = "; ".join(f"{text} at {', '.join(ks)}" for text, ks in verdicts.items())
            name = METRIC_NAMES[claim.metric]
            lines.append(f"- {claim.rule} better than {claim.better_than} in {name} ({claim.source}): {found}")
    return "\n".join(lines) or "No two rules of which a paper compares one with the other have been measured."


def verdict(claim: Claim, mine: Row, other: Row) -> str:
    """Whether the claim held: a difference counts where it exceeds what seeds differ by."""
    if not (is_matched(mine) and is_matched(other)):
        return "not at equal L0"
    if min(mine["seeds"], other["seeds"]) < 2:
        return "one seed, not judged"
    gain = other[claim.metric] - mine[claim.metric]
    gain = -gain if claim.metric in HIGHER_IS_BETTER else gain
    spread = max(m[f"{claim.metric}_high"] - m[f"{claim.metric}_low"] for m in (mine, other))
    if abs(gain) <= spread:
        return "no difference beyond the seeds'"
    return "**held**" if gain > 0 else "**worse than claimed**"


def published(rows: Sequence[Row]) -> str:
    """Our errors beside the published ones: GPT-2 small's residual stream only."""
    first = rows[0]
    layers = {layer for _, layer in PUBLISHED}
    if "gpt2" not in first["model"].lower() or first["d"] != 768 or first["site"] != "resid_pre":
        return ""
    if first["layer"] not in layers:
        return f"Published numbers exist for layers {', '.join(map(str, sorted(layers)))} only."
    summary, lines = summarised(rows), []
    for (rule, layer), by_k in PUBLISHED.items():
        for k, theirs in by_k.items():
            mine = summary.get((rule, k))
            if layer == first["layer"] and mine:
                lines.append([rule, str(k), f"{mine['mse']:.4f}", f"{theirs:.4f}", f"{mine['mse'] / theirs:.2f}×"])
    if first["layer"] == 8:
        for coefficient, (l0, theirs) in PUBLISHED_TOP_AFA.items():
            lines.append([f"top-AFA, afa_coeff 1/{1 / coefficient:g}", f"L0 {l0}", "", f"{theirs:.3g}", ""])
    header = ("rule", "k", "MSE, ours", "MSE, published", "ours / published")
    return (
        "### Beside the published errors\n\n"
        f"Theirs: {PUBLISHED_BUDGET}. Ours: F = {first['d_sae']}, {first['train_tokens']:,} tokens of other text, "
        f"another evaluation text. MSE is per element in the same space.\n\n{table(header, lines)}"
    )


def picture(rows: Sequence[Row]) -> bytes:
    """FVU and loss recovered against the held-out L0, a line a rule, means over seeds: a PNG."""
    import plot  # needs matplotlib

    return plot.png(lambda: _panels(rows, plot))


def _panels(rows: Sequence[Row], plot: ModuleType) -> Figure:
    summary = summarised(rows)
    names = list(dict.fromkeys(row["rule"] for row in rows))
    figure, panels = plot.plt.subplots(1, 2, figsize=(10.0, 4.4), layout="constrained")
    colours = plot.plt.get_cmap("tab20").colors
    for panel, metric in zip(panels, ("fvu", "loss_recovered"), strict=True):
        for number, name in enumerate(names):
            line = sorted((m for m in summary.values() if m["rule"] == name), key=lambda m: m["k"])
            errors = [[m[metric] - m[f"{metric}_low"] for m in line], [m[f"{metric}_high"] - m[metric] for m in line]]
            panel.errorbar([m["l0"] for m in line], [m[metric] for m in line], yerr=errors, label=name, linewidth=1.2,
                           markersize=4, color=colours[number % 20], marker=MARKS[number % len(MARKS)],
                           capsize=2)  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(plot.FuncFormatter(lambda x, _: f"{x:g}"))
        panel.grid(color=plot.FAINT, linewidth=0.6)
        panel.set_xlabel("entries per token (L0), held-out tokens")
        panel.set_title(METRIC_NAMES[metric])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure
