"""What a checkpoint holds of a run, and a run that goes on from one."""
from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _saved_state as saved_state
from . import checkpoint, mesh_checkpoint
from .logs import Logs
from .plan import Stream
from .ranks import Ranks
from .trainee import Trainee

logger = logging.getLogger(__name__)


def newest(run: Path, ranks: Ranks, *, on_mesh: bool) -> checkpoint.Saved | None:
    """The newest checkpoint that is whole; None where none was written yet. On a mesh tensors are read later.

    Raises:
        ValueError: none is whole.
    """
    saved, complaints = mesh_checkpoint.newest(run, ranks) if on_mesh else checkpoint.newest(run)
    for complaint in complaints:
        logger.warning("%s; an earlier checkpoint is taken", complaint)
    return saved


def parts_of(saved: checkpoint.Saved | None, ranks: Ranks) -> int:
    """The streams into which a run on a mesh deals its rows: one for each process with which it began."""
    return ranks.world if saved is None else len(saved.plain["streams"])


def load(
    run: Path, saved: checkpoint.Saved, trainees: Mapping[str, Trainee], stream: Stream, ranks: Ranks
) -> None:
    """All of a run as it was.

    Raises:
        ValueError: the checkpoint is of several processes without a mesh, or of another text.
    """
    if ranks.mesh is not None:
        _load_on_mesh(run, saved, trainees, stream, ranks)
        return
    state = saved_state.join(saved.plain, saved.tensors)
    if (before := len(state["processes"])) != 1:
        raise ValueError(f"run: it was trained by {before} processes that averaged their gradients, which has given "
                         "way to meshes: begin it anew")  # fmt: skip
    (own,) = state["processes"]
    _compare_threads(state["threads"])
    for name, trainee in trainees.items():
        trainee.load(state["saes"][name], own["saes"][name])
    stream.load_state_dict(own["stream"])
    saved_state.set_random_state(state["random"])


def save(
    run: Path, update: int, trainees: Mapping[str, Trainee], stream: Stream, ranks: Ranks, logs: Logs, keep: int
) -> Path:
    """A checkpoint of this update, of which ``keep`` stay; its folder."""
    if ranks.mesh is not None:
        streams = [one for each in ranks.gathered(stream.state_dict()) for one in each["streams"]]
        whole = {**_on_mesh(trainees), "streams": streams, **_of_the_host(logs)}
        folder = mesh_checkpoint.write(run, update, whole, ranks)
        if ranks.writes:
            checkpoint.prune(run, keep)
        return folder
    own = {name: trainee.own_state() for name, trainee in trainees.items()}
    processes = [{"stream": stream.state_dict(), "saes": own}]
    files: dict[str, dict[str, Tensor]] = {"saes": {}, "optimizer": {}}
    saes = {}
    for name, trainee in trainees.items():
        saes[name], tensors = saved_state.split(trainee.state(), name)
        for key, tensor in tensors.items():
            files["saes" if key.startswith(f"{name}/sae/") else "optimizer"][key] = tensor
    random, tensors = saved_state.split(saved_state.random_state(), "random")
    files["optimizer"] |= tensors
    plain = {"saes": saes, "random": random, "processes": processes, **_of_the_host(logs)}
    folder = checkpoint.write(run, update, plain, files)
    checkpoint.prune(run, keep)
    return folder


def _on_mesh(trainees: Mapping[str, Trainee]) -> dict[str, Any]:
    """What processes have in common; of what is not cut the first one's is kept."""
    saes = {name: {**trainee.state(), "own": trainee.own_state()} for name, trainee in trainees.items()}
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        random["device"] = torch.cuda.get_rng_state()
    return {"saes": saes, "random": random}


def _load_on_mesh(
    run: Path, saved: checkpoint.Saved, trainees: Mapping[str, Trainee], stream: Stream, ranks: Ranks
) -> None:
    from ..distributed.checkpoint import load_state

    assert ranks.mesh is not None
    state = load_state(_on_mesh(trainees), mesh_checkpoint.folder_of(run, saved.update), ranks.mesh)
    _compare_threads(state["threads"])
    for name, trainee in trainees.items():
        trainee.load(state["saes"][name], state["saes"][name]["own"])
    stream.load_state_dict({"streams": [state["streams"][number] for number in ranks.own_streams]})
    torch.set_rng_state(state["random"]["cpu"])
    if "device" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["device"])


def _of_the_host(logs: Logs) -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), "metrics_bytes": logs.sync(), "trackers": logs.ids}


def _compare_threads(before: int) -> None:
    if before != torch.get_num_threads():
        logger.warning("the run used %d threads and this process uses %d: sums may round differently",
                       before, torch.get_num_threads())  # fmt: skip
