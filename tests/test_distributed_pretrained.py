"""Autoencoders on a mesh and checkpoints of the field: one folder written by slices, and slices read of others."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from forked_ranks import mesh_of, outcomes, raised, succeeded

import sae_engine as se
from sae_engine.checkpoints import formats
from sae_engine.checkpoints.saelens import CONFIG, WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:SAELens")  # of batch rules, which its load_from_disk refuses
D, F = 6, 22  # on 3 and 4 ranks uneven shards

RULES = {
    "TopK": lambda: se.TopK(3), "BatchTopK": lambda: se.BatchTopK(3), "JumpReLU": lambda: se.JumpReLU(F),
    "Gated": lambda: se.Gated(F), "Matryoshka": lambda: se.MatryoshkaBatchTopK(3.0, (4, F)),
    "FeatureChoice": lambda: se.FeatureChoice(F, 2.5),
}  # fmt: skip
OPTIONS = {
    "TopK": {"dtype": torch.bfloat16, "rescale_acts_by_decoder_norm": True}, "BatchTopK": {},
    "JumpReLU": {"rescale_acts_by_decoder_norm": True, "d_out": 5, "skip": True}, "Gated": {},
    "Matryoshka": {"dtype": torch.float64}, "FeatureChoice": {"normalize_activations": "layer_norm"},
}  # fmt: skip
# Formats that are read by slices, and a rule that each holds.
OTHERS = {"sparsify": "TopK", "dictionary_learning": "BatchTopK", "openai": "TopK", "gemma_scope_2": "JumpReLU",
          "batchtopk": "BatchTopK"}  # fmt: skip


def made(name, *, plain=False):
    """One that no tensor of is as it started."""
    draw = torch.Generator().manual_seed(3)
    sae = se.SparseAutoencoder(D, F, RULES[name](), **({} if plain else OPTIONS[name]))
    with torch.no_grad():
        for tensor in (*sae.parameters(), *sae.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=draw, dtype=torch.float64) + 0.1)
        if not sae.activation.encoder_bias:
            sae.b_enc.zero_()
    sae.provenance = se.Provenance(model="gpt2", layer=3, site="resid_post")
    return sae


def state(sae):
    from torch.distributed.tensor import DTensor

    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in sae.state_dict().items()}


def same(ours, theirs):
    ours, theirs = state(ours), state(theirs)
    return [name for name in ours.keys() | theirs.keys() if name not in ours or name not in theirs
            or ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])]  # fmt: skip


# --- what ranks do ----------------------------------------------------------------------------------------------------


def reads_and_writes(rank, size, folder):
    """What one process wrote is read by slices, and written by slices again: byte for byte the same files."""
    given, mesh, found = folder.parent / "given", mesh_of(size), {}
    for name in RULES:
        sae = se.SparseAutoencoder.from_pretrained(given / name, mesh=mesh)
        whole = se.SparseAutoencoder.from_pretrained(given / name)
        sae.save_pretrained(folder / name)
        whole.save_pretrained(alone := folder / f"{name} by {rank}")
        files = {file: (folder / name / file).read_bytes() == (alone / file).read_bytes() for file in (WEIGHTS, CONFIG)}
        left = sorted({p.name for p in (folder / name).iterdir()} - {WEIGHTS, CONFIG})
        found[name] = [same(sae, whole), repr(sae.activation) == repr(whole.activation), files, left,
                       sae.share.d_sae, str(sae.provenance) == str(whole.provenance)]  # fmt: skip
    return found


def reads_others(rank, size, folder):
    given, mesh, found = folder.parent / "given", mesh_of(size), {}
    for name in OTHERS:
        sae = se.SparseAutoencoder.from_pretrained(given / name, mesh=mesh, dtype="float64")
        found[name] = same(sae, se.SparseAutoencoder.from_pretrained(given / name, dtype="float64"))
    unit = {"fold_decoder_norms": True}
    sae = se.SparseAutoencoder.from_pretrained(given / "JumpReLU", mesh=mesh, **unit)
    found["folded"] = same(sae, se.SparseAutoencoder.from_pretrained(given / "JumpReLU", **unit))
    return found


def no_whole_tensor(rank, size, folder):
    """Neither in reading nor in writing does a rank make a tensor of all latents times the width."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest, reading = 0, False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, list | tuple) else (out,):
                # What ranks say to one another, as text, is no part of a tensor.
                plain = type(t) in (torch.Tensor, torch.nn.Parameter) and t.is_cpu and t.dtype != torch.uint8
                if plain and not Sizes.reading and t.untyped_storage().data_ptr() not in mapped:
                    Sizes.largest = max(Sizes.largest, t.untyped_storage().nbytes())
            return out

    import safetensors.torch

    from sae_engine import _decoder_rows

    _decoder_rows.BLOCK = 4  # latents whose initial rows are drawn at a time
    mapped, load_file = set(), safetensors.torch.load_file

    def remembered(*args, **options):
        Sizes.reading = True
        tensors = load_file(*args, **options)  # views of the file as it is mapped
        Sizes.reading = False
        mapped.update(t.untyped_storage().data_ptr() for t in tensors.values())
        return tensors

    safetensors.torch.load_file = remembered
    mesh = mesh_of(size)
    with Sizes():
        sae = se.SparseAutoencoder.from_pretrained(folder.parent / "given" / "BatchTopK", mesh=mesh)
        sae.save_pretrained(folder / "out")
    return [len(mapped), Sizes.largest, sae.share.W_enc.nbytes]


