"""Ranks that do not see the first rank's disk: checkpoints and folders are written there, and read, piece by piece.

Each of these ranks is in a folder of its own, and paths are relative: two of four share one.
"""
from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest
import torch
from cut_states import is_whole, state_of, whole
from forked_ranks import mesh_of, outcomes, raised, succeeded

import sae_engine as se
from sae_engine.distributed import checkpoint, lent_disk
from sae_engine.distributed.agreement import Agreement

SIZE, DISKS = 4, (0, 0, 1, 2)  # of each rank
DEATHS = "dies_while_sending", "dies_while_writing_a_folder", "dies_while_reading"
PIECE = 48  # bytes, of tensors of which a rank's smallest part has more


def disk_of(rank, folder):
    """Where this rank is, with a folder that is there already on every disk."""
    place = folder / f"disk {DISKS[rank]}"
    place.mkdir(exist_ok=True, parents=True)
    os.chdir(place)


def files_of(folder):
    return {disk.name: sorted(str(p.relative_to(disk)) for p in disk.rglob("*") if p.is_file())
            for disk in sorted(folder.glob("disk *"))}  # fmt: skip


# --- what ranks do ----------------------------------------------------------------------------------------------------


def saves_and_loads(rank, size, folder):
    mesh, sent = mesh_of(size), []
    disk_of(rank, folder)
    lent_disk.PIECE_BYTES = PIECE
    wire = Agreement.of(mesh).wire
    send = wire.send
    wire.send = lambda part, *to: (sent.append(part.nbytes), send(part, *to))
    checkpoint.save_state(state_of(mesh, rank, size), "state", mesh)
    saved = max(sent, default=0)
    back = checkpoint.load_state(state_of(mesh, rank, size, filled=False), "state", mesh)
    return [is_whole(back), back["step"]["calls"], saved, max(sent, default=0)]


def loads_on_three(rank, size, folder):
    """None of which sees what another number wrote but the first."""
    mesh = mesh_of(size)
    os.chdir(folder.parent / "saves_and_loads" / "disk 0" if rank == 0 else folder)
    damaged = [is_whole(checkpoint.load_state(state_of(mesh, rank, size, filled=False), "state", mesh))]
    torch.distributed.barrier()
    if rank == 0:
        content = bytearray(Path("state/__3_0.distcp").read_bytes())
        content[len(content) // 2] ^= 255
        Path("state/__3_0.distcp").write_bytes(content)
    torch.distributed.barrier()
    damaged.append(raised(lambda: checkpoint.load_state(state_of(mesh, rank, size), "state", mesh)))
    return damaged


def made(mesh=None):
    torch.manual_seed(0)
    return se.SparseAutoencoder(6, 22, se.JumpReLU(22), mesh=mesh)


def writes_a_folder(rank, size, folder):
    disk_of(rank, folder)
    made(mesh_of(size)).save_pretrained("sae")
    torch.distributed.barrier()
    if rank == 0:
        made().save_pretrained(folder / "alone")
    return None


def a_full_disk(rank, size, folder):
    """The first rank's, which another rank writes to."""
    mesh = mesh_of(size)
    disk_of(rank, folder)
    state = state_of(mesh, rank, size)
    sae = made(mesh)  # groups of processes meet in a file, too
    checkpoint.save_state(state, "before", mesh)
    if rank == 0:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        said = raised(lambda: checkpoint.save_state(state, "full", mesh))
        written = raised(lambda: sae.save_pretrained("sae"))
    finally:
        if rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    torch.distributed.barrier()
    checkpoint.save_state(state_of(mesh, rank, size), "full", mesh)
    return [said, written, is_whole(checkpoint.load_state(state_of(mesh, rank, size, filled=False), "full", mesh))]


def dies_while_sending(rank, size, folder):
    _dies(rank, size, folder, "write", lambda mesh: checkpoint.save_state(state_of(mesh, rank, size), "torn", mesh))


def dies_while_writing_a_folder(rank, size, folder):
    _dies(rank, size, folder, "write", lambda mesh: made(mesh).save_pretrained("torn"))


def dies_while_reading(rank, size, folder):
    """What another case has saved before."""
    place = folder.parent / "saves_and_loads" / "disk 0" / "state" if rank < 2 else folder / "nothing is here"
    _dies(rank, size, folder, "read", lambda mesh: checkpoint.load_state(state_of(mesh, rank, size), place, mesh))


def is_stuck_while_sending(rank, size, folder):
    _dies(rank, size, folder, "write", lambda mesh: checkpoint.save_state(state_of(mesh, rank, size), "torn", mesh),
          lambda: (time.sleep(5), os._exit(9)), timeout=2)  # fmt: skip


def _dies(rank, size, folder, method, call, how=lambda: os._exit(9), timeout=60):
    """The last rank, which sees no other's disk, while it is at a file: after the first piece."""
    mesh, calls = mesh_of(size), []
    Agreement.of(mesh, timeout=timeout)
    disk_of(rank, folder)
    lent_disk.PIECE_BYTES = PIECE
    meant = getattr(lent_disk.LentDisk, method)

    def until_the_second(self, *request):
        calls.append(request)
        return meant(self, *request) if len(calls) < 2 else how()

    if rank == 3:
        setattr(lent_disk.LentDisk, method, until_the_second)
    begun = time.monotonic()
    said = raised(lambda: call(mesh))
    raise AssertionError([said, time.monotonic() - begun])


# --- what is seen of it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    sizes = {"saves_and_loads": 4, **dict.fromkeys(DEATHS, 4), "is_stuck_while_sending": 4, "loads_on_three": 3,
             "writes_a_folder": 4, "a_full_disk": 4}  # fmt: skip
    return outcomes(__file__, sizes, folder) | {"folder": folder}


