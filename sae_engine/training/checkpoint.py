"""The checkpoints of a run: whole or not there, and verified when they are read."""
from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .._files import file_sha256, sync, write_tensors
from ..data._require import require
from .callbacks import resume_command

FOLDER, STATE = "checkpoints", "state.json"
FORMAT = 2
_NAME = re.compile(r"step-(\d{9})")


class Saved(NamedTuple):
    """A checkpoint as it was read: its update, what JSON holds of its state, and the tensors of all its files."""

    update: int
    plain: dict[str, Any]
    tensors: dict[str, Tensor]


class Damaged(ValueError):
    """A checkpoint is not what was written; names the file."""


def write(run: Path, update: int, plain: Mapping[str, Any], files: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """A checkpoint of ``update`` updates, complete on the disk before it gets its name.

    Args:
        plain: of JSON's types.
        files: file name → tensors by name, for example ``{"optimizer": {"a/exp_avg": …}}``.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left of the attempt.
    """
    place = run / FOLDER / f"step-{update:09d}"
    aside = place.with_name(f".{place.name}.{secrets.token_hex(8)}.tmp")
    try:
        aside.mkdir(parents=True)
        hashes = {}
        for name, tensors in files.items():
            file = aside / f"{name}.safetensors"
            file.touch()
            mode = file.stat().st_mode  # safetensors 0.8 makes a file that only its owner may read
            write_tensors(file, dict(tensors))
            file.chmod(mode)
            sync(file)
            hashes[file.name] = file_sha256(file)
        (aside / STATE).write_text(
            json.dumps({"format": FORMAT, "update": update, "files": hashes, **plain}, indent=1), encoding="utf-8"
        )
        sync(aside / STATE)
        sync(aside)
        if place.exists():  # of an attempt that was found damaged, and gone back behind
            shutil.rmtree(place)
        aside.rename(place)
        sync(place.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise type(error)(
            error.errno, f"the checkpoint of update {update} could not be written, earlier ones are whole: "
            f"{error.strerror}" + f"; make room, then {resume_command(run)}" * bool(listed(run)), str(place),
        ) from error  # fmt: skip
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return place


def newest(run: Path) -> tuple[Saved | None, list[str]]:
    """The newest checkpoint that is what was written, None without any; and what is wrong with newer ones, in words."""
    complaints: list[str] = []
    for update, place in sorted(listed(run).items(), reverse=True):
        try:
            return read(place, update), complaints
        except Damaged as error:
            complaints.append(str(error))
    if complaints:
        raise Damaged("no checkpoint of this run is whole: " + "; ".join(complaints))
    return None, complaints


def listed(run: Path) -> dict[int, Path]:
    """Update → folder, of all that have their name."""
    folder = run / FOLDER
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return {int(match[1]): place for place in found if (match := _NAME.fullmatch(place.name))}


def read(place: Path, update: int) -> Saved:
    """One checkpoint, compared with its hashes. Raises :class:`Damaged`."""
    try:
        plain = json.loads((place / STATE).read_bytes())
        hashes = plain.pop("files")
        if plain.pop("format") != FORMAT or plain.pop("update") != update:
            raise ValueError("it is of another format or update")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{place / STATE} is missing or damaged: {error!r}") from error
    tensors: dict[str, Tensor] = {}
    for name, expected in hashes.items():
        try:
            found = file_sha256(place / name)
        except OSError as error:
            raise Damaged(f"{place / name} is missing or cannot be read: {error.strerror}") from error
        if found != expected:
            raise Damaged(f"{place / name} is damaged: its sha256 is not the one that was written")
        tensors |= require("safetensors.torch").load_file(place / name)
    return Saved(update, plain, tensors)


def prune(run: Path, keep: int) -> None:
    """Only the newest ``keep`` stay, and nothing of attempts that were killed. For the one writer."""
    for _, place in sorted(listed(run).items())[: -keep or None]:
        shutil.rmtree(place, ignore_errors=True)
    folder = run / FOLDER
    for left in (*folder.glob(".step-*.tmp"), *folder.glob("step-*.tmp")) if folder.is_dir() else ():
        shutil.rmtree(left, ignore_errors=True)
