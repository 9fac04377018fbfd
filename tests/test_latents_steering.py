"""steer and ablate: against the dense formula in fp64, with and without a cache, and all is as it was afterwards."""

import pytest
import torch
from tiny_models import MODELS

import sae_engine as se
from sae_engine.data import load_language_model, read_activations, read_sites, run_with_replacement

SITE = "blocks.2.hook_resid_post"
IDS = torch.tensor([[17, 300, 45, 1200, 88, 9], [5, 6, 2047, 31, 31, 400]])


@pytest.fixture(scope="module")
def lm():
    return load_language_model(dtype=torch.float64)


def autoencoder(lm, rule=None, **options):
    """In fp64, on the scale of the model's activations, so that codes are neither all nor nothing."""
    torch.manual_seed(7)
    sae = se.SparseAutoencoder(lm.d_model, 96, rule or se.TopK(6), dtype=torch.float64, **options)
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.W_dec *= torch.rand(96, 1, dtype=torch.float64) + 0.5
        if isinstance(sae.activation, se.JumpReLU):
            sae.activation.threshold.fill_(3.0)
    return sae


def jump_relu():
    return se.JumpReLU(96)


def dense_change(sae, x, new):
    """sum_j (new_j - old_j) * W_dec[j] of each row, by dense matrices; ``new`` maps (rows, d_sae) codes to others."""
    scale = 1.0
    if sae.normalize_activations == "layer_norm":
        scale = x.std(-1, keepdim=True)
        x = (x - x.mean(-1, keepdim=True)) / (scale + 1e-5)
    pre = (x - sae.b_dec if sae.apply_b_dec_to_input else x) @ sae.W_enc + sae.b_enc
    norms = sae.W_dec.norm(dim=1)
    if sae.rescale_acts_by_decoder_norm:
        pre = pre * norms
    if isinstance(sae.activation, se.JumpReLU):
        old = torch.where(pre > sae.activation.threshold, pre, 0.0)
    else:
        kept = pre.topk(sae.activation.k, -1)
        old = torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())
    difference = new(old) - old
    if sae.rescale_acts_by_decoder_norm:
        difference = difference / norms
    return difference @ sae.W_dec * scale


def added(amounts):
    def new(old):
        old = old.clone()
        for latent, amount in amounts.items():
            old[..., latent] += amount
        return old

    return new


def held(amounts):
    def new(old):
        old = old.clone()
        for latent, amount in amounts.items():
            old[..., latent] = amount
        return old

    return new


def busiest(sae, x, count=3):
    """The latents that fire most often there."""
    return sae.encode(x).to_dense().flatten(0, -2).gt(0).sum(0).topk(count).indices.tolist()


KINDS = {
    "top-k": {}, "rescaled": {"rescale_acts_by_decoder_norm": True}, "JumpReLU": {"rule": jump_relu},
    "layer norm": {"normalize_activations": "layer_norm"}, "no b_dec": {"apply_b_dec_to_input": False},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "site"), [*((kind, SITE) for kind in KINDS), ("top-k", "blocks.1.hook_mlp_out"),
                                            ("top-k", "blocks.1.hook_resid_mid")])  # fmt: skip
@torch.no_grad()
def test_the_activations_become_those_of_the_dense_formula(lm, kind, site):
    options = dict(KINDS[kind])
    rule = options.pop("rule", lambda: None)()
    sae = autoencoder(lm, rule, **options)
    clean = read_activations(lm.model, IDS, site=site)
    first, second, third = busiest(sae, clean)
    amounts = {first: -2.5, second: 40.0, 95: 3.0}
    cases = {
        "add": (se.steer(lm, sae, amounts, site=site), added(amounts)),
        "set": (se.steer(lm, sae, amounts, mode="set", site=site), held(amounts)),
        "ablate": (se.ablate(lm, sae, [first, third], site=site), held({first: 0.0, third: 0.0})),
    }
    for name, (context, new) in cases.items():
        with context as model:
            logits = model(IDS).logits
        expected = run_with_replacement(lm.model, IDS, lambda x, new=new: x + dense_change(sae, x, new), site=site)
        assert torch.allclose(logits, expected, rtol=1e-9, atol=1e-9), (name, (logits - expected).abs().max())
        assert (logits - lm.model(IDS).logits).abs().max() > 1e-3, name


