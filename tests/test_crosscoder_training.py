"""TrainStep over several sources: the parameters of a dense loop under torch.optim.Adam, for every wiring and rule."""
import pytest
import torch
from pair_loop import SITES, WIRINGS, B, D, F, batch, coder, copied, dense_codes, forward, norms
from played_cuda import Played

import sae_engine as se
from sae_engine import _slabs
from sae_engine.losses import L1, AuxK, MultiTopK, PreActivation, TanhL0
from sae_engine.testing import allocated_by
from sae_engine.training import TrainStep, peak_bytes

LR = 2**-10  # the same in fp32, in which a step keeps it
# Five steps of Adam: a gradient's rounding of 1e-16 is multiplied by 1 / sqrt(second moment), here below 1e6.
CLOSE = {"rtol": 1e-8, "atol": 1e-9}
RULES = ("topk", "batch", "batches", "mixed", "token")


def error(made, x, target):
    return (forward(made, x) - target).square().sum() / len(x)


def trained_by_the_loop(made, batches, loss=error, **options):
    """Losses of a dense loop with autograd and torch.optim.Adam."""
    adam = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=LR, **options)
    found = []
    for x, target in batches:
        adam.zero_grad()
        value = loss(made, x, target)
        value.backward()
        adam.step()
        found.append(value.detach())
    made.zero_grad()
    return found


def assert_trained_alike(ours, theirs):
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        bound = CLOSE if p.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}  # thresholds: 5 roundings of fp32
        torch.testing.assert_close(p, q, **bound, msg=lambda text, name=name: f"{name}: {text}")


def batches(number=5, **options):
    return [batch(seed, **options) for seed in range(number)]


@pytest.mark.parametrize("budget", [None, 3 * F * 8, B * 8 * 8], ids=["whole", "some tokens", "some latents"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_five_steps_are_those_of_the_loop(wiring, rule, budget, monkeypatch):
    monkeypatch.setattr(_slabs, "LATENTS_AT_LEAST", 8 if budget == B * 8 * 8 else F)
    monkeypatch.setattr(_slabs, "ALIGNMENT", 4)
    ours, theirs = (coder(wiring, rule, skip=True) for _ in range(2))
    step = TrainStep(ours, lr=LR, memory_budget=budget)
    found = [step(x, target)["loss"] for x, target in batches()]
    wanted = trained_by_the_loop(theirs, batches())
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-10, atol=0)
    assert_trained_alike(ours, theirs)


@pytest.mark.parametrize("stored", [{"accumulate": 2}, {"grad_clip": 0.5}], ids=["accumulate", "clip"])
@pytest.mark.parametrize("rule", ["topk", "batch"])
def test_stored_gradients(rule, stored):
    ours, theirs = (coder("causal", rule, skip=True) for _ in range(2))
    step = TrainStep(ours, lr=LR, **stored)
    adam = torch.optim.Adam(theirs.parameters(), lr=LR)
    calls = stored.get("accumulate", 1)
    for number in range(6):
        x, target = batch(number)
        report = step(x, target)
        (error(theirs, x, target) / calls).backward()
        if (number + 1) % calls == 0:
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), stored.get("grad_clip", torch.inf))
            torch.testing.assert_close(report["grad_norm"], norm, rtol=1e-10, atol=0)
            adam.step(), adam.zero_grad(set_to_none=True)
    assert_trained_alike(ours, theirs)


def l1(made, x, target):
    codes = dense_codes(made, x)
    return error(made, x, target) + 0.05 * sum((z * norms(made, s)).sum() for s, z in enumerate(codes)) / B


def tanh(made, x, target):
    codes = dense_codes(made, x)
    squashed = sum(torch.tanh(4.0 * z * norms(made, s)).sum() for s, z in enumerate(codes))
    return error(made, x, target) + 0.05 * squashed / B


