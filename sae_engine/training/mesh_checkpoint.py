"""The checkpoints of a run on a mesh: each process writes its part, and reads what is its own of any number of parts.

They are those of :func:`sae_engine.distributed.save_state`, under the names of :mod:`.checkpoint`.
"""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .._files import file_sha256
from .checkpoint import FOLDER, STATE, Damaged, Saved, listed
from .ranks import Ranks


def write(run: Path, update: int, state: dict[str, Any], ranks: Ranks) -> Path:
    """A checkpoint of ``update`` updates, whole or not there. All processes call it.

    Raises:
        OSError: the disk is full or the folder cannot be written.
        RuntimeError: another process has failed or does not answer: names it.
    """
    from ..distributed.checkpoint import save_state

    place = folder_of(run, update)
    if ranks.writes and place.exists():  # of an attempt that was found damaged, and gone back behind
        shutil.rmtree(place)
    assert ranks.mesh is not None
    save_state({**state, "update": update}, place, ranks.mesh)
    return place


def newest(run: Path, ranks: Ranks) -> tuple[Saved | None, list[str]]:
    """As :func:`.checkpoint.newest`, without tensors. All processes call it, and each looks at some of the files;
    one that does not see the first one's disk is told what is there.
    """
    complaints: list[str] = []
    for update in ranks.gathered(sorted(listed(run), reverse=True))[0]:
        place = folder_of(run, update)
        digests = ranks.gathered(file_sha256(place / STATE) if (place / STATE).is_file() else None)
        lookers = [rank for rank, digest in enumerate(digests) if digest == digests[0]]
        content, wrong = _read(place, update, ranks.rank, lookers) if ranks.rank in lookers else ({}, None)
        found = [what for what in ranks.gathered(wrong) if what is not None]
        if not found:
            if len(lookers) < ranks.world:
                content = ranks.gathered(content if ranks.writes else None)[0]
            return Saved(update, content["state"], {}), complaints
        complaints.append(found[0])
    if complaints:
        raise Damaged("no checkpoint of this run is whole: " + "; ".join(complaints))
    return None, complaints


def folder_of(run: Path, update: int) -> Path:
    return run / FOLDER / f"step-{update:09d}"


def _read(place: Path, update: int, rank: int, lookers: list[int]) -> tuple[dict[str, Any], str | None]:
    """What JSON holds of it; and what is wrong with it, as far as this one of those who look at it does."""
    try:
        content = json.loads((place / STATE).read_bytes())
        files = sorted(content["files"].items())
        if content["state"]["update"] != update or not content["state"]["streams"]:
            raise ValueError("it is of another update")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"{place / STATE} is missing, damaged, or not of a run on a mesh: {error!r}"
    for name, expected in files[lookers.index(rank) :: len(lookers)]:
        try:
            found = file_sha256(place / name)
        except OSError as error:
            return {}, f"{place / name} is missing or cannot be read: {error.strerror}"
        if found != expected:
            return {}, f"{place / name} is damaged: its sha256 is not the one that was written"
    return content, None
