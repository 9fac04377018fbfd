"""Autoencoders spliced into the embedded model: `evaluate` and `ppl_sparsity`, also beside SAELens' own evaluation."""

import math

import pytest
import torch
from metric_cases import assert_close

import sae_engine as se
from sae_engine import latents
from sae_engine.data import (
    collect_activations,
    evaluation_text,
    load_language_model,
    run_with_replacement,
    stream_activations,
)
from sae_engine.data.contexts import context_batches
from sae_engine.metrics import NextTokenLoss, Reconstruction, evaluate, evaluate_during, ppl_sparsity
from sae_engine.metrics.splice import Normalization

TOKENS = 1500


@pytest.fixture(scope="module")
def lm():
    return load_language_model()


@pytest.fixture(scope="module")
def ids(lm):
    return next(context_batches(lm, evaluation_text(), 128, 4))


def identity(d):
    """An autoencoder that returns its input bit for bit: a latent for each sign of each dimension."""
    sae = se.SparseAutoencoder(d, 2 * d, se.ReLU())
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


@pytest.mark.parametrize("site", ["resid_pre", "mlp_out", "resid_post"])
def test_replacing_with_the_same_changes_no_bit(lm, ids, site):
    clean = lm.model(ids).logits
    seen = []

    def read(hidden):
        seen.append(hidden)
        return hidden.clone()

    assert torch.equal(run_with_replacement(lm.model, ids, read, layer=2, site=site), clean)
    assert seen[0].shape == (4, 128, 256)
    zeros = run_with_replacement(lm.model, ids, torch.zeros_like, layer=2, site=site)
    assert not torch.allclose(zeros, clean, atol=1.0)
    assert torch.equal(lm.model(ids).logits, clean)  # the hook is gone


def test_replacing_reaches_the_site_that_it_names(lm, ids):
    """Zeros for what enters the first block are zeros for its embedding; a later block's zeros are another thing."""
    noise = torch.randn(4, 128, 256)
    after = run_with_replacement(lm.model, ids, lambda _: noise, layer=3, site="resid_post")
    expected = lm.model.lm_head(lm.model.transformer.ln_f(noise))
    torch.testing.assert_close(after, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="replace must return"):
        run_with_replacement(lm.model, ids, lambda x: x[:, 1:], layer=3)
    with pytest.raises(ValueError, match="layer"):
        run_with_replacement(lm.model, ids, lambda x: x, layer=9)


@pytest.mark.parametrize("drop_first", [True, False])
def test_identity_gives_the_clean_loss_and_no_code_the_ablated_one(lm, drop_first):
    options = {"layer": 2, "max_tokens": TOKENS, "context_length": 128, "drop_first": drop_first}
    perfect = identity(256)
    found = evaluate(perfect, lm, evaluation_text(), **options)
    language = found["language"]
    assert language["ce_spliced"] == language["ce_clean"]
    assert language["kl_spliced"] == 0.0
    assert language["loss_recovered"] == 1.0
    assert found["reconstruction"]["mse"] == 0.0
    assert found["reconstruction"]["tokens"] == found["sparsity"]["tokens"] == TOKENS
    assert language["ce_ablated"] > language["ce_clean"] + 1

    silent = se.SparseAutoencoder(256, 8, se.JumpReLU(8, threshold=1e9))
    language = evaluate(silent, lm, evaluation_text(), **options)["language"]
    assert language["ce_spliced"] == language["ce_ablated"]
    assert language["kl_spliced"] == language["kl_ablated"] > 1
    assert language["loss_recovered"] == 0.0


@pytest.mark.parametrize("first", [0, 1])
def test_the_clean_loss_is_the_models_own(lm, ids, first):
    text = lm.tokenizer.decode(ids[0, 1:])
    whole = next(context_batches(lm, [text], 128, 1))
    expected = torch.nn.functional.cross_entropy(lm.model(whole).logits[0, first:-1], whole[0, first + 1 :]).item()
    found = evaluate(
        identity(256), lm, [text], layer=1, context_length=128, drop_first=bool(first), max_tokens=128 - first
    )
    assert found["language"]["predicted"] == 127 - first
    assert found["language"]["ce_clean"] == pytest.approx(expected, rel=2**-20)  # 127 fp32 terms, another order


