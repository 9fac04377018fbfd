"""Replacement models: a language model whose MLPs are exchanged for a crosscoder, against that very model by hand."""

import json

import pytest
import torch
from tiny_models import DOCUMENTS, MODELS, tokenizer_of_bytes

import sae_engine as se
from sae_engine.cli import main
from sae_engine.data import LanguageModel, check_same_tokens, read_sites, run_with_replacements, together
from sae_engine.metrics import NextTokenLoss, Reconstruction, evaluate, evaluate_sites, evaluate_sites_during
from sae_engine.metrics.replacement import CLEAN, REPLACED, Replacement
from sae_engine.metrics.splice import batches_of

D, F, LAYERS = 32, 40, 3
READ = [f"blocks.{layer}.hook_resid_mid" for layer in range(LAYERS)]
WRITTEN = [f"blocks.{layer}.hook_mlp_out" for layer in range(LAYERS)]
OPTIONS = {"context_length": 12, "batch_size": 3, "max_tokens": 100}
RULES = {
    "topk": lambda sources: se.TopK(4), "relu": lambda sources: se.ReLU(),
    "jumprelu": lambda sources: [se.JumpReLU(F, threshold=0.2) for _ in range(sources)],
    "batch": lambda sources: se.BatchTopK(4, initial_threshold=0.3),
}  # fmt: skip