@torch.no_grad()
def test_rows_normalized_before_the_autoencoder_are_scaled_back(lm):
    """As provenance says it of autoencoders that were trained on normalized rows."""
    sae = autoencoder(lm)
    sae.provenance = se.Provenance(layer=2, site="resid_post", normalize="token")
    x = read_activations(lm.model, IDS, site=SITE)
    latents = busiest(sae, (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True))

    def replace(x):
        scale = x.std(-1, keepdim=True) + 1e-5
        z = (x - x.mean(-1, keepdim=True)) / scale
        return x + dense_change(sae, z, held(dict.fromkeys(latents, 0.0))) * scale

    with se.ablate(lm, sae, latents) as model:
        logits = model(IDS).logits
    expected = run_with_replacement(lm.model, IDS, replace, site=SITE)
    assert torch.allclose(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["add", "set"])
@torch.no_grad()
def test_a_transcoder_is_read_at_its_input_and_changes_its_target(lm, mode):
    sae = autoencoder(lm, d_out=lm.d_model, skip=True, apply_b_dec_to_input=False)
    torch.nn.init.normal_(sae.W_skip)  # edits change nothing of what is skipped
    sae.provenance = se.Provenance(layer=1, site="mlp_in", target_layer=1, target_site="mlp_out")
    x, _ = read_sites(lm.model, IDS, ["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"])
    amounts = {busiest(sae, x)[0]: 7.0, 3: -1.0}
    change = dense_change(sae, x, (added if mode == "add" else held)(amounts))
    with se.steer(lm, sae, amounts, mode=mode) as model:
        logits = model(IDS).logits
    expected = run_with_replacement(lm.model, IDS, lambda y: y + change, site="blocks.1.hook_mlp_out")
    assert torch.allclose(logits, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_generation_with_a_cache_and_in_padded_batches_is_that_without(lm):
    """Which a position counted wrongly, or a row that another one changes, would show."""
    sae = autoencoder(lm)
    latents = busiest(sae, read_activations(lm.model, IDS, site=SITE))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 3}
    short = IDS[1:, :3]
    padded = torch.tensor([[*IDS[0].tolist()], [0, 0, 0, *short[0].tolist()]])
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    clean = lm.model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    for context in (lambda: se.ablate(lm, sae, range(96), site=SITE),
                    lambda: se.steer(lm, sae, {latents[0]: 200.0, 95: 300.0}, site=SITE),
                    lambda: se.steer(lm, sae, {latents[0]: 200.0}, mode="set", site=SITE)):  # fmt: skip
        with context() as model:
            cached = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
            whole = model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **options)
            alone = model.generate(short, attention_mask=torch.ones_like(short), **options)
            batch = model.generate(padded, attention_mask=mask, **options)
            logits = model(whole[:, :-1]).logits
        assert torch.equal(cached, whole)
        assert torch.equal(whole[:, 6:], logits[:, 5:].argmax(-1))  # of one forward pass over all of it
        assert torch.equal(batch[0], cached[0]) and torch.equal(batch[1, 3:], alone[0])
        assert not torch.equal(clean, cached)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
@torch.no_grad()
def test_other_families(family):
    """OPT's MLP sees (batch * tokens, d); in GPT-NeoX both branches leave from one place."""
    torch.manual_seed(0)
    model = MODELS[family]().double().eval()
    sae, ids = se.SparseAutoencoder(32, 64, se.TopK(4), dtype=torch.float64), IDS % 300
    for site in ("blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"):
        latents = busiest(sae, read_activations(model, ids, site=site))
        new = held(dict.fromkeys(latents, 3.0))
        expected = run_with_replacement(model, ids, lambda x, new=new: x + dense_change(sae, x, new), site=site)
        with se.steer(model, sae, dict.fromkeys(latents, 3.0), mode="set", site=site):
            assert torch.allclose(model(ids).logits, expected, rtol=1e-9, atol=1e-9)
            options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
            mask = torch.ones_like(ids)
            cached, whole = (model.generate(ids, attention_mask=mask, use_cache=c, **options) for c in (True, False))
        assert torch.equal(cached, whole)