def test_normalizing_is_undone():
    """By the values themselves: a model with layer norms does not notice a token's mean."""
    x = 3 * torch.randn(20, 64, dtype=torch.float64) + 5
    norm = Normalization("token")
    z, info = norm.into(x)
    torch.testing.assert_close(z.mean(1), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-14)  # 64 roundings
    torch.testing.assert_close(z.std(1) * (x.std(1) + 1e-5), x.std(1))
    torch.testing.assert_close(norm.back(z, info), x)
    assert norm.back(*Normalization("none").into(x)) is x


def test_normalized_space_is_measured_there_and_undone_for_the_model(lm):
    """The identity of the normalized space is the model's identity up to the roundings of normalizing and undoing."""
    options = {"layer": 2, "max_tokens": TOKENS, "context_length": 128}
    found = evaluate(identity(256), lm, evaluation_text(), normalize="token", **options)
    assert found["reconstruction"]["space"].startswith("per-token normalized")
    # Squared norms are 255 (unbiased std) but for the 1e-5, beside a std of 1 or more.
    ratio = found["norms"]["norm_ratio_quantiles"][0.5]
    assert ratio == pytest.approx(1.0, rel=1e-6)
    assert found["language"]["loss_recovered"] == pytest.approx(1.0, abs=1e-5)
    own = identity(256)
    own.normalize_activations = "layer_norm"
    again = evaluate(own, lm, evaluation_text(), **options)
    assert again["reconstruction"]["space"] == "raw"
    assert again["language"]["loss_recovered"] == pytest.approx(1.0, abs=1e-5)
    for quantile in (0.05, 0.5, 0.95):  # the plot shows the same tokens at the same place
        assert again["norms"]["norm_ratio_quantiles"][quantile] == pytest.approx(
            found["norms"]["norm_ratio_quantiles"][quantile], rel=1e-6
        )
    z = torch.tensor(found["norms"]["zf_points"])[:, 0]
    assert z.std() / z.mean() > 0.01  # at the model's scale: the tokens do not all have one norm


def test_a_transcoder_is_measured_against_its_target_and_takes_its_place(lm):
    options = {"max_tokens": 300, "context_length": 64}
    same = {"layer": 1, "site": "resid_post", "target_layer": 2, "target_site": "resid_pre"}  # under another name
    found = evaluate(identity(256), lm, evaluation_text(), **same, **options)
    assert found["reconstruction"]["fvu"] == 0 and found["norms"] is None
    assert found["language"]["loss_recovered"] == 1
    place, target = {"layer": 1, "site": "resid_pre"}, {"layer": 2, "site": "resid_post"}
    other = {"target_layer": target["layer"], "target_site": target["site"]}
    found = evaluate(identity(256), lm, evaluation_text(), **place, **other, **options)
    x, y = (torch.cat(list(stream_activations(lm, evaluation_text(), **at, **options))) for at in (place, target))
    assert found["reconstruction"]["mse"] == pytest.approx((x - y).double().square().mean().item(), rel=1e-6)
    assert found["language"]["ce_ablated"] == pytest.approx(
        evaluate(identity(256), lm, evaluation_text(), **target, **options)["language"]["ce_ablated"], rel=1e-6
    )
    kept = ppl_sparsity(identity(256), lm, evaluation_text(), **same, **options, steps=1)
    assert kept["ce_whole"] == pytest.approx(found["language"]["ce_clean"], rel=1e-6)
    for change, match in [
        ({"normalize": "token"}, "normalize must be 'none' for a transcoder"),
        ({"target_site": None}, "target_site must be given with target_layer=2"),
        ({"target_site": "hook_nowhere"}, "site must be one of"),
        ({"site": "z", "target_site": "mlp_post"}, "d_out = 1024, the width of 'embedded' at blocks.2.mlp.hook_post"),
    ]:
        with pytest.raises(ValueError, match=match):
            evaluate(identity(256), lm, evaluation_text(), **{**same, **options, **change})
    with pytest.raises(ValueError, match="target_site must be given: sae is a transcoder, with d_in = 256"):
        evaluate(se.SparseAutoencoder(256, 64, se.ReLU(), d_out=8), lm, evaluation_text(), layer=1)


def test_batching_of_the_stream_does_not_matter(lm):
    torch.manual_seed(1)
    sae = se.SparseAutoencoder(256, 512, se.TopK(8))
    options = {"layer": 2, "normalize": "token", "context_length": 64, "max_tokens": 800}
    one, many = (evaluate(sae, lm, evaluation_text(), batch_size=size, **options) for size in (1, 7))
    one.pop("tail"), many.pop("tail")  # its thresholds are the first batch's
    # The language model's own GEMMs round differently by batch: to fp32 sums of 256 to 1024 terms, through 4 blocks.
    assert_close(one, many, tolerance=1e-4)


