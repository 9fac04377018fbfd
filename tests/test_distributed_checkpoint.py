"""States that are cut over ranks: whole or not there, for another number of ranks, and whoever dies meanwhile."""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cut_states import D, F, is_whole, state_of
from forked_ranks import mesh_of, outcomes, raised, succeeded

import sae_engine as se
from sae_engine.distributed import checkpoint
from sae_engine.distributed.agreement import Agreement

# --- what ranks do ----------------------------------------------------------------------------------------------------


def saves_on_four(rank, size, folder):
    mesh, place = mesh_of(size), folder.parent / "state"
    state = state_of(mesh, rank, size)
    before = {name: t.to_local().data_ptr() for name, t in state["sae"].items()}
    checkpoint.save_state(state, place, mesh)
    assert {name: t.to_local().data_ptr() for name, t in state["sae"].items()} == before
    back = checkpoint.load_state(state_of(mesh, rank, size, filled=False, calls=0), place, mesh)
    step = back["step"]
    shared = [step["calls"], step["scheduler"], step["optimizer"]["lr"], float(step["optimizer"]["state"][0]["step"])]
    there = raised(lambda: checkpoint.save_state(state, place, mesh))
    wrong = state_of(mesh, rank, size)
    wrong["sae"]["more"] = wrong["sae"].pop("b_dec")
    wrong["sae"]["fired"] = wrong["sae"]["fired"].float()
    other = raised(lambda: checkpoint.load_state(wrong, place, mesh))
    unsaveable = raised(lambda: checkpoint.save_state({"a": object()}, folder / "never", mesh))
    none = raised(lambda: checkpoint.load_state(state, folder / "never", mesh))
    return [is_whole(back), shared, there, other, unsaveable, none, sorted(p.name for p in place.iterdir())]


def loads_on_two(rank, size, folder):
    return _loads(rank, size, folder)


def loads_on_three(rank, size, folder):
    return _loads(rank, size, folder)


def loads_on_one(rank, size, folder):
    return _loads(rank, size, folder)


def _loads(rank, size, folder):
    mesh = mesh_of(size)
    return is_whole(checkpoint.load_state(state_of(mesh, rank, size, filled=False), folder.parent / "state", mesh))


def damaged(rank, size, folder):
    """One byte of one file, the list of what there is, and no file at all."""
    mesh, said = mesh_of(size), []
    for number, name in enumerate(("__0_0.distcp", "state.json", ".metadata")):
        place = folder / str(number)
        if rank == 0:
            shutil.copytree(folder.parent / "state", place)
            if name == ".metadata":
                (place / name).unlink()
            else:
                content = bytearray((place / name).read_bytes())
                content[len(content) // 2] ^= 255
                (place / name).write_bytes(content)
        torch.distributed.barrier()
        said.append(raised(lambda place=place: checkpoint.load_state(state_of(mesh, rank, size), place, mesh)))
    return said


def a_full_disk(rank, size, folder):
    """Of one rank: all say so, and the next attempt finds nothing of it."""
    mesh, state = mesh_of(size), state_of(mesh_of(size), rank, size)
    write = dcp.FileSystemWriter.write_data

    def full(self, plan, planner):
        if rank == 1:
            raise OSError(28, "No space left on device")
        return write(self, plan, planner)

    dcp.FileSystemWriter.write_data = full
    said = raised(lambda: checkpoint.save_state(state, folder / "full", mesh))
    dcp.FileSystemWriter.write_data = write
    left = sorted(p.name for p in folder.iterdir() if p.is_dir())
    torch.distributed.barrier()
    checkpoint.save_state(state, folder / "full", mesh)
    return [said, left, is_whole(_loaded(mesh, rank, size, folder / "full"))]


def killed_before(rank, size, folder):
    return _killed(rank, size, folder, None)


def killed_while_writing(rank, size, folder):
    def dies(self, plan, planner):
        os._exit(9)

    return _killed(rank, size, folder, ("write_data", dies, 1))


def killed_before_the_name(rank, size, folder):
    """The first rank, when all is on the disk but the name."""
    return _killed(rank, size, folder, ("rename", lambda *_: os._exit(9), 0))


def _killed(rank, size, folder, how):
    mesh = mesh_of(size)
    state = state_of(mesh, rank, size)
    Agreement.of(mesh, timeout=20)
    checkpoint.save_state(state, folder / "earlier", mesh)
    victim = 1 if how is None else how[2]
    if rank == victim:
        if how is None:
            os._exit(9)
        setattr(Path if how[0] == "rename" else dcp.FileSystemWriter, how[0], how[1])
    raise AssertionError([raised(lambda: checkpoint.save_state(state, folder / "torn", mesh))])


def goes_on_after_a_kill(rank, size, folder):
    """The earlier state is whole, and a save under the torn one's name too."""
    mesh = mesh_of(size)
    found = []
    for name in ("killed_before", "killed_while_writing", "killed_before_the_name"):
        at = folder.parent / name
        torn = raised(lambda at=at: checkpoint.load_state(state_of(mesh, rank, size, filled=False), at / "torn", mesh))
        found.append([torn, all(is_whole(_loaded(mesh, rank, size, at / "earlier")).values())])
        torch.distributed.barrier()
        checkpoint.save_state(state_of(mesh, rank, size), at / "torn", mesh)
        found[-1].append(all(is_whole(_loaded(mesh, rank, size, at / "torn")).values()))
        found[-1].append((at / "torn.tmp").exists())
    return found


def _loaded(mesh, rank, size, place):
    return checkpoint.load_state(state_of(mesh, rank, size, filled=False), place, mesh)


# --- an autoencoder and its step ------------------------------------------------------------------------------------

STEPS, TOKENS = 3, 12
KINDS = {"TopK": lambda: se.TopK(3), "BatchTopK": lambda: se.BatchTopK(2.5), "JumpReLU": lambda: se.JumpReLU(22)}


def trained(kind, mesh, **options):
    """At the beginning, the same however many ranks there are."""
    torch.manual_seed(0)
    sae = se.SparseAutoencoder(6, 22, KINDS[kind](), mesh=mesh, dtype=torch.float64)
    losses = [se.losses.StepL0(0.1)] if kind == "JumpReLU" else [se.losses.AuxK(4)]
    step = se.training.TrainStep(
        sae, lr=1e-2, eps=1e-3, losses=losses, dead_after=20, memory_budget=2**20,
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)), **options,
    )  # fmt: skip
    return sae, step