def language_model(kind="gpt2", seed=0):
    torch.manual_seed(seed)
    return LanguageModel(
        model=MODELS[kind]().double().eval(), tokenizer=tokenizer_of_bytes(), name=kind, revision=None,
        sha256="0" * 64, d_model=D, num_layers=LAYERS, max_length=32, is_embedded=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def lm():
    return language_model()


def coder(wiring="causal", rule="topk", sites=LAYERS, **options):
    torch.manual_seed(1)
    sources = 1 if wiring == "joint" else sites
    widths, dtype = [D] * sites, torch.float64
    made = se.Crosscoder(widths, widths, F, RULES[rule](sources), wiring=wiring, dtype=dtype, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.uniform_(-0.3, 0.3) if p.dim() > 1 or p is made.b_dec else None
        if isinstance(made.activation, se.BatchTopK):
            made.activation.threshold.fill_(0.3)
    return made.eval()


def batches(lm, **options):
    from sae_engine.data import Site

    return list(batches_of(lm, Site.of(READ[0]), DOCUMENTS, 100, context_length=12, batch_size=3, **options)[1])


def latents_by_hand(made, source, x):
    """(tokens, F) dense, from what a source reads."""
    pre = x @ made.W_enc[source] + made.b_enc[source]
    if made.rescale_acts_by_decoder_norm:
        pre = pre * made.W_dec[source].norm(dim=1)
    rule = made.sources[source].activation
    if isinstance(rule, se.TopK):
        dense = pre.relu() * torch.zeros_like(pre).scatter(-1, pre.topk(rule.k, dim=-1).indices, 1.0)
    else:
        theta = rule.threshold if hasattr(rule, "threshold") else torch.tensor(0.0)
        dense = torch.where(pre > theta, pre, 0.0)
    return dense / made.W_dec[source].norm(dim=1) if made.rescale_acts_by_decoder_norm else dense


def exchanged_by_hand(model, made, ids, kept):
    """Logits of a GPT-2 whose MLPs are hooked one by one: rows that are ``kept`` get the cross-layer sum."""
    streams, handles = {}, []
    for layer, block in enumerate(model.transformer.h):
        def middle(_module, args, layer=layer):  # ln_2 is given the stream between attention and MLP
            streams[layer] = args[0]

        def mlp(_module, _args, out, layer=layer):
            y = made.b_dec[layer * D : (layer + 1) * D].expand(out.shape).clone()
            for s in range(LAYERS):
                if layer in made.sources[s].written_sites:
                    at = (layer - made.sources[s].written_sites.start) * D
                    y = y + latents_by_hand(made, s, streams[s]) @ made.W_dec[s][:, at : at + D]
            if made.W_skip is not None:
                y = y + streams[layer] @ made.W_skip[layer].T
            return torch.where(kept[..., None], y, out)

        handles += [block.ln_2.register_forward_pre_hook(middle), block.mlp.register_forward_hook(mlp)]
    try:
        return model(ids).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("wiring", ["causal", "local"])
@pytest.mark.parametrize("rule", RULES)
def test_the_replacement_model_is_the_model_with_its_mlps_exchanged(lm, wiring, rule, skip):
    made = coder(wiring, rule, skip=skip, rescale_acts_by_decoder_norm=rule == "batch")
    replacement = Replacement(made, lm, READ, WRITTEN)
    losses = NextTokenLoss(), NextTokenLoss()
    for batch in batches(lm):
        kept = torch.zeros(batch.ids.numel(), dtype=torch.bool)
        kept[batch.rows] = True
        with torch.no_grad():
            clean, x, _ = replacement.clean(batch)
            (found,) = replacement.replaced(batch, x)
            expected = exchanged_by_hand(lm.model, made, batch.ids, kept.view(batch.ids.shape))
        assert replacement.is_causal
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(found, clean[0], atol=1e-3)
        losses[0].update(found[:, 1:], batch.ids[:, 1:], clean=clean[0][:, 1:])
        losses[1].update(clean[0][:, 1:], batch.ids[:, 1:])
    found = evaluate_sites(made, lm, DOCUMENTS, sites=READ, target_sites=WRITTEN, **OPTIONS)
    assert found["setting"]["codes"] == REPLACED and found["reconstruction"]["tokens"] == 100
    assert found["language"]["ce_spliced"] == pytest.approx(losses[0].compute()["ce"], rel=1e-6)
    assert found["language"]["kl_spliced"] == pytest.approx(losses[0].compute()["kl"], rel=1e-6)
    assert found["language"]["ce_clean"] == pytest.approx(losses[1].compute()["ce"], rel=1e-6)


def test_errors_and_sparsity_are_those_of_the_models_own_activations(lm):
    made = coder("causal", "jumprelu")
    found = evaluate_sites(made, lm, DOCUMENTS, sites=READ, target_sites=WRITTEN, **OPTIONS)
    metrics, l0, tokens = [Reconstruction() for _ in range(LAYERS)], torch.zeros(LAYERS), 0
    for batch in batches(lm):
        rows = [h.flatten(0, 1)[batch.rows] for h in read_sites(lm.model, batch.ids, [*READ, *WRITTEN])]
        x, y = torch.cat(rows[:LAYERS], 1), rows[LAYERS:]
        with torch.no_grad():
            for metric, out, target in zip(metrics, made.split(made(x)), y, strict=True):
                metric.update(out, target)
            l0 += made.encode(x).l0.sum(1)
        tokens += len(x)
    for site, metric in zip(found["reconstruction"]["sites"], metrics, strict=True):
        assert site["fvu"] == pytest.approx(metric.compute()["fvu"], rel=1e-9)
    assert [source["l0"] for source in found["sparsity"]["sources"]] == pytest.approx((l0 / tokens).tolist())
    share = found["decoder"]
    norms = torch.stack([torch.stack([w.square().sum() for w in W.split(D, 1)]).sum() for W in made.W_dec])
    own = torch.stack([W[:, :D].square().sum() for W in made.W_dec])
    assert share["cross_layer_share"] == pytest.approx((1 - own.sum() / norms.sum()).item())
    short = evaluate_sites_during(made, lm, DOCUMENTS, sites=READ, target_sites=WRITTEN, **OPTIONS)
    assert short["evaluation/cross_layer"] == share["cross_layer_share"]
    assert short["evaluation/fvu"] == found["reconstruction"]["fvu"]
    assert short["evaluation/kl"] == found["language"]["kl_spliced"] > 0
    local = evaluate_sites_during(coder("local"), lm, DOCUMENTS, sites=READ, target_sites=WRITTEN, **OPTIONS)
    assert local["evaluation/cross_layer"] == 0


@pytest.mark.parametrize("wiring", ["joint", "each"])
def test_a_wiring_that_reads_ahead_takes_codes_of_the_models_own_run(lm, wiring):
    made = coder(wiring, sites=2)
    sites = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    found = evaluate_sites(made, lm, DOCUMENTS, sites=sites, **OPTIONS)
    assert found["setting"]["codes"] == CLEAN
    loss = NextTokenLoss()
    for batch in batches(lm):
        x = torch.cat([h.flatten(0, 1)[batch.rows] for h in read_sites(lm.model, batch.ids, sites)], 1)
        with torch.no_grad():
            new = made.split(made(x))
        uses = {site: lambda h, y=y, rows=batch.rows: h.flatten(0, 1).index_copy(0, rows, y).view(h.shape)
                for site, y in zip(sites, new, strict=True)}  # fmt: skip
        loss.update(run_with_replacements(lm.model, batch.ids, uses)[:, 1:], batch.ids[:, 1:])
    assert found["language"]["ce_spliced"] == pytest.approx(loss.compute()["ce"], rel=1e-6)
    quantiles = [*found["decoder"]["relative_norm_quantiles"].values()] if wiring == "joint" else []
    assert quantiles == sorted(quantiles)


def test_a_crosscoder_that_gives_back_what_it_reads_changes_nothing(lm):
    """A latent for each sign of each dimension; a stream that is read and replaced, layer after layer."""
    made = se.Crosscoder([D] * 2, [D] * 2, 2 * D, se.ReLU(), wiring="local", dtype=torch.float64)
    with torch.no_grad():
        for W_enc, W_dec in zip(made.W_enc, made.W_dec, strict=True):
            W_dec.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
            W_enc.copy_(W_dec.T)
    found = evaluate_sites(made, lm, DOCUMENTS, sites=["resid_post_layer_0", "resid_post_layer_1"], **OPTIONS)
    assert found["setting"]["codes"] == REPLACED
    assert found["language"]["ce_spliced"] == found["language"]["ce_clean"] and found["language"]["kl_spliced"] == 0
    assert found["language"]["loss_recovered"] == 1 and found["reconstruction"]["fvu"] == 0
    assert found["language"]["ce_ablated"] != found["language"]["ce_clean"]


def test_two_models(lm):
    other, made = language_model("llama", seed=3), coder("joint", sites=2)
    sites = ["blocks.1.hook_resid_post", "blocks.1.hook_resid_post"]
    found = evaluate_sites(made, together(lm, other), DOCUMENTS, sites=[sites[0], f"{sites[1]}@1"], **OPTIONS)
    first, second = found["language"]["models"]
    assert found["setting"]["models"] == ["gpt2", "llama"] and found["setting"]["codes"] == CLEAN
    assert found["language"]["ce_clean"] == first["ce_clean"] != second["ce_clean"]
    loss = NextTokenLoss()
    for batch in batches(lm):
        x = [read_sites(model.model, batch.ids, sites[:1])[0].flatten(0, 1)[batch.rows] for model in (lm, other)]
        with torch.no_grad():
            new = made.split(made(torch.cat(x, 1)))[1]
        use = {sites[0]: lambda h, rows=batch.rows, new=new: h.flatten(0, 1).index_copy(0, rows, new).view(h.shape)}
        loss.update(run_with_replacements(other.model, batch.ids, use)[:, 1:], batch.ids[:, 1:])
    assert second["ce_spliced"] == pytest.approx(loss.compute()["ce"], rel=1e-6)


class Words:
    def __init__(self, **vocabulary):
        self.get_vocab = lambda: vocabulary


def test_models_that_share_no_tokenizer_are_refused(lm):
    import dataclasses

    other = dataclasses.replace(lm, tokenizer=Words(a=0, b=1), name="other")
    third = dataclasses.replace(lm, tokenizer=Words(a=0, b=2), name="third")
    check_same_tokens([lm, lm, lm])
    with pytest.raises(ValueError, match=r"1 tokens of 'other' and 'third' differ, as 'b', which is 1 and 2"):
        check_same_tokens([other, third])
    bare = dataclasses.replace(lm, tokenizer=None)
    check_same_tokens([bare, bare])
    with pytest.raises(TypeError, match="models must hold"):
        check_same_tokens([lm, lm.model])
    with pytest.raises(ValueError, match="must share a tokenizer"):
        together(other, third)
    short = dataclasses.replace(lm, max_length=8, name="short")
    with pytest.raises(ValueError, match=r"'short' takes 8 tokens, 'gpt2' 32"):
        together(lm, short)
    with pytest.raises(ValueError, match=r"there is no model 1 beside 'gpt2'"):
        evaluate_sites(coder("joint", sites=2), lm, DOCUMENTS, sites=[READ[0], f"{READ[1]}@1"], **OPTIONS)
    with pytest.raises(ValueError, match=r"sites must name a site of each model, 'gpt2' has none"):
        evaluate_sites(coder("joint", sites=2), together(lm, lm), DOCUMENTS, sites=READ[:2], **OPTIONS)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"sites": READ[:2]}, ValueError, "sites must name the 3 sites of the crosscoder, got 2"),
    ({"sites": READ[0]}, TypeError, "sites must be a sequence"),
    ({"target_sites": WRITTEN[:1]}, ValueError, "target_sites must name the 3"),
    ({"sites": [READ[0]] * 3}, ValueError, "sites must name each place once"),
    ({"sites": [*READ[:2], "blocks.2.mlp.hook_post"]}, ValueError, r"coder must have width 128 at sites\[2\]"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(lm, options, error, message):
    with pytest.raises(error, match=message):
        evaluate_sites(coder(), lm, DOCUMENTS, **{"sites": READ, "target_sites": WRITTEN, **OPTIONS, **options})


def test_the_command_line_evaluates_a_cross_layer_transcoder(tmp_path, capsys):
    made = se.Crosscoder.clt(2, 256, 64, se.TopK(4))
    made.save_pretrained(tmp_path / "unsaid")
    made.provenance = se.Provenance(model="embedded", sites=READ[:2], target_sites=WRITTEN[:2])
    made.save_pretrained(tmp_path / "clt")
    common = ["--tokens", "64", "--context-length", "32", "--quiet"]
    assert main(["eval", str(tmp_path / "clt"), *common, "--out", str(tmp_path / "out"), "--no-figures"]) == 0
    told = capsys.readouterr().out
    assert "replaced with codes of the replaced run" in told and "squared decoder norms in later layers" in told
    found = json.loads((tmp_path / "out" / "eval.json").read_text())["clt"]
    assert found["sparsity"]["l0_by_source"] == [4, 4] and len(found["reconstruction"]["fvu_by_site"]) == 2
    assert main(["eval", str(tmp_path / "unsaid"), *common]) == 1
    assert "do not say at which places" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "clt"), *common, "--ppl", "1"]) == 1
    assert "--ppl is for autoencoders" in capsys.readouterr().err


def test_crosscoders_are_refused_where_one_place_is_meant(lm):
    with pytest.raises(TypeError, match=r"evaluate_sites\(\) measures it"):
        evaluate(coder(), lm, DOCUMENTS, layer=1)


def test_autoencoders_are_refused(lm):
    with pytest.raises(TypeError, match="coder must be a Crosscoder"):
        evaluate_sites(se.SparseAutoencoder(D, F, se.TopK(2)), lm, DOCUMENTS, sites=READ, **OPTIONS)
