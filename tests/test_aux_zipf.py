"""aux_zipf_loss: AuxK for latents that fire too seldom, each by how much."""
import copy

import pytest
import torch

import sae_engine as se
from sae_engine import functional as f
from sae_engine import losses
from sae_engine.testing import HARD_KINDS, assert_same, make_pre

F = 24
BACKENDS = ("torch", "triton")


def test_shortfall_by_hand():
    """Two latents a token over weights 1, 1/2, 1/3, 1/4: shares 0.96, 0.48, 0.32, 0.24, by rank of density."""
    density = torch.tensor([0.24, 0.0, 0.5, 0.1], dtype=torch.float64)
    got = f.zipf_shortfall(density, 2)
    want = torch.tensor([1 - 0.24 / 0.48, 1.0, 1 - 0.5 / 0.96, 1 - 0.1 / 0.32], dtype=torch.float64)
    torch.testing.assert_close(got, want)
    assert f.zipf_shortfall(torch.tensor([1.0, 0.9, 0.8, 0.7]), 2).tolist() == [0, 0, 0, 0]
    assert f.zipf_shortfall(torch.tensor([-1.0, 0.0, 0.0, 0.0]), 2).tolist() == [0, 1, 1, 1]  # unset lacks nothing


def test_no_share_exceeds_every_token():
    """3.5 latents a token of 4: a share above 1 is cut, and the rest goes to the others."""
    short = f.zipf_shortfall(torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64), 3.5)
    shares = 0.5 / (1 - short)
    assert bool((shares <= 1 + 1e-12).all()) and abs(float(shares.sum()) - 3.5) < 1e-9


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_auxk_where_only_dead_latents_fall_short(backend, relu):
    for kind, shape in [(k, (2, 3, F)) for k in HARD_KINDS] if backend == "torch" else [("special", (2, F))]:
        pre, dead = make_pre(kind, shape), torch.rand(F) < 0.3
        ours = se.AuxZipfTopK(4, relu=relu).select(pre, shortfall=dead.float(), backend=backend)
        auxk = se.AuxTopK(4, relu=relu).select(pre, dead_mask=dead, backend=backend)
        assert_same((ours.values, ours.indices, ours.offsets), (auxk.values, auxk.indices, auxk.offsets))


def by_definition(pre, weight, k):
    dense = torch.zeros_like(pre)
    for row in range(pre.shape[0]):
        score = [(-float(pre[row, j].detach() * weight[j]), j) for j in range(F) if weight[j] > 0]
        for _, j in sorted(score)[:k]:
            dense[row, j] = torch.relu(pre[row, j]) * weight[j]
    return dense


def test_loss_and_gradients_against_dense_autograd_in_fp64():
    sae = se.SparseAutoencoder(8, F, se.TopK(3), dtype=torch.float64)
    x, residual = (torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(2))
    weight = (torch.rand(F, dtype=torch.float64) - 0.4).clamp(min=0)
    codes = sae.encode_with(x, select=se.AuxZipfTopK(12), shortfall=weight).codes[0]  # more than are positive
    loss = losses.aux_zipf(codes, sae.W_dec, residual)
    loss.backward()
    leaves = {n: p.detach().clone().requires_grad_() for n, p in sae.named_parameters()}
    pre = (x.view(10, 8) - leaves["b_dec"]) @ leaves["W_enc"] + leaves["b_enc"]
    dense = by_definition(pre, weight, 12)
    assert_same(codes.to_dense().detach().view(10, F) != 0, dense.detach() != 0)
    expected = (dense @ leaves["W_dec"] - residual.view(10, 8)).square().sum(1).mean()
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, leaves[name].grad, msg=name)
    enough = weight == 0
    assert sae.W_enc.grad[:, ~enough].any() and not sae.W_enc.grad[:, enough].any()  # it reaches the encoder


def test_running_density_by_hand():
    density = se.RunningDensity(3, rate=0.5)
    codes = se.SparseCodes.from_dense(torch.tensor([[1.0, 0, 0], [2.0, -1.0, 0]]))
    density.update(codes)
    assert density.density.tolist() == [1, 0.5, 0]
    density.update(se.SparseCodes.from_dense(torch.tensor([[0.0, 0, 5.0]])))
    density.update(codes[:0])
    assert density.density.tolist() == [0.5, 0.25, 0.5]