def test_rescaled_codes_are_measured_as_the_folded_ones(lm):
    """Codes that hold p * ||w|| over rows w / ||w|| are the codes p over rows w: norms and tails agree."""
    torch.manual_seed(2)
    plain = se.SparseAutoencoder(256, 64, se.ReLU(), decoder_init_norm=0.5)
    rescaled = se.SparseAutoencoder(256, 64, se.ReLU(), rescale_acts_by_decoder_norm=True)
    rescaled.load_state_dict(plain.state_dict())
    a, b = (evaluate(s, lm, evaluation_text(), layer=2, context_length=64, max_tokens=300) for s in (plain, rescaled))
    for result in (a, b):
        result["norms"].pop("zf_points")
    assert_close(a["norms"], b["norms"], tolerance=1e-5)  # fp32 products in another order
    assert_close(a["tail"], b["tail"], tolerance=1e-4)
    assert_close(a["language"], b["language"], tolerance=1e-5)


def test_ppl_sparsity_finds_the_last_threshold_that_is_allowed(lm):
    torch.manual_seed(3)
    sae = se.SparseAutoencoder(256, 512, se.TopK(16))
    options = {"layer": 2, "normalize": "token", "context_length": 64, "max_tokens": 500}
    whole = evaluate(sae, lm, evaluation_text(), **options)
    small = ppl_sparsity(sae, lm, evaluation_text(), rise=0.01, steps=6, **options)
    large = ppl_sparsity(sae, lm, evaluation_text(), rise=0.5, steps=6, **options)
    assert small["ce_whole"] == pytest.approx(whole["language"]["ce_spliced"], rel=1e-6)
    for found in (small, large):
        assert found["ce"] <= found["ce_whole"] + math.log1p(found["rise"])
        assert 0 <= found["cett"] < 1
        assert found["off"] == pytest.approx(1 - found["l0_kept"] / 512)
        assert found["l0"] == whole["sparsity"]["l0"]
    assert large["l0_kept"] < small["l0_kept"] <= 16
    assert large["threshold"] > small["threshold"]


# --- during training -----------------------------------------------------------------------------------------------

SITE, SHORT = "blocks.2.hook_resid_pre", {"context_length": 64, "batch_size": 4, "max_tokens": 300}


def random_sae(seed=0, d_sae=512, rule=None):
    torch.manual_seed(seed)
    return se.SparseAutoencoder(256, d_sae, se.TopK(8) if rule is None else rule)


def passes(lm):
    """Counts forward passes of the model that go through its last norm."""
    seen = []
    return seen, lm.model.transformer.ln_f.register_forward_hook(lambda *_: seen.append(1))


@pytest.mark.parametrize("drop_first", [True, False])
def test_during_training_the_numbers_are_those_of_an_evaluation(lm, drop_first):
    sae = random_sae().train()
    texts = evaluation_text()[:1]
    whole = evaluate(sae, lm, texts, layer=2, drop_first=drop_first, **SHORT)
    found = evaluate_during(sae, lm, texts, site=SITE, drop_first=drop_first, **SHORT)
    language = whole["language"]
    assert found == {
        "evaluation/fvu": whole["reconstruction"]["fvu"], "evaluation/l0": whole["sparsity"]["l0"],
        "evaluation/dead": whole["sparsity"]["dead_fraction"], "evaluation/ce_clean": language["ce_clean"],
        "evaluation/ce_spliced": language["ce_spliced"], "evaluation/ce_ablated": language["ce_ablated"],
        "evaluation/ce_recovered": language["loss_recovered"],
        "model_performance_preservation/ce_loss_score": language["loss_recovered"],
    }  # fmt: skip
    assert sae.training


