"""Sites on one scale, and weights folded for activations as they are: the same codes, the same output."""
import pytest
import torch
from pair_loop import SITES, WIDTHS, WIRINGS, D, F, batch, coder

import sae_engine as se
from sae_engine import Standardization, fold_standardization

CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # fp64: weights rounded once more than those that they are folded from


def raw(seed=3):
    """Two batches whose sites differ in mean and scale."""
    x, target = batch(seed, tokens=200)
    scales = torch.tensor([1.0, 30.0, 0.02], dtype=torch.float64)[:, None]
    return (x * scales + 5 * scales).flatten(1), (target * scales.flip(0) - 2).flatten(1)


def test_one_number_a_site():
    x, _ = raw()
    standard = Standardization.of(x, WIDTHS)
    sites = standard(x).view(-1, SITES, D)
    torch.testing.assert_close(sites.square().mean((0, 2)), torch.ones(SITES, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(sites.mean(0), torch.zeros(SITES, D, dtype=torch.float64), **CLOSE)
    ratio = (x - x.mean(0)) / standard(x)
    assert all(part.std() < 1e-6 * part.mean() for part in ratio.split(D, dim=1))  # columns of a site keep theirs
    torch.testing.assert_close(standard.undo(standard(x)), x, **CLOSE)
    again = Standardization.of(x.view(-1, SITES, D), WIDTHS)
    assert torch.equal(again.scale, standard.scale) and torch.equal(again.mean, standard.mean)


@pytest.mark.parametrize("rule", ["topk", "batch", "jumprelu"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_folded_weights_take_activations_as_they_are(wiring, rule):
    made, (x, target) = coder(wiring, rule, skip=True), raw()
    reads, writes = Standardization.of(x, WIDTHS), Standardization.of(target, WIDTHS)
    folded = fold_standardization(made, reads, writes)
    ours, theirs = folded.encode(x), made.encode(reads(x))
    assert torch.equal(ours.indices, theirs.indices)
    torch.testing.assert_close(ours.values, theirs.values, **CLOSE)
    torch.testing.assert_close(folded(x), writes.undo(made(reads(x))), **CLOSE)


def test_a_coder_trained_on_standardised_sites_is_exported_raw():
    """Trained so, its error is made up of all sites; folded, it reconstructs each as well as it did."""
    x, _ = raw()
    standard = Standardization.of(x, WIDTHS)
    made = se.Crosscoder.clt(SITES, D, F, se.TopK(4), dtype=torch.float64)
    step = se.training.TrainStep(made, lr=1e-2)
    losses = [step(standard(x))["loss"] for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    folded = fold_standardization(made, standard)
    left = standard(folded(x)) - standard(x)
    torch.testing.assert_close(left, made(standard(x)) - standard(x), **CLOSE)
    assert all(part.square().mean() < 1 for part in left.split(D, dim=1))


BAD = {
    "another width": (lambda: Standardization.of(raw()[0], [D, D]), "x must be"),
    "no variation": (lambda: Standardization.of(torch.ones(5, 4), [2, 2]), "vary"),
    "no token": (lambda: Standardization.of(torch.ones(0, 4), [2, 2]), "token"),
    "a scale that is none": (lambda: Standardization((2,), torch.zeros(2), torch.zeros(1)), "scale"),
    "a mean of another width": (lambda: Standardization((2,), torch.zeros(3), torch.ones(1)), "mean"),
    "other sites": (
        lambda: fold_standardization(coder(), Standardization((2,), torch.zeros(2), torch.ones(1))), "reads"),
    "no crosscoder": (
        lambda: fold_standardization(torch.nn.Linear(2, 2), Standardization((2,), torch.zeros(2), torch.ones(1))),
        "coder"),
    "ranked by norms": (
        lambda: fold_standardization(coder(rescale_acts_by_decoder_norm=True), Standardization.of(raw()[0], WIDTHS)),
        "rescale_acts"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    make, named = BAD[case]
    with pytest.raises((TypeError, ValueError), match=named):
        make()
