"""Crosscoder: the same numbers as a dense loop over sources and sites, forward and every gradient; what it refuses."""
import copy

import pytest
import torch
from pair_loop import SITES, WIRINGS, B, D, F, batch, coder, copied, dense_codes, forward

import sae_engine as se
from sae_engine import _slabs, _sources

RULES = ("topk", "batch", "batches", "jumprelu", "relu", "mixed", "token")
# Sums over at most B F products of numbers near 1 in fp64.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def close(found, wanted):
    """Thresholds, and with them their gradients, are fp32 whatever else is: sums over B tokens of it."""
    eps = torch.finfo(wanted.dtype).eps
    bound = CLOSE if wanted.dtype == torch.float64 else {"rtol": B * eps, "atol": B * eps}
    torch.testing.assert_close(found, wanted, **bound)


def gradients(made, out, target):
    made.zero_grad()
    ((out - target).square().sum() / B).backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_forward_and_each_gradient_are_those_of_the_loop(wiring, rule):
    made, (x, target) = coder(wiring, rule, skip=True), batch()
    x.requires_grad_()
    wanted = forward(made, x)
    of_loop = {**gradients(made, wanted, target), "x": x.grad.clone()}
    x.grad = None
    found = made(x)
    ours = {**gradients(made, found, target), "x": x.grad.clone()}
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert ours.keys() == of_loop.keys()
    for name, gradient in of_loop.items():
        assert gradient.any(), name
        close(ours[name], gradient)


@pytest.mark.parametrize("decoder_norm", ["joint", "sum"])
@pytest.mark.parametrize("rule", ["topk", "batch", "relu"])
@pytest.mark.parametrize("wiring", ["joint", "causal"])
def test_ranked_by_decoder_norms(wiring, rule, decoder_norm):
    made = coder(wiring, rule, rescale_acts_by_decoder_norm=True, decoder_norm=decoder_norm)
    x, target = batch()
    wanted = forward(made, x)
    of_loop = gradients(made, wanted, target)
    found = made(x)
    ours = gradients(made, found, target)
    torch.testing.assert_close(found, wanted, **CLOSE)
    for name, gradient in of_loop.items():
        close(ours[name], gradient)


@pytest.mark.parametrize("rule", RULES)
def test_codes_lie_source_by_source(rule):
    """As a coalesced COO tensor over (layer, token, latent) has them, which is circuit-tracer's order."""
    made, (x, _) = coder("causal", rule), batch()
    codes = made.encode(x)
    assert codes.shape == (SITES, B, F)
    dense = dense_codes(made, x)
    torch.testing.assert_close(codes.to_dense(), dense, **CLOSE)
    coo, kept = dense.detach().to_sparse().coalesce(), codes.values != 0
    assert torch.equal(codes.indices[kept].long(), coo.indices()[2])
    rows = torch.repeat_interleave(torch.arange(SITES * B), codes.offsets.diff())[kept]
    assert torch.equal(rows, coo.indices()[0] * B + coo.indices()[1])


