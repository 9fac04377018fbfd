"""One of the ranks of tests/test_mesh.py, and which cases of ``mesh_cases`` how many of them go through.

``python mesh_ranks.py RANK SIZE FOLDER`` writes the names of the cases that went well to FOLDER.
"""

import os
import sys
from pathlib import Path

import mesh_crosscoders
import torch
import torch.distributed as dist
from mesh_cases import (
    RULES,
    STEPS,
    D,
    F,
    decides_together,
    empty_shards_train,
    encodes,
    encodes_by_other_rules,
    in_16_bits,
    lays_out_row_by_row,
    needs_what_the_formula_says,
    repeats,
    room_in_place_of_lengths,
    sends_what_the_formula_says,
    skips_together,
    starts_alike,
    trains,
    trains_on_uneven_tokens,
)
from mesh_selections import matching_norms_is_exact, selects_as_the_reference

import sae_engine as se
from sae_engine.distributed.shards import Shards


def over_nodes(mesh, rank, size):
    """Two nodes of two ranks: latents are cut over nodes first, then inside each."""
    mesh = se.distributed.from_env(latent=2, node=2)
    assert mesh.mesh_dim_names == ("node", "latent")
    for rule in ("TopK", "BatchTopK"):
        encodes(mesh, rank, size, rule)
    for step in ("AuxK of SAELens", "FeatureChoice", "clipped"):
        trains(mesh, rank, size, step)
    sae = se.SparseAutoencoder(D, 9, se.TopK(2), mesh=mesh)  # 3 and 2, 2 and 2
    assert sae.shards.layout.numbers == [3, 2, 2, 2] and len(sae.W_dec.to_local()) == sae.shards.layout.numbers[rank]
    adds_in_nodes_first(mesh, rank, size)


def adds_in_nodes_first(mesh, rank, size):
    """The bits of a sum over all ranks as they come, for fewer bytes between nodes; also of uneven rows, and none."""
    flat, nodes = Shards(se.distributed.from_env(), F).wire, Shards(mesh, F)
    for rows in ([4, 4, 4, 4], [5, 0, 3, 2], [0, 0, 0, 7]):
        nodes.begun(rows)
        part = torch.randn(sum(rows), D, generator=torch.Generator().manual_seed(rank))
        nodes.wire.bytes.clear()
        assert torch.equal(nodes.sum_parts(part, "x_hat"), flat.sum_rows(part, rows, "x_hat"))
        of_place = rows[rank % 2 :: 2]
        sent = sum(rows) - sum(of_place), sum(of_place) - rows[rank]  # inside the node, and to the other one
        assert nodes.wire.bytes["x_hat"] == sum(sent) * D * 4


def on_groups(sizes, case):
    """The case on a mesh with these dimensions of the same ranks."""

    def of_ranks(mesh, rank, size):
        if sizes not in MESHES:
            MESHES[sizes] = se.distributed.from_env(**dict(sizes))
        case(MESHES[sizes], rank, size)

    return of_ranks


MESHES = {}  # once made
# What lies over groups of ranks: on one mesh all of it, on others a part.
GROUPS = {2: [{"data": 2}], 3: [], 4: [{"data": 2}, {"data": 4}, {"data": 2, "node": 2}]}


def cases_of_groups(size, sizes):
    is_first = size == 2
    if "node" not in sizes:
        yield "selection", lambda *at: selects_as_the_reference(*at, True)
        yield "selection, with room", lambda *at: selects_as_the_reference(*at, False)
        yield "norms are matched exactly", matching_norms_is_exact
        yield "step: uneven tokens", trains_on_uneven_tokens
        yield "step: empty shards", empty_shards_train
        yield "step: overflow", lambda *at: skips_together(*at, "overflow")
        yield "step: bytes", sends_what_the_formula_says
    if is_first or sizes == {"data": 2}:
        yield "initial rows", starts_alike
        yield "step: not finite", lambda *at: skips_together(*at, "nan")
        yield "step: room", room_in_place_of_lengths
        yield "step: row by row", lays_out_row_by_row
        yield "step: 16 bits", in_16_bits
        yield "encode: other rules", encodes_by_other_rules
        yield "step: the same bits again", repeats
        yield from mesh_crosscoders.cases() if is_first else mesh_crosscoders.cases(1, 2)
    every = 1 if is_first else 7 if "node" in sizes else 3
    for number, name in enumerate(RULES):
        if number % every == 0:
            yield f"encode: {name}", lambda *at, name=name: encodes(*at, name)
    for number, name in enumerate(STEPS):
        if number % every == 0 or (name == "FeatureChoice" and "node" not in sizes):
            yield f"step: {name}", lambda *at, name=name: trains(*at, name)


def cases(size):
    for sizes in GROUPS[size]:
        label = ", ".join(f"{name} {number}" for name, number in sizes.items())
        for name, case in cases_of_groups(size, sizes):
            yield f"{label}: {name}", on_groups(tuple(sizes.items()), case)
    yield "selection", lambda *at: selects_as_the_reference(*at, True)
    yield "selection, with room", lambda *at: selects_as_the_reference(*at, False)
    yield "norms are matched exactly", matching_norms_is_exact
    yield "initial rows", starts_alike
    some = {2: 4, 3: 3, 4: 6}[size]  # each case at one number of ranks at least, and the first of all at each
    for number, name in enumerate(RULES):
        if number % some == 0 or size == 3:
            yield f"encode: {name}", lambda *at, name=name: encodes(*at, name)
    for number, name in enumerate(STEPS):
        if size == 2 or number % some == 0:
            yield f"step: {name}", lambda *at, name=name: trains(*at, name)
    yield "step: overflow", lambda *at: skips_together(*at, "overflow")
    yield "step: not finite", lambda *at: skips_together(*at, "nan")
    yield "step: uneven tokens", trains_on_uneven_tokens
    yield "step: empty shards", empty_shards_train
    yield "step: bytes", sends_what_the_formula_says
    yield "step: room", room_in_place_of_lengths
    yield "step: 16 bits", in_16_bits
    yield "encode: other rules", encodes_by_other_rules
    if size != 3:
        yield from mesh_crosscoders.cases() if size == 2 else mesh_crosscoders.cases(0, 2)
    if size == 2:
        yield "step: memory", needs_what_the_formula_says
        yield "step: whole rows", decides_together
    if size == 4:
        yield "nodes", over_nodes


def main(rank, size, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="unused", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    mesh = se.distributed.from_env()
    mesh_crosscoders.FOLDER.append(folder)
    done = Path(folder, f"{rank}.txt")
    for name, case in cases(size):
        sys.stdout.write(f"{name}\n")  # what a rank that fails was at
        sys.stdout.flush()
        case(mesh, rank, size)
        with done.open("a") as file:
            file.write(name + "\n")
    dist.barrier()  # who leaves early takes its connections with it
    os._exit(0)  # gloo's threads now and then abort an orderly exit


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
