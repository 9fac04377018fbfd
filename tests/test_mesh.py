"""Latents over the ranks of a mesh, by gloo: selections, passes and training steps are those of one process.

One launch for each number of ranks, of many cases (``mesh_ranks``): starting processes takes longer than most of them.
A case that fails ends its rank, and with it the launch: the cases after it fail too, and say what the ranks said.
"""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import mesh_cases
import mesh_ranks
import pytest
import torch
import torch.distributed as dist
from played_cuda import Played
from structure import ROOT
from torch.distributed.device_mesh import init_device_mesh

import sae_engine as se
from sae_engine.distributed.layout import Ownership
from sae_engine.distributed.shards import Shards
from sae_engine.distributed.wire import shares, tree_sum

SIZES = 2, 3, 4
TIMEOUT = 300  # seconds for a launch
LAUNCHED = {}


def launched(size, factory):
    """The cases that went well on every rank, what the ranks said, and where they wrote."""
    if size not in LAUNCHED:
        folder = factory.mktemp("ranks")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(mesh_ranks.__file__).parent)}
        ranks = [
            subprocess.Popen(
                [sys.executable, mesh_ranks.__file__, str(rank), str(size), str(folder)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
            )
            for rank in range(size)
        ]  # fmt: skip
        said = []
        try:
            for rank in ranks:
                said.append(rank.communicate(timeout=TIMEOUT)[0][-3000:])
        finally:
            for rank in ranks:
                rank.kill()
        files = [folder / f"{rank}.txt" for rank in range(size)]
        done = [set(file.read_text().splitlines()) if file.exists() else set() for file in files]
        LAUNCHED[size] = set.intersection(*done), "\n".join(said), folder
    return LAUNCHED[size]


NAMED = [pytest.param(size, name, id=f"{size} ranks: {name}") for size in SIZES for name, _ in mesh_ranks.cases(size)]


@pytest.mark.parametrize(("size", "name"), NAMED)
def test_ranks_do_as_one_process(size, name, tmp_path_factory):
    done, said, _ = launched(size, tmp_path_factory)
    assert name in done, said


def test_every_rule_and_step_has_its_ranks():
    names = {name for _, name in (param.values for param in NAMED)}
    each = {f"encode: {rule}" for rule in mesh_cases.RULES} | {f"step: {step}" for step in mesh_cases.STEPS}
    assert each <= names and {f"data 2: {case}" for case in each} <= names


# --- by one process --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "sizes"), [(10, [4]), (9, [4]), (3, [4]), (64, [8]), (10, [2, 2]), (7, [3, 2])])
def test_latents_are_cut_as_torch_cuts_them(number, sizes):
    parts = [torch.arange(number)]
    for size in sizes:
        parts = [piece for part in parts for piece in [*part.chunk(size), *[part[:0]] * size][:size]]
    for rank, part in enumerate(parts):
        mine = Ownership.over(number, sizes, rank).mine
        assert torch.equal(torch.arange(number)[mine], part)
    assert sum(shares(number, sizes[0])) == number


def test_sums_are_trees_that_halves_share():
    parts = list(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))
    halves = [tree_sum(parts[:4]), tree_sum(parts[4:])]
    assert torch.equal(tree_sum(parts), tree_sum(halves))
    assert torch.equal(tree_sum(parts[:3]), (parts[0] + parts[1]) + parts[2])


def test_only_the_wire_calls_collectives():
    names = r"all_gather\w*|all_reduce|all_to_all\w*|reduce_scatter\w*|broadcast\w*|gather_object|scatter_object_list"
    called = re.compile(rf"dist(?:ributed)?\.(?:{names})\(")
    files = [*(ROOT / "sae_engine" / "distributed").glob("*.py"), *(ROOT / "sae_engine" / "losses").glob("*.py")]
    files += [ROOT / "sae_engine" / "training" / f"{n}.py" for n in ("step", "forward", "backward", "optimizer")]
    found = {file.name for file in files if called.search(file.read_text(encoding="utf-8"))}
    assert found <= {"wire.py"}, found


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A mesh of this process."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield se.distributed.from_env()
    dist.destroy_process_group()


def test_one_rank_is_one_process(alone):
    one, many = mesh_cases.pair(lambda: se.TopK(4), alone)
    first, second = mesh_cases.step_of(one), mesh_cases.step_of(many)
    for x in mesh_cases.batches(3):
        first(x)
        second(x)
    mesh_cases.same_state(one, many, first, second, 1e-12)


