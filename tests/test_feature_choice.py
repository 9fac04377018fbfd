"""FeatureChoice: budgets in training, its schedule, and the thresholds that it learns for afterwards."""
import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sae_engine as se
from sae_engine import functional as f
from sae_engine.testing import assert_same

F = 24


def test_the_budget_is_exact_for_1000_random_densities():
    rule = se.FeatureChoice(F, 2.3)
    pre = torch.randn(7, F)
    for _ in range(1000):
        rule.density.copy_(torch.rand(F) * (torch.rand(F) < 0.7))
        codes = rule.select(pre)
        assert codes.values.numel() == int(2.3 * 7)
    for tokens in (0, 1, 3):
        assert rule.select(pre[:tokens]).values.numel() == int(2.3 * tokens)


def test_dense_latents_get_the_larger_budgets():
    rule, pre = se.FeatureChoice(F, 3), torch.rand(16, F) + 0.1
    rule.density.copy_(torch.linspace(0, 1, F))
    counts = (rule(pre) != 0).sum(0)
    assert bool((counts.diff() >= 0).all()) and int(counts[-1]) == 12 and int(counts[0]) == 1  # 1 / rank
    uniform = se.FeatureChoice(F, 3, budgets="uniform")
    assert torch.equal((uniform(pre) != 0).sum(0), torch.full((F,), 2))


def test_mutual_choice_first_then_feature_choice():
    rule = se.FeatureChoice(F, 2, mutual_steps=2)
    for step in range(4):
        pre = torch.randn(12, F)
        codes = rule.select(pre)
        counts = codes.by_latent.offsets.diff()
        if step < 2:
            assert rule.phase == "mutual"
            want = f.batch_topk(pre, 2)
            assert_same((codes.values, codes.indices), (want.values, want.indices))
        else:
            m = f.feature_budgets(rule.density, 24, 12)
            assert rule.phase == "feature" and torch.equal(counts, m.long())
        rule(pre)
    early = se.FeatureChoice(F, 2, mutual_steps=9)
    early.end_mutual_choice()
    assert early.phase == "feature" and early.forwards == 9


def test_the_schedule_survives_saving_and_counts_a_checkpoint_once():
    rule = se.FeatureChoice(F, 2, mutual_steps=3)
    pre = torch.randn(12, F, requires_grad=True)
    for _ in range(2):
        checkpoint(rule, pre, use_reentrant=False).sum().backward()
    assert rule.forwards == 2 and rule.phase == "mutual"
    other = se.FeatureChoice(F, 2, mutual_steps=3)
    other.load_state_dict(rule.state_dict())
    for module in (other, copy.deepcopy(rule)):
        assert module.phase == "mutual"
        module(pre)
        assert module.phase == "feature" and module.forwards == 3


def test_running_density_and_thresholds_by_hand():
    rule = se.FeatureChoice(3, 1, mutual_steps=9, density_lr=0.5, threshold_lr=0.5)
    rule(torch.tensor([[3.0, 1.0, -1.0], [2.0, -1.0, -1.0]]))  # keeps 3 and 2, both of latent 0
    assert rule.density.tolist() == [1.0, 0.0, 0.0]
    assert rule.threshold == 2 and rule.latent_threshold.tolist() == [2.0, -1.0, -1.0]
    rule(torch.tensor([[4.0, 6.0, -1.0], [-2.0, -1.0, -1.0]]))  # keeps 6 and 4
    assert rule.density.tolist() == [0.75, 0.25, 0.0]
    assert rule.threshold == 3 and rule.latent_threshold.tolist() == [3.0, 6.0, -1.0]
    before = copy.deepcopy(rule.state_dict())
    rule.select(torch.rand(4, 3))
    with torch.no_grad():
        rule(torch.rand(4, 3))
    rule(torch.rand(0, 3))
    rule.eval()(torch.rand(4, 3))
    assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())


def test_inference_by_latent_and_global():
    rule = se.FeatureChoice(3, 1, mutual_steps=9)
    rule(torch.tensor([[4.0, 6.0, -1.0], [-2.0, -1.0, -1.0]]))
    pre = torch.tensor([[4.5, 5.0, 3.0], [4.0, 7.0, 4.1]])
    assert rule.eval()(pre).tolist() == [[4.5, 0, 0], [0, 7.0, pre[1, 2].item()]]  # latent 2 takes the global 4
    assert_same(rule.select(pre).to_dense(), rule(pre))
    rule.inference = "global"
    assert rule(pre).tolist() == [[4.5, 5.0, 0], [0, 7.0, pre[1, 2].item()]]


def test_unset_in_eval_raises_and_casts_leave_state_alone():
    rule = se.FeatureChoice(F, 2).eval()
    with pytest.raises(RuntimeError, match="threshold"):
        rule(torch.randn(3, F))
    rule.train()(torch.randn(9, F))
    exact = copy.deepcopy(rule.state_dict())
    for module in (copy.deepcopy(rule).bfloat16(), copy.deepcopy(rule).half(), copy.deepcopy(rule).float()):
        assert all(torch.equal(value, exact[name]) for name, value in module.state_dict().items())
        assert module.eval()(torch.randn(3, F).bfloat16()).dtype == torch.bfloat16


def test_every_latent_lives_under_feature_choice():
    """What the rule is for: a latent that the batch's common budget starves keeps a token, and learns."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    alive = {}
    for rule in (se.MutualChoice(2), se.FeatureChoice(32, 2)):
        sae = se.SparseAutoencoder(8, 32, rule)
        with torch.no_grad():
            sae.b_enc[16:] = -3.0  # half of the latents start far below the others
        codes = sae.encode(x)
        sae.decode(codes).square().sum().backward()
        alive[type(rule)] = int((codes.by_latent.offsets.diff() > 0).sum())
    assert alive[se.MutualChoice] < 32 == alive[se.FeatureChoice]


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"k": 25}, "k"), ({"k": "2"}, "k"), ({"d_sae": 0}, "d_sae"), ({"budgets": "pareto"}, "budgets"),
        ({"inference": "none"}, "inference"), ({"exponent": -1}, "exponent"), ({"shift": -1}, "shift"),
        ({"mutual_steps": -1}, "mutual_steps"), ({"mutual_steps": 1.5}, "mutual_steps"),
        ({"density_lr": 0}, "density_lr"), ({"density_lr": 2}, "density_lr"), ({"threshold_lr": 2}, "threshold_lr"),
    ],
)  # fmt: skip
def test_arguments_are_checked(kwargs, name):
    with pytest.raises((ValueError, TypeError), match=name):
        se.FeatureChoice(**{"d_sae": F, "k": 2, **kwargs})


def test_width_is_checked():
    for training in (True, False):
        with pytest.raises(ValueError, match="d_sae"):
            se.FeatureChoice(F, 2).train(training)(torch.randn(3, F + 1))
