"""Metrics of several sites by their definitions: each site and source alone, and least squares of each latent."""

import math

import pytest
import torch

from sae_engine import functional
from sae_engine.metrics import (
    LatentScaling,
    Reconstruction,
    SiteReconstruction,
    SourceSparsity,
    Sparsity,
    cross_layer_share,
    relative_norms,
)

B, F = 40, 24


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_errors_of_a_site_are_those_of_its_columns_alone():
    widths, x, x_hat = [3, 5, 1], rows(2, B, 9), rows(2, B, 9, seed=1)
    metric, whole = SiteReconstruction(widths), Reconstruction()
    for part, part_hat in zip(x.split(17, 1), x_hat.split(17, 1), strict=True):  # any batching
        metric.update(part_hat, part), whole.update(part_hat, part)
    found = metric.compute()
    assert {name: found[name] for name in whole.compute()} == whole.compute()
    for site, (first, last) in zip(found["sites"], [(0, 3), (3, 8), (8, 9)], strict=True):
        alone = Reconstruction()
        alone.update(x_hat[..., first:last].reshape(-1, last - first), x[..., first:last].reshape(-1, last - first))
        assert site["fvu"] == pytest.approx(alone.compute()["fvu"], rel=1e-12)
    squared = sum(site["squared_error"] for site in found["sites"])
    assert found["squared_error"] == pytest.approx(squared, rel=1e-12)
    for bad in (([], 9), ([4, 4], 9)):
        with pytest.raises(ValueError, match=r"widths|columns"):
            SiteReconstruction(bad[0]).update(x_hat, x)
    with pytest.raises(TypeError, match="widths"):
        SiteReconstruction([2.5])


@pytest.mark.parametrize("capacity", [None, 3 * B * F])
def test_sparsity_of_a_source_is_that_of_its_codes_alone(capacity):
    pre = rows(3, B, F)
    codes = functional.threshold(pre, 1.0, capacity=capacity)
    metric = SourceSparsity(3, F)
    metric.update(codes)
    found = metric.compute()
    for number, source in enumerate(found["sources"]):
        alone = Sparsity(F)
        alone.update(functional.threshold(pre[number], 1.0))
        assert source == alone.compute()
    fired = pre > 1.0
    assert found["l0"] == pytest.approx(fired.sum().item() / B)
    assert found["dead"] == int((~fired.any(1)).sum()) and found["tokens"] == B
    one = SourceSparsity(1, F)
    one.update(functional.threshold(pre[0], 1.0))
    assert one.compute()["sources"][0] == found["sources"][0]
    with pytest.raises(ValueError, match="3 sources"):
        metric.update(functional.threshold(pre[:2], 1.0))
    with pytest.raises(ValueError, match="d_sae"):
        SourceSparsity(3, F + 1).update(codes)


def test_share_of_norms_that_cross_layers():
    norms = rows(3, F, 4).abs()
    found = cross_layer_share(norms)
    own = torch.stack([norms[s, :, s] for s in range(3)]).square()
    elsewhere = norms.square().sum(2) - own
    assert found["share"] == pytest.approx((elsewhere.sum() / norms.square().sum()).item())
    assert found["sources"] == pytest.approx((elsewhere.sum(1) / norms.square().sum((1, 2))).tolist())
    assert found["latents_above"] == pytest.approx((elsewhere > own).double().mean().item())
    within = torch.zeros(3, F, 3).diagonal_scatter(rows(F, 3).abs().float(), dim1=0, dim2=2)
    assert cross_layer_share(within)["share"] == 0 == cross_layer_share(within)["latents_above"]
    assert math.isnan(cross_layer_share(torch.zeros(2, F, 2))["sources"][1])
    with pytest.raises(ValueError, match="site of its own"):
        cross_layer_share(norms[..., :2])
    with pytest.raises(ValueError, match="site_norms"):
        cross_layer_share(norms[0])


def test_relative_norms():
    norms = rows(F, 2).abs()
    found = relative_norms(norms)
    assert torch.equal(found > 0.5, norms[:, 1] > norms[:, 0]) and bool(((found >= 0) & (found <= 1)).all())
    torch.testing.assert_close(relative_norms(norms.flip(1)), 1 - found)
    assert relative_norms(torch.zeros(1, 2)).isnan().all()
    with pytest.raises(ValueError, match="d_sae, 2"):
        relative_norms(rows(F, 3))


@pytest.mark.parametrize("capacity", [None, B * F])
def test_latent_scaling_is_least_squares_of_each_latent(capacity):
    pre, directions, y = rows(B, F), rows(F, 7, seed=1), rows(B, 7, seed=2)
    pre[:, 3] = -9.0  # never fires
    directions[5] = 0.0
    metric = LatentScaling(directions)
    for part in (slice(0, 11), slice(11, B)):
        metric.update(functional.threshold(pre[part], 0.7, capacity=capacity), y[part])
    beta = metric.compute()
    dense = torch.where(pre > 0.7, pre, 0.0)
    for j in range(F):
        basis = torch.outer(dense[:, j], directions[j]).flatten()
        if j in (3, 5):
            assert beta[j].isnan()
            continue
        wanted = torch.linalg.lstsq(basis[:, None], y.flatten()[:, None]).solution.item()
        assert beta[j].item() == pytest.approx(wanted, rel=1e-10), j
    with pytest.raises(ValueError, match="y"):
        metric.update(functional.threshold(pre, 0.7), y[:, :3])
    with pytest.raises(RuntimeError, match="no token"):
        LatentScaling(directions).compute()


def test_a_latent_of_one_model_scales_to_zero_in_the_other():
    """Activations made of the latents themselves: what a model has is 1, what it lacks 0, what it has twice 2."""
    directions = torch.eye(F, 30, dtype=torch.float64)
    codes = functional.topk(rows(B, F), 4)
    dense, has = codes.to_dense(), torch.arange(F) % 3  # 0, 1 and 2 times
    metric = LatentScaling(directions)
    metric.update(codes, (dense * has) @ directions)
    fires = (dense != 0).any(0)
    torch.testing.assert_close(metric.compute()[fires], has[fires].double())