@pytest.mark.parametrize("rule", ["topk", "batch", "jumprelu"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_one_site_is_a_column_of_all(wiring, rule):
    made, (x, _) = coder(wiring, rule, skip=True), batch()
    (codes,), info, _ = made.encode_with(x)
    whole = made.decode(codes, info)
    for t, part in enumerate(made.split(whole)):
        torch.testing.assert_close(made.decode(codes, info, sites=t), part, **CLOSE)


def test_both_forms_and_any_batch():
    made, (x, _) = coder("causal", "topk"), batch(tokens=B * 2)
    whole = made(x)
    assert torch.equal(made(x.flatten(1)), whole.flatten(1))
    assert torch.equal(made(x.view(2, B, SITES, D)), whole.view(2, B, SITES, D))
    assert made.encode(x.view(2, B, SITES, D)).shape == (SITES, 2, B, F)
    assert [tuple(part.shape) for part in made.split(whole)] == [(B * 2, D)] * SITES


def test_causal_both_ways():
    made, (x, _) = coder("causal", "topk"), batch()
    with torch.no_grad():
        for s in range(SITES):
            other = x.clone()
            other[:, s] += 1
            moved = (made(other) - made(x)).abs().amax((0, 2)) > 0
            assert moved.tolist() == [t >= s for t in range(SITES)]
    made(x)[:, 1].sum().backward()
    assert [bool(p.grad.any()) for p in made.W_dec] == [True, True, False]


@pytest.mark.parametrize("latents_at_least", [8, F], ids=["some latents", "some tokens"])
def test_slabs_keep_the_same_codes(latents_at_least, monkeypatch):
    """Chunked or not; several sources, whose pre-activations are there one after the other."""
    monkeypatch.setattr(_slabs, "LATENTS_AT_LEAST", latents_at_least)
    monkeypatch.setattr(_slabs, "ALIGNMENT", 4)
    x, _ = batch()
    for rule in ("topk", "batch", "batches", "jumprelu", "token"):
        made = coder("causal", rule)
        with torch.no_grad():
            whole, parts = made.encode(x), made.encode(x, memory_budget=3 * F * 8)
        assert torch.equal(whole.indices, parts.indices) and torch.equal(whole.offsets, parts.offsets)
        torch.testing.assert_close(whole.values, parts.values, **CLOSE)


def test_one_layer_is_a_transcoder():
    one = se.Crosscoder.clt(1, D, F, se.TopK(4), dtype=torch.float64)
    sae = se.SparseAutoencoder(D, F, se.TopK(4), apply_b_dec_to_input=False, dtype=torch.float64)
    copied(one, sae)
    x = torch.randn(B, D, dtype=torch.float64)
    torch.testing.assert_close(one(x), sae(x), **CLOSE)
    assert one.encode(x).shape == (B, F)


def test_two_models_are_an_autoencoder_of_both_side_by_side():
    made = se.Crosscoder([4, 7], [4, 7], F, se.BatchTopK(3), dtype=torch.float64)
    sae = se.SparseAutoencoder(11, F, se.BatchTopK(3), apply_b_dec_to_input=False, dtype=torch.float64)
    copied(made, sae)
    x = torch.randn(B, 11, dtype=torch.float64)
    torch.testing.assert_close(made(x), sae(x), **CLOSE)
    assert [part.shape[1] for part in made.split(made(x))] == [4, 7]


def test_one_threshold_for_all_sources_is_learned_and_used():
    made, (x, _) = coder("causal", "batch"), batch()
    codes = made.encode(x)
    made(x)
    assert made.activation.threshold == codes.values[codes.values > 0].min().double()
    made.eval()
    dense = torch.stack([x[:, s] @ made.W_enc[s] + made.b_enc[s] for s in range(SITES)])
    wanted = torch.where(dense > made.activation.threshold, dense, 0.0)
    torch.testing.assert_close(made.encode(x).to_dense(), wanted, **CLOSE)


def test_each_source_learns_a_threshold_of_its_own():
    made, (x, _) = coder("local", "batches"), batch()
    made(x)
    assert len({float(rule.threshold) for rule in made.activation}) == SITES


def test_site_norms():
    made = coder("windows")
    norms = made.site_norms()
    assert norms.shape == (3, F, SITES) and not norms[1, :, :2].any() and not norms[0, :, 2].any()
    torch.testing.assert_close(norms[2, :, 1], made.W_dec[2][:, :D].norm(dim=1), **CLOSE)
    norms.sum().backward()
    assert made.W_dec[2].grad.any()


@pytest.mark.parametrize("rule", RULES)
def test_state_is_saved_and_loaded(rule, tmp_path):
    made, (x, _) = coder("windows", rule, skip=True), batch()
    made(x)
    state = made.state_dict()
    assert all(t.is_contiguous() for t in state.values())
    torch.save(state, tmp_path / "state.pt")
    again = coder("windows", rule, seed=7, skip=True)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again.eval()(x), made.eval()(x)) and torch.equal(copy.deepcopy(made)(x), made(x))


def test_both_ways_of_drawing_start_small():
    made = se.Crosscoder.clt(3, 8, 100, se.TopK(2))
    assert all(0.09 < p.abs().max() <= 0.1 for p in made.W_enc)
    assert all(0.9 * 24**-0.5 < p.abs().max() <= 24**-0.5 for p in made.W_dec)


BAD = {
    "no sites": (lambda: se.Crosscoder([], [4], 8, se.TopK(2)), "reads"),
    "a width that is none": (lambda: se.Crosscoder([4, 0], [4], 8, se.TopK(2)), r"reads\[1\]"),
    "a width of another kind": (lambda: se.Crosscoder([4], [4.0], 8, se.TopK(2)), r"writes\[0\]"),
    "no sequence": (lambda: se.Crosscoder(4, [4], 8, se.TopK(2)), "reads"),
    "an unknown wiring": (lambda: se.Crosscoder([4], [4], 8, se.TopK(2), wiring="acausal"), "wiring"),
    "unequal numbers": (lambda: se.Crosscoder([4], [4, 4], 8, se.TopK(2), wiring="causal"), "wiring"),
    "a range outside": (lambda: se.Crosscoder([4], [4], 8, se.TopK(2), wiring=[(0, range(0, 2))]), r"wiring\[0\]\[1\]"),
    "an empty range": (lambda: se.Crosscoder([4], [4], 8, se.TopK(2), wiring=[((0, 0), 0)]), r"wiring\[0\]\[0\]"),
    "nobody writes": (lambda: se.Crosscoder([4], [4, 4], 8, se.TopK(2), wiring=[(0, 0)]), r"nobody writes \[1\]"),
    "no pair": (lambda: se.Crosscoder([4], [4], 8, se.TopK(2), wiring=[0]), r"wiring\[0\]"),
    "k too large": (lambda: se.Crosscoder([4], [4], 8, se.TopK(9)), "k=9"),
    "k too large for one": (lambda: se.Crosscoder.clt(2, 4, 8, [se.TopK(2), se.TopK(9)]), "k=9"),
    "a shared state": (lambda: se.Crosscoder.clt(2, 4, 8, se.JumpReLU(8)), "JumpReLU.*sequence"),
    "too few rules": (lambda: se.Crosscoder.clt(2, 4, 8, [se.TopK(2)]), "activation"),
    "a rule twice": (lambda: se.Crosscoder.clt(2, 4, 8, [rule := se.TopK(2), rule]), "activation"),
    "no rule": (lambda: se.Crosscoder.clt(2, 4, 8, 3), "activation"),
    "no bias": (lambda: se.Crosscoder([4], [4], 8, se.Gated(8)), "Gated"),
    "a rule with context": (lambda: se.Crosscoder([4], [4], 8, se.GradientTopK(2)), "GradientTopK"),
    "nested latents": (lambda: se.Crosscoder.clt(2, 4, 8, se.MatryoshkaBatchTopK(2, (4, 8))), "Matryoshka"),
    "a rule that sees all": (lambda: se.Crosscoder.clt(2, 4, 8, se.SampledTopK(2)), "SampledTopK"),
    "a norm": (lambda: se.Crosscoder([4], [4], 8, se.TopK(2), decoder_norm="l1"), "decoder_norm"),
    "skip of unequal numbers": (lambda: se.Crosscoder([4], [4, 4], 8, se.TopK(2), skip=True), "skip"),
    "layers": (lambda: se.Crosscoder.clt(0, 4, 8, se.TopK(2)), "layers"),
    "x of neither form": (lambda: coder()(torch.ones(B, D, SITES, dtype=torch.float64)), "x must be"),
    "codes of other sources": (lambda: coder().decode(coder("joint").encode(batch()[0])), "batch shape"),
    "a site that is none": (lambda: coder().decode(coder().encode(batch()[0]), sites=SITES), "sites"),
    "skip without info": (lambda: coder(skip=True).decode(coder().encode(batch()[0])), "info"),
    "initial weights of one site": (lambda: se.init_sparse(coder(), 3), "Crosscoder"),
    "split of what": (lambda: coder().split(batch()[0], of="sites"), "of must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    make, named = BAD[case]
    with pytest.raises((TypeError, ValueError), match=named):
        make()




def launches(monkeypatch):
    """A list that each launch of all sources' decoders adds their number to."""
    calls, plain = [], _sources.ops.decode_sources
    monkeypatch.setattr(_sources.ops, "decode_sources", lambda *given: calls.append(len(given[0])) or plain(*given))
    return calls


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("sites", [None, 1])
def test_all_sources_are_decoded_in_one_launch_with_gradients(backend, sites, monkeypatch):
    """In fp32, as the products of dense codes in fp64 to rounding; without gradients the same bits."""
    made = coder(dtype=torch.float32, skip=True, rescale_acts_by_decoder_norm=True)
    (x, weight), shown = batch(dtype=torch.float32), slice(None) if sites is None else sites
    x.requires_grad_()
    (codes,), info, _ = made.encode_with(x)
    calls = launches(monkeypatch)
    found = made.decode(codes, info, sites=sites, backend=backend)
    with torch.no_grad():
        alone = made.decode(codes, info, sites=sites, backend=backend)
    assert calls == [3 if sites is None else 2] * 2 and torch.equal(found, alone)
    learned = [*made.parameters(), x]
    ours = torch.autograd.grad((found * weight[:, shown].flatten(1)).sum(), learned, allow_unused=True)

    made, x = copy.deepcopy(made).double(), x.detach().double().requires_grad_()
    wanted, learned = forward(made, x)[:, shown].flatten(1), [*made.parameters(), x]
    theirs = torch.autograd.grad((wanted * weight[:, shown].flatten(1)).sum(), learned, allow_unused=True)
    bound = {"rtol": 1e-4, "atol": 1e-5}  # sums of at most B F products of numbers near 1
    torch.testing.assert_close(found, wanted.float(), **bound)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(0 * b.float() if a is None and b is not None else a,
                                   None if b is None else b.float(), **bound)  # fmt: skip


def test_what_is_not_learned_has_no_gradient_and_gradients_have_gradients(monkeypatch):
    clt = se.Crosscoder.clt(2, 3, 6, se.TopK(2), dtype=torch.float64)
    codes = clt.encode(torch.randn(2, 2, 3, dtype=torch.float64)).detach()
    calls = launches(monkeypatch)

    def decoded(values, first, last):
        parts = _sources.parts_of(codes.replace(values=values), 2)
        written = list(zip(parts, (first, last), (0, 3), strict=True))
        return _sources.decode_together(written, (2,), 6, torch.float64, "auto")

    inputs = [t.detach().clone().requires_grad_() for t in (codes.values, *clt.W_dec)]
    assert torch.autograd.gradcheck(decoded, inputs) and torch.autograd.gradgradcheck(decoded, inputs)
    assert calls and set(calls) == {2}
    inputs[1].requires_grad_(False)
    decoded(*inputs).sum().backward()
    assert inputs[1].grad is None and inputs[0].grad.any() and inputs[2].grad.any()
