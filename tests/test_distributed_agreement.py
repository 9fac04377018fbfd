"""Ranks that agree, meet, and end together: each with an error that names the one on whose account."""
from __future__ import annotations

import gc
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from forked_ranks import mesh_of, outcomes, raised, succeeded
from torch.distributed.device_mesh import init_device_mesh

from sae_engine.distributed.agreement import GRACE_SECONDS, Agreement, aligned, is_of_a_collective


def raised_after(call):
    """What it raised, in words, and after how many seconds."""
    begun = time.monotonic()
    return [raised(call), time.monotonic() - begun]


# --- what ranks do ----------------------------------------------------------------------------------------------------


def talk(rank, size, folder):
    mesh = mesh_of(size)
    agreement = Agreement.of(mesh, timeout=20)
    assert Agreement.of(mesh) is agreement
    sent = dict(agreement.wire.bytes)
    met = [agreement.meet("step", 10 * rank + call) for call in range(3)]
    per_call = (agreement.wire.bytes["rows, calls, status"] - sent.get("rows, calls, status", 0)) / 3
    said = agreement.said({"rank": rank, "words": "ü" * rank})
    agreement.agree(d_sae=64, rule="TopK(k=4)")
    differs = raised(lambda: agreement.agree(d_sae=64 + (rank == 1), rule="TopK(k=4)", lr=1e-3))
    failed = raised(lambda: agreement.meet("step", error=ValueError("x must have d_in = 4") if rank == 2 else None))
    places = raised(lambda: agreement.meet("saved" if rank == 0 else "step"))
    still = agreement.meet("step", rank)
    return [met, per_call, said, differs, failed, places, still]


def uneven(rank, size, folder):
    """Three batches, one, and none."""
    mesh = mesh_of(size)
    own = [torch.full((n + 1, 4), float(rank), dtype=torch.float64) for n in range([3, 1, 0][rank])]
    shapes = [[*x.shape, str(x.dtype)] for x in aligned(own, mesh)]
    nothing = [*aligned([], mesh)]

    def breaks():
        yield torch.ones(2, 4)
        if rank == 1:
            raise OSError("the disk is gone")
        yield torch.ones(2, 4)

    broken = raised(lambda: [*aligned(breaks(), mesh)])
    widths = raised(lambda: [*aligned([torch.ones(2, 4 + rank)], mesh)])
    kinds = raised(lambda: [*aligned([torch.ones(4)] if rank == 0 else [], mesh)])
    return [shapes, nothing, broken, widths, kinds]


def shares_a_store(rank, size, folder):
    """As under torchrun, where meshes come and go, on one rank sooner than on another."""
    kept = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = torch.tensor([0 if kept is None else kept.port])
    dist.broadcast(port, 0)
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(int(port)))
    meshes = [init_device_mesh("cpu", (1,) * n + (size,), mesh_dim_names=("a", "b", "c")[-n - 1 :]) for n in range(3)]
    first = Agreement.of(meshes[0])
    second = Agreement.of(meshes[1])
    del first
    if rank == 0:  # here the first is gone when the third is made
        meshes[0] = None
        gc.collect()
    third = Agreement.of(meshes[2])
    if rank == 0:
        third._tell("the third has parted")
    dist.barrier()
    told = [third._told(), second._told()]
    dist.barrier()  # who keeps the store stays until all have read
    return [told, second.meet("step", rank)]


def dies_before_a_meeting(rank, size, folder):
    return _dies(1, rank, size, lambda agreement: agreement.meet("step"))


def the_first_dies(rank, size, folder):
    return _dies(0, rank, size, lambda agreement: agreement.meet("step"))


def dies_in_a_collective(rank, size, folder):
    def gather(agreement):
        with agreement.watched():
            out = torch.empty(size, 4)
            agreement.wire.gather(out[0], "x")

    return _dies(1, rank, size, gather)


