"""The rules of sae_engine.rules against their definitions, on hard inputs and in every back end; their gradients."""
import copy
import math
from statistics import NormalDist

import pytest
import torch

import sae_engine as se
from sae_engine import functional as f
from sae_engine.testing import HARD_KINDS, assert_same, make_pre

F = 20
BACKENDS = ("torch", "triton")


def relu(x):
    return torch.where((x > 0) | x.isnan(), x, 0.0)


def first(score, count):
    """Flat positions of the ``count`` largest numbers, NaN above all, ties to the lowest: by a Python sort."""
    flat = score.flatten().tolist()
    order = sorted((value == value, -value if value == value else 0.0, i) for i, value in enumerate(flat))
    return [i for *_, i in order[:count]]


def gradient_mask(rule, pre, attribution):
    mask = torch.zeros_like(pre, dtype=torch.bool)
    score = pre * (1 + rule.beta * attribution.abs())
    for row in range(pre.shape[0]):
        mask[row, first(score[row], rule.k)] = True
    return mask


def sampled_mask(rule, pre):
    kept = relu(pre).double()
    share = kept / kept.sum(0)
    entropy = torch.where(kept.sum(0) == 0, 0.0, -torch.special.xlogy(share, share).sum(0))
    score = kept.square().sum(0).sqrt() if rule.score == "l2" else entropy
    pool = first(score, min(math.ceil(rule.k * rule.pool), F))
    outside = torch.ones(F, dtype=torch.bool).index_fill(0, torch.tensor(pool), False)
    mask = torch.zeros(pre.numel(), dtype=torch.bool)
    mask[first(torch.where(outside, -1.0, relu(pre)), int(rule.k * pre.shape[0]))] = True
    return mask.view(pre.shape)


def feature_mask(rule, pre):
    total = int(rule.k * pre.shape[0])
    exponent = 0.0 if rule.budgets == "uniform" else rule.exponent
    m = f.feature_budgets(rule.density, total, pre.shape[0], exponent=exponent, shift=rule.shift)
    mask = torch.zeros_like(pre, dtype=torch.bool)
    for latent in range(F):
        mask[first(relu(pre[:, latent]), int(m[latent])), latent] = True
    return mask


def batch_mask(rule, pre):
    mask = torch.zeros(pre.numel(), dtype=torch.bool)
    mask[first(relu(pre), int(rule.k * pre.shape[0]))] = True
    return mask.view(pre.shape)


def dense_gated(rule, pre):
    b_gate, b_mag, r_mag = (p.to(pre.dtype) for p in (rule.b_gate, rule.b_mag, rule.r_mag))
    return torch.where((pre + b_gate > 0) | pre.isnan(), relu(pre * r_mag.exp() + b_mag), 0.0)


def dense_statistical(rule, pre):
    mean = pre.mean(1, keepdim=True)
    std = (pre - mean).square().mean(1, keepdim=True).sqrt()
    return relu(pre - (mean + std * NormalDist().inv_cdf(1 - rule.k / F)))


def made(kind, *args, **kwargs):
    rule = kind(*args, **kwargs)
    for name, parameter in rule.named_parameters():
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)), device="cpu")
        with torch.no_grad():
            parameter.copy_(0.3 * drawn)
    return rule


MAKERS = {
    "FeatureChoice": lambda: se.FeatureChoice(F, 2.5), "uniform": lambda: se.FeatureChoice(F, 2.5, budgets="uniform"),
    "mutual": lambda: se.FeatureChoice(F, 2.5, mutual_steps=3), "GradientTopK": lambda: se.GradientTopK(3, beta=2.0),
    "SampledTopK": lambda: se.SampledTopK(2.5, pool=2), "entropy": lambda: se.SampledTopK(2.5, pool=2, score="entropy"),
    "whole pool": lambda: se.SampledTopK(2.5, pool=8), "Gated": lambda: made(se.Gated, F),
    "StatisticalTopK": lambda: se.StatisticalTopK(3), "Matryoshka": lambda: se.MatryoshkaBatchTopK(2.5, (4, 9, F)),
    "LogJumpReLU": lambda: se.LogJumpReLU(F, threshold=0.4, bandwidth=0.3),
}  # fmt: skip
MASKS = {
    "FeatureChoice": feature_mask, "uniform": feature_mask, "mutual": batch_mask, "GradientTopK": gradient_mask,
    "SampledTopK": sampled_mask, "entropy": sampled_mask, "whole pool": batch_mask, "Matryoshka": batch_mask,
    "LogJumpReLU": lambda rule, pre: (pre > rule.threshold) | pre.isnan(),
}  # fmt: skip