def steps(aux, dead, number=3, rule=None, **options):
    torch.manual_seed(0)
    sae = se.SparseAutoencoder(8, F, se.TopK(3) if rule is None else rule)
    step = se.training.TrainStep(sae, lr=1e-2, losses=aux, dead_after=1000, **options)
    step.dead.since_fired[dead] = 5000
    step.dead.tokens = 5000
    batches = torch.randn(number, 16, 8, generator=torch.Generator().manual_seed(0), device="cpu")
    reports = [step(x.to(sae.W_enc.device)) for x in batches]
    return sae, reports


@pytest.mark.parametrize("convention", ["openai", "saelens"])
def test_a_training_step_with_auxk_as_the_special_case(convention):
    dead = torch.arange(F) % 4 == 0
    density = se.RunningDensity(F, rate=1e-12)
    density.density.copy_((~dead).double())
    auxk = losses.AuxK.openai(5) if convention == "openai" else losses.AuxK.saelens()
    options = {name: getattr(auxk, name) for name in ("k", "coefficient", "relu", "normalize", "scale_by_dead")}
    zipf = losses.AuxZipf(**options, density=density)
    (plain, first), (ours, second) = steps(auxk, dead, 1), steps(zipf, dead, 1)
    assert first[0]["auxk"] > 0
    torch.testing.assert_close(second[0]["aux_zipf"], first[0]["auxk"])
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, dict(plain.named_parameters())[name], msg=name)


def test_a_training_step_learns_the_densities_and_feature_choice_has_its_own():
    density = se.RunningDensity(F)
    _, reports = steps(losses.AuxZipf(k=4, density=density), torch.zeros(F, dtype=torch.bool))
    assert reports[0]["aux_zipf"] == 0 and reports[2]["aux_zipf"] > 0  # unset at first: nothing lacks anything
    assert abs(float(density.density.sum()) - 3) < 0.5
    sae, reports = steps(losses.AuxZipf(k=4), torch.zeros(F, dtype=torch.bool), rule=se.FeatureChoice(F, 3))
    assert reports[2]["aux_zipf"] >= 0 and (sae.activation.density >= 0).all()
    with pytest.raises(TypeError, match="density"):
        steps(losses.AuxZipf(k=4), torch.zeros(F, dtype=torch.bool))
    added = [losses.L1(0.0), losses.AuxZipf(k=4, density=se.RunningDensity(F))]
    with pytest.raises(TypeError, match="latents"):
        steps(added, torch.zeros(F, dtype=torch.bool), rule=se.ReLU())


def test_densities_are_state():
    density = se.RunningDensity(F)
    density.update(f.topk(torch.randn(9, F), 3))
    other = se.RunningDensity(F)
    other.load_state_dict(density.state_dict())
    assert_same(other.density, density.density)
    assert copy.deepcopy(density).density.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: f.zipf_shortfall(torch.rand(3), 4), "k"), (lambda: f.zipf_shortfall(torch.rand(3, 3), 1), "density"),
        (lambda: f.zipf_shortfall(torch.rand(3), 1, exponent=-1), "exponent"),
        (lambda: se.AuxZipfTopK(0), "k"),
        (lambda: se.AuxZipfTopK(2, shortfall=torch.ones(3, dtype=torch.bool)), "shortfall"),
        (lambda: se.AuxZipfTopK(2).select(torch.randn(3, 5)), "shortfall"),
        (lambda: se.AuxZipfTopK(2).select(torch.randn(3, 5), shortfall=torch.ones(4)), "shortfall"),
        (lambda: se.RunningDensity(3, rate=0), "rate"), (lambda: se.RunningDensity(0), "d_sae"),
        (lambda: losses.AuxZipf(density=torch.rand(3)), "density"),
        (lambda: losses.AuxZipf(latents=0), "latents"), (lambda: losses.AuxZipf(shift=-1), "shift"),
    ],
)  # fmt: skip
def test_arguments_are_checked(make, name):
    with pytest.raises((ValueError, TypeError), match=name):
        make()