@torch.no_grad()
def test_first_tokens_can_be_left_alone(lm):
    """Padding aside, with a cache and without."""
    sae = autoencoder(lm)
    padded = torch.tensor([[*IDS[0].tolist()], [0, 0, 0, *IDS[1, :3].tolist()]])
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    clean = read_activations(lm.model, padded, site=SITE, attention_mask=mask)
    latents = dict.fromkeys(busiest(sae, clean), 150.0)

    def after(ids, mask=None):
        """What enters the next block, with padding where it was."""
        found = []
        handle = lm.model.transformer.h[3].register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
        lm.model(ids, attention_mask=mask)
        handle.remove()
        return found[0]

    hidden = after(padded, mask)
    with se.steer(lm, sae, latents, site=SITE, mode="set", drop_first=True) as model:
        partly, unmasked = after(padded, mask), after(IDS)
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        cached, whole = (model.generate(padded, attention_mask=mask, use_cache=use, **options) for use in (True, False))
        with pytest.raises(RuntimeError, match="drop_first: call the model itself"):
            model.transformer(IDS)  # as many tokens as the call before
    with se.steer(lm, sae, latents, site=SITE, mode="set"):
        everywhere, all_of_it = after(padded, mask), after(IDS)
    assert torch.equal(partly[0, 0], hidden[0, 0]) and torch.equal(partly[1, 3], hidden[1, 3])
    assert torch.equal(partly[0, 1:], everywhere[0, 1:]) and torch.equal(partly[1, 4:], everywhere[1, 4:])
    assert not torch.equal(everywhere[1, 3], hidden[1, 3]) and not torch.equal(partly[0, 1], hidden[0, 1])
    assert torch.equal(unmasked[:, 1:], all_of_it[:, 1:]) and torch.equal(unmasked[:, 0], after(IDS)[:, 0])
    assert torch.equal(cached, whole)


@torch.no_grad()
def test_tokens_where_nothing_changes_keep_their_bits():
    """And the model its dtype: an ablated latent that does not fire changes nothing, whatever rounds."""
    lm = load_language_model(dtype=torch.bfloat16)
    sae = autoencoder(lm).float()
    clean = read_activations(lm.model, IDS, site=SITE)
    fires = sae.encode(clean.float()).to_dense()[..., :] != 0
    latent = int(fires.flatten(0, 1).sum(0).sub(6).abs().argmin())  # on some tokens, not on all
    with se.ablate(lm, sae, [latent], site=SITE):
        after = read_activations(lm.model, IDS, site="blocks.3.hook_resid_pre")
        assert lm.model(IDS).logits.dtype == torch.bfloat16
    assert 0 < int(fires[..., latent].sum()) < 12
    assert torch.equal((after != clean).any(-1), fires[..., latent])


