"""Pre-activations that pass by in rectangles: the same codes for any cutting, and steps with the same bits."""

import dataclasses
import itertools

import pytest
import torch

import sae_engine as se
from sae_engine import _encoder, _slabs
from sae_engine._slabs import rectangles, running_of, slab_shape
from sae_engine.testing import assert_same
from sae_engine.training import forward
from sae_engine.training.forward import OfSource

B, F, D = 14, 96, 8
K = 5


def dead():
    return torch.arange(F) % 3 == 1


def shortfall():
    return (torch.arange(F) % 5 / 4).clamp(max=1)


def learned(rule):
    """A batch rule in eval, as after some training."""
    for name, buffer in rule.named_buffers():
        if name.endswith("threshold"):
            buffer.fill_(0.5)
    return rule.eval()


def gated():
    rule = se.Gated(F)
    with torch.no_grad():
        rule.b_gate.copy_(torch.linspace(-1, 0.5, F))
        rule.b_mag.copy_(torch.linspace(0.25, -0.25, F))
        rule.r_mag.copy_(torch.linspace(-0.5, 0.5, F))
    return rule


RULES = {
    "TopK": lambda: (se.TopK(K), {}),
    "TopK, all": lambda: (se.TopK(F), {}),
    "TopK, one": lambda: (se.TopK(1), {}),
    "AbsTopK": lambda: (se.AbsTopK(K), {}),
    "AuxTopK": lambda: (se.AuxTopK(K), {"dead_mask": dead()}),
    "AuxTopK, no ReLU": lambda: (se.AuxTopK(K, relu=False), {"dead_mask": dead()}),
    "AuxTopK, few dead": lambda: (se.AuxTopK(K), {"dead_mask": torch.arange(F) == 50}),
    "AuxZipfTopK": lambda: (se.AuxZipfTopK(K), {"shortfall": shortfall()}),
    "GradientTopK": lambda: (se.GradientTopK(K), {"attribution": torch.linspace(-1, 1, B * F).view(B, F)}),
    "BatchTopK": lambda: (se.BatchTopK(K + 0.5), {}),
    "BatchTopK, nothing": lambda: (se.BatchTopK(0.01), {}),
    "BatchTopK, all": lambda: (se.BatchTopK(F), {}),
    "BatchTopK, eval": lambda: (learned(se.BatchTopK(K)), {}),
    "Matryoshka": lambda: (se.MatryoshkaBatchTopK(K, widths=[F // 4, F]), {}),
    "FeatureChoice": lambda: (se.FeatureChoice(F, K), {}),
    "FeatureChoice, mutual": lambda: (se.FeatureChoice(F, K, mutual_steps=1), {}),
    "FeatureChoice, eval": lambda: (learned(se.FeatureChoice(F, K)), {}),
    "ReLU": lambda: (se.ReLU(), {}),
    "JumpReLU": lambda: (se.JumpReLU(F, threshold=0.5), {}),
    "JumpReLU, eval": lambda: (se.JumpReLU(F, threshold=0.5).eval(), {}),
    "LogJumpReLU": lambda: (se.LogJumpReLU(F, threshold=0.5), {}),
    "Gated": lambda: (gated(), {}),
    "its gate": lambda: (gated().gate, {}),
}  # fmt: skip
OF_WHOLE_ROWS = {
    "TopAFA": lambda: (se.TopAFA(), {"target_norm": torch.linspace(0.5, 9, B), "weight_norm": torch.ones(F)}),
    "TopAFA, capacity": lambda: (
        se.TopAFA(capacity=B * F), {"target_norm": torch.linspace(0.5, 9, B), "weight_norm": torch.ones(F)}
    ),
}  # fmt: skip
CUTTINGS = {  # tokens, latents of a rectangle
    "columns": (B, 32), "uneven columns": (B, 41), "narrow columns": (B, 3), "rows": (4, F), "both": (5, 32),
    "one by one": (3, 7),
}  # fmt: skip


def matrix(kind):
    torch.manual_seed(0)
    pre = torch.randn(B, F)
    if kind == "ties":
        return pre.round()
    if kind == "few positive":
        return torch.where(torch.rand(B, F) < 0.01, pre.abs(), -pre.abs()).round(decimals=1)
    if kind == "special":
        pre[torch.rand(B, F) < 0.05] = torch.nan
        pre[torch.rand(B, F) < 0.05] = torch.inf
        pre[torch.rand(B, F) < 0.05] = -torch.inf
        pre[0], pre[1], pre[2], pre[3] = 0.0, torch.nan, -torch.inf, -0.0
    if kind == "ascending":
        return pre.sort(dim=1).values
    if kind == "bf16":
        return pre.bfloat16()
    return pre


def select(rule, context, pre, shape, backend):
    running, _ = running_of([rule], [context], B, F, 1, backend, dense_gradient=False)
    running[0].wants_entries = True
    for tokens, latents in rectangles(B, F, shape):
        part = torch.full_like(pre[tokens, latents], torch.nan).copy_(pre[tokens, latents])
        running[0].add(part, tokens, latents)
        part.fill_(torch.nan)  # the slab is used again
    codes, entries = running[0].finish()
    return codes.detach(), entries


def assert_equal_selection(rule, context, pre, shape, backend):
    expected = rule.select(pre, backend=backend, **context).detach()
    codes, entries = select(rule, context, pre, shape, backend)
    owned = int(expected.offsets[-1])
    assert_same((codes.values[:owned], codes.indices[:owned], codes.offsets),
                (expected.values[:owned], expected.indices[:owned], expected.offsets))  # fmt: skip
    assert codes.shape == expected.shape and codes.k == (expected.k if rule.scope == "row" else None)
    if rule.entry_values is None:
        return
    rows = torch.repeat_interleave(codes.offsets.diff())
    seen = codes.values[:owned] if entries is None else entries[:owned]
    context = {name: t for name, t in context.items() if name in rule.context_keys}
    raw = pre[rows, codes.indices[:owned].long()]
    at = dataclasses.replace(codes, values=codes.values[:owned], indices=codes.indices[:owned])
    assert_same(rule.entry_values(seen, at, **context).detach(), rule.entry_values(raw, at, **context).detach())


@pytest.mark.parametrize("kind", ["normal", "ties", "few positive", "special", "ascending", "bf16"])
@pytest.mark.parametrize("name", RULES)
def test_codes_are_the_same_for_any_cutting(name, kind):
    for shape in CUTTINGS.values():
        rule, context = RULES[name]()
        assert_equal_selection(rule, context, matrix(kind), shape, "torch")


@pytest.mark.parametrize("name", ["TopK", "AuxTopK", "AuxZipfTopK", "BatchTopK", "FeatureChoice", "JumpReLU"])
def test_codes_are_the_same_by_the_reference(name):
    for kind, cutting in (("ties", "uneven columns"), ("special", "both")):
        rule, context = RULES[name]()
        assert_equal_selection(rule, context, matrix(kind), CUTTINGS[cutting], "reference")


@pytest.mark.parametrize(("name", "cutting"), [("TopK", "both"), ("BatchTopK", "uneven columns")])
def test_codes_are_the_same_by_the_kernels(name, cutting):
    """Each operation alone is held to its reference elsewhere; the interpreter is slow."""
    rule, context = RULES[name]()
    assert_equal_selection(rule, context, matrix("special"), CUTTINGS[cutting], "triton")


@pytest.mark.parametrize("name", OF_WHOLE_ROWS)
def test_rules_of_whole_rows(name):
    for kind in ("normal", "ties", "special"):
        rule, context = OF_WHOLE_ROWS[name]()
        assert_equal_selection(rule, context, matrix(kind), (4, F), "torch")


@pytest.mark.parametrize(("rule", "context", "match"), [
    (lambda: se.TopK(F + 1), {}, "k must"),
    (lambda: se.AuxTopK(3), {}, "dead_mask"),
    (lambda: se.AuxTopK(3), {"dead_mask": torch.ones(F - 1, dtype=torch.bool)}, "mask must"),
    (lambda: se.AuxTopK(3), {"dead_mask": torch.ones(F)}, "mask must"),
    (lambda: se.AuxZipfTopK(3), {"shortfall": torch.ones(F + 1)}, "shortfall must"),
    (lambda: se.GradientTopK(3), {"attribution": torch.ones(B, F + 1)}, "attribution must"),
    (lambda: se.TopK(3), {"other": torch.ones(F)}, "takes no other"),
    (lambda: se.BatchTopK(F + 1), {}, "k must"),
    (lambda: se.MatryoshkaBatchTopK(3, widths=[4, F - 1]), {}, "widths must end"),
    (lambda: se.FeatureChoice(F + 1, 3), {}, "d_sae"),
    (lambda: se.JumpReLU(F + 1), {}, "theta must"),
    (lambda: se.Gated(F - 1), {}, "theta must"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_slabs_too(rule, context, match):
    x, W_enc = torch.randn(B, D), torch.randn(D, F)
    for budget in (None, B * 16 * 4):
        with pytest.raises((TypeError, ValueError), match=match if budget else "."):
            se.functional.encode(x, W_enc, select=rule(), memory_budget=budget, **context)


# ------------------------------------------------------------------------------------------------------ rectangles


@pytest.mark.parametrize("whole_rows", [False, True])
def test_rectangles_cover_once_and_stay_within_the_budget(whole_rows):
    for tokens, latents, elements in itertools.product((1, 7, 300), (1, 96, 2048, 5000, 2**17), (1, 10**4, 10**7)):
        shape = slab_shape(tokens, latents, elements, whole_rows=whole_rows)
        least = latents if whole_rows else min(latents, _slabs.LATENTS_AT_LEAST)
        assert shape[0] * shape[1] <= max(elements, least) and 1 <= shape[0] <= tokens
        if tokens * latents <= 10**5:
            covered = torch.zeros(tokens, latents, dtype=torch.int8)
            for part in rectangles(tokens, latents, shape):
                covered[part] += 1
            assert covered.eq(1).all()
        ends = [(r.latents.start, r.tokens.start) for r in rectangles(tokens, latents, shape)]
        assert ends == sorted(set(ends))


def test_slabs_are_of_nearly_one_size():
    tokens, latents = slab_shape(2048, 131_072, 2048 * 9000)
    assert tokens == 2048 and latents % _slabs.ALIGNMENT == 0 and 8192 <= latents <= 9000


# ------------------------------------------------------------------------------------------------------ the step

OF_BATCH = ("BatchTopK", "Matryoshka", "FeatureChoice")
OBJECTIVES = {"TopK": [se.losses.AuxK(4), se.losses.MultiTopK(2)], "ReLU": [se.losses.L1(0.1)],
              "JumpReLU": [se.losses.StepL0(0.1)], "Gated": [se.losses.GateLoss(0.1)],
              "FeatureChoice": [se.losses.AuxZipf(4)], "BatchTopK": [se.losses.AuxK(4)]}  # fmt: skip


@pytest.mark.parametrize("name", ["TopK", "AbsTopK", "GradientTopK", "BatchTopK", "Matryoshka", "FeatureChoice", "ReLU",
                                  "JumpReLU", "Gated"])  # fmt: skip
def test_twenty_steps_have_the_bits_of_the_unchunked(name, monkeypatch):
    """Given the same pre-activations: a product of fewer latents may round otherwise."""
    monkeypatch.setattr(_slabs, "LATENTS_AT_LEAST", 16)
    monkeypatch.setattr(_slabs, "ALIGNMENT", 8)
    of_part = OfSource._pre_activations
    shapes = []

    def of_whole(self, tokens, latents):
        shapes.append((tokens.stop - tokens.start, latents.stop - latents.start))
        whole = of_part(self, slice(0, self.tokens), slice(0, self.source.d_sae))
        return whole[tokens, latents].clone()

    monkeypatch.setattr(OfSource, "_pre_activations", of_whole)
    results = []
    for elements, rows, fewest in (  # the last two as where oneDNN multiplies
        (B * F, B, None), (B * 40, B, None), (5 * 24, B, None), (B * F, 5, 2), (3 * F, B, 2),
    ):  # fmt: skip
        monkeypatch.setattr(forward, "rows_at_once", lambda *_, rows=rows: rows)
        monkeypatch.setattr(forward, "whole_rows_from", lambda *_, fewest=fewest: fewest)
        torch.manual_seed(3)
        sae = se.SparseAutoencoder(D, F, RULES[name]()[0])
        step = se.training.TrainStep(sae, lr=1e-2, losses=OBJECTIVES.get(name, ()), dead_after=3 * B,
                                     memory_budget=elements * 4)  # fmt: skip
        reports = []
        for _ in range(20):
            x = torch.randn(B, D)
            gradient = {"gradient": torch.randn(B, D)} if name == "GradientTopK" else {}
            reports += step(x, **gradient).values()
        results.append((*reports, *sae.state_dict().values(), step.dead.since_fired))
    for others in results[1:]:
        assert_same(others, results[0])
    assert {shape[1] for shape in shapes} > {F} and len({shape[0] for shape in shapes}) > 1
    assert ((5, F) in shapes) == ((3, F) in shapes) == (name not in OF_BATCH)


def test_what_needs_the_whole_batch_is_refused_by_name():
    pairs = {"SampledTopK": se.SampledTopK(2), "StatisticalTopK": se.StatisticalTopK(2)}
    for name, rule in pairs.items():
        step = se.training.TrainStep(se.SparseAutoencoder(D, F, rule), lr=1e-2, memory_budget=4 * F)
        with pytest.raises(RuntimeError, match=f"{name} needs the pre-activations of the whole batch.*memory_budget"):
            step(torch.randn(B, D))


# ------------------------------------------------------------------------------------------------------ encode


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", ["TopK", "BatchTopK", "JumpReLU", "Gated", "TopAFA"])
def test_encode_gives_the_same_codes_and_gradients(name, rescale, monkeypatch):
    monkeypatch.setattr(_slabs, "LATENTS_AT_LEAST", 16)
    monkeypatch.setattr(_slabs, "ALIGNMENT", 8)
    torch.manual_seed(1)
    rule = {**RULES, **OF_WHOLE_ROWS}[name]()[0]
    sae = se.SparseAutoencoder(D, F, rule, rescale_acts_by_decoder_norm=rescale, dtype=torch.float64)
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.5, 2, F)[:, None]
    x = torch.randn(2, B // 2, D, dtype=torch.float64)
    found = []
    for budget, rows, fewest in ((None, B, None), (B * 40 * 8, B, None), (3 * 24 * 8, B, None), (None, 3, 2)):
        monkeypatch.setattr(_encoder, "rows_at_once", lambda *_, rows=rows: rows)
        monkeypatch.setattr(_encoder, "whole_rows_from", lambda *_, fewest=fewest: fewest)
        mine = x.clone().requires_grad_()
        encoded = sae.encode_with(mine, memory_budget=budget)
        sae.zero_grad()
        sae.decode(encoded.codes[0], encoded.info).square().sum().backward()
        found.append((encoded.codes[0].detach(), mine.grad, *(p.grad for p in sae.parameters() if p.grad is not None)))
    for codes, *gradients in found[1:]:
        assert codes.shape == (2, B // 2, F)
        assert_same((codes.indices, codes.offsets), (found[0][0].indices, found[0][0].offsets))
        torch.testing.assert_close([codes.values, *gradients], [found[0][0].values, *found[0][1:]])
    with torch.no_grad():
        assert_same(sae.encode(x, memory_budget=B * 40 * 8).indices, sae.encode(x).indices)


@pytest.mark.parametrize("rule", [se.TopK(4), se.AbsTopK(4), se.GradientTopK(4), se.JumpReLU(8192, threshold=3.0)])
def test_no_matrix_of_all_latents_is_made(rule, monkeypatch):
    """Neither by the autoencoder's forward nor by its training step, where memory is short."""
    monkeypatch.setattr(_slabs, "default_budget_bytes", lambda device: 2**18)
    monkeypatch.setattr("sae_engine._encoder.default_budget_bytes", lambda device: 2**18)
    monkeypatch.setattr("sae_engine._encoder.SMALL", 0)
    tokens, latents = 64, 8192
    sae = se.SparseAutoencoder(D, latents, rule)
    gradient = {"gradient": torch.randn(tokens, D)} if isinstance(rule, se.GradientTopK) else {}
    sizes = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    x = torch.randn(tokens, D)
    with Watched():
        sae(x, **gradient).square().sum().backward()
        sae.zero_grad()
    assert max(sizes) < tokens * latents / 4, max(sizes)
    sizes.clear()
    with torch.no_grad(), Watched():
        sae.encode(x, **gradient)
    assert max(sizes) < tokens * latents / 4
    sizes.clear()
    losses = se.losses.StepL0(0.1) if isinstance(rule, se.JumpReLU) else se.losses.AuxK(4)
    step = se.training.TrainStep(sae, lr=1e-3, losses=losses, memory_budget=2**18)
    with Watched():
        step(x, **gradient)
    assert max(sizes) < tokens * latents / 4


def test_a_budget_that_is_none_is_refused():
    sae = se.SparseAutoencoder(D, F, se.TopK(2))
    for wrong, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="memory_budget"):
            sae.encode(torch.randn(3, D), memory_budget=wrong)
    with pytest.raises(RuntimeError, match="SampledTopK needs the pre-activations of the whole batch"):
        se.SparseAutoencoder(D, F, se.SampledTopK(2)).encode(torch.randn(3, D), memory_budget=4 * F)


@pytest.mark.no_poison  # the compiler runs torch.empty itself
@pytest.mark.parametrize("name", ["TopK", "BatchTopK", "JumpReLU", "GradientTopK"])
def test_slabs_compile_whole(name, monkeypatch, compile_backend):
    monkeypatch.setattr(_slabs, "LATENTS_AT_LEAST", 16)
    monkeypatch.setattr(_slabs, "ALIGNMENT", 8)
    torch._dynamo.reset()
    sae, x = se.SparseAutoencoder(D, F, RULES[name]()[0]), torch.randn(B, D)
    gradient = {"gradient": torch.randn(B, D)} if name == "GradientTopK" else {}

    def encode(x):
        codes = sae.encode(x, memory_budget=B * 40 * 4, **gradient)
        return codes.values, codes.indices, codes.offsets

    expected = encode(x)
    found = torch.compile(encode, fullgraph=True, backend=compile_backend)(x)
    assert_same(found[1:], expected[1:])
    torch.testing.assert_close(found[0], expected[0])
