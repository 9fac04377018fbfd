"""Runs over the processes of a mesh: those of one process over the same rows, killed, resumed, by others."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from forked_ranks import outcomes, raised, succeeded
from short_runs import SAE, settings, timeless

import sae_engine as se
from sae_engine.data.memory import TensorStream
from sae_engine.training import checkpoint
from sae_engine.training.architectures import Architecture, TopKSAE
from sae_engine.training.callbacks import Callback, Interrupted
from sae_engine.training.config import ConfigError, MeshConfig
from sae_engine.training.first_weights import directions
from sae_engine.training.forward import PreActivations
from sae_engine.training.meshes import check_mesh, settled
from sae_engine.training.ranks import Ranks
from sae_engine.training.run import Run
from sae_engine.training.settings import configured
from sae_engine.training.trainee import Trainee
from sae_engine.training.trainer import resume, train

if __name__ == "cases":  # here once, not in every fork
    import pydantic  # noqa: F401
    import tokenizers  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401
    import yaml  # noqa: F401

HOOK, OUT = "blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"
SAES = [
    SAE | {"name": "plain", "d_sae": 90},  # on four processes 23, 23, 23 and 21
    {"name": "batch", "hook_name": HOOK, "architecture": "batchtopk", "k": 4, "d_sae": 64, "b_dec_init": "mean"},
    {"name": "afa", "hook_name": HOOK, "architecture": "top_afa", "l0_at_start": 6, "d_sae": 64},
    {"name": "coder", "hook_name": HOOK, "hook_name_out": OUT, "architecture": "jumprelu", "d_sae": 50},
    {"name": "recipe", "hook_name": [HOOK, OUT], "wiring": "causal", "architecture": "tanh_jumprelu", "d_sae": 42,
     "normalize_activations": "standardize", "aux_k_coefficient": 0, "l0_at_start": 5},
    {"name": "budget", "hook_name": [HOOK, OUT], "wiring": "each", "architecture": "batchtopk", "k": 4, "d_sae": 50},
    {"name": "joint", "hook_name": [OUT, HOOK], "hook_name_out": [HOOK], "architecture": "topk", "k": 3, "d_sae": 30,
     "normalize_activations": "none", "rescale_acts_by_decoder_norm": True, "b_dec_init": "mean"},
]  # fmt: skip
PLACES = {"coder": ((0,), (1,)), "recipe": ((0, 1), (0, 1)), "budget": ((0, 1), (0, 1)), "joint": ((1, 0), (0,))}
NAMES = [str(sae["name"]) for sae in SAES]


def rows(seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(640, width, generator=draw) for width in (16, 12)]


def of_rows(folder: Path, **changes):
    changes = {"mesh": 2, "saes": SAES, "output__save_total_limit": 9, **changes}
    return settings(folder, **changes)


LAYERS = {"name": "clt", "hook_name": "blocks.{0..1}.hook_resid_mid", "hook_name_out": "blocks.{0..1}.hook_mlp_out",
          "wiring": "causal", "architecture": "topk", "k": 4, "d_sae": 64}  # fmt: skip

SHARED = LAYERS | {"name": "shared", "k": 8, "over_sources": True}


def of_text(folder: Path):
    return settings(folder, mesh={"latent": 2}, data__training_tokens=64 * 8, eval__eval_steps=0, output__save_steps=4,
                    saes=[SAE | {"name": "plain"}, LAYERS, SHARED])  # fmt: skip


def copied(run: Path, to: Path, update: int) -> Path:
    """The run as it was after so many updates."""
    shutil.copytree(run, to)
    for number, place in checkpoint.listed(to).items():
        if number > update:
            shutil.rmtree(place)
    return to


# --- what processes do ------------------------------------------------------------------------------------------------


class At(Callback):
    def __init__(self, update: int, rank: int, number: int) -> None:
        self.update, self.rank, self.number = update, rank, number

    def on_update(self, trainer) -> None:
        if trainer.update == self.update and trainer.ranks.rank == self.rank:
            os.kill(os.getpid(), self.number)


def on_two(rank, size, folder):
    run = train(of_rows(folder.parent / "whole"), dataset=rows())
    return [sorted(place.name for place in (run.folder / "sae" / "plain").iterdir()), run.saes()["plain"].d_sae]


def killed_on_two(rank, size, folder):
    try:
        train(of_rows(folder.parent / "parts"), dataset=rows(), callbacks=[At(9, 1, signal.SIGKILL)])
    except RuntimeError as error:
        (folder / "said").write_text(str(error))


def resumed_on_two(rank, size, folder):
    run, before = folder.parent / "parts", 0
    try:
        resume(run, dataset=rows(), callbacks=[At(15, rank=0, number=signal.SIGTERM)])
    except Interrupted as stopped:
        before = stopped.signal
    resume(run, dataset=rows())
    return before


def resumed_on_four(rank, size, folder):
    run = copied_by_one(rank, folder, "four", 12)
    resume(run, settings=["mesh={latent: 2, data: 2}"], dataset=rows())
    return [Run(run).config.mesh.latent, Run(run).config.mesh.data]


def tokens_over_two(rank, size, folder):
    """What torchrun starts without a word about a mesh; some of it by the other way of cutting."""
    train(of_rows(folder.parent / "data", mesh=None), dataset=rows())
    run = copied_by_one(rank, folder, "turned", 12, "data")
    resume(run, settings=["mesh=2"], dataset=rows())
    return [Run(folder.parent / name).config.mesh.data for name in ("data", "turned")]


def both_over_four(rank, size, folder):
    train(of_rows(folder.parent / "both", mesh={"latent": 2, "data": 2}), dataset=rows())
    resume(copied_by_one(rank, folder, "nodes", 18, "both"), settings=["mesh={latent: 2, node: 2}"], dataset=rows())


def resumed_on_three(rank, size, folder):
    """Where one process has no rows of its own; and the newest checkpoint is damaged."""
    run = copied_by_one(rank, folder, "three", 18)
    if rank == 0:
        next(checkpoint.listed(run)[18].glob("__1_*")).write_bytes(b"")
    torch.distributed.barrier()
    resume(run, settings=["mesh=3"], dataset=rows())
    return sorted(checkpoint.listed(run))


def copied_by_one(rank, folder, name, update, of="whole"):
    run = folder.parent / name
    if rank == 0:
        copied(folder.parent / of, run, update)
    torch.distributed.barrier()
    return run


def text_on_two(rank, size, folder):
    train(of_text(folder.parent / "text"))


def text_on_one(rank, size, folder):
    resume(copied_by_one(rank, folder, "text-one", 4, "text"), settings=["mesh=1"])


def started_on_two(rank, size, folder):
    """From a crosscoder that a run has left."""
    recipe = next(sae for sae in SAES if sae["name"] == "recipe")
    again = recipe | {"from_pretrained": str(folder.parent / "whole" / "sae" / "recipe")}
    train(of_rows(folder.parent / "again", saes=[again], data__training_tokens=64), dataset=rows())


def apart_on_two(rank, size, folder):
    """The second process sees nothing of the first one's disk, neither when the run begins nor when it goes on."""
    place = folder / f"disk {rank}"
    place.mkdir()
    os.chdir(place)
    before = 0
    try:
        train(of_rows(Path("run")), dataset=rows(), callbacks=[At(9, rank=0, number=signal.SIGTERM)])
    except Interrupted as stopped:
        before = stopped.signal
    run = resume("run", dataset=rows())
    nowhere = raised(lambda: resume("nowhere", dataset=rows()))
    return [before, str(run.folder), nowhere, sorted(one.name for one in place.iterdir())]


