"""``sae-engine verify``: whether collected activations are what was written."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="whether collected activations are what was written, by their checksums",
        description="Read every shard of collections, compare its checksum with the manifest and look for rows that "
        "are not finite. The first that is damaged is named, and the status is then 1.",
    )
    parser.add_argument("folder", metavar="DIR", nargs="+", help="folder that collect wrote")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sae_engine.data import ActivationStore

    for folder in args.folder:
        store = ActivationStore(folder, allow_incomplete=True)
        store.verify()
        for _ in store.batches(65536, shuffle=False):  # which refuses rows that are not finite
            pass
        print(f"{folder}: {store!r}, {len(store.manifest['shards'])} shards, sound")
    return 0