def test_what_needs_no_autoencoder_is_computed_once(lm):
    """Of two at a site and one at another: the clean model once, each site's zeros once, each autoencoder once."""
    texts, kept = evaluation_text()[:1], {}
    seen, hook = passes(lm)
    at = [(SITE, 0), (SITE, 1), ("blocks.3.hook_resid_pre", 0), (SITE, 0)]
    with hook:
        counted, found = [], []
        for site, seed in at:
            before = len(seen)
            found.append(evaluate_during(random_sae(seed), lm, texts, site=site, baselines=kept, **SHORT))
            counted.append(len(seen) - before)
    batches = counted[1]
    assert counted == [3 * batches, batches, 2 * batches, batches]
    alone = [evaluate_during(random_sae(seed), lm, texts, site=site, **SHORT) for site, seed in at[1:3]]
    assert found == [found[0], *alone, found[0]]
    other = evaluate_during(random_sae(), lm, texts, site=SITE, baselines=kept, **{**SHORT, "max_tokens": 200})
    assert other["evaluation/ce_clean"] != found[0]["evaluation/ce_clean"]  # other settings are not mixed up


def test_rows_that_training_does_not_see_are_left_alone(lm):
    """Tokens that are excluded: the reconstruction is not put in their place, and they are not measured."""
    ids = torch.randint(5, 400, (130,))
    special = int(ids[40])
    silent = se.SparseAutoencoder(256, 8, se.JumpReLU(8, threshold=1e9))
    options = {"site": SITE, "context_length": 65, "separator": None, "first_token": None}
    rows = []
    update = Reconstruction.update

    def counting(self, x_hat, x):
        rows.append(len(x))
        update(self, x_hat, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reconstruction, "update", counting)
        every = evaluate_during(silent, lm, [ids], **options)
        without = evaluate_during(silent, lm, [ids], exclude_tokens=[special], **options)
    contexts = ids.view(2, 65)
    dropped = int((contexts[:, 1:] == special).sum())
    assert rows == [128, 128 - dropped]
    assert every["evaluation/ce_clean"] == without["evaluation/ce_clean"]

    def zeros(hidden):
        keep = torch.ones_like(contexts, dtype=torch.bool)
        keep[:, 0] = False
        return torch.where((keep & (contexts != special))[..., None], 0.0, hidden)

    loss = NextTokenLoss()
    loss.update(run_with_replacement(lm.model, contexts, zeros, site=SITE)[:, 1:], contexts[:, 1:])
    assert loss.compute()["ce"] == without["evaluation/ce_ablated"] == without["evaluation/ce_spliced"]
    assert every["evaluation/ce_ablated"] != without["evaluation/ce_ablated"]


@pytest.mark.parametrize("transcoder", [False, True], ids=["autoencoder", "transcoder"])
def test_padding_is_neither_measured_nor_seen(lm, transcoder):
    """Documents in contexts of their own: sums of what each gives alone, without padding."""
    documents = [torch.randint(5, 400, (length,)) for length in (40, 17, 90)]
    site, target = ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out") if transcoder else (SITE, None)
    options = {"context_length": 64, "target_site": target, "first_token": None, "separator": None}
    sae = random_sae()
    found = evaluate_during(sae, lm, documents, site=site, packing=False, batch_size=4, **options)
    pieces = [piece for document in documents for piece in document.split(64)]
    alone = [evaluate_during(sae, lm, [piece], site=site, **options) for piece in pieces]
    for key in ("ce_clean", "ce_spliced", "ce_ablated"):
        predicted = [len(piece) - 2 for piece in pieces]  # by all but the first and the last position
        mean = sum(n * one[f"evaluation/{key}"] for n, one in zip(predicted, alone, strict=True)) / sum(predicted)
        assert found[f"evaluation/{key}"] == pytest.approx(mean, rel=1e-5)  # 32-bit activations of other shapes
    assert found["evaluation/l0"] == 8.0
    some = evaluate_during(sae, lm, documents, site=site, packing=False, batch_size=4, max_tokens=50, **options)
    cut = [documents[0], documents[1][:12]]  # 39 rows and 11
    assert_close(some, evaluate_during(sae, lm, cut, site=site, packing=False, **options), 1e-5)


def test_an_autoencoder_of_scaled_activations_is_measured_as_the_folded_one(lm):
    """Powers of two: dividing the biases is exact, and so every number."""
    folded, texts = random_sae(), evaluation_text()[:1]
    with torch.no_grad():
        folded.b_dec.normal_()
        folded.b_enc.normal_()
    trained = random_sae()
    with torch.no_grad():
        for name in ("b_dec", "b_enc"):
            getattr(trained, name).copy_(getattr(folded, name) * 4)
    found = evaluate_during(trained, lm, texts, site=SITE, scale=4.0, **SHORT)
    expected = evaluate_during(folded, lm, texts, site=SITE, **SHORT)
    assert found == expected
    unscaled = evaluate_during(trained, lm, texts, site=SITE, **SHORT)
    assert unscaled["evaluation/fvu"] != expected["evaluation/fvu"]