SIZES = {"on_two": 2, "started_on_two": 2, "killed_on_two": 2, "resumed_on_two": 2, "resumed_on_four": 4,
         "resumed_on_three": 3, "apart_on_two": 2, "tokens_over_two": 2, "both_over_four": 4, "text_on_two": 2,
         "text_on_one": 1}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ran")
    found = outcomes(__file__, SIZES, folder, timeout=300)
    for name in SIZES.keys() - {"killed_on_two"}:
        succeeded(found[name])
    return found, folder


# --- held to one process ----------------------------------------------------------------------------------------------


def tensors(run: Path, update: int) -> dict[str, torch.Tensor]:
    """All of a checkpoint, read without any process group."""
    place = checkpoint.listed(run)[update]
    kinds = json.loads((place / checkpoint.STATE).read_text())["tensors"]
    found = {name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
             for name, (dtype, *shape) in kinds.items()}  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(found, storage_reader=dcp.FileSystemReader(place), no_dist=True)
    return found


def lines_of(run: Path) -> list[dict]:
    return [line for line in timeless(Run(run)) if "plain/losses/mse_loss" in line]


def near(one, other, tolerance=2e-4):
    return torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("number", range(len(SAES)), ids=NAMES)
@pytest.mark.parametrize(("run", "world"), [("whole", 2), ("data", 2), ("both", 4)])
def test_a_run_on_a_mesh_is_that_of_one_process_over_the_same_rows(ran, run, world, number):
    """By hand: all processes' rows, one below the other, given to one autoencoder with all its latents."""
    run = ran[1] / run
    config = Run(run).config
    sae, name = config.saes[number], NAMES[number]
    streams = [TensorStream(rows(), batch_rows=64 // world, seed=config.seed, rank=rank, world=world,
                            chunk_rows=config.data.shuffle_tokens) for rank in range(world)]  # fmt: skip
    trainee = Trainee(sae, config, places=PLACES.get(name, ((0,), (0,))), context={}, widths=(16, 12), total=24,
                      device=torch.device("cpu"), mean=None, buffer=PreActivations())  # fmt: skip
    trainee.begin(tuple(map(torch.cat, zip(*(s.first_chunk() for s in streams), strict=True))), 1)
    begun, ended = tensors(run, 0), tensors(run, 24)
    for key, tensor in trainee.sae.state_dict().items():
        is_drawn = key.split(".")[0] in ("W_enc", "W_dec") and name != "afa"  # whose scale is a sum
        assert (torch.equal if is_drawn else near)(begun[f"saes/{name}/sae/{key}"], tensor), key
    losses = []
    for update in range(24):
        batch = tuple(map(torch.cat, zip(*(s.next() for s in streams), strict=True)))
        trainee.train(lambda site, scale, batch=batch: batch[site] * scale, update)
        if (update + 1) % 5 == 0 or update == 23:
            losses.append(float(trainee.metrics()["losses/mse_loss"]))
    logged = [line[f"{name}/losses/mse_loss"] for line in lines_of(run)]
    assert logged == pytest.approx(losses, rel=1e-4) and logged[-1] < logged[0]
    for key, tensor in trainee.sae.state_dict().items():
        assert near(ended[f"saes/{name}/sae/{key}"], tensor), key
    fired = ended[f"saes/{name}/densities/fired"].unflatten(1, (-1, 2)).permute(2, 1, 0)
    assert near(fired.flatten(1), trainee.densities.counts[:, :-1])
    written, exported = Run(run).saes()[name], trainee.exported()
    for key, tensor in exported.state_dict().items():
        assert near(written.state_dict()[key], tensor), key


