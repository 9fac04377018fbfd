"""Training runs in processes of their own: killed at a chosen moment, or several that train together."""
from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT = 120  # seconds for one process


class Kill(NamedTuple):
    """When a process dies: after an update of its run, or when it has synced so many files of checkpoints."""

    moment: str  # "update" or "sync"
    number: int

    def arm(self) -> list[Any]:
        """In the process: the callbacks that do it."""
        from sae_engine.training import checkpoint
        from sae_engine.training.callbacks import Callback

        left = self.number

        def strike() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        if self.moment == "sync":
            before = checkpoint.sync

            def sync(path: Path) -> None:
                before(path)
                strike()

            checkpoint.sync = sync
            return []

        class Strike(Callback):
            def on_update(self, trainer: Any) -> None:
                strike()

        return [Strike()]


def work(settings: dict[str, Any] | None, folder: str, kill: Kill | None, answer: Any) -> None:
    """Starts the run with these settings, or resumes it."""
    import torch

    torch.set_num_threads(1)
    from sae_engine.training.trainer import resume, train

    callbacks = [] if kill is None else kill.arm()
    if (Path(folder) / "config.yaml").exists():
        resume(folder, callbacks=callbacks)
    else:
        assert settings is not None
        train(settings, callbacks=callbacks)
    answer.send("finished")


def context() -> Any:
    """Processes that begin with torch and transformers imported."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["torch", "transformers.models.gpt2.modeling_gpt2", "sae_engine.training.trainer",
                                  "tokenizers", "pydantic", "yaml", "killed_runs"])  # fmt: skip
    return found


def outcome(processes: Any, settings: dict[str, Any] | None, folder: Path, kill: Kill | None) -> str:
    """ "finished", or "killed"; RuntimeError for anything else."""
    ours, theirs = processes.Pipe()
    process = processes.Process(target=work, args=(settings, str(folder), kill, theirs))
    process.start()
    theirs.close()
    process.join(TIMEOUT)
    if process.exitcode == -signal.SIGKILL:
        return "killed"
    if process.exitcode == 0 and ours.poll():
        return ours.recv()
    process.kill()
    raise RuntimeError(f"the run in {folder} ended with status {process.exitcode}")


def work_together(settings: dict[str, Any] | None, folder: str, stop: int, rank: int, world: int, port: int) -> None:
    """One of ``world`` processes over gloo; the last of them gets a signal after ``stop`` updates."""
    import sys

    import torch

    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    from sae_engine.training.callbacks import Callback, Interrupted
    from sae_engine.training.trainer import resume, train

    class Stop(Callback):
        def on_update(self, trainer: Any) -> None:
            if trainer.update == stop and rank == world - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    try:
        if settings is None:
            resume(folder, callbacks=[Stop()])
        else:
            train(settings, callbacks=[Stop()])
    except Interrupted as stopped:
        sys.exit(128 + stopped.signal)


def statuses(processes: Any, settings: dict[str, Any] | None, folder: Path, *, stop: int = 0) -> list[int]:
    """The exit statuses of two processes that train together; without ``settings`` they resume the run."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = [processes.Process(target=work_together, args=(settings, str(folder), stop, rank, 2, port))
               for rank in range(2)]  # fmt: skip
    for process in started:
        process.start()
    for process in started:
        process.join(TIMEOUT)
        process.kill()
    return [process.exitcode for process in started]