def _dies(victim, rank, size, call):
    agreement = Agreement.of(mesh_of(size), timeout=30)
    agreement.meet("step")
    if rank == victim:
        os._exit(9)
    first = raised_after(lambda: call(agreement))
    again = raised_after(lambda: agreement.meet("step"))
    _leave(folder_free=[first, again])
    return None


def _leave(folder_free):
    """Says it by a traceback: there is no barrier any more for those who would return."""
    raise AssertionError(folder_free)


def is_stuck(rank, size, folder):
    agreement = Agreement.of(mesh_of(size), timeout=2)
    agreement.meet("step")
    if rank == 2:
        time.sleep(6 + GRACE_SECONDS)
    _leave([raised_after(lambda: agreement.meet("step"))])


def fails_by_itself(rank, size, folder):
    """In the middle of a step: it raises its own error, and the others hear of it when it is gone."""
    agreement = Agreement.of(mesh_of(size), timeout=30)

    def step():
        with agreement.watched():
            agreement.meet("step")
            if rank == 1:
                raise FloatingPointError("the loss is not finite")
            agreement.wire.gather(torch.ones(3), "x")

    _leave([raised_after(step)])


def the_first_fails_by_itself(rank, size, folder):
    """Without torchrun the store goes with it."""
    agreement = Agreement.of(mesh_of(size), timeout=30)

    def step():
        with agreement.watched():
            agreement.meet("step")
            if rank == 0:
                raise FloatingPointError("the loss is not finite")
            agreement.wire.gather(torch.ones(3), "x")

    _leave([raised_after(step)])


def all_fail_alike(rank, size, folder):
    """Nobody waits for anybody, and what they do next is not held against them."""
    agreement = Agreement.of(mesh_of(size), timeout=30)

    def step():
        with agreement.watched():
            agreement.meet("step")
            raise FloatingPointError("the loss is not finite")

    said, seconds = raised_after(step)
    torch.distributed.barrier()
    return [said, seconds, agreement.meet("saved", rank)]


def closes(rank, size, folder):
    """What gloo says when a peer is gone is known for what it is."""
    if rank == 1:
        os._exit(0)
    try:
        dist.barrier()
    except RuntimeError as error:
        _leave([is_of_a_collective(error)])


# --- what is seen of it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    sizes = {"shares_a_store": 2} | dict.fromkeys(
        ["talk", "uneven", "dies_before_a_meeting", "the_first_dies", "dies_in_a_collective", "is_stuck",
         "fails_by_itself", "the_first_fails_by_itself", "all_fail_alike", "closes"], 3,
    )  # fmt: skip
    return outcomes(__file__, sizes, tmp_path_factory.mktemp("ranks"))


def told(outcome):
    """The list that a rank left with."""
    assert "AssertionError: [" in outcome.raised, outcome.raised
    return eval(outcome.raised.rpartition("AssertionError: ")[2])


def test_ranks_meet_and_agree(ran):
    for rank, (met, per_call, said, differs, failed, places, still) in enumerate(succeeded(ran["talk"])):
        assert met == [[call, 10 + call, 20 + call] for call in range(3)]
        assert per_call == 24 * 2  # to each of the others
        assert said == [{"rank": r, "words": "ü" * r} for r in range(3)]
        assert differs == ("RuntimeError: all ranks must be given the same: d_sae is 64 on rank 0 and 65 on rank 1")
        assert failed == ("nothing" if rank == 2 else "RuntimeError: rank 2: ValueError: x must have d_in = 4")
        assert places.startswith("RuntimeError: the ranks are not at the same place: rank 0 at 'saved', meeting")
        assert "rank 1 at 'step'" in places
        assert still == [0, 1, 2]


def test_each_agreement_has_a_store_of_its_own(ran):
    """Also where another one has ended, on some ranks only."""
    assert succeeded(ran["shares_a_store"]) == [[["the third has parted", "-"], [0, 1]]] * 2