def test_a_crosscoder_that_was_saved_goes_on_on_a_mesh(ran):
    """For rows as they are scaled now; its first export is what it started from."""
    run = ran[1] / "again"
    begun, saved = tensors(run, 0), Run(ran[1] / "whole").saes()["recipe"]
    state = json.loads((checkpoint.listed(run)[0] / checkpoint.STATE).read_text())["state"]["saes"]["recipe"]
    read, written = (
        se.Standardization((16, 12), begun[f"saes/recipe/means/{side}"].double(), torch.tensor(scales).double())
        for side, scales in enumerate(state["scales"])
    )
    again = se.fold_standardization(saved, read.inverse(), written.inverse()).state_dict()
    for key, tensor in again.items():
        assert near(begun[f"saes/recipe/sae/{key}"], tensor, 1e-4), key


def test_what_it_writes_is_there_when_it_returns_in_every_process(ran):
    """One SAELens folder, of all latents; a line of metrics for each measurement, though there are two processes."""
    found, folder = ran
    files = ["cfg.json", "sae_weights.safetensors", "sparsity.safetensors"]
    assert succeeded(found["on_two"]) == [[files, 90]] * 2
    lines = lines_of(folder / "whole")
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 24]
    assert lines[-1]["data/rows"] == 64 * 24  # of both
    assert (folder / "whole" / "report.html").exists() and not (folder / "whole" / ".lock").exists()


