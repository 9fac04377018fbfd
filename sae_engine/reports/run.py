"""``report.md`` and ``report.html`` of a run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from .._files import replace_files
from ..training.config_files import to_yaml
from .figures import COLOURS, DASHES, Point, Series, colour_of, curves, frontier, shares, short
from .page import Code, Figures, Folded, Heading, Legend, Page, Table, Text, Tiles
from .reading import RunRecord, Trained, distinct, read_run

_CURVES = (
    ("evaluation/fvu", "FVU, held-out text"),
    ("evaluation/ce_recovered", "Cross-entropy recovered, held-out text"),
    ("metrics/explained_variance", "Explained variance, training batches"),
    ("metrics/l0", "L0, training batches"),
    ("sparsity/dead_features", "Dead latents"),
    ("details/current_learning_rate", "Learning rate"),
)
_MOST_ROWS = 12  # of the table of evaluations
_DATA = ("dataset_path", "dataset_name", "split", "column", "store_path", "context_size", "packing", "prepend_bos",
         "training_tokens", "shuffle_tokens", "shuffle_chunks", "eval_fraction_documents")  # fmt: skip
# Of RowStream.counts, below data/.
_COUNTS = {
    "tokens": "tokens given to the language model", "rows": "rows made of them", "mask": "left out: padding",
    "excluded": "left out: special tokens and excluded positions", "norm": "left out: norm too large",
    "nonfinite": "left out: not finite", "epoch": "times that the text was begun anew",
}  # fmt: skip


def write(folder: str | Path) -> list[Path]:
    """Writes ``report.md`` and ``report.html`` of a run, from its ``config.yaml`` and ``metrics.jsonl`` alone.

    Both can be written at any time, of a run that still goes on or was killed too. The page holds its figures and needs
    no network and no script.

    Args:
        folder: of the run.

    Returns:
        The two files, both whole or neither.

    Raises:
        FileNotFoundError, ValueError: it is no run folder, or damaged; names the file.
        ImportError: PyYAML is not installed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> entry = "{name: a, hook_name: blocks.2.hook_resid_pre, architecture: topk, k: 8, d_sae: 512}"
        >>> _ = (folder / "config.yaml").write_text(f"saes: [{entry}]")
        >>> _ = (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 4096, "metrics/l0": 8.0}' + chr(10))
        >>> [path.name for path in write(folder)]
        ['report.md', 'report.html']
    """
    run = read_run(folder)
    page = page_of(run)
    texts = {"report.md": page.markdown(), "report.html": page.html()}
    replace_files({run.folder / name: partial(write_text, text) for name, text in texts.items()})
    return [run.folder / name for name in texts]


def write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def page_of(run: RunRecord) -> Page:
    model, data = run.section("model").get("model_name", "?"), run.section("data")
    text = data.get("store_path") or data.get("dataset_path", "?")
    title = str(run.section("logger").get("run_name") or run.name)
    count = len(run.names)
    what = "One autoencoder" if count == 1 else f"{count} autoencoders, from one pass of the language model"
    page = Page(title, f"{what}: activations of `{model}` on the text `{text}`. {_state(run)}")
    page.blocks = [*_overview(run), *_frontiers(run), *_curves(run), *_data(run), *_performance(run), *_loading(run),
                   *_rest(run)]  # fmt: skip
    return page


def _state(run: RunRecord) -> str:
    if not run.lines:
        return "Nothing has been logged yet."
    if run.is_finished:
        return "The run is finished."
    way_on = f"`sae-engine train --resume {_path(run)}` goes on from its last checkpoint."
    return f"The run ends at {_tokens(run)}: it was stopped, or is still going on. {way_on}"


def _tokens(run: RunRecord) -> str:
    done = run.tokens[-1] if run.tokens else 0
    if run.total_tokens is None or run.is_finished:
        return f"{short(done)} tokens"
    return f"{short(done)} of {short(run.total_tokens)} tokens ({done / run.total_tokens:.0%})"


def _path(run: RunRecord) -> str:
    """The run folder as the configuration says it, unless it has been moved since."""
    said = Path(str(run.section("output").get("output_path", "")))
    return str(said) if said.name == run.name else run.name


# ------------------------------------------------------------------------------------------- what was trained


def _overview(run: RunRecord) -> list[Any]:
    speeds = [v for v in run.curve("performance/tokens_per_second")[1] if math.isfinite(v)]
    tiles = [("tokens", _tokens(run).partition(" tokens")[0])]
    for key, name in (("fvu", "FVU"), ("l0", "L0"), ("recovered", "cross-entropy recovered"), ("dead", "dead latents")):
        if values := [t.numbers[key] for t in run.trained if math.isfinite(t.numbers[key])]:
            low, high = number(key, min(values), 3), number(key, max(values), 3)
            tiles.append((name, low if low == high else f"{low} – {high}"))
    if speeds:
        tiles.append(("tokens a second, median", short(median(speeds), 3)))
    head = ["autoencoder", "site", "architecture", "d_sae", "L0", "FVU", "CE recovered", "CE spliced", "dead"]
    rows = [[*names_of(t), *numbers_of(t)[:3], _fixed(run.last("evaluation/ce_spliced", t.name)), numbers_of(t)[3]]
            for t in run.trained]  # fmt: skip
    marks = marks_of(run.trained) if len(rows) > 1 else []
    return [Tiles(tiles), Heading("Autoencoders"), Table(head, rows, "lllrrrrrr", marks), Text(_meaning(run))]


def _meaning(run: RunRecord) -> str:
    evaluated = [t.name for t in run.trained if t.is_evaluated]
    if not evaluated:
        return "There has been no evaluation yet: L0 and FVU are those of the last training batches."
    parts = [
        "Measured on held-out text. FVU is the share of the variance that is not explained. CE recovered: zeros in the "
        "place of the activations raise the model's cross-entropy, and this share of the rise a reconstruction avoids."
    ]
    clean = {_fixed(run.last("evaluation/ce_clean", name)) for name in evaluated}
    ablated = {_fixed(run.last("evaluation/ce_ablated", name)) for name in evaluated}
    if len(clean) == 1:
        zeros = f", with zeros {next(iter(ablated))}" if len(ablated) == 1 else ""
        parts.append(f"Without an autoencoder the cross-entropy is {next(iter(clean))}{zeros}.")
    if len(evaluated) < len(run.names):
        missing = ", ".join(name for name in run.names if name not in evaluated)
        parts.append(f"Not evaluated yet, with numbers of training batches instead: {missing}.")
    return " ".join(parts)


def names_of(trained: Trained) -> list[str]:
    """Name, site, architecture and width, as tables have them."""
    architecture = f"{trained.architecture}, {trained.settings}" if trained.settings else trained.architecture
    width = "–" if trained.d_sae is None else f"{trained.d_sae:,}"
    return [trained.name, trained.site, architecture, width]


def numbers_of(trained: Trained) -> list[str]:
    """L0, FVU, cross-entropy recovered and the share of dead latents, as tables have them."""
    return [number(key, trained.numbers[key]) for key in ("l0", "fvu", "recovered", "dead")]


def number(key: str, value: float, places: int = 4) -> str:
    """One of those, written; FVU and cross-entropy recovered with so many decimal places."""
    if not math.isfinite(value):
        return "–"
    return {"l0": f"{value:.1f}", "dead": share(value)}.get(key, f"{value:.{places}f}")


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _fixed(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


# ---------------------------------------------------------------------------------------------------- figures


def marks_of(trained: Sequence[Trained]) -> list[tuple[str, str]]:
    """Colours and dashes: a colour for those that a frontier joins, where dashes suffice to tell these apart."""
    series: dict[object, list[int]] = {}
    for n, t in enumerate(trained):
        series.setdefault((t.run, *t.series), []).append(n)
    if 1 < len(series) <= len(COLOURS) and max(map(len, series.values())) <= len(DASHES):
        place = {n: (COLOURS[c], DASHES[d]) for c, found in enumerate(series.values()) for d, n in enumerate(found)}
        return [place[n] for n in range(len(trained))]
    return [colour_of(n) for n in range(len(trained))]


def frontier_figures(entries: Sequence[tuple[str, str, Trained]]) -> list[str]:
    """L0 against FVU and against cross-entropy recovered, of autoencoders with their labels and colours.

    Those of one colour's run that differ in their sparsity alone are joined.
    """
    drawn = []
    for key, title, y_label in (
        ("fvu", "FVU against L0", "FVU, lower is better"),
        ("recovered", "Cross-entropy recovered against L0", "recovered, higher is better"),
    ):
        points = []
        for label, colour, t in entries:
            tip = f"{label or t.name}: L0 {number('l0', t.numbers['l0'])}, {number(key, t.numbers[key])}"
            points.append(Point(label, t.numbers["l0"], t.numbers[key], colour, tip, (t.run, *t.series)))
        drawn.append(frontier(title, points, x_label="L0, latents a token", y_label=y_label))
    return [svg for svg in drawn if svg is not None]


def _frontiers(run: RunRecord) -> list[Any]:
    labels = distinct(run.names)
    marks = marks_of(run.trained)
    entries = [(label, colour, t) for label, (colour, _), t in zip(labels, marks, run.trained, strict=True)]
    found = frontier_figures([entry for entry in entries if entry[2].is_evaluated])
    return [Heading("Frontiers"), Figures(found)] if found else []


def _curves(run: RunRecord) -> list[Any]:
    losses = {key: None for name in run.names for key in run.keys("losses/", name)}
    wanted = [*_CURVES[:2], *((key, _loss_title(key)) for key in losses), *_CURVES[2:]]
    drawn, marks = [], marks_of(run.trained)
    for key, title in wanted:
        series = []
        for name, mark in zip(run.names, marks, strict=True):
            xs, ys = run.curve(key, name)
            series.append(Series(name, xs, ys, *mark))
        if any(len(set(s.x)) > 1 for s in series):  # one evaluation is in the table above
            drawn.append(curves(title, series, x_label="tokens"))
    found = [svg for svg in drawn if svg is not None]
    if not found:
        return []
    legend = [Legend(list(zip(run.names, marks, strict=True)))] if len(run.names) > 1 else []
    return [Heading("Training"), *legend, Figures(found), *_evaluations(run)]


def _loss_title(key: str) -> str:
    known = {"overall_loss": "Loss", "mse_loss": "Squared error", "auxiliary_reconstruction_loss": "Auxiliary loss"}
    name = key.removeprefix("losses/")
    return known.get(name) or name.replace("_", " ").capitalize()


def _evaluations(run: RunRecord) -> list[Any]:
    """What the curves show, as a table: the only form of them in Markdown."""
    curve = {name: dict(zip(*run.curve("evaluation/fvu", name), strict=True)) for name in run.names}
    at = sorted({tokens for found in curve.values() for tokens in found})
    if len(at) < 2 or len(run.names) > 8:
        return []
    chosen = sorted({at[round(n * (len(at) - 1) / (_MOST_ROWS - 1))] for n in range(_MOST_ROWS)})
    rows = [[short(tokens), *(_fixed(curve[name].get(tokens, math.nan)) for name in run.names)] for tokens in chosen]
    head = ["tokens", *run.names] if len(run.names) > 1 else ["tokens", "FVU"]
    return [Folded("FVU at each evaluation", [Table(head, rows, "r" * len(head))])]


# --------------------------------------------------------------------------------------- data and performance


def _data(run: RunRecord) -> list[Any]:
    said = run.section("data")
    rows = [[key, _plain(said[key])] for key in _DATA if said.get(key) is not None]
    if (tokens := run.section("eval").get("eval_tokens")) is not None:
        rows.append(["eval_tokens", _plain(tokens)])
    counts = []
    for key in run.keys("data/"):
        name = key.removeprefix("data/")
        counts.append([_COUNTS.get(name, name.replace("_", " ")), _plain(run.last(key))])
    tables = [Table(["", ""], rows, "ll")] if rows else []
    tables += [Table(["", ""], counts, "lr")] if counts else []
    return [Heading("Data"), *tables] if tables else []


def _performance(run: RunRecord) -> list[Any]:
    speeds = run.curve("performance/tokens_per_second")
    starved = [v for v in run.curve("performance/starved")[1] if math.isfinite(v)]
    seconds = {key.rpartition("/")[2].replace("_", " "): math.fsum(v for v in run.curve(key)[1] if v >= 0)
               for key in run.keys("performance/seconds/")}  # fmt: skip
    blocks: list[Any] = []
    finite = [v for v in speeds[1] if math.isfinite(v)]
    sentences = []
    if finite:
        sentences.append(f"{short(median(finite), 3)} tokens a second (median of {len(finite)} lines).")
    if starved:
        sentences.append(f"The step waited for activations in {share(fmean(starved))} of the time.")
    if times := [line["time"] for line in run.lines if "time" in line]:
        sentences.append(f"First line {times[0]}, last line {times[-1]}.")
    if sentences:
        blocks.append(Text(" ".join(sentences)))
    if math.fsum(seconds.values()) > 0:
        total = math.fsum(seconds.values())
        ordered = sorted(seconds.items(), key=lambda part: -part[1])
        coloured = [(name, value, colour_of(n)[0]) for n, (name, value) in enumerate(ordered)]
        blocks += [Text("Where the time went:"), Figures([shares("Where the time went", coloured)], wide=True)]
        blocks.append(Legend([(f"{name} {share(value / total)}", (colour, "")) for name, value, colour in coloured]))
        rows = [[name, f"{value:.1f}", share(value / total)] for name, value in ordered]
        blocks.append(Folded("In seconds", [Table(["part", "seconds", "share"], rows, "lrr")]))
    if len(set(speeds[0])) > 2 and (svg := curves(
            "Tokens a second", [Series("tokens a second", *speeds, *colour_of(0))], x_label="tokens")):  # fmt: skip
        blocks.append(Figures([svg]))
    return [Heading("Performance"), *blocks] if blocks else []


def _plain(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


# ----------------------------------------------------------------------------------------------- how to go on


def _loading(run: RunRecord) -> list[Any]:
    path, model = _path(run), run.section("model").get("model_name")
    first = run.config["saes"][0]
    sites = first.get("hook_name")
    several = any(isinstance(entry.get("hook_name"), list) for entry in run.config["saes"])
    opened = "opened" if several else "se.SparseAutoencoder.from_pretrained"
    lines = ["from sae_engine.checkpoints.opened import opened"] if several else ["import sae_engine as se"]
    if isinstance(sites, list):
        lines = ["import torch", *lines]
    reader = "read_sites" if isinstance(sites, list) else "read_activations"
    lines += [f"from sae_engine.data import load_language_model, {reader}", ""]
    if len(run.names) == 1:
        lines.append(f"sae = {opened}({_quoted(f'{path}/sae/{run.names[0]}')})")
    else:
        lines += ["names = [", *(f"    {_quoted(name)}," for name in run.names), "]"]
        lines.append(f'saes = {{n: {opened}(f"{path}/sae/{{n}}") for n in names}}')
        lines.append("sae = saes[names[0]]")
    lines += [
        "", f"lm = load_language_model({'' if model in (None, 'embedded') else _quoted(model)})",
        'ids = lm.tokenizer("Some text.", return_tensors="pt").input_ids',
        "codes = sae.encode(torch.cat(read_sites(lm.model, ids, sae.provenance.sites), -1))" if isinstance(sites, list)
        else f"codes = sae.encode(read_activations(lm.model, ids, site={_quoted(sites)}))",
    ]  # fmt: skip
    trained = f"{path}/sae/{run.names[0]}"
    shell = f"sae-engine eval {trained}\nsae-engine push {trained} --to OWNER/REPOSITORY --dry-run"
    blocks: list[Any] = [Heading("How to use them" if len(run.names) > 1 else "How to use it")]
    if not run.is_finished:
        blocks.append(Text("The folders below `sae/` are there once the run has ended."))
    return [*blocks, Code("\n".join(lines), "python"), Code(shell, "console")]


def _quoted(text: Any) -> str:
    return json.dumps(str(text), ensure_ascii=False)


def _rest(run: RunRecord) -> list[Any]:
    """All that has not been said: the last value of every key, and the configuration."""
    rows = [[key, _plain(values[-1])] for key, (_, values) in run.columns.items()]
    return [
        Heading("Everything else"),
        Folded("The last value of every number", [Table(["", ""], rows, "lr")]),
        Folded("Configuration", [Code(to_yaml(run.config), "yaml")]),
    ]
