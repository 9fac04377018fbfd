"""Adam's moments in bfloat16: rounded by chance, after the update, the same bits wherever they are made."""
from types import SimpleNamespace

import narrow_moments
import pytest
import torch
from latent_passes import DTYPES, FAST, LAYOUTS, MODES, SHAPES, adam
from latent_passes import make as make_pass
from rows import load
from training_cases import RULES, make, train_step

import sae_engine as se
from sae_engine.losses import AuxK
from sae_engine.testing import assert_same
from sae_engine.training import TrainStep
from sae_engine.training.optimizer import Adam
from sae_kernels import _rounding
from sae_kernels.device import _tuning
from sae_kernels.stock import limits, moments

BF16, FP32 = torch.bfloat16, torch.float32
NARROW = ("exp_avg 0", "exp_avg 1", "exp_avg_sq 0", "exp_avg_sq 1")
LARGEST = torch.finfo(BF16).max


def narrowed(s):
    """The same step with the weights' moments in bfloat16."""
    halves = {name: [*(t.to(BF16) for t in group[:2]), group[2]] for name, group in vars(s).items()
              if name in ("exp_avgs", "exp_avg_sqs")}  # fmt: skip
    return SimpleNamespace(**vars(s) | halves)


def without_gradients(s, backend, **how):
    """A step that only decays the moments, by numbers that leave them exact in fp32: every back end rounds the same."""
    quiet = SimpleNamespace(**vars(s) | {"terms": []})
    return adam(quiet, backend, along=False, weight_decay=0.0, unit_rows=False, **how)


def same_moments(a, b):
    for name in NARROW:
        assert a[name].dtype == b[name].dtype == BF16
        assert_same(a[name], b[name])


# --- the rounding ----------------------------------------------------------------------------------------------------


def in_python(step, matrix, latent, column):
    """The definition in integers of any length."""
    low = 2**32 - 1

    def mixed(h):
        h = (h ^ h >> 16) * 0x7FEB352D & low
        h = (h ^ h >> 15) * 0x846CA68B & low
        return h ^ h >> 16

    h = (mixed(mixed(2 * step + matrix) ^ latent) ^ column) * 0x7FEB352D & low
    h = (h ^ h >> 15) * 0x846CA68B & low
    return (h ^ h >> 16) & 0xFFFF, (h ^ h >> 16) >> 16


@pytest.mark.parametrize(("step", "matrix"), [(1, 0), (2, 1), (2**24, 1)])
def test_the_random_bits_are_those_of_the_definition(step, matrix):
    first, second = _rounding.rounding_bits(torch.tensor(float(step)), matrix, 5, 3)
    for latent in range(5):
        for column in range(3):
            assert (first[latent, column], second[latent, column]) == in_python(step, matrix, latent, column)


def test_the_random_bits_are_uniform_and_independent():
    """Of steps, places, matrices and moments: mean, and products of neighbours, within 4 standard deviations."""
    made = [_rounding.rounding_bits(torch.tensor(float(step)), m, 128, 128) for step in (1, 2, 700) for m in (0, 1)]
    bits = torch.stack([one for pair in made for one in pair]).double() / 2**16 - 0.5 + 2.0**-17  # 12 matrices
    count = bits.numel()
    assert abs(bits.mean()) < 4 * (1 / 12 / count) ** 0.5
    assert abs(bits.square().mean() - 1 / 12) < 4 * (1 / 180 / count) ** 0.5
    pairs = [bits[i] * bits[j] for i in range(12) for j in range(i)]
    pairs += [bits[:, 1:] * bits[:, :-1], bits[:, :, 1:] * bits[:, :, :-1], bits[:, 1:, 1:] * bits[:, :-1, :-1]]
    for pair in pairs:
        assert abs(pair.mean()) < 4.5 * (1 / 144 / pair.numel()) ** 0.5  # 69 of them
    counts = ((bits + 0.5) * 256).long().flatten().bincount(minlength=256)
    chi_square = ((counts - count / 256).square() / (count / 256)).sum()
    assert abs(chi_square - 255) < 4 * (2 * 255) ** 0.5


