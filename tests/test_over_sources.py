"""One budget of each token over the latents of all sources: who is kept, what is refused, and how it is evaluated."""
import json

import pytest
import torch
from pair_loop import SITES, B, F, batch, coder, dense_codes
from short_runs import settings

import sae_engine as se
from sae_engine.data import evaluation_text, load_language_model, read_sites
from sae_engine.losses import AuxK, MultiTopK, evaluate
from sae_engine.metrics import evaluate_sites
from sae_engine.metrics.replacement import CLEAN
from sae_engine.rules import TopKOverSources
from sae_engine.training import TrainStep
from sae_engine.training._faults import ConfigError


def kept_by_sorting(pre, k):
    """(sources, tokens, F) bool: of each token's numbers, by source and latent, the k first of a stable sort."""
    sources, tokens, width = pre.shape
    flat = pre.transpose(0, 1).reshape(tokens, -1)
    flat = torch.where(flat.isnan(), torch.inf, flat)
    order = flat.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, True).view(tokens, sources, width).transpose(0, 1)


@pytest.mark.parametrize("k", [1, 5, 8, 24])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_ties_zeros_and_nan_go_to_the_first_source_and_latent(k, backend):
    pre = torch.randint(-2, 3, (3, 17, 8), generator=torch.Generator().manual_seed(k)).float()
    pre[0, 0, 0], pre[1, 1, 2], pre[2, 2, 7] = -0.0, torch.nan, torch.nan
    codes = TopKOverSources(k, 3).select(pre, backend=backend)
    kept = kept_by_sorting(pre, k)
    assert torch.equal(codes.indices.long(), kept.nonzero()[:, 2]) and codes.values.shape[0] == 17 * k
    assert torch.equal(codes.offsets, torch.cat([torch.zeros(1, dtype=torch.long), kept.sum(2).flatten().cumsum(0)]))
    torch.testing.assert_close(codes.values, pre[kept].clamp(min=0), equal_nan=True, rtol=0, atol=0)


def test_more_than_a_source_has_may_be_kept_and_the_gradient_reaches_what_is_kept_and_positive():
    pre = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    rule = TopKOverSources(6, 2)
    dense = rule(pre)
    dense.square().sum().backward()
    assert torch.equal(dense.detach(), torch.where(kept_by_sorting(pre.detach(), 6), pre.detach().relu(), 0.0))
    assert torch.equal(pre.grad, 2 * dense.detach())
    assert torch.equal(TopKOverSources(8, 2)(pre.detach()), pre.detach().relu())


def test_each_token_keeps_k_and_sources_share_them():
    made, (x, _) = coder("causal", "token"), batch()
    with torch.no_grad():
        made.b_enc[1] += 1
        codes = made.encode(x)
    assert codes.offsets.diff().view(SITES, B).sum(0).tolist() == [7] * B
    assert codes.l0.sum(1)[1] > codes.l0.sum(1)[0] and codes.l0.sum(1)[1] > codes.l0.sum(1)[2]
    torch.testing.assert_close(codes.to_dense(), dense_codes(made, x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.eval().encode(x).to_dense(), codes.to_dense(), rtol=0, atol=0)


@pytest.mark.parametrize("budget", [None, 3 * F * 8])
def test_beside_auxiliary_losses_steps_are_those_of_autograd(budget):
    losses = [MultiTopK(), AuxK(k=3)]
    ours, theirs = coder("causal", "token"), coder("causal", "token")
    step = TrainStep(ours, lr=2**-10, losses=losses, memory_budget=budget)
    adam = torch.optim.Adam(theirs.parameters(), lr=2**-10)
    for seed in range(5):
        x, target = batch(seed)
        step(x, target)
        adam.zero_grad()
        evaluate(theirs, x, losses, target=target)["loss"].backward()
        adam.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)


def test_multi_topk_widens_the_budget_of_all_sources():
    made = coder("causal", "token")
    assert MultiTopK(factor=4).rule(made, 0).k == 28 and MultiTopK(factor=99).rule(made, 0).k == SITES * F


def clt(rule, sources=3):
    return se.Crosscoder.clt(sources, 4, 8, rule)


