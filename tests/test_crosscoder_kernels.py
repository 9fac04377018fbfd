"""Steps of cross-layer coders on the Triton kernels, interpreted or compiled: gradients are columns of wider rows."""
import pytest
import torch
from pair_loop import SITES, D, F, batch, coder

from sae_engine import JumpReLU
from sae_engine.losses import AuxK, TanhL0
from sae_engine.training import TrainStep
from sae_kernels.device import _tuning

TOKENS = 5  # the interpreter takes its time
# Adam with eps = 1 moves a parameter in proportion to its gradient, of which sums in fp32 differ by some roundings.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


ONE, SEVERAL = _tuning.PASS_TILE, 8  # tiles of a row


@pytest.mark.parametrize(("wiring", "rule", "tile"), [
    ("causal", "topk", ONE), ("windows", "mixed", SEVERAL), ("causal", "token", ONE)])  # fmt: skip
def test_columns_of_wider_rows(wiring, rule, tile, monkeypatch):
    """Every source but the first reads and writes inside of the rows of x and of the gradient at the output."""
    monkeypatch.setattr(_tuning, "PASS_TILE", tile)
    results = []
    for backend in ("torch", "triton"):
        made = coder(wiring, rule, dtype=torch.float32, skip=True)
        step = TrainStep(made, lr=0.5, eps=1.0, losses=AuxK(k=3), dead_after=TOKENS, backend=backend)
        reports = [step(*batch(seed, tokens=TOKENS, dtype=torch.float32)) for seed in range(2)]
        assert made.W_dec[1].shape[1] < SITES * D
        results.append([reports[-1]["loss"], *(p.detach() for p in made.parameters())])
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, **CLOSE)


@pytest.mark.parametrize("width", [0.2, 1.5, 4.0], ids=["within", "mask", "below"])
def test_thresholds_learn_the_same_from_what_is_held_apart(width, monkeypatch):
    """By place, in a mask, and as what is left over beside entries below the window."""
    found, original = [], JumpReLU.of_window
    monkeypatch.setattr(JumpReLU, "of_window", lambda self, sums: found.append(sums) or original(self, sums))
    for backend in ("torch", "triton"):
        made = coder("causal", "jumprelu", dtype=torch.float32)
        for rule in made.activation:
            rule.bandwidth = width
        TrainStep(made, lr=0.5, losses=TanhL0(0.1), backend=backend)(*batch(tokens=TOKENS, dtype=torch.float32))
    ours, other = (torch.stack(sums) for sums in (found[SITES:], found[:SITES]))
    assert other.any()
    torch.testing.assert_close(ours, other, **CLOSE)


def test_decoding_one_site_reads_columns():
    made = coder("causal", "topk", dtype=torch.float32)
    codes = made.encode(batch(tokens=TOKENS, dtype=torch.float32)[0], backend="triton")
    assert codes.shape == (SITES, TOKENS, F)
    for site in range(SITES):
        found = made.decode(codes, sites=site, backend="triton")
        torch.testing.assert_close(found, made.decode(codes, sites=site, backend="torch"), **CLOSE)