def test_a_transcoder_of_scaled_activations_has_two_scales(lm):
    texts = evaluation_text()[:1]
    sites = {"site": "blocks.2.mlp.hook_in", "target_site": "blocks.2.hook_mlp_out"}
    folded, trained = random_sae(), random_sae()
    with torch.no_grad():  # inputs are 4 times, targets half as large in training
        trained.W_enc.copy_(folded.W_enc / 4)
        trained.W_dec.copy_(folded.W_dec / 2)
    found = evaluate_during(trained, lm, texts, scale=4.0, target_scale=0.5, **sites, **SHORT)
    assert found == evaluate_during(folded, lm, texts, **sites, **SHORT)


@pytest.mark.parametrize(("change", "error", "match"), [
    ({"scale": 0.0}, ValueError, "scale"), ({"target_scale": -1.0}, ValueError, "target_scale"),
    ({"site": "blocks.9.hook_resid_pre"}, ValueError, "layer must be in"),
    ({"documents": []}, RuntimeError, "no token"), ({"exclude_tokens": "eos"}, TypeError, "exclude_tokens"),
    ({"separator": "end"}, ValueError, "separator"),
])  # fmt: skip
def test_evaluation_during_training_refuses(lm, change, error, match):
    arguments = {"documents": ["some words"], "site": SITE, **SHORT, **change}
    with pytest.raises(error, match=match):
        evaluate_during(random_sae(), lm, **arguments)


def test_rows_are_those_of_the_store_that_it_was_trained_on_unless_others_are_named(lm, tmp_path):
    texts, place = evaluation_text()[:2], {"layer": 1, "site": "resid_mid"}
    often = lm.tokenizer(texts[0])["input_ids"][5]
    rows = {"context_length": 24, "separator": None, "first_token": None, "drop_first": False,
            "exclude_tokens": [often]}  # fmt: skip
    store = collect_activations(lm, texts, tmp_path / "store", **place, **rows, max_tokens=150, progress=False)
    sae = se.SparseAutoencoder(lm.d_model, 64, se.TopK(4))
    sae.provenance = store.provenance
    by_default = {**place, "max_tokens": 150}
    found, said = evaluate(sae, lm, texts, **by_default), evaluate(sae, lm, texts, **by_default, **rows)
    assert found == said and found["setting"]["separator"] == "none" and found["setting"]["context_length"] == 24
    other = evaluate(sae, lm, texts, **by_default, separator="eos", exclude_tokens=())
    assert (other["setting"]["separator"], other["setting"]["exclude_tokens"]) == ("eos", [])
    assert other["setting"]["context_length"] == 24 and other["language"] != found["language"]
    by_default["steps"] = 1
    assert ppl_sparsity(sae, lm, texts, **by_default) == ppl_sparsity(sae, lm, texts, **by_default, **rows)
    features = latents.collect(sae, lm, texts, tmp_path / "features", max_tokens=150, progress=False)
    assert {name: features.manifest[name] for name in ("separator", "context_length", "exclude_tokens")} == {
        "separator": "none", "context_length": 24, "exclude_tokens": [str(often)]
    }  # fmt: skip


def test_evaluation_restores_the_mode_and_refuses(lm):
    sae = se.SparseAutoencoder(256, 64, se.BatchTopK(4)).train()
    with pytest.raises(RuntimeError, match="threshold"):
        evaluate(sae, lm, evaluation_text(), layer=2, max_tokens=100)
    assert sae.training and sae.activation.training
    good = identity(256)
    for change, error, match in [
        ({"layer": 7}, ValueError, "layer must be in"),
        ({"site": "hook_nowhere"}, ValueError, "site must be one of"),
        ({"normalize": "unit"}, ValueError, "normalize must be one of"),
        ({"max_tokens": 0}, ValueError, "max_tokens"),
        ({"sae": se.SparseAutoencoder(128, 64, se.ReLU())}, ValueError, "d_in = 256, the width of 'embedded' at"),
        ({"sae": torch.nn.Linear(256, 256)}, TypeError, "SparseAutoencoder"),
        ({"sae": se.SparseAutoencoder(256, 64, se.GradientTopK(4))}, TypeError, "attribution"),
        ({"texts": []}, RuntimeError, "no token"),
        ({"texts": "one string"}, TypeError, "texts"),
    ]:
        arguments = {"sae": good, "lm": lm, "texts": evaluation_text(), "layer": 2, "max_tokens": 50, **change}
        with pytest.raises(error, match=match):
            evaluate(arguments.pop("sae"), arguments.pop("lm"), arguments.pop("texts"), **arguments)
    with pytest.raises(ValueError, match="rise"):
        ppl_sparsity(good, lm, evaluation_text(), layer=2, rise=0)


