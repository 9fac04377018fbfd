"""Several runs in one table and on one frontier: ``sae-engine compare``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from .._files import replace_files
from .figures import colour_of, short
from .page import Figures, Heading, Page, Table, Text, markdown_table
from .reading import RunRecord, Trained, distinct, read_run
from .run import frontier_figures, marks_of, names_of, numbers_of, write_text


class Row(NamedTuple):
    """An autoencoder that has been evaluated, its run, and what that is called here."""

    label: str
    run: RunRecord
    trained: Trained


@dataclass(frozen=True)
class Comparison:
    """Autoencoders of several runs: ``str()`` is a table of them, :attr:`page` has the figures too."""

    rows: Sequence[Row]
    page: Page

    def __str__(self) -> str:
        return "\n\n".join(
            markdown_table(block) if isinstance(block, Table) else block.text
            for block in self.page.blocks if isinstance(block, Table | Text)
        )  # fmt: skip

    def write(self, folder: str | Path) -> list[Path]:
        """Writes ``compare.md`` and ``compare.html``, both whole or neither; returns them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"compare.md": self.page.markdown(), "compare.html": self.page.html()}
        replace_files({folder / name: partial(write_text, text) for name, text in texts.items()})
        return [folder / name for name in texts]


def compare(folders: Sequence[str | Path]) -> Comparison:
    """The last evaluation of every autoencoder of some runs.

    Args:
        folders: run folders, of runs that still go on too, as long as each has been evaluated once.

    Raises:
        FileNotFoundError, ValueError: a folder is no run folder, is given twice or is damaged, or its run has not been
            evaluated yet; names it.
        TypeError: ``folders`` is one path.
        ImportError: PyYAML is not installed.

    Example:
        >>> import tempfile
        >>> folders = []
        >>> for k in (8, 16):
        ...     folders.append(Path(tempfile.mkdtemp()) / f"k{k}")
        ...     folders[-1].mkdir()
        ...     entry = f"{{name: a, hook_name: blocks.2.hook_resid_pre, architecture: topk, k: {k}, d_sae: 512}}"
        ...     _ = (folders[-1] / "config.yaml").write_text(f"saes: [{entry}]")
        ...     line = f'{{"step": 1, "tokens": 4096, "evaluation/l0": {k}, "evaluation/fvu": {2 / k}}}'
        ...     _ = (folders[-1] / "metrics.jsonl").write_text(line + chr(10))
        >>> [row.trained.numbers["fvu"] for row in compare(folders).rows]
        [0.25, 0.125]
    """
    if isinstance(folders, str | Path):
        raise TypeError(f"folders must be a sequence of run folders, got {folders!r}")
    if not folders:
        raise ValueError("folders must name at least one run")
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    if twice := [str(path) for n, path in enumerate(paths) if resolved[n] in resolved[:n]]:
        raise ValueError(f"folders: the same run was given twice: {', '.join(twice)}")
    runs = [read_run(path) for path in paths]
    for run in runs:
        if not any(trained.is_evaluated for trained in run.trained):
            raise ValueError(f"{run.folder}: the run has not been evaluated yet, and there is nothing to compare")
    names = [run.name for run in runs]
    labels = names if len(set(names)) == len(names) else [str(path) for path in paths]
    rows = [Row(label, run, t) for label, run in zip(labels, runs, strict=True) for t in run.trained if t.is_evaluated]
    return Comparison(rows, _page(runs, rows))


def _page(runs: Sequence[RunRecord], rows: Sequence[Row]) -> Page:
    count = "One run" if len(runs) == 1 else f"{len(runs)} runs"
    page = Page("Comparison", f"{count}, the last evaluation of each autoencoder on held-out text.")
    trained = [row.trained for row in rows]
    if len(runs) == 1:
        marks, names = marks_of(trained), distinct([row.trained.name for row in rows])
    else:  # a colour a run
        colours = {run.folder: colour_of(n) for n, run in enumerate(runs)}
        marks = [colours[row.run.folder] for row in rows]
        names = distinct([f"{row.label}: {row.trained.name}" for row in rows])
    head = ["run", "autoencoder", "site", "architecture", "d_sae", "tokens", "L0", "FVU", "CE recovered", "dead",
            "tokens/s"]  # fmt: skip
    entries = [(name, colour, t) for name, (colour, _), t in zip(names, marks, trained, strict=True)]
    page.blocks = [Table(head, list(map(_cells, rows)), "llllrrrrrrr", marks), *map(Text, _cautions(runs, trained)),
                   Heading("Frontiers"), Figures(frontier_figures(entries))]  # fmt: skip
    return page


def _cells(row: Row) -> list[str]:
    run, t = row.run, row.trained
    speeds = [value for value in run.curve("performance/tokens_per_second")[1] if value > 0]
    tokens = short(run.tokens[-1]) + ("" if run.is_finished or run.total_tokens is None else " so far")
    return [row.label, *names_of(t), tokens, *numbers_of(t), short(median(speeds), 3) if speeds else "–"]


def _cautions(runs: Sequence[RunRecord], trained: Sequence[Trained]) -> list[str]:
    """What keeps numbers of these runs from being compared."""
    found = []
    for what, values in (
        ("language models", [run.section("model").get("model_name") for run in runs]),
        ("texts", [run.section("data").get("store_path") or run.section("data").get("dataset_path") for run in runs]),
        ("numbers of tokens trained on", [short(run.tokens[-1]) for run in runs]),
        ("sites", [t.site for t in trained]),
        ("numbers of tokens evaluated on", [run.section("eval").get("eval_tokens") for run in runs]),
        ("lengths of contexts", [run.section("data").get("context_size") for run in runs]),
    ):
        if len(different := list(dict.fromkeys(map(str, values)))) > 1:
            found.append(f"{what} ({', '.join(different)})")
    missing = [f"{run.name}/{t.name}" for run in runs for t in run.trained if not t.is_evaluated]
    cautions = [f"Compare with care: these have different {' and different '.join(found)}."] if found else []
    return cautions + ([f"Not evaluated yet, and left out: {', '.join(missing)}."] if missing else [])