@pytest.mark.parametrize("dimensions", [("latent",), ("data", "latent")], ids="-".join)
@pytest.mark.parametrize("rule", ["TopK", "BatchTopK", "TopAFA", "Matryoshka", "decoder norms"])
def test_a_step_waits_for_no_device(rule, dimensions, alone, monkeypatch):
    """On a device that is played: a rank's own work. What hosts say to one another is no device's."""
    alone = init_device_mesh("cpu", (1,) * len(dimensions), mesh_dim_names=dimensions)
    agreement = Shards(alone, mesh_cases.F).agreement
    monkeypatch.setattr(agreement, "agree", lambda **fields: None)
    monkeypatch.setattr(agreement, "meet", lambda kind, rows: [rows])
    make, options = mesh_cases.RULES[rule]
    with Played() as played, torch.device("cuda"):
        sae = se.SparseAutoencoder(mesh_cases.D, mesh_cases.F, make(), **options)
        sae.shards = sae.activation.shards = Shards(alone, mesh_cases.F)
        sae.shards.trims = False
        losses = [] if rule == "Matryoshka" else [se.losses.AuxK(5)]
        unit_rows = not sae.rescale_acts_by_decoder_norm
        step = se.training.TrainStep(
            sae, lr=1e-3, losses=losses, normalize_decoder=unit_rows, nonfinite="skip", memory_budget=1 << 20
        )
        x = torch.randn(mesh_cases.B, mesh_cases.D)
        step.warm_up(x)
        with played.refusing():
            step(x)


class OfAUser(se.Activation):
    def _select(self, pre, backend):
        return se.functional.topk(pre, 1, backend=backend)


class TopKOfAUser(se.TopK):
    def _select(self, pre, backend):
        return se.functional.topk(pre, self.k, backend=backend)


class LossOfAUser(se.losses.Loss):
    name = "largest"

    def value(self, batch):
        return batch.codes.values.max()


def test_what_cannot_be_over_a_mesh_is_refused_by_name(alone):
    for rule in (OfAUser(), TopKOfAUser(2)):
        with pytest.raises(TypeError, match=f"{type(rule).__name__} cannot say how it selects over latents"):
            se.SparseAutoencoder(4, 16, rule, mesh=alone)
    sae = se.SparseAutoencoder(4, 16, se.TopK(2), mesh=alone)
    with pytest.raises(TypeError, match="LossOfAUser"):
        se.training.TrainStep(sae, lr=1e-3, losses=[LossOfAUser()])
    jump = se.SparseAutoencoder(4, 16, se.JumpReLU(16), mesh=alone)
    with pytest.raises(ValueError, match=r"blocks must be None with StepL0\(.*target=3"):
        se.training.TrainStep(jump, lr=1e-3, losses=[se.losses.StepL0(0.1, target=3)], blocks=2)
    with pytest.raises(ValueError, match="keep_pre must be False on a mesh"):
        sae.encode_with(torch.ones(2, 4), keep_pre=True)
    with pytest.raises(ValueError, match="attribution must be given as gradient on a mesh"):
        sae.encode(torch.ones(2, 4), attribution=torch.ones(2, 16))
    with pytest.raises(TypeError, match="cannot say how it selects"):
        sae.encode_with(torch.ones(2, 4), select=OfAUser())
    with pytest.raises(ValueError, match="x must hold at least one token on some rank"):
        sae(torch.ones(0, 4))
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        copy.deepcopy(sae)


def test_a_mesh_is_checked(alone):
    with pytest.raises(TypeError, match="mesh must be a torch DeviceMesh"):
        se.SparseAutoencoder(4, 16, se.TopK(2), mesh=8)
    with pytest.raises(ValueError, match="mesh must have the dimension 'latent'"):
        se.SparseAutoencoder(4, 16, se.TopK(2), mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)))
    for sizes in ({"latent": 2}, {"data": 2}, {"latent": 1, "node": 2}):
        with pytest.raises(ValueError, match=r"latent must be such that latent \* node \* data = 1"):
            se.distributed.from_env(**sizes)
    for names in (("latent", "data"), ("node", "data", "latent"), ("data",)):
        wrong = init_device_mesh("cpu", (1,) * len(names), mesh_dim_names=names)
        with pytest.raises(ValueError, match="in this order, got"):
            se.SparseAutoencoder(4, 16, se.TopK(2), mesh=wrong)
    with pytest.raises(TypeError, match="numbers must be integers"):
        se.SparseAutoencoder(4, 16, se.TopK(2), mesh=alone).shards.wire.add(torch.ones(2), "floats")


def test_without_torchrun_the_environment_is_named(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE.*torchrun"):
        se.distributed.from_env()


def test_a_share_follows_its_autoencoder(alone):
    """Options of the rule, mode, frozen parameters, dtype: what changes on the whole changes on the share."""
    sae = se.SparseAutoencoder(4, 16, se.TopK(2), mesh=alone)
    sae.activation.k = 3
    assert sae.encode(torch.ones(2, 4)).l0.max() <= 3 and sae.share.activation.k == 3
    sae.eval()
    sae.W_enc.requires_grad_(False)
    assert not sae.share.training and not sae.share.activation.training and not sae.share.W_enc.requires_grad
    sae.double()
    with torch.no_grad():
        sae.W_dec.mul_(2)
    assert sae.share.W_dec.dtype == torch.float64 and torch.equal(sae.share.W_dec, sae.W_dec.to_local())
    state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    with torch.no_grad():
        sae.share.W_enc.zero_()
    sae.load_state_dict(state)
    assert sae.share.W_enc.abs().sum() > 0
