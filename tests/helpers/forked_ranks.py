"""Cases that need several processes, forked from one that has imported torch: seconds where interpreters take minutes.

A test module names functions of its own, ``case(rank, size, folder)``, and how many ranks each has. They run one after
the other in a new interpreter, whose forks join over gloo. What a rank returns, of JSON's types, is its outcome.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """Of one rank: its exit status, what it returned, or what it raised, and how long it took."""

    status: int
    returned: Any
    raised: str
    seconds: float


def outcomes(file: str, sizes: dict[str, int], folder: Path, *, timeout: float = 120) -> dict[str, list[Outcome]]:
    """Runs the functions of a test module that ``sizes`` names, each in so many ranks."""
    done = subprocess.run(
        [sys.executable, __file__, file, json.dumps(sizes), str(folder)], capture_output=True, text=True,
        timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "outcomes.json").read_text())
    return {case: [Outcome(*one) for one in ranks] for case, ranks in found.items()}


def succeeded(ranks: list[Outcome]) -> list[Any]:
    """What each rank returned; none has failed."""
    assert [one.status for one in ranks] == [0] * len(ranks), "\n".join(one.raised for one in ranks)
    return [one.returned for one in ranks]


def mesh_of(size: int, data: int = 1) -> Any:
    """A mesh of so many ranks on CPUs, over which latents are cut; in ``data`` groups of them."""
    from torch.distributed.device_mesh import init_device_mesh

    if data == 1:
        return init_device_mesh("cpu", (size,), mesh_dim_names=("latent",))
    return init_device_mesh("cpu", (data, size // data), mesh_dim_names=("data", "latent"))


@contextmanager
def waiting_for_gloo() -> Iterator[None]:
    """In it a collective returns when gloo's threads have forgotten its tensors, as far as a pause makes that sure.

    Where a thread is the last to let go of a tensor, torch's record of memory does not hear that it is free.
    """
    import torch.distributed as dist

    def paused(call: Callable) -> Callable:
        def collective(*args: Any, **options: Any) -> Any:
            found = call(*args, **options)
            time.sleep(0.01)
            return found

        return collective

    names = "all_to_all_single", "all_gather_single", "all_gather_into_tensor", "all_reduce"
    calls = {name: getattr(dist, name) for name in names if hasattr(dist, name)}
    try:
        for name, call in calls.items():
            setattr(dist, name, paused(call))
        yield
    finally:
        for name, call in calls.items():
            setattr(dist, name, call)


def raised(call: Callable[[], object]) -> str:
    """The type and text of what a call raises, or "nothing": an outcome in JSON's types."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _forked(case: Callable, size: int, folder: Path, timeout: float = 60) -> list[Outcome]:
    folder.mkdir()
    begun = time.monotonic()
    children = [os.fork() or _rank(case, rank, size, folder) for rank in range(size)]
    found: dict[int, Outcome] = {}
    while len(found) < size:
        for rank, child in enumerate(children):
            if rank in found or (not os.waitpid(child, os.WNOHANG)[0] and time.monotonic() - begun < timeout):
                continue
            if time.monotonic() - begun >= timeout:
                os.kill(child, signal.SIGKILL)
            said = folder / f"outcome-{rank}.json"
            status, returned, raised = json.loads(said.read_text()) if said.exists() else (9, None, "it was killed")
            found[rank] = Outcome(status, returned, raised, time.monotonic() - begun)
        time.sleep(0.01)
    return [found[rank] for rank in range(size)]


def _rank(case: Callable, rank: int, size: int, folder: Path) -> int:
    """One rank, which never returns: gloo's threads now and then abort an orderly exit."""
    import torch.distributed as dist

    outcome: tuple[int, Any, str] = (0, None, "")
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
        outcome = (0, case(rank, size, folder), "")
        dist.barrier()  # a rank that leaves early takes its connections with it
    except BaseException:
        outcome = (1, None, traceback.format_exc())
    said = folder / f"outcome-{rank}.json"
    said.with_suffix(".tmp").write_text(json.dumps(outcome))
    said.with_suffix(".tmp").rename(said)
    os._exit(outcome[0])


def main(file: str, sizes: str, folder: str) -> None:
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.tensor  # here once, not in every fork

    torch.set_num_threads(1)
    sys.path[:0] = [str(Path(__file__).parent)]
    spec = importlib.util.spec_from_file_location("cases", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cases"] = module
    spec.loader.exec_module(module)
    found = {name: _forked(getattr(module, name), size, Path(folder, name)) for name, size in json.loads(sizes).items()}
    Path(folder, "outcomes.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