@pytest.mark.parametrize("value", [1.001, -3e-5, 1e-39])
def test_the_mean_of_many_roundings_is_the_number(value):
    """Over 10,000 steps at one place, and over 10,000 places at one step."""
    exact = torch.full((100, 100), value)
    up_and_down = _rounding.rounded(exact, torch.full_like(exact, 0xFFFF, dtype=torch.int64)), _rounding.rounded(
        exact, torch.zeros_like(exact, dtype=torch.int64)
    )
    high, low = (one[0, 0].double() for one in up_and_down)
    share = (exact[0, 0].double() - low) / (high - low)
    assert 0 < share < 1
    sigma = (high - low).abs() * (share * (1 - share) / 10_000).sqrt()
    keys_in_time = _rounding.latent_keys(torch.arange(10_000.0).view(100, 100), 1, torch.tensor(5))
    for moment in (0, 1):
        at_once = _rounding.rounding_bits(torch.tensor(7.0), 0, 100, 100)[moment]
        in_time = _rounding.random_bits(keys_in_time, torch.tensor(3))[moment]
        for found in (_rounding.rounded(exact, bits) for bits in (at_once, in_time)):
            assert set(found.double().flatten().tolist()) == {float(low), float(high)}
            assert abs(found.double().mean() - exact[0, 0].double()) < 4 * sigma


def test_what_bfloat16_holds_stays_and_finite_numbers_stay_finite():
    held = torch.tensor([0.0, -0.0, 1.0, -2.5, LARGEST, torch.inf, -torch.inf, 2.0**-133])
    nearly = torch.tensor([torch.finfo(FP32).max, -torch.finfo(FP32).max])
    not_numbers = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32).view(FP32)
    for random in (0, 0x7FFF, 0xFFFF):
        bits = lambda t: torch.full(t.shape, random)  # noqa: B023, E731
        assert_same(_rounding.rounded(held, bits(held)).view(torch.int16), held.to(BF16).view(torch.int16))
        assert _rounding.rounded(nearly, bits(nearly)).tolist() == [LARGEST, -LARGEST]
        assert _rounding.rounded(not_numbers, bits(not_numbers)).isnan().all()