REFUSED = {
    "one source": (lambda: TopKOverSources(3, 1), ValueError, "sources must be at least 2, got 1"),
    "k of nothing": (lambda: TopKOverSources(0, 2), ValueError, "k"),
    "sources of another kind": (lambda: TopKOverSources(3, 2.5), TypeError, "sources"),
    "another number": (lambda: clt(TopKOverSources(3, 2)), ValueError, "among the latents of 2 sources.*got 3 sources"),
    "one source's": (lambda: clt([TopKOverSources(3, 3) for _ in range(3)]), ValueError, "with a rule each"),
    "a joint source": (lambda: se.Crosscoder([4], [4], 8, TopKOverSources(3, 2)), ValueError, "got 1 sources"),
    "an autoencoder's": (lambda: se.SparseAutoencoder(4, 8, TopKOverSources(3, 2)), ValueError, "a Crosscoder's"),
    "more than all": (lambda: clt(TopKOverSources(25, 3)), ValueError, "k=25.*d_sae times 3 sources"),
    "pre of other sources": (lambda: TopKOverSources(3, 2).select(torch.ones(3, 5, 8)), ValueError, "2 sources"),
    "a matrix": (lambda: TopKOverSources(3, 2).select(torch.ones(8)), ValueError, "pre must be"),
    "integers": (lambda: TopKOverSources(3, 2).select(torch.ones(2, 5, 8).long()), TypeError, "pre"),
    "one by itself": (lambda: se.latents.of_source(clt(TopKOverSources(3, 3)), 1), ValueError, "TopKOverSources"),
    "thresholds": (lambda: se.inference_form(clt(TopKOverSources(3, 3))), TypeError, "TopKOverSources"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_name(case):
    call, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("format", [
    "circuit_tracer_clt", "transcoder_set", "gemma_scope_2_clt", "dictionary_learning_crosscoder"])  # fmt: skip
def test_other_formats_cannot_hold_it(format, tmp_path):
    wiring = "local" if format == "transcoder_set" else "causal"
    with pytest.raises(ValueError, match=r"TopKOverSources|only 'joint'"):
        coder(wiring, "token", dtype=torch.float32).save_pretrained(tmp_path / "a", format=format)
    assert not (tmp_path / "a").exists()


def test_our_own_files_hold_it_bit_for_bit(tmp_path):
    made, (x, _) = coder("causal", "token", dtype=torch.float32), batch(dtype=torch.float32)
    made.save_pretrained(tmp_path)
    again = se.Crosscoder.from_pretrained(tmp_path)
    assert repr(again.activation) == repr(made.activation) == "TopKOverSources(k=7, sources=3)"
    assert torch.equal(again(x), made.eval()(x))
    text = json.loads((tmp_path / "crosscoder.json").read_text())
    text["rules"][0][1]["sources"] = 4
    (tmp_path / "crosscoder.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="4 sources"):
        se.Crosscoder.from_pretrained(tmp_path)


def test_evaluation_takes_codes_of_the_models_own_run():
    """In a replaced run the later layers, which share the budget, would not be there yet."""
    from sae_engine.data import run_with_replacements
    from sae_engine.metrics.replacement import Replacement
    from sae_engine.metrics.splice import Batch

    lm = load_language_model()
    sites = [f"blocks.{layer}.hook_resid_mid" for layer in range(2)]
    targets = [f"blocks.{layer}.hook_mlp_out" for layer in range(2)]
    torch.manual_seed(0)
    made = se.Crosscoder.clt(2, lm.d_model, 64, TopKOverSources(9, 2))
    options = {"sites": sites, "target_sites": targets, "max_tokens": 60, "context_length": 20}
    found = evaluate_sites(made, lm, evaluation_text()[:1], **options)
    assert found["setting"]["codes"].startswith(f"{CLEAN} (TopKOverSources ranks the latents of all sources together")
    assert 7 < found["sparsity"]["l0"] <= 9
    assert found["language"]["kl_spliced"] > 0
    ids = torch.arange(12)[None] + 40
    replacement = Replacement(made, lm, sites, targets)
    rows = Batch(ids, None, torch.arange(12), [])
    with torch.no_grad():
        _, x, _ = replacement.clean(rows)
        (logits,) = replacement.replaced(rows, x)
        own = torch.stack(read_sites(lm.model, ids, sites), 2)[0]
        out = made(own)
        uses = {site: lambda hidden, n=n: out[None, :, n] for n, site in enumerate(targets)}
        wanted = run_with_replacements(lm.model, ids, uses)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_configuration_trains_it(tmp_path):
    entry = {"name": "clt", "wiring": "causal", "hook_name": "blocks.{0..1}.hook_resid_mid",
             "hook_name_out": "blocks.{0..1}.hook_mlp_out", "architecture": "topk", "over_sources": True, "k": 6,
             "d_sae": 64}  # fmt: skip
    run = se.train(settings(tmp_path / "run", saes=[entry]))
    made = run.saes()["clt"]
    assert repr(made.activation) == "TopKOverSources(k=6, sources=2)"
    l0 = [value for line in run.metrics() for key, value in line.items() if key.endswith("metrics/l0")]
    assert l0 and all(0 < value <= 6 for value in l0)
    assert "clt: FVU" in run.summary()


@pytest.mark.parametrize("changed", [{"wiring": "joint"}, {"hook_name": "blocks.0.hook_resid_mid", "wiring": "joint"}])
def test_a_configuration_of_a_single_source_is_refused(changed, tmp_path):
    entry = {"name": "one", "hook_name": "blocks.{0..1}.hook_resid_mid", "architecture": "topk", "over_sources": True,
             "k": 6, "d_sae": 64, **changed}  # fmt: skip
    with pytest.raises(ConfigError, match=r"over_sources.*single source"):
        se.train(settings(tmp_path / "run", saes=[entry]))