WHOLE = dict.fromkeys(whole(), True)
FILES = [".metadata", *(f"__{rank}_0.distcp" for rank in range(SIZE)), "state.json"]


def test_a_state_is_written_to_one_disk_and_read_from_it(ran):
    for rank, (found, calls, saved, sent) in enumerate(succeeded(ran["saves_and_loads"])):
        assert found == WHOLE and calls == 7
        assert saved == {0: 16, 1: 32}.get(rank, PIECE)  # the first answers, the second says that it is done
        assert sent == (32 if rank == 1 else PIECE)
    there = files_of(ran["folder"] / "saves_and_loads")
    assert there == {"disk 0": [f"state/{name}" for name in FILES], "disk 1": [], "disk 2": []}


def test_another_number_of_ranks_reads_it_and_hears_of_damage(ran):
    for found, damaged in succeeded(ran["loads_on_three"]):
        assert found == WHOLE and "__3_0.distcp is missing or damaged" in damaged


def test_a_folder_is_that_of_one_process_byte_for_byte(ran):
    succeeded(ran["writes_a_folder"])
    folder = ran["folder"] / "writes_a_folder"
    names = sorted(p.name for p in (folder / "alone").iterdir())
    assert files_of(folder) == {"disk 0": [f"sae/{name}" for name in names], "disk 1": [], "disk 2": []}
    for name in names:
        assert (folder / "disk 0" / "sae" / name).read_bytes() == (folder / "alone" / name).read_bytes()


def test_a_full_disk_is_said_by_all_ranks(ran):
    for said, written, found in succeeded(ran["a_full_disk"]):
        assert said.startswith("OSError: [Errno 27] the checkpoint could not be written: File too large")
        assert "OSError: [Errno 27] File too large" in written
        assert found == WHOLE
    assert files_of(ran["folder"] / "a_full_disk")["disk 0"] == [
        f"{state}/{name}" for state in ("before", "full") for name in FILES
    ]  # fmt: skip


@pytest.mark.parametrize("case", DEATHS)
def test_a_rank_that_dies_is_named_at_once_and_nothing_gets_the_name(ran, case):
    for rank, outcome in enumerate(ran[case]):
        if rank == 3:
            assert outcome.raised == "it was killed"
            continue
        said, seconds = eval(outcome.raised.rpartition("AssertionError: ")[2])
        assert said.startswith("RuntimeError: rank 3 (process ") and "has ended) does not answer any more" in said
        assert seconds < 10  # of a timeout of 60
    torn = ran["folder"] / case / "disk 0" / "torn"
    assert not torn.exists() or not any(torn.iterdir())


def test_a_rank_that_is_stuck_is_named_after_the_timeout(ran):
    for outcome in ran["is_stuck_while_sending"][:3]:
        said, seconds = eval(outcome.raised.rpartition("AssertionError: ")[2])
        assert said.startswith("RuntimeError: rank 3 (process ") and "does not answer within 2 s" in said
        assert seconds < 9
