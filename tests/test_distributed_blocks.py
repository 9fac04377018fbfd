"""``TrainStep(blocks=)``: one run has the same bits whatever mesh of 1, 2 or 4 ranks it is on, in groups or not.

A launch for each mesh; the run of one rank is also held to a step without blocks.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_ranks import mesh_of, outcomes, succeeded

import sae_engine as se
from sae_engine.losses import AFA, L1, AuxK, AuxZipf, GateLoss, MultiTopK, StepL0, TanhL0
from sae_engine.training import TrainStep

B, D, F, V = 48, 16, 64, 4
F32, F64 = torch.float32, torch.float64
CUT = {"W_enc": 1, "W_dec": 0, "b_enc": 0}


def jump():
    return se.JumpReLU(F, threshold=0.3, bandwidth=0.8)


# The rule, what the step is given, and the autoencoder; a number of steps that is not 4.
RUNS = {
    "TopK, AuxK": (lambda: se.TopK(4), {"losses": [AuxK(8)], "dead_after": 100}, {}, 20),
    "AuxK of SAELens": (lambda: se.TopK(4), {"losses": [AuxK.saelens()], "dead_after": 30}, {}),
    "AuxK, clipped, accumulated": (lambda: se.TopK(2), {"losses": [AuxK(8)], "dead_after": 100, "grad_clip": 0.3,
                                                        "accumulate": 2}, {}),
    "BatchTopK": (lambda: se.BatchTopK(3.5), {}, {}),
    "BatchTopK, accumulated": (lambda: se.BatchTopK(3.5), {"accumulate": 2}, {}),
    "slabs": (lambda: se.TopK(4), {"memory_budget": B * 16 * 4}, {}),
    "slabs of rows": (se.TopAFA, {"memory_budget": 8 * F * 5}, {}),
    "norms": (lambda: se.TopK(4), {"normalize_decoder": False, "grad_clip": 0.3},
              {"rescale_acts_by_decoder_norm": True}),
    "16 bits": (lambda: se.TopK(4), {"compute_dtype": "bfloat16", "moments": "bfloat16"}, {}),
    "Matryoshka": (lambda: se.MatryoshkaBatchTopK(3, widths=[24, 64]), {}, {}),
    "MultiTopK": (lambda: se.TopK(3), {"losses": [MultiTopK()]}, {}),
    "L1": (se.ReLU, {"losses": [L1(0.1)], "normalize_decoder": False}, {}),
    "StepL0": (jump, {"losses": [StepL0(0.1)], "grad_clip": 0.3}, {}),
    "TanhL0": (jump, {"losses": [TanhL0(0.1)], "accumulate": 2}, {"rescale_acts_by_decoder_norm": True}),
    "LogJumpReLU": (lambda: se.LogJumpReLU(F, threshold=0.3, bandwidth=0.8), {"losses": [StepL0(0.1)]}, {}),
    "Gated": (lambda: se.Gated(F), {"losses": [GateLoss(0.1)]}, {}),
    "Gated, norms": (lambda: se.Gated(F), {"losses": [GateLoss(0.1)]}, {"rescale_acts_by_decoder_norm": True}),
    "AFA": (se.TopAFA, {"losses": [AFA(1 / 32)]}, {}),
    "FeatureChoice": (lambda: se.FeatureChoice(F, 3, mutual_steps=1), {"losses": [AuxZipf(4)]}, {}),
    "SampledTopK": (lambda: se.SampledTopK(3, pool=2.0), {}, {}),
    "layer norm, skip": (lambda: se.TopK(4), {"weight_decay": 0.01},
                         {"normalize_activations": "layer_norm", "skip": True}),
    "not finite": (lambda: se.TopK(4), {"nonfinite": "skip", "accumulate": 2, "losses": [AuxK(8)],
                                        "dead_after": 100}, {}),
    "row by row": (lambda: se.TopK(4), {"moments": "bfloat16"}, {"contiguous_parameters": True}),
}  # fmt: skip


NAMES = [(name, dtype) for number, name in enumerate(RUNS) for dtype in ((F32, F64) if number < 4 else (F32,))]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained(name, dtype, mesh, rank, size):
    """The autoencoder, the step, and what the last of some steps reported; without ``mesh`` and blocks, too."""
    make, how, options, *steps = RUNS[name]
    torch.manual_seed(0)
    sae = se.SparseAutoencoder(D, F, make(), dtype=dtype, mesh=mesh, **options)
    step = TrainStep(sae, lr=2**-7, eps=1e-3, blocks=None if mesh is None else V, **how)
    rows, g = B // size, torch.Generator().manual_seed(1)
    for number in range(*(steps or [4])):
        x = torch.randn(B, D, generator=g, dtype=F64).to(dtype)
        if name == "not finite" and number == 1:
            x[B - 1, 0] = torch.nan
        report = step(x[rank * rows : (rank + 1) * rows])
    return sae, step, report


def numbers_of(mesh, rank, size):
    """Parameters, buffers, moments and what the last step reported, of every run."""
    found = {}
    for name, dtype in NAMES:
        sae, step, report = trained(name, dtype, mesh, rank, size)
        state = {n: whole(t).detach().clone() for n, t in (*sae.named_parameters(), *sae.named_buffers())}
        for n, p in ((n, p) for n, p in sae.share.named_parameters() if p.requires_grad):
            for kind in ("exp_avg", "exp_avg_sq"):
                moment = step.optimizer.state[p][kind]
                dim = CUT.get(n, 0 if n.startswith("activation") else None)
                state[f"{n}.{kind}"] = whole(sae.shards.as_whole(moment, dim, updated=True)).clone()
        found[name, dtype] = {**state, **report}
    return found


def in_groups(data):
    def on_mesh(rank, size, folder):
        found = numbers_of(mesh_of(size, data), rank, size)
        if rank == 0:
            torch.save(found, Path(folder).parent / f"{size // data}x{data}.pt")

    return on_mesh


one = two = four = in_groups(1)
two_in_groups = four_in_two_groups = in_groups(2)
four_in_groups = in_groups(4)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    sizes = {"one": 1, "two": 2, "four": 4, "two_in_groups": 2, "four_in_groups": 4, "four_in_two_groups": 4}
    ran = outcomes(__file__, sizes, folder, timeout=300)
    for ranks in ran.values():
        succeeded(ranks)
    return {file.stem: torch.load(file, weights_only=True) for file in folder.glob("*.pt")}


MESHES = "2x1", "1x2", "4x1", "2x2", "1x4"  # ranks of a group, and groups


@pytest.mark.parametrize("run", NAMES, ids=lambda run: f"{run[0]}, {run[1]}")
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_has_the_bits_of_one_rank(mesh, run, ran):
    one, many = ran["1x1"][run], ran[mesh][run]
    assert many.keys() == one.keys()
    differ = {key: (t, many[key]) for key, t in one.items() if not torch.equal(t, many[key])}
    assert not differ


@pytest.fixture
def alone(tmp_path):
    """A mesh of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield mesh_of(1)
    dist.destroy_process_group()