def test_uneven_ends_do_not_hang(ran):
    for rank, (shapes, nothing, broken, widths, kinds) in enumerate(succeeded(ran["uneven"])):
        rows = [[1, 2, 3], [1, 0, 0], [0, 0, 0]][rank]
        assert shapes == [[n, 4, "torch.float64"] for n in rows]
        assert nothing == []
        assert broken == ("OSError: " if rank == 1 else "RuntimeError: rank 1: OSError: ") + "the disk is gone"
        assert widths.startswith("ValueError: batches must have one width and dtype on all ranks, got [(4, ")
        assert ("ValueError: batches must have 2 dimension" in kinds) and (rank == 0 or "rank 0: " in kinds)


@pytest.mark.parametrize(("case", "victim"), [
    ("dies_before_a_meeting", 1), ("the_first_dies", 0), ("dies_in_a_collective", 1),
])  # fmt: skip
def test_a_dead_rank_is_named_by_all_others(ran, case, victim):
    for rank, outcome in enumerate(ran[case]):
        if rank == victim:
            assert outcome.raised == "it was killed"
            continue
        (said, seconds), (again, _) = told(outcome)
        assert said.startswith(f"RuntimeError: rank {victim} (process "), said
        assert "has ended) does not answer any more" in said
        assert seconds < 10  # of a timeout of 30
        assert again.startswith("RuntimeError: ") and f"rank {victim}" in again


def test_a_stuck_rank_is_named_within_the_timeout(ran):
    for rank, outcome in enumerate(ran["is_stuck"]):
        ((said, seconds),) = told(outcome)
        assert said.startswith("RuntimeError: "), said
        assert rank == 2 or ("rank 2 (process " in said and "does not answer within 2 s" in said), said
        assert seconds < 2 + GRACE_SECONDS + 3


@pytest.mark.parametrize(("case", "victim"), [("fails_by_itself", 1), ("the_first_fails_by_itself", 0)])
def test_a_rank_that_fails_by_itself_is_quoted(ran, case, victim):
    for rank, outcome in enumerate(ran[case]):
        ((said, seconds),) = told(outcome)
        own = "FloatingPointError: the loss is not finite"
        if rank == victim:
            assert said == own
        elif victim == 0:  # which keeps the store: of itself only that it has ended is known
            assert said.startswith("RuntimeError: rank 0 (process ") and "has ended" in said
        else:
            assert said == f"RuntimeError: rank {victim}: {own}"
        assert seconds < 5


def test_ranks_that_fail_alike_can_go_on(ran):
    for said, seconds, met in succeeded(ran["all_fail_alike"]):
        assert said == "FloatingPointError: the loss is not finite" and seconds < GRACE_SECONDS
        assert met == [0, 1, 2]


def test_what_a_broken_connection_says_is_known(ran):
    assert told(ran["closes"][0]) == [True] or told(ran["closes"][2]) == [True]
    assert not is_of_a_collective(RuntimeError("CUDA out of memory")) and not is_of_a_collective(ValueError("gloo"))


UNDER_TORCHRUN = """
import signal
from pathlib import Path
import torch
import sae_engine as se

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which torchrun ends those that are left
mesh = se.distributed.from_env(timeout=20)
sae = se.SparseAutoencoder(8, 32, se.TopK(2), mesh=mesh)
step = se.training.TrainStep(sae, lr=1e-3)
step(torch.ones(4, 8))
if mesh.get_rank() == 0:
    def fails(*_, **__):
        raise MemoryError("there is no memory left")
    sae.share.activation.select = sae.share.activation.running = fails
try:
    step(torch.ones(4, 8))
except Exception as error:
    Path(f"said-{mesh.get_rank()}").write_text(f"{type(error).__name__}: {error}")
    raise
"""


def test_under_torchrun_the_first_rank_is_quoted_too(tmp_path):
    """Its store outlives that rank."""
    (tmp_path / "program.py").write_text(UNDER_TORCHRUN, encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "program.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(3)]
    own = "MemoryError: there is no memory left"
    assert said == [own, f"RuntimeError: rank 0: {own}", f"RuntimeError: rank 0: {own}"], done.stderr
