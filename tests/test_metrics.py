"""Metrics against values computed by hand, and against any other batching."""

import itertools
import math

import pytest
import torch
from largest_tensor import Largest
from metric_cases import FP64_SUMS, assert_close

import sae_engine as se
from sae_engine.metrics import (
    EpsilonLBO,
    NextTokenLoss,
    Reconstruction,
    Sparsity,
    TailTruncation,
    decoder_cosines,
    decoder_similarity,
    loss_recovered,
)

NAN = float("nan")


def dense_codes(rows):
    return se.SparseCodes.from_dense(torch.tensor(rows))


def splits(count, seed):
    """A random cut of range(count), with empty and single pieces among them."""
    rng = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, count + 1, (6,), generator=rng).tolist()
    cuts = sorted([0, 0, 1, count, *cuts])
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


# --- reconstruction ------------------------------------------------------------------------------------------------


def test_reconstruction_by_hand():
    # Tokens (1, 0), (3, 0), (2, 3); the mean is (2, 1); squared distances 2, 2, 4, in all 8; squared norms 1, 9, 13.
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
    x_hat = torch.tensor([[1.0, 1.0], [3.0, 0.0], [2.0, 1.0]])  # errors (0, 1), (0, 0), (0, -2): 1, 0, 4
    metric = Reconstruction(space="raw", centre=torch.tensor([2.0, 1.0]))
    metric.update(x_hat, x)
    found = metric.compute()
    assert (found["space"], found["tokens"], found["d"]) == ("raw", 3, 2)
    expected = {
        "mse": 5 / 6,
        "squared_error": 5 / 3,
        "nmse": 5 / 23,
        "nmse_per_token": (1 / 1 + 0 / 9 + 4 / 13) / 3,
        "fvu": 5 / 8,
        "explained_variance": 3 / 8,
        # The mean error is (0, -1/3): squared distances from it (4/3)^2, (1/3)^2, (5/3)^2, in all 42/9.
        "explained_variance_centred": 1 - (42 / 9) / 8,
        "explained_variance_per_token": 1 - (1 / 2 + 0 / 2 + 4 / 4) / 3,
        "cosine": (1 / math.sqrt(2) + 1 + 7 / math.sqrt(13 * 5)) / 3,
        "l2_ratio": (math.sqrt(2) + 1 + math.sqrt(5 / 13)) / 3,
        "relative_bias": (2 + 9 + 5) / (1 + 9 + 7),
    }
    assert_close({name: found[name] for name in expected}, expected)


def test_reconstruction_agrees_with_the_losses():
    x, x_hat = torch.randn(2, 7, 5, 12, dtype=torch.float64).unbind()
    metric = Reconstruction()
    metric.update(x_hat, x)
    found = metric.compute()
    assert_close(found["squared_error"], se.losses.squared_error(x_hat, x).item())
    assert_close(found["fvu"], se.losses.fvu(x_hat, x).item())
    assert found["explained_variance_per_token"] is None  # without a centre
    assert found["tokens"] == 35


@pytest.mark.parametrize("seed", range(4))
def test_reconstruction_in_any_batches(seed):
    """A mean a thousand times the spread: sums of squares would lose six digits here, merged centred sums do not."""
    x = torch.randn(300, 9) + 1000
    x_hat = x + 0.1 * torch.randn(300, 9)
    whole, parts = Reconstruction(centre=x.mean(0)), Reconstruction(centre=x.mean(0))
    whole.update(x_hat, x)
    for part in splits(300, seed):
        parts.update(x_hat[part], x[part])
    error, centred = (x_hat.double() - x.double()), x.double() - x.double().mean(0)
    truth = (error.square().sum() / centred.square().sum()).item()
    assert_close(whole.compute()["fvu"], truth)
    # Merging rounds a mean of 1000, eps * 1000 beside a spread of 1, at each of the few merges.
    assert_close(parts.compute(), whole.compute(), tolerance=1000 * FP64_SUMS)


