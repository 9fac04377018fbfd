"""Folders of crosscoders on a mesh: every format is read by slices, with the bits of one process."""
from __future__ import annotations

import shutil

import pytest
import torch
from crosscoder_cases import forge, made, theirs
from forked_ranks import mesh_of, outcomes, raised, succeeded
from pair_loop import SITES, D, F, batch

import sae_engine as se

# The wiring and rule that each folder holds, and its format.
FOLDERS = {
    "ours": ("causal", "jumprelu", "sae_engine"), "one budget": ("causal", "batch", "sae_engine"),
    "budgets": ("windows", "batches", "sae_engine"), "joint": ("joint", "topk", "sae_engine"),
    "clt": ("causal", "jumprelu", "circuit_tracer_clt"), "clt of ReLU": ("causal", "relu", "circuit_tracer_clt"),
    "set": ("local", "jumprelu", "transcoder_set"), "gemma": ("causal", "jumprelu", "gemma_scope_2_clt"),
    "gemma, each": ("each", "jumprelu", "gemma_scope_2_clt"),
    "pairs": ("joint", "relu", "dictionary_learning_crosscoder"),
    "pairs, batch": ("joint", "batch", "dictionary_learning_crosscoder"),
}
FORGED = {"forge": (True, 1), "forge, local": (False, 1), "forge of two": (True, 2), "forge of three": (True, 3)}
# Of dictionary_learning with activations that were centred and scaled, which is folded: id, k, scales.
SCALED = {"scaled": (2, None, [0.5, 2.0]), "scaled, batch": (1, 3, [0.5, 2.0])}
EVERY = [*FOLDERS, *FORGED, *SCALED]


def state(coder):
    from torch.distributed.tensor import DTensor

    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in coder.state_dict().items()}


def reads(rank, size, folder):
    return _reads(mesh_of(size), folder)


def reads_in_groups(rank, size, folder):
    return _reads(mesh_of(size, data=2), folder)


def _reads(mesh, folder):
    """What differs from what one process reads."""
    found = {}
    for name in EVERY:
        place = folder.parent / "given" / name
        many, one = se.Crosscoder.from_pretrained(place, mesh=mesh), se.Crosscoder.from_pretrained(place)
        ours, theirs_ = state(many), state(one)
        differ = [key for key, t in theirs_.items() if ours[key].dtype != t.dtype or not torch.equal(ours[key], t)]
        same = [ours.keys() == theirs_.keys(), repr(many.activation) == repr(one.activation), many.wiring == one.wiring,
                str(many.provenance) == str(one.provenance), many.card == one.card]  # fmt: skip
        x = batch(dtype=torch.float32)[0][:, : len(one.read_widths)]
        own = slice(mesh.get_rank() if mesh.ndim == 1 else torch.distributed.get_rank(), None, mesh.size())
        apart = float((many.eval()(x[own]) - one.eval()(x)[own]).abs().max())
        found[name] = [differ, all(same), apart < 1e-4]
    wide = se.Crosscoder.from_pretrained(folder.parent / "given" / "ours", mesh=mesh, dtype="float64")
    one = se.Crosscoder.from_pretrained(folder.parent / "given" / "ours", dtype="float64")
    differ = [name for name, t in state(one).items() if not torch.equal(state(wide)[name], t)]
    return found | {"another dtype": [differ, True, True]}