def hooks_of(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@torch.no_grad()
def test_nested_contexts_add_up_and_leave_nothing_behind(lm):
    sae = autoencoder(lm)
    clean, before = lm.model(IDS).logits, hooks_of(lm.model)
    sae.train()
    with se.steer(lm, sae, {3: 5.0}, site=SITE), se.steer(lm, sae, {4: -9.0}, site=SITE):
        both = lm.model(IDS).logits
    with se.steer(lm, sae, {3: 5.0, 4: -9.0}, site=SITE):
        assert torch.allclose(lm.model(IDS).logits, both, rtol=1e-9, atol=1e-9)
    with se.steer(lm, sae, {3: 5.0}, mode="set", site=SITE), se.ablate(lm, sae, range(96), site=SITE):
        inner = read_activations(lm.model, IDS, site="blocks.3.hook_resid_pre")
    x = read_activations(lm.model, IDS, site=SITE)
    x = x + dense_change(sae, x, held({3: 5.0}))
    assert torch.allclose(inner, x + dense_change(sae, x, torch.zeros_like), rtol=1e-9, atol=1e-9)
    with pytest.raises(KeyboardInterrupt), se.steer(lm, sae, {3: 5.0}, site=SITE):
        raise KeyboardInterrupt
    assert sae.training and not lm.model.training
    assert hooks_of(lm.model) == before and torch.equal(lm.model(IDS).logits, clean)


def test_gradients_pass_through_an_edit(lm):
    """With respect to the activations before it, as of the dense formula."""
    sae = autoencoder(lm, jump_relu())
    x = read_activations(lm.model, IDS, site=SITE)
    latents = busiest(sae, x)
    found = []
    for edited in (True, False):
        leaf = x.clone().requires_grad_()

        def enter(_, inputs, output, leaf=leaf):
            return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

        handle = lm.model.transformer.h[2].register_forward_hook(enter)
        try:
            if edited:
                with se.ablate(lm, sae, latents, site=SITE) as model:
                    logits = model(IDS).logits
            else:
                change = dense_change(sae, leaf, held(dict.fromkeys(latents, 0.0)))
                handle.remove()
                hook = lambda _, inputs, output, y=leaf + change: (y, *output[1:]) if isinstance(output, tuple) else y  # noqa: E731
                handle = lm.model.transformer.h[2].register_forward_hook(hook)
                logits = lm.model(IDS).logits
        finally:
            handle.remove()
        found.append(torch.autograd.grad(logits[..., 7].sum(), leaf)[0])
    assert torch.allclose(*found, rtol=1e-8, atol=1e-10)


def test_batch_rules_use_their_threshold(lm):
    sae = autoencoder(lm, se.BatchTopK(6))
    with pytest.raises(RuntimeError, match="threshold"):
        se.ablate(lm, sae, [3], site=SITE)
    x = read_activations(lm.model, IDS, site=SITE)
    se.calibrate_threshold(sae, [x])
    form = se.inference_form(sae)
    latents = busiest(form, x)
    with torch.no_grad(), se.ablate(lm, sae, latents, site=SITE) as model:
        logits = model(IDS[:1]).logits  # in training the rule would cut this batch alone
        with se.ablate(lm, form, latents, site=SITE):
            pass
    with torch.no_grad(), se.ablate(lm, form, latents, site=SITE) as model:
        assert torch.allclose(model(IDS[:1]).logits, logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("latents", "options", "error", "said"),
    [
        ({96: 1.0}, {}, ValueError, "latents must be in 0..95, got 96"),
        ({-1: 1.0}, {}, ValueError, "latents must be in 0..95, got -1"),
        ({True: 1.0}, {}, TypeError, "latents must be integers, got True"),
        ({3: "much"}, {}, TypeError, "amount of latent 3 must be a number, got 'much'"),
        ({3: float("nan")}, {}, ValueError, "amount of latent 3 must be finite"),
        ([3], {}, TypeError, "latents must be a mapping"),
        ({}, {}, ValueError, "at least one latent"),
        ({3: 1.0}, {"mode": "multiply"}, ValueError, "mode must be one of"),
        ({3: 1.0}, {"site": None}, ValueError, "site must be given: the autoencoder does not say"),
        ({3: 1.0}, {"site": "resid_pre"}, ValueError, "layer"),
        ({3: 1.0}, {"site": "blocks.9.hook_resid_pre"}, ValueError, "layer must be in 0..3, got 9"),
        ({3: 1.0}, {"site": "blocks.1.mlp.hook_post"}, ValueError, "the model is 1024 wide .* sae has d_in = 256"),
        ({3: 1.0}, {"target_layer": 1}, ValueError, "target_site must be given"),
        ({3: 1.0}, {"drop_first": 1}, TypeError, "drop_first must be"),
        ({3: 1.0}, {"normalize": "rows"}, ValueError, "normalize must be one of"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(lm, latents, options, error, said):
    before = hooks_of(lm.model)
    with pytest.raises(error, match=said):
        se.steer(lm, autoencoder(lm), latents, **{"site": SITE, **options})
    assert hooks_of(lm.model) == before


def test_what_cannot_be_steered_is_refused(lm):
    with pytest.raises(TypeError, match="model must be a LanguageModel"):
        se.steer("gpt2", autoencoder(lm), {3: 1.0}, site=SITE)
    with pytest.raises(TypeError, match="sae must be a SparseAutoencoder"):
        se.ablate(lm, lm.model, [3], site=SITE)
    with pytest.raises(TypeError, match="latents must be a sequence"):
        se.ablate(lm, autoencoder(lm), "35", site=SITE)
    with pytest.raises(TypeError, match=r"attribution|gradient"):
        se.ablate(lm, autoencoder(lm, se.GradientTopK(3)), [3], site=SITE)
    backwards = autoencoder(lm, d_out=lm.d_model, apply_b_dec_to_input=False)
    backwards.provenance = se.Provenance(layer=2, site="resid_pre", target_layer=1, target_site="mlp_out")
    with pytest.raises(RuntimeError, match=r"target_site: .* comes before the input"), se.ablate(lm, backwards, [3]):
        lm.model(IDS)
    assert torch.isfinite(lm.model(IDS).logits).all()