def trains(step, rank, size, updates):
    share = slice(rank * TOKENS // size, (rank + 1) * TOKENS // size)
    for update in updates:
        draw = torch.Generator().manual_seed(update)
        step(torch.randn(TOKENS, 6, generator=draw, dtype=torch.float64)[share])


def everything(sae, step):
    """All of their state on one rank, by name."""
    from torch.distributed.tensor import DTensor

    from sae_engine._saved_state import split

    plain, tensors = split({"sae": sae.state_dict(), "step": step.state_dict()}, contiguous=False)
    return plain, {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}


def steps_on_four(rank, size, folder):
    """Half of the steps, a checkpoint, the other half; and again from the checkpoint."""
    mesh, found = mesh_of(size), {}
    for kind in KINDS:
        sae, step = trained(kind, mesh)
        trains(step, rank, size, range(STEPS))
        checkpoint.save_state({"sae": sae.state_dict(), "step": step.state_dict()}, folder / kind, mesh)
        trains(step, rank, size, range(STEPS, 2 * STEPS))
        plain, ended = everything(sae, step)
        again_plain, again = everything(*_resumed(kind, mesh, rank, size, folder / kind))
        found[kind] = [plain == again_plain, [name for name in ended if not torch.equal(ended[name], again[name])]]
        if rank == 0:
            torch.save((plain, ended), folder / f"{kind}.pt")
    return found


def _resumed(kind, mesh, rank, size, place):
    sae, step = trained(kind, mesh)
    trains(step, rank, size, [99])  # what is loaded takes the place of all of this
    state = checkpoint.load_state({"sae": sae.state_dict(), "step": step.state_dict()}, place, mesh)
    sae.load_state_dict(state["sae"])
    step.load_state_dict(state["step"])
    trains(step, rank, size, range(STEPS, 2 * STEPS))
    return sae, step


def steps_on_two(rank, size, folder):
    """From what four ranks saved, to where those went: to rounding, which sums over other parts differ by."""
    mesh, found = mesh_of(size), {}
    for kind in KINDS:
        plain, ended = torch.load(folder.parent / "steps_on_four" / f"{kind}.pt")
        again_plain, again = everything(*_resumed(kind, mesh, rank, size, folder.parent / "steps_on_four" / kind))
        gaps = {name: float((ended[name].double() - again[name].double()).abs().max()) for name in ended}
        bound = {torch.float64: 1e-12, torch.float32: 1e-9, torch.int64: 0}
        wrong = {name: gap for name, gap in gaps.items() if gap > bound[ended[name].dtype]}
        found[kind] = [plain == again_plain, ended.keys() == again.keys(), wrong]
    return found


def others_than_agreed(rank, size, folder):
    """Sizes, rules and options of which one rank has another."""
    mesh = mesh_of(size)
    said = [raised(lambda: se.SparseAutoencoder(6, 22 + rank, se.TopK(3), mesh=mesh)),
            raised(lambda: se.SparseAutoencoder(6, 22, se.TopK(3 + (rank == 1)), mesh=mesh))]  # fmt: skip
    sae = se.SparseAutoencoder(6, 22, se.TopK(3), mesh=mesh)
    said.append(raised(lambda: se.training.TrainStep(sae, lr=1e-3 * (1 + rank))))
    step = se.training.TrainStep(sae, lr=1e-3)
    said.append(raised(lambda: step(torch.ones(4, 6 + (rank == 1)))))
    step(torch.ones(4, 6))  # nothing has parted
    return said


def dies_in_a_step(rank, size, folder):
    mesh = mesh_of(size)
    Agreement.of(mesh, timeout=20)
    sae, step = trained("TopK", mesh)
    trains(step, rank, size, [0])
    if rank == 1:
        sae.share.activation.select = lambda *_, **__: os._exit(9)
    raise AssertionError(raised(lambda: trains(step, rank, size, [1])))


# --- what is seen of it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    sizes = {"saves_on_four": 4, "loads_on_two": 2, "loads_on_three": 3, "loads_on_one": 1, "damaged": 2,
             "a_full_disk": 3, "killed_before": 3, "killed_while_writing": 3, "killed_before_the_name": 3,
             "goes_on_after_a_kill": 2, "steps_on_four": 4, "steps_on_two": 2, "others_than_agreed": 2,
             "dies_in_a_step": 3}  # fmt: skip
    folder = tmp_path_factory.mktemp("ranks")
    return outcomes(__file__, sizes, folder) | {"folder": folder}