def context_for(rule, pre):
    if "attribution" not in rule.context_keys:
        return {}
    drawn = torch.randn(pre.shape, generator=torch.Generator().manual_seed(1), device="cpu")
    return {"attribution": drawn.to(pre)}


def defined(name, rule, pre, **context):
    """The rule on a matrix, densely: what is kept by a Python sort, values differentiable."""
    if name == "Gated":
        return dense_gated(rule, pre)
    if name == "StatisticalTopK":
        return dense_statistical(rule, pre)
    mask = MASKS[name](rule, pre.detach(), **context)
    return torch.where(mask, relu(pre), 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAKERS)
def test_equals_its_definition_on_hard_inputs(name, backend):
    for kind in HARD_KINDS if backend == "torch" else ("ties", "special"):
        rule, pre = MAKERS[name](), make_pre(kind, (6, F))
        context = context_for(rule, pre)
        with torch.no_grad():
            got = rule.select(pre, backend=backend, **context).to_dense()
            torch.testing.assert_close(got, defined(name, rule, pre, **context), equal_nan=True, rtol=1e-6, atol=1e-6)
            if name != "StatisticalTopK":  # kept values elsewhere are copies, or the same arithmetic
                assert_same(got, defined(name, rule, pre, **context))
            assert_same(rule(pre, **context), got)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAKERS)
