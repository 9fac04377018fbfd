"""Groups of ranks with the same latents: what they write and read, uneven ends, and ranks that die."""
from __future__ import annotations

import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from forked_ranks import mesh_of, outcomes, raised, succeeded

import sae_engine as se
from sae_engine.checkpoints.saelens import CONFIG, WEIGHTS
from sae_engine.distributed import aligned, checkpoint
from sae_engine.distributed.agreement import Agreement

D, F, STEPS, TOKENS = 6, 22, 3, 12
RULES = {
    "TopK": lambda: se.TopK(3), "FeatureChoice": lambda: se.FeatureChoice(F, 2.5), "JumpReLU": lambda: se.JumpReLU(F),
}  # fmt: skip
LOSSES = {"TopK": lambda: se.losses.AuxK(4), "FeatureChoice": lambda: se.losses.AuxZipf(4),
          "JumpReLU": lambda: se.losses.StepL0(0.1)}  # fmt: skip


def trained(rule, mesh, **options):
    """At the beginning, the same however many ranks there are."""
    torch.manual_seed(0)
    sae = se.SparseAutoencoder(D, F, RULES[rule](), mesh=mesh, dtype=torch.float64)
    return sae, se.training.TrainStep(sae, lr=1e-2, eps=1e-3, losses=LOSSES[rule](), dead_after=20, **options)