def test_whoever_is_killed_is_named_and_a_resumed_run_ends_with_the_bits_of_one_that_was_not(ran):
    """One process is killed after update 9, the run goes on from 6, is stopped by a signal at 15, and goes on again."""
    found, folder = ran
    said = (folder / "killed_on_two" / "said").read_text()
    assert "rank 1 (process " in said and " has ended) does not answer" in said
    assert succeeded(found["resumed_on_two"]) == [signal.SIGTERM] * 2
    one, two = (tensors(folder / run, 24) for run in ("whole", "parts"))
    assert one.keys() == two.keys() and any("exp_avg_sq" in name for name in one)
    assert [name for name, t in one.items() if not torch.equal(t, two[name])] == []
    assert timeless(Run(folder / "whole")) == timeless(Run(folder / "parts"))
    weights = ["sae/batch/sae_weights.safetensors", "sae/coder/cfg.json"]
    assert all((folder / "whole" / name).read_bytes() == (folder / "parts" / name).read_bytes() for name in weights)


def test_a_run_goes_on_without_a_shared_disk(ran):
    found, folder = ran
    nowhere = "FileNotFoundError: run: 'nowhere' holds no config.yaml: it is not the folder of a run"
    for rank, told in enumerate(succeeded(found["apart_on_two"])):
        assert told == [signal.SIGTERM, "run", nowhere, ["run"] if rank == 0 else []]
    apart = folder / "apart_on_two" / "disk 0" / "run"
    one, two = tensors(folder / "whole", 24), tensors(apart, 24)
    assert one.keys() == two.keys() and [name for name, t in one.items() if not torch.equal(t, two[name])] == []
    for name in NAMES:
        assert all((apart / "sae" / name / file.name).read_bytes() == file.read_bytes()
                   for file in (folder / "whole" / "sae" / name).iterdir()), name  # fmt: skip


@pytest.mark.parametrize(("before", "name"), [
    ("whole", "four"), ("whole", "three"), ("data", "turned"), ("both", "nodes"),
])  # fmt: skip
def test_other_processes_go_on_with_the_same_rows(ran, before, name):
    found, folder = ran
    assert succeeded(found["resumed_on_four"]) == [[2, 2]] * 4
    assert succeeded(found["resumed_on_three"]) == [[0, 6, 12, 18, 24]] * 3
    assert succeeded(found["tokens_over_two"]) == [[2, 1]] * 2
    one, other = tensors(folder / before, 24), tensors(folder / name, 24)
    assert one.keys() == other.keys()
    assert [name for name, t in one.items() if name.startswith("saes/") and not near(t, other[name])] == []
    assert [line["data/rows"] for line in lines_of(folder / name)] == [320, 640, 960, 1280, 1536]