def converts(rank, size, folder):
    """Parameters to another dtype, thresholds not: as without a mesh; the share has the same memory."""
    mesh, found = mesh_of(size), {}
    for name in ("JumpReLU", "BatchTopK", "Gated"):
        sae = se.SparseAutoencoder.from_pretrained(folder.parent / "given" / name, mesh=mesh).to(torch.float64)
        one = se.SparseAutoencoder.from_pretrained(folder.parent / "given" / name).to(torch.float64)
        mine = dict(sae.share.state_dict())
        shared = all(t.data_ptr() == (w.to_local() if hasattr(w, "to_local") else w).data_ptr()
                     for t, w in ((mine[key], value) for key, value in sae.state_dict().items() if key != "W_enc"))
        found[name] = [same(sae, one), shared]
    return found


def refuses(rank, size, folder):
    mesh, given = mesh_of(size), folder.parent / "given"
    sae = se.SparseAutoencoder.from_pretrained(given / "TopK", mesh=mesh)
    read = se.SparseAutoencoder.from_pretrained
    said = [
        raised(lambda: sae.save_pretrained(folder / "a", format="openai")),
        raised(lambda: read(given / "gemma_scope", mesh=mesh)),
        raised(lambda: read(given / "nowhere", mesh=mesh)),
    ]
    torch.distributed.barrier()
    if rank == 0:
        (folder / "file").touch()
    torch.distributed.barrier()
    said.append(raised(lambda: sae.save_pretrained(folder / "file" / "below")))
    return [said, sorted(p.name for p in folder.iterdir() if "outcome" not in p.name and p.name != "rendezvous")]


def killed_while_saving(rank, size, folder):
    """The old files are whole, and no temporary is ever read."""
    mesh, at = mesh_of(size), folder / "sae"
    if rank == 0:
        shutil.copytree(folder.parent / "given" / "TopK", at)
    torch.distributed.barrier()
    sae = se.SparseAutoencoder.from_pretrained(at, mesh=mesh)
    with torch.no_grad():
        sae.share.W_dec.add_(1)
    if rank == 1:
        os.fsync = lambda _: os._exit(9)
    sae.save_pretrained(at)


# --- what is seen of it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name in RULES:
        made(name).save_pretrained(folder / "given" / name)
    for name, rule in {**OTHERS, "gemma_scope": "JumpReLU"}.items():
        sae = made(rule, plain=True)
        if rule == "JumpReLU":
            sae.apply_b_dec_to_input = False
        if name == "openai":
            sae.normalize_activations = "layer_norm"
        if name == "batchtopk":
            with torch.no_grad():
                sae.b_enc.zero_()
        place = folder / "given" / name
        sae.save_pretrained(place / "params.npz" if name == "gemma_scope" else place, format=name)
    sizes = {"reads_and_writes": 3, "reads_others": 4, "no_whole_tensor": 2, "converts": 2, "refuses": 2,
             "killed_while_saving": 3}  # fmt: skip
    return outcomes(__file__, sizes, folder) | {"folder": folder}


def test_what_was_read_by_slices_is_written_by_slices_byte_for_byte(ran):
    for rank, found in enumerate(succeeded(ran["reads_and_writes"])):
        for name, (differ, rule, files, left, mine, provenance) in found.items():
            assert (name, differ, rule, files, left) == (name, [], True, {WEIGHTS: True, CONFIG: True}, [])
            assert mine == [8, 8, 6][rank] and provenance


def test_other_formats_are_read_by_slices(ran):
    for found in succeeded(ran["reads_others"]):
        assert found == {name: [] for name in [*OTHERS, "folded"]}


def test_a_dtype_is_changed_as_without_a_mesh(ran):
    for found in succeeded(ran["converts"]):
        assert found == {name: [[], True] for name in ("JumpReLU", "BatchTopK", "Gated")}


def test_no_rank_makes_a_whole_matrix(ran):
    for mapped, largest, mine in succeeded(ran["no_whole_tensor"]):
        assert mapped and largest == mine < D * F * 4


def test_what_a_mesh_cannot_do_is_refused_by_all_ranks(ran):
    for rank, ((other, npz, nowhere, below), left) in enumerate(succeeded(ran["refuses"])):
        assert "format must be 'saelens' for an autoencoder on a mesh, got 'openai'" in other
        assert "mesh must be None: the format 'gemma_scope' cannot be read by slices" in npz
        assert "there is none at" in nowhere
        assert ("rank 0: " in below) == (rank != 0) and "NotADirectoryError" in below
        assert left == ["file"]


def test_a_kill_leaves_the_old_files_whole(ran):
    assert ran["killed_while_saving"][1].raised == "it was killed"
    for rank in (0, 2):
        assert "RuntimeError: rank 1 (process " in ran["killed_while_saving"][rank].raised
    at, given = ran["folder"] / "killed_while_saving" / "sae", ran["folder"] / "given" / "TopK"
    assert {p.name for p in at.iterdir()} == {WEIGHTS, CONFIG}
    assert (at / WEIGHTS).read_bytes() == (given / WEIGHTS).read_bytes()
    assert formats.detect(Path(at)) == "saelens"