def test_reconstruction_chunks_do_not_matter(monkeypatch):
    from sae_engine.metrics import reconstruction

    x, x_hat = torch.randn(2, 50, 6).unbind()
    whole, chunked = Reconstruction(), Reconstruction()
    whole.update(x_hat, x)
    monkeypatch.setattr(reconstruction, "CHUNK_ELEMENTS", 40)
    chunked.update(x_hat, x)
    assert_close(chunked.compute(), whole.compute())


def test_reconstruction_of_nan_and_of_nothing():
    metric = Reconstruction()
    with pytest.raises(RuntimeError, match="no token"):
        metric.compute()
    metric.update(torch.empty(0, 4), torch.empty(0, 4))
    with pytest.raises(RuntimeError, match="no token"):
        metric.compute()
    x = torch.randn(5, 4)
    metric.update(x, x)
    assert metric.compute()["fvu"] == 0.0
    spoiled = x.clone()
    spoiled[2, 1] = NAN
    metric.update(spoiled, x)
    found = metric.compute()
    assert all(math.isnan(found[name]) for name in ("mse", "fvu", "explained_variance_centred", "cosine", "nmse"))


def test_reconstruction_takes_16_bit_and_says_what_it_refuses():
    x = torch.randn(20, 8).bfloat16()
    metric = Reconstruction(space="normalized")
    metric.update(torch.zeros(20, 8), x)
    assert_close(metric.compute()["mse"], x.double().square().mean().item())
    for arguments, error, match in [
        ((torch.zeros(20, 8), torch.zeros(20, 7)), ValueError, "x_hat must have shape"),
        ((torch.zeros(20, 7), torch.zeros(20, 7)), ValueError, "d = 8"),
        ((torch.zeros(20, 8).long(), torch.zeros(20, 8)), TypeError, "x_hat"),
    ]:
        with pytest.raises(error, match=match):
            metric.update(*arguments)
    with pytest.raises(TypeError, match="space"):
        Reconstruction(space=None)
    with pytest.raises(ValueError, match="centre"):
        Reconstruction(centre=torch.zeros(3)).update(x, x)


# --- sparsity ------------------------------------------------------------------------------------------------------


def test_sparsity_by_hand():
    metric = Sparsity(5, dense_above=0.5)
    metric.update(dense_codes([[1.0, 0.0, 0.0, -2.0, 0.0], [1.0, 3.0, 0.0, 0.0, 0.0]]))
    metric.update(dense_codes([[1.0, 0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 4.0, 0.0]]))
    found = metric.compute()
    assert metric.density.tolist() == [1.0, 0.5, 0.0, 0.5, 0.0]
    assert (found["tokens"], found["l0"], found["l0_min"], found["l0_max"]) == (4, 2.0, 1, 3)
    assert found["l0_quantiles"] == {0.05: 1, 0.25: 1, 0.5: 2, 0.75: 2, 0.95: 3}
    assert (found["dead"], found["dead_fraction"]) == (2, 0.4)
    assert (found["dense"], found["dense_fraction"]) == (1, 0.2)  # 0.5 is not above 0.5
    histogram = found["density_histogram"]
    # log10(0.5) is -0.301: in [-0.5, -0.25); a latent that always fires is in the last bin.
    assert histogram == {"edges": [-1.0, -0.75, -0.5, -0.25, 0.0], "counts": [0, 0, 2, 1]}


def test_no_latent_or_every_latent_fires():
    nothing, everything = Sparsity(3), Sparsity(3)
    nothing.update(dense_codes([[0.0, 0.0, 0.0]] * 4))
    everything.update(dense_codes([[1.0, 2.0, 3.0]] * 4))
    found = nothing.compute()
    assert (found["l0"], found["dead"], found["dense"], found["l0_max"]) == (0.0, 3, 0, 0)
    assert sum(found["density_histogram"]["counts"]) == 0
    found = everything.compute()
    assert (found["l0"], found["dead"], found["dense"], found["l0_min"]) == (3.0, 0, 3, 3)
    assert found["density_histogram"]["counts"][-1] == 3


