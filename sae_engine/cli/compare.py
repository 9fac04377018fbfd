"""``sae-engine compare``: runs of ``sae-engine train`` beside one another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="runs beside one another: a table and their frontiers",
        description="Print a table of the last evaluation of every autoencoder of some runs, and write it with the "
        "frontiers of FVU and of cross-entropy recovered over L0 as Markdown and HTML. Runs that still go on, or that "
        "were stopped, count as far as they have come.",
    )
    parser.add_argument("run_folders", metavar="RUN", nargs="+", help="folder that train wrote")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="folder for compare.md and compare.html")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sae_engine.reports.compare import compare

    found = compare(args.run_folders)
    print(found)
    if args.out is not None:
        print(*found.write(args.out), sep="\n")
    return 0
