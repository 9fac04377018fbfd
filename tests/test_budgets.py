"""functional.feature_budgets: integers that follow a law of ranks and sum up exactly."""
import pytest
import torch

from sae_engine import functional as f


def test_the_sum_is_exact_for_1000_random_densities():
    for _ in range(1000):
        num_latents, tokens = int(torch.randint(1, 80, ())), int(torch.randint(0, 200, ()))
        k = float(torch.rand(())) * num_latents
        exponent, shift = float(torch.rand(())) * 3, float(torch.rand(())) * 5
        density = torch.rand(num_latents) * (torch.rand(num_latents) < 0.7)
        total = int(k * tokens)
        m = f.feature_budgets(density, total, tokens, exponent=exponent, shift=shift)
        assert int(m.sum()) == total and bool(((m >= 0) & (m <= tokens)).all())
        assert total < num_latents or int(m.min()) >= 1
        ranked = m[density.argsort(descending=True, stable=True)]
        assert bool((ranked.diff() <= 0).all())


def test_zipf_by_hand():
    """12 shares over weights 1, 1/2, 1/3: 6.55, 3.27, 2.18, and the one left goes to the largest remainder."""
    assert f.feature_budgets(torch.tensor([0.1, 0.3, 0.2]), 12, 100).tolist() == [2, 7, 3]
    assert f.feature_budgets(torch.tensor([0.1, 0.3, 0.2]), 12, 6).tolist() == [2, 6, 4]  # 6 over 3 : 2, capped at 6
    assert f.feature_budgets(torch.zeros(3), 12, 100, shift=1.0).tolist() == [5, 4, 3]  # 5.54, 3.69, 2.77
    assert f.feature_budgets(torch.zeros(4), 2, 9).tolist() == [1, 1, 0, 0]  # 0.96, 0.48, 0.32, 0.24


def test_uniform_shares_differ_by_one_at_most():
    m = f.feature_budgets(torch.rand(30), 100, 50, exponent=0)
    assert sorted(m.tolist()) == [3] * 20 + [4] * 10


def test_every_latent_gets_a_token_where_there_are_enough():
    m = f.feature_budgets(torch.rand(1000), 1000, 4096, exponent=2.0)
    assert m.tolist() == [1] * 1000
    m = f.feature_budgets(torch.rand(1000), 5000, 4096, exponent=2.0)
    assert int(m.min()) == 1 and int(m.max()) > 1000 and int(m.sum()) == 5000


def test_large_sizes_are_exact():
    m = f.feature_budgets(torch.rand(131072), 4096 * 32, 4096)
    assert int(m.sum()) == 4096 * 32 and int(m.min()) >= 1
    assert f.feature_budgets(torch.rand(8), 8 * 70000, 70000).tolist() == [70000] * 8


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"total": 41}, "total"), ({"total": -1}, "total"), ({"total": 1.0}, "total"), ({"tokens": True}, "tokens"),
        ({"exponent": -1}, "exponent"), ({"exponent": "1"}, "exponent"), ({"shift": float("inf")}, "shift"),
        ({"density": torch.ones(2, 5)}, "density"), ({"density": torch.ones(5, dtype=torch.int32)}, "density"),
    ],
)  # fmt: skip
def test_arguments_are_checked(kwargs, name):
    with pytest.raises((ValueError, TypeError), match=name):
        f.feature_budgets(**{"density": torch.rand(10), "total": 5, "tokens": 4, **kwargs})