IN_FP32 = "StepL0", "TanhL0", "LogJumpReLU", "Gated", "Gated, norms"  # the rule's parameters


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if "bfloat16" not in run[1].values()])
def test_blocks_train_as_one_device_does(name, alone):
    """To rounding: what is summed is the same."""
    sae, step, report = trained(name, F64, alone, 0, 1)
    plain, by_itself, expected = trained(name, F64, None, 0, 1)
    tolerance = 2e-5 if name in IN_FP32 else 1e-10
    assert report.keys() == expected.keys() and (name != "not finite" or step.skipped == by_itself.skipped == 1)
    for key, number in expected.items():
        assert torch.allclose(report[key].double(), number.double(), rtol=1e-5, equal_nan=True), key
    for (key, p), (_, q) in zip(plain.named_parameters(), sae.named_parameters(), strict=True):
        assert torch.allclose(p.double(), whole(q).double(), rtol=tolerance, atol=tolerance), key


@pytest.mark.parametrize("data", [1, 2])
def test_what_cannot_be_by_blocks_is_refused_by_name(data, alone):
    mesh = alone if data == 1 else mesh_of_groups(1)
    train, plain = TrainStep, se.SparseAutoencoder(4, 16, se.TopK(2), mesh=mesh)
    with pytest.raises(ValueError, match="blocks must be None without a mesh"):
        train(se.SparseAutoencoder(4, 16, se.TopK(2)), lr=1e-3, blocks=2)
    for blocks in (3, 32):
        with pytest.raises(ValueError, match="blocks must be a power of two that divides d_sae = 16"):
            train(plain, lr=1e-3, blocks=blocks)
    with pytest.raises(ValueError, match="blocks must be None with dense=True"):
        train(plain, lr=1e-3, blocks=2, dense=True)
    with pytest.raises(ValueError, match="blocks must be None with LossOfAUser"):
        train(plain, lr=1e-3, blocks=2, losses=[LossOfAUser()])
    with pytest.raises(ValueError, match="rules that have a dense gradient"):
        train(se.SparseAutoencoder(4, 16, se.StatisticalTopK(2), mesh=mesh), lr=1e-3, blocks=2)
    with pytest.raises(ValueError, match="rules that rank by attributions"):
        train(se.SparseAutoencoder(4, 16, se.GradientTopK(2), mesh=mesh), lr=1e-3, blocks=2)
    with pytest.raises(ValueError, match="whose parameters are not one for each latent"):
        train(se.SparseAutoencoder(4, 16, Scaled(), mesh=mesh), lr=1e-3, blocks=2)
    with pytest.raises(ValueError, match="a multiple of 4, got"):
        train(plain, lr=1e-3, blocks=4)(torch.ones(6, 4))


def mesh_of_groups(size):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "latent"))


class LossOfAUser(se.losses.Loss):
    name = "largest"
    adds_over_shards = True

    def value(self, batch):
        return batch.codes.values.sum() / batch.tokens


class Scaled(se.TopK):
    """With one parameter that all latents share."""

    selects_over_shards = True

    def __init__(self):
        super().__init__(2)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def entry_values(self, pre, codes):
        return pre * self.scale
