"""losses: values by hand, dtypes under autocast, shapes that would broadcast."""
import pytest
import torch

import sae_engine as se
from sae_engine import losses


def test_values_by_hand():
    x, x_hat = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0], [3.0, 6.0]])
    assert losses.squared_error(x_hat, x) == (1 + 4) / 2
    assert losses.mse(x_hat, x) == (1 + 4) / 4
    assert losses.fvu(x_hat, x) == 5 / 4  # around the mean (2, 3): 1 + 1 + 1 + 1
    codes = se.SparseCodes.from_dense(torch.tensor([[3.0, 0, 4.0], [0, 0, 0]]))
    torch.testing.assert_close(losses.afa(codes, torch.tensor([[0.0, 3.0], [1.0, 0.0]])), torch.tensor(2.5))


def test_leading_dimensions_and_fp64():
    x, x_hat = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    assert losses.squared_error(x_hat, x).dtype == torch.float64
    torch.testing.assert_close(losses.squared_error(x_hat, x), (x_hat - x).square().sum(-1).mean(), rtol=0, atol=0)
    torch.testing.assert_close(losses.fvu(x_hat, x), losses.fvu(x_hat.view(6, 4), x.view(6, 4)))
    assert losses.fvu(x_hat[0, 0], x[0, 0]).dim() == 0


def test_afa_stays_wide_under_autocast_and_reaches_the_values():
    dense = (torch.rand(4, 30) * 100).requires_grad_()
    codes, x = se.SparseCodes.from_dense(dense), torch.randn(4, 8)
    plain = losses.afa(codes, x)
    with torch.autocast(torch.get_default_device().type, dtype=torch.float16):
        torch.testing.assert_close(losses.afa(codes, x), plain)
    plain.backward()
    assert dense.grad.isfinite().all() and dense.grad.abs().sum() > 0


@pytest.mark.parametrize("other", [(8,), (4, 1), (4, 7)], ids=str)
def test_shapes_do_not_broadcast(other):
    for loss in (losses.squared_error, losses.mse, losses.fvu):
        with pytest.raises(ValueError, match="x_hat"):
            loss(torch.randn(other), torch.randn(4, 8))
    with pytest.raises(ValueError, match="x must"):
        losses.afa(se.functional.topk(torch.randn(4, 9), 2), torch.randn(3, 8))


@pytest.mark.parametrize("normalize", [False, True])
def test_auxk_against_its_definition(normalize):
    codes = se.functional.topk(torch.randn(5, 12, dtype=torch.float64), 3)
    W_dec = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    loss = se.losses.auxk(codes, W_dec, residual, normalize=normalize)
    expected = (codes.to_dense() @ W_dec - residual).square().sum(1).mean()
    if normalize:
        expected = expected / (residual - residual.mean(0)).square().sum(1).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert residual.grad is None and W_dec.grad.abs().sum() > 0


def test_auxk_of_a_residual_without_spread_is_zero():
    codes = se.functional.topk(torch.randn(5, 12), 3)
    W_dec = torch.randn(12, 4, requires_grad=True)
    loss = se.losses.auxk(codes, W_dec, torch.zeros(5, 4), normalize=True)
    loss.backward()
    assert loss == 0 and not W_dec.grad.any()
