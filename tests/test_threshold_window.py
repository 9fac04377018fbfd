"""What thresholds learn from entries that were dropped: held apart, by place, by what is left over or as a mask.

In fp64 against sums over every entry of a dense matrix.
"""
import pytest
import torch
from pair_loop import WIRINGS, B, D, F, batch, coder, norms

import sae_engine as se
from sae_engine import _slabs
from sae_engine.losses import L1, AuxK, PreActivation, StepL0, TanhL0
from sae_engine.losses.warmed import Warmed
from sae_engine.testing import allocated_by
from sae_engine.training import TrainStep, forward

LR = 2**-10
KINDS = {"within": 0.2, "below": 4.0, "mask": 1.5}  # what is held with a window of that width
BUDGETS = {"whole": None, "some tokens": 3 * F * 8 * 2, "some latents": B * 8 * 8 * 2}


def windowed(wiring="causal", width=0.2, **options):
    made = coder(wiring, "jumprelu", **options)
    for rule in made.activation if isinstance(made.activation, se.rules.PerSource) else [made.activation]:
        rule.bandwidth = width
    return made


@pytest.fixture
def held(monkeypatch):
    """The kinds of what steps hold, in a list."""
    found, original = [], forward.RunningWindow.finish

    def finish(self):
        result = original(self)
        kind = "mask" if self.dropped.mask is not None else "within" if self.dropped.within else "below"
        return found.append(kind) or result

    monkeypatch.setattr(forward.RunningWindow, "finish", finish)
    return found


@pytest.fixture
def sums(monkeypatch):
    """What rules are told of their windows' dropped halves, in a list."""
    found, original = [], se.JumpReLU.of_window
    monkeypatch.setattr(se.JumpReLU, "of_window", lambda self, sums: found.append(sums) or original(self, sums))
    return found