def makes_no_whole_weight(rank, size, folder):
    """Only views of files as they are mapped have all latents and a width."""
    import safetensors.torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from sae_engine import _decoder_rows

    _decoder_rows.BLOCK = 4  # latents whose initial rows are drawn at a time
    mapped = {}

    def remembering(read):
        def reads(*args, **options):
            mode.on = False
            found = read(*args, **options)
            mode.on = True
            mapped.update({t.untyped_storage().data_ptr(): t for t in found.values()})
            return found

        return reads

    class Watch(TorchDispatchMode):
        on, made = True, []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, list | tuple) else (out,):
                plain = type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu"
                whole = plain and Watch.on and F in t.shape and t.numel() >= F * D
                if whole and t.untyped_storage().data_ptr() not in mapped:
                    Watch.made.append([str(func), *t.shape])
            return out

    mode, mesh = Watch, mesh_of(size)
    safetensors.torch.load_file = remembering(safetensors.torch.load_file)
    torch.load = remembering(torch.load)
    for name in EVERY:
        with Watch():
            coder = se.Crosscoder.from_pretrained(folder.parent / "given" / name, mesh=mesh)
        assert coder.share.d_sae == F // size
    return [len(mapped) > len(EVERY), Watch.made]


def refuses(rank, size, folder):
    mesh, given, read = mesh_of(size), folder.parent / "given", se.Crosscoder.from_pretrained
    return [
        raised(lambda: read(given / "nowhere", mesh=mesh)),
        raised(lambda: read(given / "neither", mesh=mesh)),
        raised(lambda: read(given / "torn", mesh=mesh)),
        raised(lambda: read(given / "short", mesh=mesh)),
        raised(lambda: read(given / "not a number", mesh=mesh)),
    ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    given = folder / "given"
    for name, (wiring, rule, format) in FOLDERS.items():
        made(wiring, rule, skip=format in ("transcoder_set", "gemma_scope_2_clt")).save_pretrained(
            given / name, format=format)  # fmt: skip
    for name, (crosses, shards) in FORGED.items():
        forge(given / name, crosses, shards)
    for name, (id, k, scales) in SCALED.items():
        theirs(given / name, id, k, scales)
    spoiled(given)
    sizes = {"reads": 3, "reads_in_groups": 4, "makes_no_whole_weight": 2, "refuses": 2}
    return outcomes(__file__, sizes, folder)


def spoiled(given):
    """What is wrong with some latents only: those of the last rank."""
    from safetensors.torch import load_file, save_file

    def changed(name, source, file, change):
        shutil.copytree(given / source, given / name)
        tensors = load_file(given / name / file)
        change(tensors)
        save_file({key: t.contiguous() for key, t in tensors.items()}, given / name / file)

    def writes_back(tensors):
        tensors["w_dec"][F - 1, 0] = 1.0

    def is_short(tensors):
        tensors["W_dec"] = tensors["W_dec"][:-1]

    def has_no_threshold(tensors):
        tensors["rule.threshold"][F - 1] = torch.nan

    changed("neither", "gemma", "params_layer_2.safetensors", writes_back)
    changed("short", "ours", "source_1.safetensors", is_short)
    changed("not a number", "ours", "source_1.safetensors", has_no_threshold)
    shutil.copytree(given / "ours", given / "torn")
    (given / "torn" / f"source_{SITES - 1}.safetensors").unlink()


@pytest.mark.parametrize("name", [*EVERY, "another dtype"])
@pytest.mark.parametrize("case", ["reads", "reads_in_groups"])
def test_slices_have_the_bits_of_the_whole(ran, case, name):
    for found in succeeded(ran[case]):
        assert found[name] == [[], True, True]


def test_no_rank_makes_a_whole_weight(ran):
    for looked, made_whole in succeeded(ran["makes_no_whole_weight"]):
        assert looked and made_whole == []


def test_what_is_wrong_is_said_by_all_ranks(ran):
    for rank, (nowhere, neither, torn, short, nan) in enumerate(succeeded(ran["refuses"])):
        assert "path must be the folder of a crosscoder; there is none at" in nowhere
        assert "params_layer_2.safetensors: w_dec writes layers before 2, which layer 1 does not" in neither
        assert "the number of files source_….safetensors must be 3, got 2" in torn
        assert f"source_1.safetensors: W_dec must be of {F} latents, got {F - 1}" in short
        assert ("rank 1: " in nan) == (rank == 0) and "threshold must not be negative or NaN" in nan