WHOLE = dict.fromkeys(["W_dec", "W_enc", "b_dec", "moment", "fired"], True)


def test_a_state_comes_back_and_others_are_refused(ran):
    for found, shared, there, other, unsaveable, none, files in succeeded(ran["saves_on_four"]):
        assert found == WHOLE and shared == [7, None, 1e-3, 7.0]
        assert "FileExistsError: path: " in there
        for part in ("sae/b_dec is not there", "sae/more was not saved", "sae/fired was ['torch.int64', 10], and is"):
            assert part in other
        assert "TypeError: a must be a tensor or of JSON's types" in unsaveable
        assert "FileNotFoundError: path: there is no folder" in none
        assert files == [".metadata", *(f"__{rank}_0.distcp" for rank in range(4)), "state.json"]


@pytest.mark.parametrize("case", ["loads_on_two", "loads_on_three", "loads_on_one"])
def test_another_number_of_ranks_reads_the_same_bits(ran, case):
    assert all(found == WHOLE for found in succeeded(ran[case]))


def test_damage_is_found_by_all_ranks_and_named(ran):
    for byte, listing, gone in succeeded(ran["damaged"]):
        assert "__0_0.distcp is missing or damaged" in byte and "ValueError: " in byte
        assert "state.json is missing or damaged" in listing or "is missing or damaged" in listing
        assert ".metadata is missing or damaged" in gone


def test_a_full_disk_is_said_by_all_ranks(ran):
    for said, left, found in succeeded(ran["a_full_disk"]):
        assert said.startswith("OSError: [Errno 28] the checkpoint could not be written: No space left on device")
        assert left == ["full.tmp"] and found == WHOLE


@pytest.mark.parametrize(("case", "victim"), [
    ("killed_before", 1), ("killed_while_writing", 1), ("killed_before_the_name", 0),
])  # fmt: skip
def test_a_rank_that_dies_is_named_and_nothing_gets_the_name(ran, case, victim):
    for rank, outcome in enumerate(ran[case]):
        if rank == victim:
            assert outcome.raised == "it was killed"
        else:
            assert f"RuntimeError: rank {victim} (process " in outcome.raised, outcome.raised
            assert outcome.seconds < 10


def test_what_was_saved_before_is_whole_and_the_name_is_free(ran):
    for found in succeeded(ran["goes_on_after_a_kill"]):
        for torn, earlier, again, left in found:
            assert torn.startswith("FileNotFoundError: path: there is no folder") and earlier and again and not left
        assert "its saving was cut off" in found[1][0] and "its saving was cut off" in found[2][0]


def test_the_listing_says_what_lies_where(ran):
    content = json.loads((ran["folder"] / "state" / "state.json").read_text())
    assert content["ranks"] == 4 and content["tensors"]["sae/W_enc"] == ["torch.float32", D, F]
    assert content["state"]["step"]["optimizer"]["lr"] == 1e-3


def test_training_goes_on_bit_for_bit(ran):
    for found in succeeded(ran["steps_on_four"]):
        assert found == {kind: [True, []] for kind in KINDS}


def test_training_goes_on_with_half_the_ranks(ran):
    for found in succeeded(ran["steps_on_two"]):
        for plain, names, wrong in found.values():
            assert plain and names and wrong == {}  # JumpReLU's thresholds, near 1e-2, and their moments are fp32


def test_what_ranks_do_not_agree_on_is_named_and_parts_nobody(ran):
    for rank, (sizes, rule, rate, batch) in enumerate(succeeded(ran["others_than_agreed"])):
        assert sizes == "RuntimeError: all ranks must be given the same: d_sae is 22 on rank 0 and 23 on rank 1"
        assert 'activation is "TopK(k=3)" on rank 0 and "TopK(k=4)" on rank 1' in rule
        assert "lr is 0.001 on rank 0 and 0.002 on rank 1" in rate
        own = "ValueError: x must have d_in = 6 in its last dimension, got shape (4, 7)"
        assert batch == (own if rank == 1 else f"RuntimeError: rank 1: {own}")


def test_a_rank_that_dies_in_a_step_is_named(ran):
    for rank in (0, 2):
        assert "RuntimeError: rank 1 (process " in ran["dies_in_a_step"][rank].raised
        assert ran["dies_in_a_step"][rank].seconds < 15