def test_a_language_models_rows_and_the_evaluation(ran):
    """Each process reads its own documents; one that goes on alone reads those of both."""
    _, folder = ran
    two, one = (timeless(Run(folder / run)) for run in ("text", "text-one"))
    assert [line["step"] for line in two] == [line["step"] for line in one] == [5, 8, 8]
    for key in ("data/tokens", "data/rows", "plain/metrics/l0", "tokens"):
        assert [line.get(key) for line in two] == [line.get(key) for line in one], key
    for key in ("plain/losses/mse_loss", "plain/evaluation/fvu", "plain/evaluation/ce_recovered", "clt/losses/mse_loss",
                "clt/evaluation/fvu", "clt/evaluation/ce_spliced", "clt/evaluation/cross_layer", "clt/evaluation/l0"):
        values = [[line[key] for line in run if key in line] for run in (two, one)]
        assert values[0] == pytest.approx(values[1], rel=1e-3) and values[0], key
    sae, clt, shared = Run(folder / "text").saes().values()
    config = Run(folder / "text").config
    held_out = se.data.open_source("stdlib", hold_out=config.data.eval_fraction_documents).held_out(256, tokens=256)
    lm = se.data.load_language_model()
    special = [word for word in ("bos", "eos") if getattr(lm.tokenizer, f"{word}_token_id") is not None]
    options = dict(context_length=32, batch_size=4, drop_first=True, first_token="bos", exclude_tokens=special,
                   max_tokens=256)  # fmt: skip
    measured = {"plain": se.metrics.evaluation.evaluate_during(sae, lm, held_out, site=HOOK, **options)}
    for name, coder in {"clt": clt, "shared": shared}.items():
        measured[name] = se.metrics.evaluate_sites_during(
            coder, lm, held_out, sites=coder.provenance.sites, target_sites=coder.provenance.target_sites, **options)
    for name, found in measured.items():
        for key, value in found.items():
            assert two[-1][f"{name}/{key}"] == pytest.approx(value, rel=1e-3), key