def test_bits_are_the_references_at_any_shape_and_dtype(name, backend):
    for shape in ((F,), (0, F), (2, 3, F)):
        for dtype in (torch.float32, torch.bfloat16) if backend == "torch" else (torch.bfloat16,):
            rule, pre = MAKERS[name](), make_pre("ties", shape, dtype) + make_pre("normal", shape, dtype).round()
            context = context_for(rule, pre)
            got, want = (rule.select(pre, backend=b, **context) for b in (backend, "reference"))
            assert got.shape == pre.shape and got.dtype == dtype
            assert_same((got.values, got.indices, got.offsets), (want.values, want.indices, want.offsets))


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_equal_dense_autograd_in_fp64(name):
    """Through the encoder's sparse gradient, to every parameter, the rule's own included."""
    torch.manual_seed(1)
    rule = MAKERS[name]()
    sae = se.SparseAutoencoder(8, F, rule, dtype=torch.float64)
    with torch.no_grad():
        sae.b_dec.normal_()
        if rule.encoder_bias:
            sae.b_enc.normal_()
    x, weight = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    gradient = torch.randn(2, 5, 8, dtype=torch.float64)
    extra = {"gradient": gradient} if rule.context_keys else {}
    (sae(x, **extra) * weight).sum().backward()
    got = {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    rule = MAKERS[name]()
    pre = (x - sae.b_dec).view(10, 8) @ sae.W_enc + (sae.b_enc if rule.encoder_bias else 0)
    context = {"attribution": (gradient.view(10, 8) @ sae.W_dec.T).detach()} if extra else {}
    dense = defined(name, sae.activation if name in ("Gated",) else rule, pre, **context)
    ((dense @ sae.W_dec + sae.b_dec).view(x.shape) * weight).sum().backward()
    assert {"W_enc", "W_dec", "b_dec"} <= got.keys()
    for key, parameter in sae.named_parameters():
        if "log_threshold" in key:
            continue  # an estimator: below
        if parameter.grad is None:
            assert key not in got or not got[key].any(), key
            continue
        torch.testing.assert_close(got[key], parameter.grad, msg=key)  # 1e-7, of fp32 parameters 1e-6: other sums


# What these are not trained without.
NEEDED = {"Gated": [se.losses.GateLoss(0.3)], "LogJumpReLU": [se.losses.StepL0(0.3)]}


@pytest.mark.parametrize("name", MAKERS)
def test_a_training_step_is_what_autograd_and_adam_make(name):
    """eps = 1 keeps Adam's steps proportional to gradients, whose zeros may otherwise be of either sign."""
    x, gradient = torch.randn(12, 8, dtype=torch.float64), torch.randn(12, 8, dtype=torch.float64)
    ours, plain = (se.SparseAutoencoder(8, F, MAKERS[name](), dtype=torch.float64) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    extra = {"gradient": gradient} if ours.activation.context_keys else {}
    added = NEEDED.get(name, ())
    step = se.training.TrainStep(ours, lr=0.1, eps=1.0, normalize_decoder=False, losses=added)
    adam = torch.optim.Adam([p for p in plain.parameters() if p.requires_grad], lr=0.1, eps=1.0)
    for _ in range(3):
        report = step(x, **extra)
        loss = se.losses.evaluate(plain, x, added, **extra)["loss"]
        adam.zero_grad()
        loss.backward()
        adam.step()
        torch.testing.assert_close(report["loss"], loss.detach())
    for (key, a), (_, b) in zip(ours.state_dict().items(), plain.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


@pytest.mark.parametrize("name", ["FeatureChoice", "SampledTopK", "StatisticalTopK", "Matryoshka", "Gated"])
def test_batches_in_chunks_keep_the_same_codes_or_are_refused(name):
    x = torch.randn(12, 8)
    whole, parts = (se.SparseAutoencoder(8, F, MAKERS[name]()) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    added = NEEDED.get(name, ())
    reports = [se.training.TrainStep(whole, lr=1e-3, losses=added, memory_budget=1 << 20)(x)]
    small = se.training.TrainStep(parts, lr=1e-3, losses=added, memory_budget=5 * F * 4)  # five tokens at a time
    if name in ("Matryoshka", "Gated", "FeatureChoice"):
        torch.testing.assert_close(small(x)["loss"], reports[0]["loss"])
    else:
        with pytest.raises(RuntimeError, match="memory_budget"):
            small(x)


def test_statistical_topk_gradcheck():
    """The gradient flows through mean and standard deviation; away from the kink it is exact."""
    rule, pre = se.StatisticalTopK(3), torch.randn(4, F, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rule, (pre,))
    assert torch.autograd.gradcheck(lambda p: rule.select(p).to_dense(), (pre,))
    constant = torch.ones(2, F, requires_grad=True)
    rule(constant).sum().backward()
    assert constant.grad.isfinite().all()  # a standard deviation of 0 has no slope


def test_statistical_topk_keeps_about_k_of_a_normal_row():
    kept = se.StatisticalTopK(64).select(torch.randn(200, 4096)).l0.float()
    # binomial: a standard deviation of 8 a row, 0.57 of the mean of 200; six of them
    assert abs(float(kept.mean()) - 64) < 3.4


def test_log_threshold_gradient_is_the_estimators_through_the_exponential():
    rule = se.LogJumpReLU(F, threshold=0.4, bandwidth=0.3)
    pre, weight = torch.randn(50, F), torch.randn(50, F)
    (rule(pre) * weight).sum().backward()
    theta = rule.threshold.detach()
    inside = (pre - theta).abs() < 0.15
    expected = theta * -(theta / 0.3) * (weight * inside).sum(0)
    torch.testing.assert_close(rule.log_threshold.grad, expected)
    assert rule.log_threshold.grad.abs().sum() > 0 and rule.bfloat16().log_threshold.dtype == torch.float32


@pytest.mark.no_poison  # the compiler compares runs of torch.empty itself
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [n for n in MAKERS if n not in ("uniform", "entropy", "whole pool")])
def test_autoencoders_compile_whole(name, training):
    torch._dynamo.reset()
    sae = se.SparseAutoencoder(8, F, MAKERS[name]())
    extra = {"gradient": torch.randn(6, 8)} if sae.activation.context_keys else {}
    x = torch.randn(6, 8)
    sae(x, **extra)  # learns a threshold where there is one
    sae.train(training)
    state = {k: v.clone() for k, v in sae.state_dict().items()}
    results = []
    # code generation is Inductor's; tracing, fakes and gradients are ours
    for call in (sae, torch.compile(sae, fullgraph=True, backend="aot_eager")):
        sae.load_state_dict(state)
        sae.zero_grad()
        call(x, **extra).square().sum().backward()
        grads = {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}
        results.append({**grads, **{f"buffer {n}": b.clone() for n, b in sae.named_buffers()}})
    assert results[0].keys() == results[1].keys()
    for key, eager in results[0].items():
        torch.testing.assert_close(results[1][key], eager, msg=key)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MAKERS)
def test_cuda_graph_of_a_dense_forward(name, training):
    rule, pre = MAKERS[name]().cuda(), torch.randn(64, F, device="cuda")
    context = context_for(rule, pre)
    rule(pre, **context)
    rule.train(training)(pre, **context)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rule(pre, **context)
    pre.copy_(torch.randn_like(pre))
    rule.load_state_dict(state := copy.deepcopy(rule.state_dict()))
    graph.replay()
    rule.load_state_dict(state)
    assert_same(out.detach(), rule(pre, **context).detach())


def test_gradient_topk_ranks_by_attribution_and_keeps_pre():
    pre, attribution = torch.tensor([[1.0, 2.0, 3.0, -5.0]]), torch.tensor([[9.0, 0.0, 0.0, -9.0]])
    assert se.GradientTopK(1)(pre, attribution=attribution).tolist() == [[1.0, 0, 0, 0]]
    assert se.GradientTopK(1)(pre, attribution=0 * attribution).tolist() == [[0, 0, 3.0, 0]]


def test_gradient_topk_in_an_autoencoder_knows_layer_norm_and_rescaling():
    """Attribution is what the loss changes by per unit of each code, whatever stands between code and output."""
    options = {"normalize_activations": "layer_norm", "rescale_acts_by_decoder_norm": True}
    sae = se.SparseAutoencoder(8, F, se.GradientTopK(3), decoder_init_norm=0.3, **options)
    x, gradient = torch.randn(5, 8) * 4, torch.randn(5, 8)
    seen = {}
    select = sae.activation._select
    sae.activation._select = lambda *args, **context: seen.update(context) or select(*args, **context)
    _, info, _ = sae.encode_with(x, gradient=gradient)
    probe = se.functional.topk(torch.ones(5, F), F)  # every code at 1
    values = probe.values.clone().requires_grad_()
    (sae.decode(probe.replace(values=values), info) * gradient).sum().backward()
    torch.testing.assert_close(seen["attribution"], values.grad.view(5, F))
    with pytest.raises(TypeError, match="attribution"):
        sae(x)
    with pytest.raises(TypeError, match="attribution"):
        se.SparseAutoencoder(8, F, se.TopK(3))(x, gradient=gradient)
    with pytest.raises(ValueError, match="gradient"):
        sae(x, gradient=gradient[:2])


def test_sampled_topk_at_the_ends_of_its_range():
    pre = torch.randn(7, F)
    whole, batch = se.SampledTopK(3, pool=F / 3), se.BatchTopK(3)
    assert_same(whole(pre), batch(pre))
    kept = se.SampledTopK(3, pool=1)(pre)
    columns = (kept != 0).any(0)
    assert int(columns.sum()) == 3 and torch.equal(kept[:, columns], pre[:, columns].relu())


def test_entropy_prefers_what_serves_many_tokens():
    pre = torch.zeros(8, F)
    pre[:, 3], pre[0, 5] = 0.1, 9.0
    assert (se.SampledTopK(1, pool=1)(pre) != 0).any(0).nonzero().tolist() == [[5]]
    assert (se.SampledTopK(1, pool=1, score="entropy")(pre) != 0).any(0).nonzero().tolist() == [[3]]


@pytest.mark.parametrize("name", ["SampledTopK", "Matryoshka", "FeatureChoice"])
def test_thresholds_survive_saving_bit_for_bit(name, tmp_path):
    sae = se.SparseAutoencoder(8, F, MAKERS[name]())
    for _ in range(3):
        sae(torch.randn(30, 8))
    x = torch.randn(50, 8)
    torch.save(sae.state_dict(), tmp_path / "sae.pt")
    other = se.SparseAutoencoder(8, F, MAKERS[name]())
    other.load_state_dict(torch.load(tmp_path / "sae.pt", weights_only=True))
    expected = sae.eval()(x)
    assert_same(other.eval()(x), expected)
    se.inference_form(sae).save_pretrained(tmp_path / "exported")
    exported = se.SparseAutoencoder.from_pretrained(tmp_path / "exported").eval()
    assert isinstance(exported.activation, se.JumpReLU)
    assert_same(exported.encode(x).to_dense(), sae.encode(x).to_dense())
    assert_same(exported(x), expected)
    assert float(exported.encode(x).l0.sum()) > 0


def test_inference_form_rounds_no_threshold_onto_what_exceeds_it():
    low = torch.tensor(0.1)
    high = low.nextafter(torch.tensor(1.0))
    sae = se.SparseAutoencoder(8, F, se.BatchTopK(3))
    sae.activation.threshold.fill_((float(low) + float(high)) / 2 + 1e-12)  # rounds up to `high`
    assert sae.activation.threshold.float() == high
    pre = torch.stack([low, high]).expand(F, 2).T
    assert_same(se.inference_form(sae).activation(pre), sae.eval().activation(pre))
    assert bool((sae.activation(pre) > 0).any())


def test_inference_form_needs_a_learned_threshold_and_shares_parameters():
    sae = se.SparseAutoencoder(8, F, se.BatchTopK(3))
    with pytest.raises(RuntimeError, match="threshold"):
        se.inference_form(sae)
    sae(torch.randn(9, 8))
    form = se.inference_form(sae)
    assert form.W_enc is sae.W_enc and sae.training and not form.training and isinstance(sae.activation, se.BatchTopK)
    with pytest.raises(TypeError, match="TopK"):
        se.inference_form(se.SparseAutoencoder(8, F, se.TopK(3)))
    log = se.SparseAutoencoder(8, F, MAKERS["LogJumpReLU"]())
    x = torch.randn(9, 8)
    assert_same(se.inference_form(log)(x), log.eval()(x))


class TestThresholdConventions:
    def run(self, rule, steps):
        smallest = []
        for _ in range(steps):
            out = rule(torch.randn(8, 30))
            smallest.append(float(out[out > 0].min()))
        return smallest

    def test_saelens(self):
        """From 0, by 0.01 of the way each step."""
        rule = se.BatchTopK(2, threshold_lr=0.01, initial_threshold=0.0)
        rule.eval()(torch.randn(2, 30))  # as SAELens, it evaluates untrained
        expected = 0.0
        for value in self.run(rule.train(), 5):
            expected = (1 - 0.01) * expected + 0.01 * value
        torch.testing.assert_close(float(rule.threshold), expected)

    def test_dictionary_learning(self):
        """-1 up to its start; then the batch's value, then an average with beta = 0.999."""
        rule = se.BatchTopK(2, threshold_lr=0.001, threshold_start=3)
        self.run(rule, 3)
        assert rule.threshold == -1
        expected = None
        for value in self.run(rule, 4):
            expected = value if expected is None else 0.999 * expected + 0.001 * value
        torch.testing.assert_close(float(rule.threshold), expected)
        assert rule.forwards == 7

    def test_the_count_survives(self):
        rule = se.BatchTopK(2, threshold_start=3)
        self.run(rule, 2)
        other = se.BatchTopK(2, threshold_start=3)
        other.load_state_dict(rule.state_dict())
        for module in (other, copy.deepcopy(rule).bfloat16()):
            assert module.forwards.dtype == torch.float64
            self.run(module, 1)
            assert module.threshold == -1
            self.run(module, 1)
            assert module.threshold > 0

    def test_checkpoints_without_a_start_are_as_before(self):
        assert se.BatchTopK(2).state_dict().keys() == {"threshold"}


class TestTopAFAOptions:
    def test_target_scale(self):
        pre = torch.randn(6, F)
        context = {"target_norm": pre.norm(dim=1) * 0.5, "weight_norm": torch.ones(F)}
        want = f.norm_match(pre, pre.norm(dim=1) * 0.25, weight_norm=torch.ones(F)).to_dense()
        assert_same(se.TopAFA(target_scale=0.5)(pre, **context), want)
        assert (se.TopAFA()(pre, **context) != 0).sum() > (want != 0).sum()

    def test_the_authors_start_keeps_nearly_half(self):
        torch.manual_seed(0)
        sae = se.init_as_top_afa(se.SparseAutoencoder(64, 4096, se.TopAFA()))
        x = torch.randn(50, 64)
        kept = sae.encode(x).l0.float().mean() / 4096
        assert 0.3 < kept <= 0.5
        energy = (x @ sae.W_enc.detach()).relu().square().sum(1) / x.square().sum(1)
        assert abs(float(energy.mean()) - 1) < 0.1
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(4096))
        torch.testing.assert_close(sae.W_dec.T * sae.W_enc.norm(dim=0), sae.W_enc)

    @pytest.mark.parametrize(("l0", "scale"), [(16, 1.0), (64, 1.0), (64, 0.3), (256, 1.0)])
    def test_a_sparse_start(self, l0, scale):
        torch.manual_seed(0)
        sae = se.SparseAutoencoder(256, 4096, se.TopAFA(target_scale=scale))
        got = se.init_sparse(se.init_as_top_afa(sae), l0).encode(torch.randn(200, 256)).l0.float().mean()
        assert 0.85 * l0 < got < 1.15 * l0  # the largest of 4096 numbers scatter around their mean energy

    def test_arguments(self):
        sae = se.SparseAutoencoder(8, F, se.TopAFA())
        for bad in (0, 2.0, F // 2):
            with pytest.raises((ValueError, TypeError), match="l0"):
                se.init_sparse(sae, bad)
        with pytest.raises(ValueError, match="d_out"):
            se.init_as_top_afa(se.SparseAutoencoder(8, F, se.TopAFA(), d_out=5))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: se.GradientTopK(3, beta=0), "beta"), (lambda: se.SampledTopK(3, pool=0.5), "pool"),
        (lambda: se.SampledTopK(3, score="l1"), "score"),
        (lambda: se.SampledTopK(3)(torch.randn(4, 2)), "k"), (lambda: se.StatisticalTopK(0), "k"),
        (lambda: se.StatisticalTopK(F)(torch.randn(2, F)), "k"), (lambda: se.MatryoshkaBatchTopK(3, (5, 4)), "widths"),
        (lambda: se.MatryoshkaBatchTopK(3, 5), "widths"), (lambda: se.MatryoshkaBatchTopK(3, (0, 5)), "widths"),
        (lambda: se.MatryoshkaBatchTopK(3, (5, F))(torch.randn(2, 30)), "widths"),
        (lambda: se.Gated(5)(torch.randn(2, 6)), "d_sae"), (lambda: se.Gated(0), "d_sae"),
        (lambda: se.LogJumpReLU(5, threshold=0), "threshold"), (lambda: se.LogJumpReLU(5, bandwidth=-1), "bandwidth"),
        (lambda: se.BatchTopK(2, threshold_start=-1), "threshold_start"),
        (lambda: se.BatchTopK(2, initial_threshold=-0.5), "initial_threshold"),
        (lambda: se.BatchTopK(2, initial_threshold="0"), "initial_threshold"),
        (lambda: se.TopAFA(target_scale=0), "target_scale"),
    ],
)  # fmt: skip
def test_arguments_are_checked(make, name):
    with pytest.raises((ValueError, TypeError), match=name):
        make()