def test_a_power_of_ten_lies_in_the_bin_that_it_opens():
    metric = Sparsity(1000)
    rows = torch.zeros(1000, 1000)
    rows[0, 0] = rows[:10, 1] = rows[:100, 2] = 1.0  # densities 0.001, 0.01, 0.1
    metric.update(se.SparseCodes.from_dense(rows))
    histogram = metric.compute()["density_histogram"]
    assert [edge for edge, count in zip(histogram["edges"], histogram["counts"], strict=False) if count] == [-3, -2, -1]
    assert metric.compute()["dense"] == 0  # 0.1 is not above 0.1


def test_stored_zeros_do_not_fire_and_nan_does():
    codes = se.functional.topk(torch.tensor([[1.0, -1.0, -2.0, NAN], [-1.0, -2.0, -3.0, -4.0]]), 3)
    assert codes.values.shape == (6,)
    metric = Sparsity(4)
    metric.update(codes)
    assert metric.density.tolist() == [0.5, 0.0, 0.0, 0.5]
    assert metric.compute()["l0_quantiles"] == {0.05: 0, 0.25: 0, 0.5: 0, 0.75: 2, 0.95: 2}


def test_sparsity_in_any_batches_and_shapes_is_equal_bit_for_bit():
    codes = se.functional.threshold(torch.randn(4, 30, 64), 1.0)
    whole, parts = Sparsity(64), Sparsity(64)
    whole.update(codes)
    assert whole.compute()["l0"] == codes.l0.double().mean().item()
    dense = codes.to_dense().flatten(0, 1)
    for part in splits(120, 1):
        parts.update(se.SparseCodes.from_dense(dense[part]))
    assert parts.compute() == whole.compute()


def test_capacity_is_not_counted_and_an_overflow_is_reported():
    pre = torch.randn(6, 16)
    exact, roomy, tight = Sparsity(16), Sparsity(16), Sparsity(16)
    exact.update(se.functional.threshold(pre, 0.5))
    codes = se.functional.threshold(pre, 0.5, capacity=90)
    rubbish = torch.arange(90) >= codes.offsets[-1]  # beyond what rows own, anything may stand
    roomy.update(
        se.SparseCodes(torch.where(rubbish, 7.0, codes.values), torch.where(rubbish, -99, codes.indices),
                       codes.offsets, codes.batch_shape, 16, required=codes.required)
    )  # fmt: skip
    assert roomy.compute() == exact.compute()
    tight.update(se.functional.threshold(pre, 0.5, capacity=3))
    tight.update(se.functional.threshold(pre, 0.5, capacity=90))
    with pytest.raises(RuntimeError, match="capacity"):
        tight.compute()


def test_sparsity_refuses():
    with pytest.raises(RuntimeError, match="no token"):
        Sparsity(3).compute()
    with pytest.raises(RuntimeError, match="no token"):
        _ = Sparsity(3).density
    with pytest.raises(ValueError, match="d_sae = 4"):
        Sparsity(4).update(dense_codes([[1.0, 2.0, 3.0]]))
    with pytest.raises(TypeError, match="SparseCodes"):
        Sparsity(4).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="dense_above"):
        Sparsity(4, dense_above=1.5)


# --- decoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 3, 4, 7, 100])
def test_cosines_equal_the_whole_matrix(block):
    W = torch.randn(10, 4) * torch.rand(10, 1)
    W[7] = -3 * W[2]
    W[8] = 2 * W[2]
    unit = W.double() / W.double().norm(dim=1, keepdim=True)
    expected = (unit @ unit.T).fill_diagonal_(-2).amax(1)
    # A cosine of fp32 rows errs by the roundings of two normalizations and of a sum of 4 products.
    torch.testing.assert_close(decoder_cosines(W, block=block).double(), expected, rtol=0, atol=8 * 2**-23)