def every_entry(made, x, target, slope):
    """(sources, F) sums over dropped entries of the window, of the gradients at values: entry by entry."""
    x, target = x.flatten(1), target.flatten(1)
    grad = 2 * (made(x).detach() - target) / len(x)
    found = []
    for number, source in enumerate(made.sources):
        pre = x[:, source.reads] @ source.W_enc + source.b_enc
        scale = norms(made, number) if made.rescale_acts_by_decoder_norm else torch.ones(F, dtype=pre.dtype)
        pre, theta = pre * scale, source.activation.threshold.double()
        at_values = grad[:, source.writes] @ source.W_dec.T / scale
        at_values = at_values + slope * (norms(made, number) if not made.rescale_acts_by_decoder_norm else 1) / len(x)
        dropped = (pre <= theta) & (pre > theta - source.activation.bandwidth / 2)
        found.append((at_values * dropped).sum(0))
    return torch.stack(found).detach()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_sums_are_those_over_every_entry(wiring, kind, budget, held, sums, monkeypatch):
    monkeypatch.setattr(_slabs, "LATENTS_AT_LEAST", 8 if budget == "some latents" else F)
    monkeypatch.setattr(_slabs, "ALIGNMENT", 4)
    made, (x, target) = windowed(wiring, KINDS[kind]), batch()
    wanted = every_entry(made, x, target, slope=0.05 * 4.0)
    TrainStep(made, lr=LR, losses=TanhL0(0.05), memory_budget=BUDGETS[budget])(x, target)
    assert set(held) == {kind} or budget == "some tokens"  # of which the first rectangle has but three
    torch.testing.assert_close(torch.stack(sums), wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_ranked_by_decoder_norms_and_with_a_slope_of_1(kind, held, sums):
    made, (x, target) = windowed("causal", KINDS[kind], rescale_acts_by_decoder_norm=True), batch()
    wanted = every_entry(made, x, target, slope=0.3)
    TrainStep(made, lr=LR, losses=Warmed(L1(0.3)))(x, target)
    assert held
    torch.testing.assert_close(torch.stack(sums), wanted, rtol=1e-11, atol=1e-13)


def plain(rule, **options):
    torch.manual_seed(0)
    made = se.SparseAutoencoder(D, F, rule, dtype=torch.float64, **options)
    with torch.no_grad():
        made.W_enc.mul_(2), made.b_enc.uniform_(-0.2, 0.2)
    return made


@pytest.mark.parametrize("kind", ["JumpReLU", "LogJumpReLU"])
@pytest.mark.parametrize("width", [0.1, 1.2, 3.0])
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_five_steps_are_those_of_autograd_which_stores_the_window(kind, width, norm, held):
    make = getattr(se, kind)
    losses = [TanhL0(0.05), PreActivation(0.01), AuxK(k=3)]
    ours, theirs = (plain(make(F, threshold=0.2, bandwidth=width), normalize_activations=norm) for _ in range(2))
    step = TrainStep(ours, lr=LR, losses=losses, normalize_decoder=False)
    adam = torch.optim.Adam(theirs.parameters(), lr=LR)
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(32, D, generator=g, dtype=torch.float64)
        step(x)
        adam.zero_grad()
        se.losses.evaluate(theirs, x, losses)["loss"].backward()
        adam.step()
    assert len(held) == 5
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        bound = {"rtol": 1e-8, "atol": 1e-9} if p.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(p, q, **bound, msg=lambda text, name=name: f"{name}: {text}")


class Own(TanhL0):
    """A loss that does not say what its slope at dropped values is."""

    def value(self, batch):
        return super().value(batch)


@pytest.mark.parametrize("losses", [StepL0(0.1), Own(0.05), Warmed(Own(0.05))], ids=["step", "own", "warmed"])
def test_where_a_loss_does_not_know_its_slope_codes_hold_the_window(losses, held):
    made = plain(se.JumpReLU(F, threshold=0.2, bandwidth=1.2))
    TrainStep(made, lr=LR, losses=losses)(torch.randn(32, D, dtype=torch.float64))
    assert not held


@pytest.mark.parametrize("case", ["fixed thresholds", "another selection", "other values"])
def test_rules_that_learn_nothing_or_select_by_themselves_are_left_alone(case, held):
    class Selects(se.JumpReLU):
        def _select(self, pre, backend):
            return super()._select(pre, backend)

    class Values(se.JumpReLU):
        def entry_values(self, pre, codes):
            return super().entry_values(pre, codes)

    kinds = {"fixed thresholds": se.JumpReLU, "another selection": Selects, "other values": Values}
    rule = kinds[case](F, threshold=0.2, bandwidth=1.2)
    rule.threshold.requires_grad_(case != "fixed thresholds")
    report = TrainStep(plain(rule), lr=LR, losses=TanhL0(0.05))(torch.randn(32, D, dtype=torch.float64))
    assert not held and report["l0"] > 0


def test_16_bit_products(held, sums):
    for dtype in (torch.float32, torch.bfloat16):
        made = plain(se.JumpReLU(F, threshold=0.2, bandwidth=1.2)).float()
        x = torch.randn(256, D, generator=torch.Generator().manual_seed(3))
        TrainStep(made, lr=LR, losses=TanhL0(0.05), compute_dtype=dtype)(x)
    assert set(held) == {"mask"}
    exact, rounded = sums
    assert (exact - rounded).norm() < 0.1 * exact.norm()  # an entry near an edge is on its other side in 16 bits


def test_a_step_holds_less_than_the_window():
    """A quarter of the entries is kept, the rest is within the window."""
    tokens, latents, found = 256, 4096, {}
    for name, loss in {"apart": TanhL0(0.05), "stored": Own(0.05)}.items():
        torch.manual_seed(0)
        made = se.SparseAutoencoder(32, latents, se.JumpReLU(latents, threshold=0.5, bandwidth=4.0))
        step, x = TrainStep(made, lr=LR, losses=loss, memory_budget=1 << 30), torch.randn(tokens, 32)
        step(x)
        found[name] = allocated_by(lambda step=step, x=x: step(x))
    assert 3 * found["apart"].peak < found["stored"].peak, found