# --- back ends and layouts: the same bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_back_ends_round_the_same(dtypes, layout, backend):
    for shape in ("B1-F1-D1-1", "B9-F17-D33-33"):
        s = narrowed(make_pass(SHAPES[shape], (), DTYPES[dtypes]))
        s.exp_avg_sqs[1][:1, :1] = LARGEST
        s.exp_avgs[0][-1:, -1:] = torch.nan
        same_moments(without_gradients(s, backend, layout=layout), without_gradients(s, "reference"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_wider_than_a_tile_round_the_same(layout, monkeypatch):
    monkeypatch.setattr(_tuning, "PASS_TILE", 16)
    monkeypatch.setattr(_tuning, "stored_latents", lambda width: 8)
    monkeypatch.setattr(_tuning, "stored_tile", lambda by_columns: (4, 16))
    s = narrowed(make_pass((4, 10, 40, 23), (), DTYPES["bf16"]))
    same_moments(without_gradients(s, "triton", layout=layout), without_gradients(s, "reference"))


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_move_by_the_exact_moments(layout, backend):
    """As with moments in fp32 that begin as the same numbers; those, rounded, are what is kept."""
    narrow = narrowed(make_pass(SHAPES["B6-F11-D7-5"], MODES["gated"], DTYPES["bf16"]))
    wide = SimpleNamespace(**vars(narrow) | {
        name: [t.float() for t in getattr(narrow, name)] for name in ("exp_avgs", "exp_avg_sqs")
    })  # fmt: skip
    got, want = (adam(s, backend, layout=layout) for s in (narrow, wide))
    for name in want.keys() - set(NARROW):
        assert_same(got[name], want[name])
    for name in NARROW:
        number = int(name[-1])
        bits = _rounding.rounding_bits(narrow.step, number, *got[name].shape)["sq" in name]
        assert_same(got[name], _rounding.rounded(want[name].contiguous(), bits))
        assert not torch.equal(got[name], want[name].to(BF16))  # to the nearest is something else


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_of_latents_on_a_cpu_change_nothing(layout, monkeypatch):
    s = narrowed(make_pass((20, 75, 13, 17), MODES["two"], DTYPES["fp32"]))
    outcomes = []
    for chunk, most, block in ((75, 1 << 22, 1 << 17), (32, 1 << 22, 128), (64, 16 * 32 * 17, 1)):
        monkeypatch.setattr(limits, "latents_in_cache", lambda width, chunk=chunk: chunk)
        monkeypatch.setitem(limits.WIDE_ELEMENTS, "cpu", most)
        monkeypatch.setattr(limits, "ROUNDED_IN_CACHE", block)
        outcomes.append(adam(s, "torch", layout=layout))
    for chunked in outcomes[1:]:
        same_moments(chunked, outcomes[0])


def test_both_layouts_keep_the_same_bits():
    s = narrowed(make_pass((20, 64, 16, 32), MODES["two"], DTYPES["fp32"]))
    same_moments(*(adam(s, "torch", layout=layout) for layout in LAYOUTS))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_where_skip_is_set_nothing_changes(backend):
    s = narrowed(make_pass((4, 10, 20, 17), MODES["two"], DTYPES["bf16"]))
    after = adam(s, backend, skip=True)
    for i in range(2):
        assert_same(after[f"exp_avg {i}"], s.exp_avgs[i])
        assert_same(after[f"exp_avg_sq {i}"], s.exp_avg_sqs[i])


@pytest.mark.sanitizer
def test_small_and_complete(monkeypatch):
    """Both kernels that round, in all layouts."""
    s = narrowed(make_pass((4, 12, 20, 20), MODES["gated"], DTYPES["bf16"]))
    for tile, layout in ((_tuning.PASS_TILE, LAYOUTS[0]), (_tuning.PASS_TILE, LAYOUTS[1]), (16, LAYOUTS[0])):
        monkeypatch.setattr(_tuning, "PASS_TILE", tile)
        same_moments(without_gradients(s, "triton", layout=layout), without_gradients(s, "reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FAST)
def test_production_shapes(backend, layout):
    s = narrowed(make_pass((512, 32768, 768, 768), (), DTYPES["bf16"]))
    same_moments(without_gradients(s, backend, layout=layout), without_gradients(s, "reference"))


# --- the training step -----------------------------------------------------------------------------------------------

STEPS = {  # both ways of the optimizer
    "fused": {}, "stored": {"grad_clip": 0.5}, "accumulated": {"accumulate": 2}, "dense": {"dense": True},
    "bf16": {"compute_dtype": BF16}, "no copies": {"compute_dtype": BF16, "copies": False},
    "unit rows off, decay": {"normalize_decoder": False, "weight_decay": 0.01},
}  # fmt: skip


def trained(steps, *, resumed_at=None, rule="TopK", row_major=False, losses=(), **options):
    """The autoencoder and the step after ``steps`` calls on seeded batches."""
    sae = make(RULES[rule](), dtype=FP32, contiguous_parameters=row_major)
    make_step = lambda: train_step(sae, lr=0.01, moments=BF16, losses=losses, dead_after=30, **options)  # noqa: E731
    step = make_step()
    generator = torch.Generator("cpu").manual_seed(1)
    for number in range(steps):
        if number == resumed_at:
            saved = step.state_dict()
            saved["optimizer"]["state"] = {
                n: {k: t.clone() for k, t in one.items()} for n, one in saved["optimizer"]["state"].items()
            }
            step = make_step()
            step.load_state_dict(saved)
        step(torch.randn(14, 6, generator=generator, device="cpu").to(sae.W_dec.device))
    return sae, step


def all_of(sae, step):
    state = [t for p in step.optimizer.options["params"] for t in step.optimizer.state[p].values()]
    return [*sae.parameters(), *state]


@pytest.mark.parametrize("options", STEPS)
def test_a_run_repeats_and_resumes_bit_for_bit(options):
    options = STEPS[options]
    one, again, resumed = trained(6, **options), trained(6, **options), trained(6, resumed_at=4, **options)
    moments_of = one[1].optimizer.moments
    assert [moments_of(p)[0].dtype for p in (one[0].W_dec, one[0].W_enc, one[0].b_enc)] == [BF16, BF16, FP32]
    assert all(moment.any() for moment in moments_of(one[0].W_enc))
    for a, b, c in zip(all_of(*one), all_of(*again), all_of(*resumed), strict=True):
        assert_same(a, b)
        assert_same(a, c)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("row_major", [False, True], ids=["by latent", "row-major"])
def test_every_rule_keeps_narrow_moments(rule, row_major):
    sae, step = trained(3, rule=rule, row_major=row_major, losses=[AuxK(4)] if rule == "TopK" else ())
    for p in (sae.W_dec, sae.W_enc):
        for moment in step.optimizer.moments(p):
            assert moment.dtype == BF16 and moment.stride() == p.stride() and moment.isfinite().all()


def test_stored_gradients_in_both_layouts_keep_the_same_bits():
    found = []
    for row_major in (False, True):
        torch.manual_seed(0)
        sae = se.SparseAutoencoder(32, 64, se.TopK(4), contiguous_parameters=row_major)
        step = TrainStep(sae, lr=0.01, moments=BF16)
        torch.manual_seed(1)
        with torch.no_grad():
            for _ in range(3):
                step.optimizer.apply({sae.W_dec: torch.randn(64, 32), sae.W_enc: torch.randn(64, 32).T}, None)
        found.append([*step.optimizer.moments(sae.W_dec), *step.optimizer.moments(sae.W_enc)])
    for one, other in zip(*found, strict=True):
        assert one.any()
        assert_same(one, other)


def test_the_fused_and_the_stored_way_round_alike():
    """A norm that clips nothing changes the way and not the numbers: the same moments but where sums differ."""
    fused, stored = trained(1), trained(1, grad_clip=1e9)
    for p, q in ((fused[0].W_dec, stored[0].W_dec), (fused[0].W_enc, stored[0].W_enc)):
        for one, other in zip(fused[1].optimizer.moments(p), stored[1].optimizer.moments(q), strict=True):
            assert (one == other).float().mean() > 0.97


@pytest.mark.parametrize("skipping", [{}, {"grad_clip": 1.0}], ids=["fused", "stored"])
def test_a_batch_that_is_not_finite_changes_nothing(skipping):
    sae, step = trained(3, nonfinite="skip", **skipping)
    before = [t.clone() for t in all_of(sae, step)]
    step(torch.full((14, 6), torch.nan))
    for a, b in zip(all_of(sae, step), before, strict=True):
        assert_same(a, b)


def test_a_second_moment_decays_where_no_gradient_comes():
    """As 0.999 ** n on the mean; rounded to the nearest, 0.999 v is v again, for ever."""
    steps, beta2 = 200, 0.999
    second = torch.linspace(1, 2, 64 * 64).view(64, 64).to(BF16)
    start, nearest, first = second.double().mean(), second.clone(), torch.zeros_like(second)
    weight, nothing = torch.zeros(64, 64), torch.zeros(64, 64)
    update = moments.FusedAdam(found_inf=None, beta1=0.9, beta2=beta2, lr=torch.tensor(0.1), weight_decay=0.0, eps=1e-8)
    for step in range(steps):
        count = torch.tensor(step + 1.0)
        keys = moments.keys(count, 0, slice(0, 64), 64)
        update([weight], [nothing], [first], [second], [count], [keys])
        nearest = (nearest.float() * beta2).to(BF16)
    assert nearest.double().mean() == start  # what the rounding is there for
    # A rounding errs by at most a unit in the last place, of less than 2: its variance is at most a quarter of that.
    sigma = (steps * (2.0**-7) ** 2 / 4 / second.numel()) ** 0.5
    assert abs(second.double().mean() - start * beta2**steps) < 4 * sigma
    assert abs(start * beta2**steps - start) > 100 * sigma


def test_twenty_steps_stay_within_what_rounding_can_do():
    """Given gradients: intervals that hold the moments, whatever chance does, and the weights that follow from them."""
    beta1, beta2, lr, eps, ulp = 0.9, 0.999, 0.01, 1e-8, 2.0**-7  # of a bfloat16, over its magnitude, at most
    sae = make(se.TopK(4), dtype=FP32)
    optimizer = Adam(sae, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=0.0, moments=BF16)
    truth = sae.W_dec.detach().double().clone()
    m, v, m_off, v_off, off = (torch.zeros_like(truth) for _ in range(5))
    for step in range(1, 21):
        grad = torch.randn_like(sae.W_dec)
        with torch.no_grad():
            optimizer.apply({sae.W_dec: grad}, None)
        m, v = beta1 * m + (1 - beta1) * grad.double(), beta2 * v + (1 - beta2) * grad.double().square()
        m_off, v_off = beta1 * m_off, beta2 * v_off
        corrected = lambda m, v, step=step: m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps)  # noqa: E731
        moved = corrected(m, v)
        corners = [corrected(m + s * m_off, (v + t * v_off).clamp(min=0)) for s in (-1, 1) for t in (-1, 1)]
        off += lr * torch.stack([(corner - moved).abs() for corner in corners]).amax(0)
        truth -= lr * moved
        m_off, v_off = m_off + ulp * (m.abs() + m_off), v_off + ulp * (v + v_off)
    error = (sae.W_dec.detach().double() - truth).abs()
    assert (error <= off + 20 * 4 * torch.finfo(FP32).eps * (truth.abs() + 20 * lr)).all()
    assert error.mean() < off.mean() / 4  # chance cancels most of it
    assert error.max() > 1e-5  # and does something


# --- a step without copies in 16 bits --------------------------------------------------------------------------------


def without_copies(rule, exact, **options):
    """Reports and everything after a step, with copies and without; ``exact``: of decoder rows that 16 bits hold."""
    found = []
    for copies in (True, False):
        sae = make(RULES[rule](), dtype=FP32)
        with torch.no_grad():
            sae.W_dec.copy_(sae.W_dec.to(BF16) if exact else sae.W_dec)
        step = train_step(sae, lr=0.01, compute_dtype=BF16, copies=copies, **options)
        torch.manual_seed(1)
        found.append((step(torch.randn(14, 6)), all_of(sae, step)))
        assert (step._copies.weights is None) != copies
        step.refresh()
    return found


@pytest.mark.parametrize("options", [{}, {"grad_clip": 0.5}, {"dense": True}, {"memory_budget": 800}], ids=str)
@pytest.mark.parametrize("rule", sorted(RULES.keys() - {"TopAFA"}))  # of few entries products add up in another order
def test_a_step_without_copies_is_the_same_where_nothing_is_rounded(rule, options):
    """The encoder is rounded either way; rows of the decoder that are bfloat16 already give the same sums."""
    options = {"dense": False, **options}  # whether a GEMM pays is another question for rows in fp32
    (report, with_them), (other, without) = without_copies(rule, exact=True, **options)
    for name in report:
        assert_same(report[name], other[name])
    for one, two in zip(with_them, without, strict=True):
        if one.is_cuda and options["dense"]:  # cuBLAS adds up another way in fp32 than in bfloat16
            torch.testing.assert_close(one, two)
        else:
            assert_same(one, two)


def test_without_copies_the_decoders_rows_are_not_rounded():
    (report, _), (other, _) = without_copies("TopK", exact=False)
    assert report["squared_error"] != other["squared_error"]
    for copies in (1, None):
        with pytest.raises(TypeError, match="copies must be"):
            TrainStep(make(RULES["TopK"](), dtype=FP32), lr=1e-3, copies=copies)


# --- states and arguments --------------------------------------------------------------------------------------------


def test_a_state_of_the_other_kind_is_refused_by_name():
    narrow, wide = trained(1)[1], train_step(make(RULES["TopK"](), dtype=FP32), lr=0.01)
    with pytest.raises(ValueError, match=r"exp_avg .*saved in torch.bfloat16 .*kept in torch.float32"):
        wide.load_state_dict(narrow.state_dict())
    wide(torch.randn(14, 6))
    before = [t.clone() for t in all_of(narrow.sae, narrow)]
    with pytest.raises(ValueError, match=r"saved in torch.float32 .*kept in torch.bfloat16 .*moments=torch.float32"):
        narrow.load_state_dict(wide.state_dict())
    for a, b in zip(all_of(narrow.sae, narrow), before, strict=True):
        assert_same(a, b)


def test_moments_follow_the_parameters_unless_they_are_bfloat16_beside_float32():
    assert TrainStep(se.SparseAutoencoder(4, 8, se.TopK(2)), lr=1e-3, moments="float32")
    wide = se.SparseAutoencoder(4, 8, se.TopK(2), dtype=torch.float64)
    assert TrainStep(wide, lr=1e-3).optimizer.moments(wide.W_enc)[0].dtype == torch.float64
    for sae, moments_dtype in ((wide, BF16), (wide, FP32), (se.SparseAutoencoder(4, 8, se.TopK(2)), torch.float16)):
        with pytest.raises(ValueError, match=r"moments must be torch.float.*, got torch\."):
            TrainStep(sae, lr=1e-3, moments=moments_dtype)
    with pytest.raises(ValueError, match=r"moments must be .*'int8'"):
        TrainStep(wide, lr=1e-3, moments="int8")


def test_the_measurement_of_the_held_out_error_runs_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    made = []

    def trained_once(rows, held, kept, steps, seed, trained=narrow_moments.trained):
        made.append((kept, seed))
        return trained(rows, held, kept, steps, seed)

    rows = torch.randn(64, 8)
    monkeypatch.setattr(narrow_moments, "activations", lambda: (rows, rows))
    monkeypatch.setattr(narrow_moments, "trained", trained_once)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # of the process that all tests share
    for seeds in (1, 2, 2):
        assert narrow_moments.main(["--steps", "2", "--seeds", str(seeds), "--out", str(tmp_path)]) == 0
    assert made == [(kept, seed) for seed in (0, 1) for kept in narrow_moments.KEPT]
    found = {(row["moments"], row["seed"]): row["fvu"] for row in load(tmp_path / "narrow-moments.jsonl")}
    table = (tmp_path / "narrow-moments.md").read_text()
    assert table == capsys.readouterr().out[-len(table) :]
    for seed in (0, 1):
        assert f"| {seed} | " + " | ".join(f"{found[kept, seed]:.4f}" for kept in narrow_moments.KEPT) + " |" in table
    apart = [found["bfloat16", seed] - found["float32", seed] for seed in (0, 1)]
    error = abs(apart[0] - apart[1]) / 2
    assert f"{sum(apart) / 2:+.4f} with a standard error of {error:.4f} (2 seeds)" in table