# --- beside SAELens' own evaluation --------------------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.no_poison  # SAELens makes its modules with torch.empty
@pytest.mark.parametrize("rule", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("first_too", [True, False])
@pytest.mark.filterwarnings("default")
def test_saelens_measures_the_same(lm, tmp_path, rule, first_too):
    """The same autoencoder, model and contexts: every number that both report, under the names that each gives it."""
    evals = pytest.importorskip("sae_lens.evals", reason="the comparison needs sae-lens")
    from sae_lens import SAE
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activation_scaler import ActivationScaler

    torch.manual_seed(4)
    activation = {"relu": se.ReLU(), "topk": se.TopK(8), "jumprelu": se.JumpReLU(512, threshold=0.5)}[rule]
    ours = se.SparseAutoencoder(256, 512, activation)
    with torch.no_grad():
        ours.b_dec.normal_()
        ours.b_enc.normal_(std=0.1)
    ours.save_pretrained(tmp_path)
    theirs = SAE.load_from_disk(tmp_path)
    hook = theirs.cfg.metadata.hook_name = "transformer.h.1"  # what leaves block 1

    text = evaluation_text()[0]  # one document, so that the beginning of the context is the only special token
    every = next(context_batches(lm, [text], 128, 6))

    class Store:
        context_size, store_batch_size_prompts, given = 128, 3, 0

        def reset_input_dataset(self):
            self.given = 0

        def get_batch_tokens(self, count):
            self.given += count
            return every[self.given - count : self.given]

    config = evals.get_eval_everything_config(
        batch_size_prompts=3, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2
    )
    model = HookedProxyLM(lm.model, lm.tokenizer, hook_names=[hook])
    special = [] if first_too else [lm.tokenizer.bos_token_id]
    expected, per_latent = evals.run_evals(
        theirs, Store(), model, ActivationScaler(), config, exclude_special_tokens=special
    )
    found = evaluate(
        ours, lm, [text], layer=1, site="resid_post", context_length=128, batch_size=3, drop_first=not first_too,
        max_tokens=6 * (127 + first_too),
    )  # fmt: skip
    quality, shrinkage = expected["reconstruction_quality"], expected["shrinkage"]
    performance, behaviour = expected["model_performance_preservation"], expected["model_behavior_preservation"]
    reconstruction, language = found["reconstruction"], found["language"]
    pairs = {
        "mse": (reconstruction["squared_error"], quality["mse"]),
        "explained_variance": (reconstruction["explained_variance"], quality["explained_variance"]),
        "cossim": (reconstruction["cosine"], quality["cossim"]),
        "l2_ratio": (reconstruction["l2_ratio"], shrinkage["l2_ratio"]),
        "l0": (found["sparsity"]["l0"], expected["sparsity"]["l0"]),
        "ce_loss_without_sae": (language["ce_clean"], performance["ce_loss_without_sae"]),
        "ce_loss_with_sae": (language["ce_spliced"], performance["ce_loss_with_sae"]),
        "kl_div_with_sae": (language["kl_spliced"], behaviour["kl_div_with_sae"]),
    }
    if first_too:  # otherwise theirs ablates the first position too, ours leaves it
        pairs |= {
            "ce_loss_with_ablation": (language["ce_ablated"], performance["ce_loss_with_ablation"]),
            "ce_loss_score": (language["loss_recovered"], performance["ce_loss_score"]),
            "kl_div_with_ablation": (language["kl_ablated"], behaviour["kl_div_with_ablation"]),
        }
    for name, (mine, other) in pairs.items():
        # Theirs: fp32 means of fp32 terms, through fp32 GEMMs of another order. 2^-13 is 1e3 fp32 roundings.
        assert mine == pytest.approx(other, rel=2**-13), name
    densities = torch.tensor(per_latent["feature_density"])
    assert found["sparsity"]["dead"] == int((densities == 0).sum())
    assert found["sparsity"]["dense"] == int((densities > 0.1).sum())