def test_cosines_of_zero_rows_and_of_one_row():
    W = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    assert decoder_cosines(W).tolist() == [0.0, 0.0, 0.0]
    assert decoder_cosines(W[:1]).isnan().all()
    with pytest.raises(ValueError, match="W_dec"):
        decoder_cosines(W[:0])


def test_similarity_by_hand():
    W = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)
    found = decoder_similarity(W)
    # Nearest: 1, 1, 0.8, 0.8.
    assert_close(found["max_cosine_mean"], 0.9)
    assert_close(found["max_cosine_quantiles"][0.5], 0.9)
    assert_close(found["max_cosine_max"], 1.0)
    assert found["share_above"] == {0.5: 1.0, 0.7: 1.0, 0.9: 0.5}


def test_cosines_stay_in_bounded_memory():
    """No tensor exceeds a tile: the matrix of all cosines would have 2^22 elements."""
    W = torch.randn(2048, 16)
    with Largest(lambda tensor: tensor._base is None) as largest:  # views of W need no memory
        decoder_cosines(W, block=128)
    assert largest.seen == 128 * 128


# --- norms ---------------------------------------------------------------------------------------------------------


def test_epsilon_lbo_by_hand():
    # Rows of norm 1, 2, 3; ||b_dec||^2 = 4. Token 0: f^2 = 3^2 + 4 = 13, z^2 = 26. Token 1: f^2 = 4^2 + 3^2 + 4 = 29.
    metric = EpsilonLBO(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0]))
    codes = dense_codes([[3.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
    z = torch.tensor([[1.0, 5.0], [2.0, 5.0]])
    metric.update(codes, z)
    found = metric.compute()
    assert_close(found["epsilon_lbo"], (13 / 13 + 0 / 29) / 2 / 2)
    assert_close(found["epsilon_lbo_median"], 0.25)
    assert_close(found["norm_ratio_quantiles"][0.5], (math.sqrt(13 / 26) + 1) / 2)
    assert_close(found["zf_points"], [[math.sqrt(26), math.sqrt(13)], [math.sqrt(29), math.sqrt(29)]])
    assert_close(found["bands"][0.25], (1.25**-0.5, 0.75**-0.5))
    assert_close(found["bands"][1.0], (2**-0.5, math.inf))
    assert found["band_shares"][0.25] == found["band_shares"][0.5] == 0.5  # token 1; token 0 is on the edge of 1


def test_a_code_of_the_inputs_own_norm_has_no_epsilon():
    pre = torch.rand(20, 8) + 0.1
    metric = EpsilonLBO(torch.ones(8))
    metric.update(se.SparseCodes.from_dense(pre), pre)
    found = metric.compute()
    assert found["epsilon_lbo"] <= FP64_SUMS
    assert_close(found["norm_ratio_quantiles"], dict.fromkeys(found["norm_ratio_quantiles"], 1.0))
    assert found["band_shares"] == {0.25: 1.0, 0.5: 1.0, 1.0: 1.0}


def test_scale_moves_the_plot_alone():
    codes, z = se.SparseCodes.from_dense(torch.rand(6, 5)), torch.randn(6, 3)
    plain, scaled = EpsilonLBO(torch.ones(5)), EpsilonLBO(torch.ones(5))
    plain.update(codes, z)
    scaled.update(codes, z, scale=torch.full((6,), 2.0))
    a, b = plain.compute(), scaled.compute()
    assert_close([[2 * x, 2 * y] for x, y in a.pop("zf_points")], b.pop("zf_points"))
    assert_close(a, b)


@pytest.mark.parametrize("seed", range(3))
def test_epsilon_lbo_and_its_points_in_any_batches(seed):
    codes = se.functional.topk(torch.randn(1000, 32), 4)
    z = torch.randn(1000, 6)
    norms, b_dec = torch.rand(32) + 0.5, torch.randn(6)
    whole, parts = (EpsilonLBO(norms, b_dec, points=100) for _ in range(2))
    whole.update(codes, z)
    for part in splits(1000, seed):
        parts.update(codes[part], z[part])
    found = whole.compute()
    assert 40 <= len(found["zf_points"]) <= 100
    assert_close(parts.compute(), found)
    positions = torch.cat([p for p, _ in whole._parts])
    assert positions[0] == 0 and positions[-1] > 950 and positions.diff().max() <= 40  # spread over all of it


def test_truncated_tails_by_hand():
    # Orthogonal rows of norm 1, 2, 1: contributions of token 0 have norms 3, 4, of token 1 norms 2, 0.5.
    W = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    metric = TailTruncation(W, [1.0, 3.5, 9.0])
    metric.update(dense_codes([[3.0, 2.0, 0.0], [-2.0, 0.0, 0.5], [0.0, 0.0, 0.0]]))
    found = metric.compute()
    token1 = math.sqrt(4.25)
    assert_close(found["cett"], [(0 + 0.5 / token1) / 3, (3 / 5 + 1) / 3, 2 / 3], tolerance=2**-22)  # decoded in fp32
    assert (found["l0"], found["tokens"]) == (4 / 3, 3)
    assert_close(found["l0_kept"], [1.0, 1 / 3, 0.0])
    assert_close(found["off"], [1 - 1 / 3, 1 - 1 / 9, 1.0])


def test_truncated_tails_in_any_batches():
    codes, W = se.functional.topk(torch.randn(60, 16), 5), torch.randn(16, 4)
    whole, parts = TailTruncation(W, [0.5, 1.0, 2.0]), TailTruncation(W, [0.5, 1.0, 2.0])
    whole.update(codes)
    for part in splits(60, 3):
        parts.update(codes[part])
    assert_close(parts.compute(), whole.compute(), tolerance=2**-18)  # decoded in fp32, 5 terms a token


def test_nan_is_not_hidden_by_norms_or_tails():
    codes, W = dense_codes([[NAN, 1.0], [1.0, 1.0]]), torch.eye(2)
    tail, epsilon = TailTruncation(W, [0.5]), EpsilonLBO(torch.ones(2))
    tail.update(codes)
    epsilon.update(codes, torch.ones(2, 2))
    assert math.isnan(tail.compute()["cett"][0])
    assert math.isnan(epsilon.compute()["epsilon_lbo"])


def test_norms_refuse():
    with pytest.raises(RuntimeError, match="no token"):
        EpsilonLBO(torch.ones(3)).compute()
    with pytest.raises(RuntimeError, match="no token"):
        TailTruncation(torch.eye(3), [1.0]).compute()
    with pytest.raises(ValueError, match="z must have shape"):
        EpsilonLBO(torch.ones(3)).update(dense_codes([[1.0, 2.0, 3.0]]), torch.zeros(2, 4))
    for thresholds in ([], [2.0, 1.0], [0.0]):
        with pytest.raises(ValueError, match="thresholds"):
            TailTruncation(torch.eye(3), thresholds)


@pytest.mark.gpu
def test_updates_do_not_wait_for_the_device(no_waiting):
    pre, x = torch.randn(64, 128, device="cuda"), torch.randn(64, 16, device="cuda")
    W, logits = torch.randn(128, 16, device="cuda"), torch.randn(4, 16, 50, device="cuda")
    ids = torch.zeros(4, 16, dtype=torch.int64, device="cuda")
    codes, sized = se.functional.topk(pre, 8), se.functional.threshold(pre, 1.0, capacity=64 * 128)
    metrics = Reconstruction(), Sparsity(128), EpsilonLBO(W.norm(dim=1), x[0], points=32), TailTruncation(W, [0.5, 1.0])
    language = NextTokenLoss()
    with no_waiting():
        for _ in range(3):
            metrics[0].update(x, x)
            language.update(logits, ids, clean=logits)
            for kept in (codes, sized):
                metrics[1].update(kept)
                metrics[2].update(kept, x)
                metrics[3].update(kept)
    assert all(metric.compute() for metric in (*metrics, language))


# --- language ------------------------------------------------------------------------------------------------------


def test_next_token_loss_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0], [5.0, 5.0]]])
    ids = torch.tensor([[1, 1, 0]])
    metric = NextTokenLoss()
    metric.update(logits, ids, clean=torch.zeros(1, 3, 2))
    found = metric.compute()
    # Predictions: 1 with p = 1/2, then 0 with p = 3/4; the third position predicts nothing.
    assert found["predicted"] == 2
    assert found["ce"] == pytest.approx((math.log(2) + math.log(4 / 3)) / 2, rel=2**-22)  # fp32 losses
    # KL of (1/2, 1/2) from (3/4, 1/4): log(1/2) - (log(3/4) + log(1/4)) / 2; over all three positions.
    kl = math.log(1 / 2) - (math.log(3 / 4) + math.log(1 / 4)) / 2
    assert found["kl"] == pytest.approx(kl / 3, rel=2**-20)


