"""States that are cut over a mesh, on disk and back: whole or not there, for as many ranks as there are then.

A folder is written under a name of its own, ``NAME.tmp``, and gets its name when every rank's part of it is on the
disk. Tensors are a checkpoint of ``torch.distributed.checkpoint``, of which a rank reads the slices that are its own
now; all else is in ``state.json``, with the sha256 of every file.
"""
from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from .._files import file_sha256, sync
from .._saved_state import join, split
from .agreement import Agreement
from .lent_disk import LentDisk

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

STATE, LISTING, FORMAT = "state.json", ".metadata", 1


def save_state(state: Mapping[str, Any], path: str | PathLike, mesh: DeviceMesh) -> None:
    """Writes a state that is cut over a mesh; all ranks call it. Whoever is killed meanwhile leaves ``path`` not there.

    Args:
        state: nested dictionaries and lists of tensors and of JSON's types, as ``state_dict()`` of an autoencoder on a
            mesh and of its :class:`~sae_engine.training.TrainStep` are. Of what is not cut the first rank's is kept.
        path: a folder that is not there, on the first rank's disk. Ranks that do not see it send their parts there.
        mesh: that the state is cut over.

    Raises:
        TypeError: something is neither a tensor nor of JSON's types; says where.
        FileExistsError: ``path`` is there already.
        OSError: the disk is full or the folder cannot be written.
        RuntimeError: a rank has failed or does not answer: names it.

    Example:
        >>> state = {"sae": sae.state_dict(), "step": step.state_dict()}  # doctest: +SKIP
        >>> save_state(state, f"checkpoints/{step.calls}", mesh)  # doctest: +SKIP
    """
    plain, tensors = split(state, contiguous=False)
    agreement, place = Agreement.of(mesh), Path(path).expanduser()
    seen = f".seen-{uuid.uuid4().hex}"  # by whom a file is seen that only now is there
    aside = place.with_name(f"{place.name}.tmp")
    with agreement.all_or_none("saved"):
        if agreement.rank == 0:
            if place.exists():
                raise FileExistsError(f"path: {str(place)!r} is there already")
            if aside.exists():  # of a save that was cut off
                shutil.rmtree(aside)
            aside.mkdir(parents=True)
            (aside / seen).touch()
    name = agreement.said(seen)[0]
    disk = LentDisk(agreement, (aside / name).is_file())
    with agreement.all_or_none("saved"):
        if agreement.rank == 0:
            (aside / name).unlink()
        _write(tensors, aside, agreement, disk)
    ranks = [] if disk.is_borrowed else [agreement.rank, *(disk.borrowers if agreement.rank == 0 else ())]
    own = sorted(file for rank in ranks for file in aside.glob(f"__{agreement.ranks[rank]}_*"))
    hashes = agreement.said({file.name: file_sha256(file) for file in own})
    with agreement.all_or_none("saved"):
        if agreement.rank == 0:
            files = {name: digest for one in hashes for name, digest in one.items()}
            files[LISTING] = file_sha256(aside / LISTING)
            shapes = {name: [str(t.dtype), *t.shape] for name, t in tensors.items()}
            content = {"format": FORMAT, "ranks": agreement.size, "files": files, "tensors": shapes, "state": plain}
            (aside / STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
            sync(aside / STATE)
            sync(aside)
            aside.rename(place)
            sync(place.parent)


def load_state(state: Mapping[str, Any], path: str | PathLike, mesh: DeviceMesh) -> dict[str, Any]:
    """Reads what :func:`save_state` wrote, for as many ranks as there are now: each its own slices. All ranks call it.

    Args:
        state: of the shape of the one that was saved: its tensors are written in place, and say what is whose.
        path: the folder, on the first rank's disk. Ranks that see none there, or another one, ask it for their slices.
        mesh: that the state is cut over.

    Returns:
        ``state`` as it was saved, with its tensors; for ``load_state_dict`` of those that it came from.

    Raises:
        FileNotFoundError: there is no such folder, or its saving was cut off.
        ValueError: a file is damaged, or the state has other tensors than the one that was saved: names them.
        RuntimeError: a rank has failed or does not answer: names it.

    Example:
        >>> state = {"sae": sae.state_dict(), "step": step.state_dict()}  # doctest: +SKIP
        >>> state = load_state(state, "checkpoints/7", mesh)  # doctest: +SKIP
        >>> sae.load_state_dict(state["sae"]); step.load_state_dict(state["step"])  # doctest: +SKIP
    """
    _, tensors = split(state, contiguous=False)
    agreement, place = Agreement.of(mesh), Path(path).expanduser()
    digests = agreement.said(file_sha256(place / STATE) if (place / STATE).is_file() else None)
    disk = LentDisk(agreement, digests[agreement.rank] == digests[0])
    with agreement.all_or_none("loaded"):
        content = None if disk.is_borrowed else _read(place)
    if disk.borrowers:
        content = agreement.said(content if agreement.rank == 0 else None)[0]
    assert content is not None
    with agreement.all_or_none("loaded"):
        _compare(place, content["tensors"], tensors)
        if not disk.is_borrowed:
            number = disk.lenders.index(agreement.rank)
            for name, digest in sorted(content["files"].items())[number :: len(disk.lenders)]:
                if not (place / name).is_file() or file_sha256(place / name) != digest:
                    raise ValueError(f"{place / name} is missing or damaged: its sha256 is not the one that was "
                                     "written")  # fmt: skip
    with agreement.all_or_none("loaded"):
        from .lent_checkpoint import Reader

        with disk.lent(place):
            listing = disk.whole(place / LISTING) if disk.is_borrowed else None
        reader = Reader(place, disk, listing) if disk.borrowers else dcp.FileSystemReader(place)
        dcp.load(tensors, storage_reader=reader, process_group=agreement.wire.group)
    return join(content["state"], tensors)


def _write(tensors: Mapping[str, Tensor], folder: Path, agreement: Agreement, disk: LentDisk) -> None:
    from .lent_checkpoint import Writer

    writer = Writer(folder, disk)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=agreement.wire.group)
    except dcp.CheckpointException as error:
        full = next((failure for failure, _ in error.failures.values() if isinstance(failure, OSError)), None)
        if full is None:
            raise
        said = f"the checkpoint could not be written: {full.strerror}"
        raise type(full)(full.errno, said, str(folder)) from error


def _read(place: Path) -> dict[str, Any]:
    if not place.is_dir():
        cut = place.with_name(f"{place.name}.tmp").is_dir()
        raise FileNotFoundError(f"path: there is no folder {str(place)!r}" + ": its saving was cut off" * cut)
    try:
        content = json.loads((place / STATE).read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"it is of format {content['format']!r}, not {FORMAT}")
        content["files"].items(), content["tensors"].items(), content["state"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place / STATE} is missing or damaged: {error!r}") from error
    return content


def _compare(place: Path, saved: Mapping[str, list[Any]], here: Mapping[str, Tensor]) -> None:
    found = {name: [str(t.dtype), *t.shape] for name, t in here.items()}
    wrong = [f"{name} was not saved" for name in found.keys() - saved.keys()]
    wrong += [f"{name} is not there" for name in saved.keys() - found.keys()]
    wrong += [f"{name} was {saved[name]}, and is {found[name]}" for name in found.keys() & saved.keys()
              if found[name] != saved[name]]  # fmt: skip
    if wrong:
        raise ValueError(f"state is not of the shape of what {str(place)!r} holds: {'; '.join(sorted(wrong))}")