def test_first_weights_are_drawn_in_pieces_that_are_those_of_one_draw():
    for count, width in ((90, 7), (4097, 3), (9000, 5)):
        drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(4))
        whole = drawn / drawn.norm(dim=1, keepdim=True)
        for mine in (slice(0, count), slice(count // 3, count // 3 * 2), slice(count - 5, count)):
            assert torch.equal(directions(count, width, torch.Generator().manual_seed(4), mine), whole[mine])


# --- torchrun, and one run after another ------------------------------------------------------------------------------

PROGRAM = """
import os, sys
import torch
from sae_engine.cli import main
torch.set_num_threads(1)
rows = [torch.randn(640, width, generator=torch.Generator().manual_seed(0)) for width in (16, 12)]
for config in sys.argv[1:]:
    import sae_engine.training.trainer as trainer
    plain, trainer.train = trainer.train, lambda config: plain(config, dataset=rows)
    assert main(["train", config]) == 0
    trainer.train = plain
"""


def test_one_run_after_another_under_torchrun(tmp_path):
    """Over latents, over tokens, over latents again; what the command says is said once."""
    meshes = [2, None, {"data": 2}, 2]
    files = []
    for number, mesh in enumerate(meshes):
        config = of_rows(tmp_path / f"run{number}", mesh=mesh, saes=SAES[:1], data__training_tokens=64 * 6)
        config["saes"] = [SAES[0] | {"hook_name_out": OUT}]
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(json.dumps(config))
    (tmp_path / "program.py").write_text(PROGRAM)
    started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*started, str(tmp_path / "program.py"), *map(str, files)], capture_output=True, text=True, timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("autoencoders: ") == len(meshes), done.stdout
    weights = [(tmp_path / f"run{number}" / "sae" / "plain" / "sae_weights.safetensors").read_bytes()
               for number in range(len(meshes))]  # fmt: skip
    assert weights[0] == weights[3] and weights[1] == weights[2]


# --- what is refused --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OwnSAE(Architecture):
    def build_rule(self, d_sae, steps):
        return OwnRule()


class OwnLoss(se.losses.Loss):
    name = "own"


@dataclass(frozen=True, kw_only=True)
class LossySAE(TopKSAE):
    def losses(self, d_in, d_out):
        return [OwnLoss()]


@dataclass(frozen=True, kw_only=True)
class StartedSAE(TopKSAE):
    def start(self, sae, x):
        sae.b_enc.add_(x.mean())


class OwnRule(se.Activation):
    def _select(self, pre, backend):
        return se.functional.topk(pre, 1, backend=backend)


def refused(folder, match, **changes):
    with pytest.raises(ConfigError, match=match):
        train(of_rows(folder / "run", **changes), model="none that could be loaded")
    assert not (folder / "run").exists()


def test_what_cannot_be_trained_on_a_mesh_is_refused_by_its_field(tmp_path):
    said = r"^mesh: must be of all processes: latent \* node \* data = "
    refused(tmp_path, said + "2, and there is 1; start them with: torchrun")
    refused(tmp_path, said + "3", mesh={"data": 3})
    refused(tmp_path, said + "6", mesh={"data": 2, "latent": 3})
    refused(tmp_path, r"^mesh: must be a mapping", mesh="two")
    refused(tmp_path, r"^saes\.0\.d_sae: must be at least .* = 256, got 128", saes=[SAE], mesh=256)
    own = {"hook_name": HOOK, "architecture": f"{__name__}:OwnSAE", "d_sae": 64}
    refused(tmp_path, r"^saes\.1\.architecture: .*OwnRule cannot say how", saes=[SAE, own], mesh=1)
    started = own | {"architecture": f"{__name__}:StartedSAE"}
    refused(tmp_path, r"^saes\.0\.architecture: .*:StartedSAE does not say that it does", saes=[started], mesh=1)
    lossy = own | {"architecture": f"{__name__}:LossySAE"}
    refused(tmp_path, r"^saes\.0\.architecture: .*OwnLoss\(.* does not say", saes=[lossy], mesh=1)


def test_processes_that_name_no_mesh_are_one_over_tokens(tmp_path):
    config = configured(of_rows(tmp_path, mesh=None))
    assert settled(config, Ranks(world=2)).mesh == MeshConfig(data=2)
    assert settled(config, Ranks()).mesh is None
    with pytest.raises(ConfigError, match=r"^mesh: must be given where several .* there are 2; go on in one"):
        check_mesh(config, Ranks(world=2), goes_on=True)


def test_streams_are_dealt_to_neighbours():
    dealt = {world: [list(Ranks(rank, world, parts=4).own_streams) for rank in range(world)] for world in (1, 3, 4, 5)}
    assert dealt == {1: [[0, 1, 2, 3]], 3: [[0, 1], [2, 3], []], 4: [[0], [1], [2], [3]], 5: [[0], [1], [2], [3], []]}


def test_how_to_go_on_names_torchrun(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    said = str(Interrupted(signal.SIGTERM, Path("runs/a")))
    assert said.endswith("torchrun --nproc-per-node=4 --no-python sae-engine train --resume runs/a")


def test_a_run_keeps_the_way_in_which_it_is_dealt(ran, tmp_path):
    run = train(settings(tmp_path / "run", saes=[SAE], data__training_tokens=128, eval__eval_tokens=0),
                dataset=torch.randn(640, 16))  # fmt: skip
    with pytest.raises(ConfigError, match=r"^mesh: must be of all .* there is 1; start .*, or go on .* --set mesh=1$"):
        resume(ran[1] / "whole", dataset=rows())
    with pytest.raises(ValueError, match=r"^mesh: a run that began on a mesh, and no other, goes on"):
        resume(run.folder, settings=["mesh=1"], dataset=torch.randn(640, 16))