def test_next_token_loss_in_any_batches_and_chunks(monkeypatch):
    from sae_engine.metrics import language

    logits, clean, ids = torch.randn(9, 6, 11), torch.randn(9, 6, 11), torch.randint(0, 11, (9, 6))
    whole, parts = NextTokenLoss(), NextTokenLoss()
    whole.update(logits, ids, clean=clean)
    monkeypatch.setattr(language, "CHUNK_ELEMENTS", 70)
    for part in splits(9, 2):
        parts.update(logits[part], ids[part], clean=clean[part])
    assert_close(parts.compute(), whole.compute())


def test_impossible_tokens_do_not_spoil_the_divergence():
    logits = torch.tensor([[[0.0, -math.inf], [0.0, 0.0]]])
    metric = NextTokenLoss()
    metric.update(logits, torch.tensor([[0, 0]]), clean=logits)
    assert metric.compute() == {"ce": 0.0, "predicted": 1, "kl": 0.0}


def test_next_token_loss_refuses():
    metric = NextTokenLoss()
    metric.update(torch.zeros(2, 1, 4), torch.zeros(2, 1, dtype=torch.int64))  # contexts of one token predict none
    with pytest.raises(RuntimeError, match="predicted"):
        metric.compute()
    with pytest.raises(ValueError, match="all batches or for none"):
        metric.update(torch.zeros(2, 1, 4), torch.zeros(2, 1, dtype=torch.int64), clean=torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="input_ids must have shape"):
        metric.update(torch.zeros(2, 1, 4), torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="input_ids"):
        metric.update(torch.zeros(2, 1, 4), torch.zeros(2, 1))


def test_loss_recovered():
    assert loss_recovered(2.0, 3.0, 6.0) == 0.75
    assert loss_recovered(2.0, 7.0, 6.0) == -0.25
    assert math.isnan(loss_recovered(2.0, 2.0, 2.0))


@pytest.mark.interop
@pytest.mark.no_poison
@pytest.mark.filterwarnings("default")
def test_explained_variances_are_those_of_saelens():
    """In a single batch, about that batch's mean."""
    evals = pytest.importorskip("sae_lens.evals", reason="the comparison needs sae-lens")
    x, x_hat = torch.randn(2, 40, 8).unbind()
    metric = Reconstruction(centre=x.mean(0))
    metric.update(x_hat, x)
    calculator = evals.ExplainedVarianceCalculator()
    calculator.add_batch(x_hat, x)
    found = metric.compute()
    assert found["explained_variance"] == pytest.approx(calculator.compute(), rel=2**-20)
    legacy = 1 - (x - x_hat).square().sum(1) / (x - x.mean(0)).square().sum(1)
    assert found["explained_variance_per_token"] == pytest.approx(legacy.mean().item(), rel=2**-20)