@pytest.mark.parametrize(("added", "loss"), [(L1(0.05), l1), (TanhL0(0.05), tanh)], ids=["l1", "tanh"])
@pytest.mark.parametrize("rule", ["relu", "topk", "batch", "jumprelu"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_sparsity_weighted_by_decoder_norms(wiring, rule, added, loss):
    ours, theirs = (coder(wiring, rule) for _ in range(2))
    step = TrainStep(ours, lr=LR, losses=added)
    found = [step(x, target)["loss"] for x, target in batches()]
    wanted = trained_by_the_loop(theirs, batches(), loss)
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-7, atol=0)
    assert_trained_alike(ours, theirs)


def lifted(made, x, target):
    """With what pulls latents that are off up to their thresholds, entry by entry."""
    found, rules = tanh(made, x, target), made.activation if len(made.wiring) > 1 else [made.activation[0]]
    for s, ((read, _), rule) in enumerate(zip(made.wiring, rules, strict=True)):
        pre = torch.cat([x[:, t] for t in read], 1) @ made.W_enc[s] + made.b_enc[s]
        found = found + 0.01 * (torch.relu(rule.threshold.double() - pre) * norms(made, s)).sum() / B
    return found


@pytest.mark.parametrize("budget", [None, 3 * F * 8], ids=["whole", "chunked"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_latents_that_are_off_are_lifted_by_sums_over_those_that_are_on(wiring, budget):
    """And beside AuxK, whose codes have no entry for the row of the mean input."""
    ours, theirs = (coder(wiring, "jumprelu") for _ in range(2))
    losses = [TanhL0(0.05), PreActivation(0.01), AuxK(k=3)]
    x, target = batch()
    wanted = se.losses.evaluate(ours, x, losses, target=target)
    step = TrainStep(ours, lr=LR, losses=losses, memory_budget=budget)
    found = [step(x, target)["loss"] for x, target in batches()]
    torch.testing.assert_close(wanted["loss"], lifted(theirs, x, target), rtol=1e-7, atol=0)
    of_loop = trained_by_the_loop(theirs, batches(), lifted)
    torch.testing.assert_close(torch.stack(found), torch.stack(of_loop), rtol=1e-7, atol=0)
    assert_trained_alike(ours, theirs)


def test_latents_that_are_off_are_lifted_where_gradients_are_stored():
    ours, theirs = (coder("causal", "jumprelu") for _ in range(2))
    step = TrainStep(ours, lr=LR, losses=[TanhL0(0.05), PreActivation(0.01)], grad_clip=1e9)
    for x, target in batches():
        step(x, target)
    trained_by_the_loop(theirs, batches(), lifted)
    assert_trained_alike(ours, theirs)


@pytest.mark.parametrize("rule", ["topk", "batch", "token"])
@pytest.mark.parametrize("decoder_norm", ["joint", "sum"])
def test_ranked_by_decoder_norms(rule, decoder_norm):
    ours, theirs = (coder("causal", rule, rescale_acts_by_decoder_norm=True, decoder_norm=decoder_norm)
                    for _ in range(2))  # fmt: skip
    step = TrainStep(ours, lr=LR)
    for x, target in batches():
        step(x, target)
    trained_by_the_loop(theirs, batches())
    assert_trained_alike(ours, theirs)


def test_evaluate_gives_the_same_losses():
    losses = [L1(0.05), MultiTopK()]
    made = coder("causal", "topk", skip=True)
    x, target = batch()
    wanted = se.losses.evaluate(made, x, losses, target=target)
    found = TrainStep(made, lr=LR, losses=losses)(x, target)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-12, atol=0)


def with_auxk(dead, k):
    """AuxK on the residual of all targets, by its formula: each dead latent of a source competes within it."""

    def loss(made, x, target):
        out = forward(made, x)
        left = (target - out).detach().flatten(1)
        total = 0
        for s, (read, written) in enumerate(made.wiring):
            pre = torch.cat([x[:, t] for t in read], 1) @ made.W_enc[s] + made.b_enc[s]
            ranked = pre.masked_fill(~dead[s], -torch.inf).topk(k, dim=1)
            values = ranked.values.relu() * ranked.values.isfinite()
            z = torch.zeros_like(pre).scatter(1, ranked.indices, values)
            total = total + torch.nn.functional.pad(z @ made.W_dec[s], (written.start * D, (SITES - written.stop) * D))
        spread = (left - left.mean(0)).square().sum()
        return (out - target).square().sum() / B + (total - left).square().sum() / spread / 32

    return loss


def test_dead_latents_of_each_source_learn_from_the_residual_of_all_targets():
    ours, theirs = (coder("causal", "topk") for _ in range(2))
    for made in (ours, theirs):
        with torch.no_grad():
            made.b_enc[1, :7] = -100.0  # never among the first
            made.b_enc[2, :5] = -100.0
            made.b_enc[1, 3] = -1.0
    step = TrainStep(ours, lr=LR, losses=AuxK(k=3), dead_after=B)
    x, target = batch()
    dead = torch.ones(SITES, F, dtype=torch.bool)
    step(x, target)
    trained = [(dense_codes(theirs, x) > 0).any(1)]
    adam = torch.optim.Adam(theirs.parameters(), lr=LR)
    error(theirs, x, target).backward()
    adam.step(), adam.zero_grad()
    dead = ~trained[0]
    assert dead[1, :3].all() and dead[2, :5].all() and torch.equal(step.dead.mask.view(SITES, F), dead)
    report = step(x, target)
    value = with_auxk(dead, 3)(theirs, x, target)
    value.backward()
    adam.step(), adam.zero_grad()
    torch.testing.assert_close(report["loss"], value.detach(), rtol=1e-10, atol=0)
    assert report["auxk"] > 0
    assert_trained_alike(ours, theirs)


def test_one_layer_is_a_transcoder():
    one = se.Crosscoder.clt(1, D, F, se.TopK(4))
    sae = se.SparseAutoencoder(D, F, se.TopK(4), d_out=D, apply_b_dec_to_input=False)
    copied(one, sae)
    steps = TrainStep(one, lr=1e-3, losses=L1(0.1)), TrainStep(sae, lr=1e-3, losses=L1(0.1), normalize_decoder=False)
    for n in range(3):
        x = torch.randn(B, D, generator=torch.Generator().manual_seed(n))
        reports = [step(x, 2 * x) for step in steps]
    assert all(torch.equal(reports[0][name], value) for name, value in reports[1].items())
    assert torch.equal(one.W_dec[0], sae.W_dec) and torch.equal(one.W_enc[0], sae.W_enc)


def test_two_models_are_an_autoencoder_of_both_side_by_side():
    both = se.Crosscoder([4, 7], [4, 7], F, se.BatchTopK(3))
    sae = se.SparseAutoencoder(11, F, se.BatchTopK(3), apply_b_dec_to_input=False)
    copied(both, sae)
    steps = TrainStep(both, lr=1e-3), TrainStep(sae, lr=1e-3, normalize_decoder=False)
    for n in range(3):
        x = torch.randn(B, 11, generator=torch.Generator().manual_seed(n))
        reports = [step(x) for step in steps]
    assert torch.equal(reports[0]["loss"], reports[1]["loss"]) and torch.equal(both.W_dec[0], sae.W_dec)


@pytest.mark.parametrize("moments", [None, "bfloat16"])
@pytest.mark.parametrize("rule", ["topk", "batch"])
def test_a_run_is_resumed_bit_for_bit(rule, moments):
    options = {"lr": LR, "losses": AuxK(k=3), "dead_after": B, "compute_dtype": "bfloat16", "moments": moments}
    first = coder("causal", rule, dtype=torch.float32, skip=True)
    step = TrainStep(first, **options)
    given = batches(6, dtype=torch.float32)
    for x, target in given[:3]:
        step(x, target)
    second = coder("causal", rule, seed=9, dtype=torch.float32, skip=True)
    second.load_state_dict(first.state_dict())
    again = TrainStep(second, **options)
    again.load_state_dict(step.state_dict())
    for x, target in given[3:]:
        reports = step(x, target), again(x, target)
    assert all(torch.equal(reports[0][name], value) for name, value in reports[1].items())
    left, right = first.state_dict(), second.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_in_bfloat16_errors_stay_those_of_its_roundings():
    exact, narrow = (coder("causal", "topk", dtype=torch.float32) for _ in range(2))
    steps = TrainStep(exact, lr=LR), TrainStep(narrow, lr=LR, compute_dtype="bfloat16")
    for x, target in batches(dtype=torch.float32):
        errors = [step(x, target)["squared_error"] for step in steps]
    assert all(p.dtype == torch.float32 for p in narrow.parameters())
    assert 0 < abs(errors[1] - errors[0]) < 2**-6 * errors[0]  # a few roundings of 2⁻⁸


def test_what_is_not_finite_is_left_out():
    made = coder("causal", "topk")
    step = TrainStep(made, lr=LR, nonfinite="skip")
    step(*batch())
    before = {name: p.clone() for name, p in made.state_dict().items()}
    x, target = batch(2)
    target[3, SITES - 1, 0] = torch.inf  # the last layer alone writes it: so does every source
    step(x, target)
    assert step.skipped == 1 and all(torch.equal(p, before[name]) for name, p in made.state_dict().items())


def test_latents_die_by_source():
    made = coder("causal", "topk")
    with torch.no_grad():
        made.b_enc[1] -= 100 * torch.arange(F) // 10  # half of them far below
    step = TrainStep(made, lr=1e-9, dead_after=3 * B)
    fired = torch.zeros(SITES, F, dtype=torch.bool)
    for x, target in batches(3):
        fired |= (dense_codes(made, x) > 0).any(1)
        step(x, target)
    assert torch.equal(step.dead.mask.view(SITES, F), ~fired) and step.dead.since_fired.shape == (SITES * F,)


@pytest.mark.parametrize("rule", ["topk", "mixed"])
def test_a_step_of_fixed_counts_waits_for_nothing_and_can_be_captured(rule):
    if torch.cuda.is_available():
        pytest.skip("played here; a CUDA graph of it has not been tried on a GPU")
    with Played() as played, torch.device("cuda"):
        rules = se.TopK(3) if rule == "topk" else [se.TopK(3) for _ in range(SITES)]
        made, x = se.Crosscoder.clt(SITES, D, F, rules, skip=True), torch.randn(B, SITES, D)
        step = TrainStep(made, lr=LR, losses=AuxK(3), compute_dtype="bfloat16", dense=False)
        for _ in range(2):
            step.warm_up(x)
        with played.refusing():
            step(x)
        with played.capturing():
            step(x)


BAD = {
    "L1 with sums of norms": (lambda: TrainStep(coder(decoder_norm="sum"), lr=LR, losses=L1(0.1)), "decoder_norm"),
    "tanh with sums of norms": (
        lambda: TrainStep(coder(decoder_norm="sum"), lr=LR, losses=TanhL0(0.1)), "decoder_norm"),
    "a loss of one source": (lambda: TrainStep(coder(), lr=LR, losses=se.losses.AFA()), "AFA"),
    "a rule without thresholds": (
        lambda: TrainStep(coder(), lr=LR, losses=PreActivation(0.1))(*batch()), "JumpReLU.*TopK"),
    "thresholds of something else": (
        lambda: TrainStep(coder("causal", "jumprelu", rescale_acts_by_decoder_norm=True), lr=LR,
                          losses=[TanhL0(0.1), PreActivation(0.1)])(*batch()), "rescale_acts"),
    "no sparsity": (lambda: TrainStep(coder("causal", "relu"), lr=LR), "sparsity"),
    "x of neither form": (lambda: TrainStep(coder(), lr=LR)(torch.ones(B, D, SITES, dtype=torch.float64)), "x must be"),
    "a target of neither": (lambda: TrainStep(coder(), lr=LR)(batch()[0], batch()[0][:, :2]), "target must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    make, named = BAD[case]
    with pytest.raises((TypeError, ValueError), match=named):
        make()


NARROW = {"compute_dtype": "bfloat16"}


@pytest.mark.parametrize(("budget", "options"), [(1 << 40, {}), (1 << 20, {}), (1 << 40, NARROW)],
                         ids=["whole", "chunked", "bf16"])  # fmt: skip
def test_memory_is_within_the_formula(budget, options):
    """One source's pre-activations at a time, whatever their number: four times those would not fit the bound."""
    tokens, layers, width, latents, k = 512, 4, 64, 1 << 12, 16
    made = se.Crosscoder.clt(layers, width, latents, se.TopK(k))
    x, steps = torch.randn(tokens, layers * width), []

    def run():
        steps.append(TrainStep(made, lr=LR, memory_budget=budget, **options))
        for _ in range(2):
            steps[0](x)

    measured = allocated_by(run).peak
    state = steps[0].optimizer.state.values()
    measured -= sum(t.numel() * t.element_size() for tensors in state for t in tensors.values())
    formula = peak_bytes(
        tokens, layers * width, latents, k, memory_budget=budget,
        sources=[(source.d_in, source.d_out) for source in made.sources], **options,
    )  # fmt: skip
    assert 0.6 * formula < measured <= formula
    one = peak_bytes(tokens, width, latents, k, memory_budget=budget, **options)
    assert one == peak_bytes(tokens, width, latents, k, memory_budget=budget, sources=[(width, width)], **options)
