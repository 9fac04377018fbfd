"""``sae-engine push``: autoencoders to the Hugging Face hub."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "push",
        help="autoencoders to the Hugging Face hub, as SAELens loads them, with a card",
        description="Write a folder for each hook that SAELens loads, and a card, and upload them. With --dry-run the "
        "folder is all, and no network is needed.",
    )
    parser.add_argument("sae", metavar="[NAME=]SAE", nargs="+",
                        help="folder or file of an autoencoder, or a run of train, of which all are taken; NAME: its "
                        "folder in the repository, its hook by default")  # fmt: skip
    parser.add_argument("--to", required=True, metavar="OWNER/REPOSITORY", help="made when missing")
    parser.add_argument("--dry-run", action="store_true", help="write --folder, show what would be uploaded, no more")
    parser.add_argument("--folder", type=Path, default=None, metavar="DIR",
                        help="where to write it; a temporary folder, with --dry-run the repository's name")  # fmt: skip
    parser.add_argument("--layout", nargs="+", default=None, choices=("saelens", "saebench", "circuit-tracer"),
                        help="how; saelens, of a crosscoder this library's own")  # fmt: skip
    parser.add_argument("--description", type=Path, default=None, metavar="FILE", help="Markdown for the card")
    parser.add_argument("--license", default=None, help="of the hub's identifiers, as mit")
    parser.add_argument("--private", action="store_true", help="of a repository that is made")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sae_engine import SparseAutoencoder
    from sae_engine.checkpoints.formats import holds_crosscoder
    from sae_engine.checkpoints.saelens import sparsity_in
    from sae_engine.latents import push
    from sae_engine.latents.publishing import hook_of

    sources = _sources(args.sae)
    if any(holds_crosscoder(path) for _, path in sources):
        return _crosscoder(sources, args)
    opened = [(name, path, SparseAutoencoder.from_pretrained(path)) for name, path in sources]
    hooks = {path: hook_of(sae, path) for _, path, sae in opened}
    at = Counter(hooks[path] for name, path, _ in opened if name is None)
    saes, sparsity = {}, {}
    for name, path, sae in opened:
        hook = hooks[path]
        own = name or (f"{hook}/{Path(path).resolve().name}" if at[hook] > 1 else hook)
        if own in saes:
            raise ValueError(f"SAE: two would be the folder {own!r}: give NAME=SAE")
        saes[own] = sae
        if (share := sparsity_in(path)) is not None:
            sparsity[own] = share
    done = push(saes, args.to, layouts=args.layout or ["saelens"], sparsity=sparsity, **_options(args))
    return _told(done, args.dry_run)


def _crosscoder(sources: list[tuple[str | None, str]], args: argparse.Namespace) -> int:
    """One crosscoder, which has the whole repository."""
    from sae_engine import Crosscoder
    from sae_engine.checkpoints.crosslayer._record import wiring_of
    from sae_engine.latents.publishing_sites import push_crosscoder

    if len(sources) > 1:
        raise ValueError(f"SAE: a crosscoder has a repository of its own, and {len(sources)} were given")
    coder, layouts = Crosscoder.from_pretrained(sources[0][1]), args.layout
    if layouts not in (None, ["circuit-tracer"]):
        raise ValueError(f"--layout: a crosscoder has circuit-tracer, or this library's own without it, got {layouts}")
    traced = "transcoder_set" if wiring_of(coder) == "local" else "circuit_tracer_clt"
    done = push_crosscoder(coder, args.to, format=traced if layouts else "sae_engine", **_options(args))
    return _told(done, args.dry_run)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    folder = args.folder or (Path(args.to.rpartition("/")[2]) if args.dry_run else None)
    description = "" if args.description is None else args.description.read_text(encoding="utf-8")
    return {"folder": folder, "dry_run": args.dry_run, "description": description, "license": args.license,
            "private": args.private}  # fmt: skip


def _told(done: Any, dry_run: bool) -> int:
    for name, size in done.files.items():
        print(f"{size:>14,}  {name}")
    total = f"{len(done.files)} files, {sum(done.files.values()):,} bytes"
    print(f"{total} in {done.folder}; nothing was uploaded" if dry_run else f"{total}: {done.url}")
    return 0


def _sources(words: list[str]) -> list[tuple[str | None, str]]:
    """Names, where they were given, and paths: of a run's folder, those of all its autoencoders."""
    found: list[tuple[str | None, str]] = []
    for word in words:
        before, equals, after = word.partition("=")
        name, path = (before, after) if equals and not Path(word).exists() else (None, word)
        inside = sorted(config.parent for name_of in ("cfg.json", "crosscoder.json")
                        for config in Path(path).glob(f"sae/*/{name_of}"))  # fmt: skip
        if inside and not (Path(path) / "cfg.json").exists():
            found += [(f"{name}/{folder.name}" if name else None, str(folder)) for folder in inside]
        else:
            found.append((name, path))
    return found
