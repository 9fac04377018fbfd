"""TrainStep(nonfinite=): a batch that is not finite changes not one bit, and is counted or raised for."""
import math

import pytest
import torch

import sae_engine as se
from sae_engine.training import TrainStep
from sae_engine.training.backward import Finite, _is_too_large, _is_too_large_by_host

D, F = 6, 20
RULES = {
    "TopK": lambda: se.TopK(3), "AbsTopK": lambda: se.AbsTopK(3), "BatchTopK": lambda: se.BatchTopK(2),
    "FeatureChoice": lambda: se.FeatureChoice(F, 2), "TopAFA": lambda: se.TopAFA(),
    "MatryoshkaBatchTopK": lambda: se.MatryoshkaBatchTopK(2, widths=[8, F]),
    "JumpReLU": lambda: se.JumpReLU(F), "StatisticalTopK": lambda: se.StatisticalTopK(2),
}  # fmt: skip
WAYS = {"fused": {}, "stored": {"grad_clip": 1.0}, "16 bit": {"compute_dtype": "bfloat16"}}


def made(rule="TopK", **options):
    torch.manual_seed(0)
    sae = se.SparseAutoencoder(D, F, RULES[rule]())
    losses = [se.losses.StepL0(0.1)] if rule == "JumpReLU" else []
    return TrainStep(sae, lr=1e-3, losses=losses, **options)


def batch(value=None):
    x = torch.randn(16, D, generator=torch.Generator().manual_seed(2))
    if value is not None:
        x[3, 2] = value
    return x


def state(step):
    moments = [t.clone() for s in step.optimizer.state.values() for t in s.values()]
    rule = {n: v for n, v in vars(step.sae.activation).items() if isinstance(v, int)}
    return [*(t.clone() for t in step.sae.state_dict().values()), *moments, step.dead.since_fired.clone()], rule


def unchanged(before, after):
    return all(map(torch.equal, before[0], after[0])) and before[1] == after[1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", RULES)
def test_a_bad_batch_changes_no_bit_and_the_next_is_as_if_it_had_not_been(rule, way):
    step, other = (made(rule, nonfinite="skip", **WAYS[way]) for _ in range(2))
    step(batch()), other(batch())
    before = state(step)
    for number, value in enumerate((torch.nan, torch.inf, 1e30), 1):
        step(batch(value))
        assert unchanged(before, state(step)) and step.skipped == number
    step(batch()), other(batch())
    assert unchanged(state(step), state(other)) and not unchanged(before, state(step)) and other.skipped == 0


def test_the_default_raises_and_the_state_is_that_before():
    step = made()
    step(batch())
    before = state(step)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="1 batch"):
            step(batch(torch.nan))
        assert unchanged(before, state(step))
    step(batch())
    assert not unchanged(before, state(step)) and step.skipped == 2


def test_targets_count_too():
    step = made(nonfinite="skip")
    before = state(step)
    step(batch(), target=batch(torch.inf))
    assert unchanged(before, state(step)) and step.skipped == 1


def test_an_accumulated_update_is_left_out_whole():
    step = made(nonfinite="skip", accumulate=2)
    before = state(step)
    step(batch(torch.nan)), step(batch())
    assert unchanged(before, state(step)) and step.skipped == 1
    step(batch()), step(batch())
    assert not unchanged(before, state(step))


LARGE = 3e38 ** 0.5  # its square is just finite in float32


@pytest.mark.parametrize(("loss", "slopes", "others", "bad"), [
    (1.0, [2.0, 3.0], [4.0], False), (1.0, [0.0], [0.0, 0.0], False), (-1.0, [1e-30, 1e-38], [1e30], False),
    (1.0, [LARGE], [0.0], False), (1.0, [LARGE, LARGE], [0.0], True), (1.0, [1e10], [1e8], False),
    (1.0, [1e10], [1e10], True), (torch.nan, [1.0], [1.0], True), (torch.inf, [1.0], [1.0], True),
    (-torch.inf, [1.0], [1.0], True), (1.0, [torch.nan], [1.0], True), (1.0, [0.0], [torch.inf], True),
    (1.0, [1.0], [2.0, torch.nan], True),
])  # fmt: skip
def test_host_and_device_find_the_same_too_large(loss, slopes, others, bad):
    numbers = torch.tensor([loss, *slopes, *others])
    assert bool(_is_too_large(numbers, len(slopes))) is _is_too_large_by_host(numbers, len(slopes)) is bad
    if all(map(math.isfinite, (loss, *slopes, *others))):  # the squares of these are finite in float64
        assert not _is_too_large_by_host(numbers.double(), len(slopes))


def test_a_summand_of_many_groups_may_be_no_larger_than_its_part():
    for groups, skipped in ((1, 0), (1 << 62, 1)):
        step = made(nonfinite="skip")
        step._finite = Finite("skip", torch.device("cpu"), groups)
        before = state(step)
        step(batch())
        assert step.skipped == skipped and unchanged(before, state(step)) is bool(skipped)


@pytest.mark.parametrize("site", range(3))
def test_the_gradient_of_all_sites_is_looked_at_once(site, monkeypatch):
    """Source s writes site s and all later ones: a target that is NaN at the first one reaches one source alone."""
    torch.manual_seed(0)
    step = TrainStep(se.Crosscoder.clt(3, D, F, se.TopK(3)), lr=1e-3, nonfinite="skip")
    seen, plain = [], torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda of, *rest, **named: seen.append(of) or plain(of, *rest, **named))
    x = torch.randn(16, 3, D)
    step(x)
    (looked,) = seen
    matrices = [tuple(t.shape) for t in looked if t.dim() == 2]
    assert matrices == [(16, 3 * D), *[(16, D)] * 3]  # the gradient at the output, and what each encoder multiplies
    before, target = state(step), x.clone()
    target[5, site, 1] = torch.nan
    step(x, target)
    assert step.skipped == 1 and unchanged(before, state(step))


def test_without_a_host_read_the_flag_stays_on_the_device(monkeypatch):
    """As on a GPU: the flag decides there, whether it is set or not."""
    def on_device(self, loss, pending, *, has_capacity):
        return ~loss.isfinite()

    step, other = made("BatchTopK", nonfinite="skip"), made("BatchTopK", nonfinite="skip")
    other(batch())
    monkeypatch.setattr(Finite, "of", on_device)
    step(batch())
    for ours, theirs in zip(state(step)[0], state(other)[0], strict=True):
        assert torch.equal(ours, theirs)
    before = state(step)
    step(batch(torch.nan))
    assert unchanged(before, state(step)) and step.skipped == 1


def test_a_batch_that_the_device_left_out_is_no_forward_of_the_first_phase():
    rule = se.FeatureChoice(F, 2, mutual_steps=2)
    step = TrainStep(se.SparseAutoencoder(D, F, rule), lr=1e-3, losses=[], nonfinite="skip")
    phases = []
    for bad in (False, True, True, False, False):
        step._teach(step.sae.encode(batch()), torch.tensor(bad))  # as on a GPU, where the host does not know
        phases.append((rule.phase, int(rule.forwards)))
    assert phases == [("mutual", 1), ("mutual", 1), ("mutual", 1), ("feature", 2), ("feature", 3)]


def test_the_mode_is_checked():
    with pytest.raises(ValueError, match=r"nonfinite must be one of .*raise.*skip.*, got 'ignore'"):
        made(nonfinite="ignore")