def trains(step, rank, size, updates):
    share = slice(rank * TOKENS // size, (rank + 1) * TOKENS // size)
    for update in updates:
        draw = torch.Generator().manual_seed(update)
        step(torch.randn(TOKENS, D, generator=draw, dtype=torch.float64)[share])


def whole(state):
    """Every tensor of a state, by name, and all else."""
    from torch.distributed.tensor import DTensor

    from sae_engine._saved_state import split

    plain, tensors = split(state, contiguous=False)
    return plain, {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}


def state_of(sae, step):
    return {"sae": sae.state_dict(), "step": step.state_dict()}


# --- what ranks do ----------------------------------------------------------------------------------------------------


def saves_in_two_groups(rank, size, folder):
    """Half of the steps, a checkpoint, the other half; and again from the checkpoint."""
    mesh, found = mesh_of(size, data=2), {}
    for rule in RULES:
        sae, step = trained(rule, mesh)
        trains(step, rank, size, range(STEPS))
        checkpoint.save_state(state_of(sae, step), folder / rule, mesh)
        trains(step, rank, size, range(STEPS, 2 * STEPS))
        plain, ended = whole(state_of(sae, step))
        again_plain, again = whole(state_of(*resumed(rule, mesh, rank, size, folder / rule)))
        listed = dcp.FileSystemReader(folder / rule).read_metadata().storage_data.values()
        written = sum(file.stat().st_size for file in (folder / rule).glob("*.distcp"))
        found[rule] = [plain == again_plain, [name for name in ended if not torch.equal(ended[name], again[name])],
                       written - sum(part.length for part in listed)]  # fmt: skip
        if rank == 0:
            torch.save((plain, ended), folder / f"{rule}.pt")
    return found


def resumed(rule, mesh, rank, size, place):
    sae, step = trained(rule, mesh)
    trains(step, rank, size, [99])  # what is loaded takes the place of all of this
    state = checkpoint.load_state(state_of(sae, step), place, mesh)
    sae.load_state_dict(state["sae"])
    step.load_state_dict(state["step"])
    trains(step, rank, size, range(STEPS, 2 * STEPS))
    return sae, step


def goes_on_in_one_group(rank, size, folder):
    return _goes_on(rank, size, folder, data=1)


def goes_on_over_tokens_alone(rank, size, folder):
    return _goes_on(rank, size, folder, data=2)


def _goes_on(rank, size, folder, data):
    """From what two groups of two saved, to where those went."""
    mesh, found, saved = mesh_of(size, data), {}, folder.parent / "saves_in_two_groups"
    for rule in RULES:
        plain, ended = torch.load(saved / f"{rule}.pt")
        again_plain, again = whole(state_of(*resumed(rule, mesh, rank, size, saved / rule)))
        gaps = {name: float((ended[name].double() - again[name].double()).abs().max()) for name in ended}
        bound = {torch.float64: 1e-12, torch.float32: 1e-8, torch.int64: 0}
        found[rule] = [plain == again_plain, {n: gap for n, gap in gaps.items() if gap > bound[ended[n].dtype]}]
    return found


def reads_and_writes(rank, size, folder):
    """A folder of one process is read by slices, and written by slices once: byte for byte the same files."""
    mesh, found = mesh_of(size, data=2), {}
    for rule in RULES:
        given = folder.parent / "given" / rule
        sae = se.SparseAutoencoder.from_pretrained(given, mesh=mesh)
        alone = se.SparseAutoencoder.from_pretrained(given)
        differ = [name for (name, p), q in zip(sae.named_parameters(), alone.parameters(), strict=True)
                  if not torch.equal(p.full_tensor(), q)]  # fmt: skip
        sae.save_pretrained(folder / rule)
        alone.save_pretrained(by_one := folder / f"{rule} by {rank}")
        files = [(folder / rule / file).read_bytes() == (by_one / file).read_bytes() for file in (WEIGHTS, CONFIG)]
        found[rule] = [differ, files, sae.share.d_sae]
    return found


def ends_unevenly(rank, size, folder):
    """Three batches, two, and in the other group one and none: as one process with what there is."""
    mesh, kinds = mesh_of(size, data=2), {"TopK": se.TopK(3), "BatchTopK": se.BatchTopK(3)}
    numbers, apart = [3, 2, 1, 0], {}
    draw = torch.Generator().manual_seed(5)
    own = [[torch.randn(3, D, generator=draw, dtype=torch.float64) for _ in range(number)] for number in numbers]
    for name, rule in kinds.items():
        steps = []
        for on in (mesh, None):
            torch.manual_seed(0)
            sae = se.SparseAutoencoder(D, F, type(rule)(rule.k), mesh=on, dtype=torch.float64)
            steps.append(se.training.TrainStep(sae, lr=1e-2, eps=1e-3))
        many, one = steps
        for x in aligned(own[rank], mesh):
            many(x)
        for call in range(max(numbers)):
            one(torch.cat([batches[call] for batches in own if call < len(batches)]))
        apart[name] = max(float((p.full_tensor() - q).abs().max())
                          for p, q in zip(many.sae.parameters(), one.sae.parameters(), strict=True))  # fmt: skip
    return apart


def others_than_agreed(rank, size, folder):
    """Options of which one rank of the other group has another, and its input that is none."""
    mesh = mesh_of(size, data=2)
    said = [raised(lambda: se.SparseAutoencoder(D, F, se.TopK(3 + (rank == 3)), mesh=mesh))]
    sae = se.SparseAutoencoder(D, F, se.TopK(3), mesh=mesh)
    step = se.training.TrainStep(sae, lr=1e-3)
    said.append(raised(lambda: step(torch.ones(4, D + (rank == 2)))))
    step(torch.ones(4, D))  # nothing has parted
    return said


def dies_in_a_step(rank, size, folder):
    mesh = mesh_of(size, data=2)
    Agreement.of(mesh, timeout=20)
    _, step = trained("TopK", mesh)
    trains(step, rank, size, [0])
    if rank == 2:
        step.sae.share.activation.select = lambda *_, **__: os._exit(9)
    raise AssertionError(raised(lambda: trains(step, rank, size, [1])))


# --- what is seen of it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name, rule in RULES.items():
        se.SparseAutoencoder(D, F, rule()).save_pretrained(folder / "given" / name)
    sizes = {"saves_in_two_groups": 4, "goes_on_in_one_group": 2, "goes_on_over_tokens_alone": 2,
             "reads_and_writes": 4, "ends_unevenly": 4, "others_than_agreed": 4, "dies_in_a_step": 4}  # fmt: skip
    return outcomes(__file__, sizes, folder)


def test_a_run_goes_on_bit_for_bit_from_what_is_written_once(ran):
    for found in succeeded(ran["saves_in_two_groups"]):
        assert found == {rule: [True, [], 0] for rule in RULES}  # no byte that nobody reads


@pytest.mark.parametrize("case", ["goes_on_in_one_group", "goes_on_over_tokens_alone"])
def test_another_mesh_goes_on_to_rounding(ran, case):
    for found in succeeded(ran[case]):
        assert found == {rule: [True, {}] for rule in RULES}


def test_replicas_write_one_folder_byte_for_byte(ran):
    for found in succeeded(ran["reads_and_writes"]):
        assert found == {rule: [[], [True, True], F // 2] for rule in RULES}


def test_groups_whose_tokens_end_do_not_hang(ran):
    for apart in succeeded(ran["ends_unevenly"]):
        assert max(apart.values()) < 1e-12


def test_a_rank_of_another_group_is_named(ran):
    for rank, (rule, x) in enumerate(succeeded(ran["others_than_agreed"])):
        assert "all ranks must be given the same: activation is" in rule and 'TopK(k=4)" on rank 3' in rule
        assert x.startswith("ValueError: x must" if rank == 2 else "RuntimeError: rank 2: ValueError: x must have d_in")


def test_the_death_of_a_rank_ends_both_groups_and_names_it(ran):
    for rank, outcome in enumerate(ran["dies_in_a_step"]):
        said = "it was killed" if rank == 2 else "RuntimeError: rank 2 (process "
        assert said in outcome.raised, outcome.raised
        assert outcome.seconds < 20
