"""Where an autoencoder belongs: from the store into the autoencoder, into its files and back."""

import copy
import json
from dataclasses import replace

import pytest
import torch

import sae_engine as se
from sae_engine.checkpoints.convert import convert
from sae_engine.data import EMBEDDED_FOLDER, collect_activations, load_language_model, weights_sha256

PLACE = se.Provenance(
    model="openai-community/gpt2", revision="607a30d", layer=8, site="resid_pre", d=16, normalize="none",
    dtype="float16", tokenizer="openai-community/gpt2", text="a text", context_length=128, separator="eos",
    first_token="bos", excluded=("first", "50256"),
)  # fmt: skip
# The formats whose files can hold more than weights.
DESCRIBED = ("saelens", "sparsify", "dictionary_learning", "batchtopk")


def test_from_the_store_into_the_autoencoder(tmp_path):
    store = collect_activations(
        load_language_model(), ["A text."], tmp_path, layer=1, site="mlp_out", text_source="two words", progress=False
    )
    sae = se.SparseAutoencoder(store.d_model, 64, se.TopK(2))
    assert sae.provenance is None
    sae.provenance = store.provenance
    assert sae.provenance == se.Provenance(
        model="embedded", sha256=weights_sha256(EMBEDDED_FOLDER), layer=1, site="mlp_out", d=256, normalize="none",
        model_dtype="float32", dtype="float16", tokenizer="embedded", text="two words", context_length=256,
        separator="eos", first_token="bos", excluded=("first",),
    )  # fmt: skip


@pytest.mark.parametrize("format", DESCRIBED)
def test_every_file_that_can_hold_it_does(format, tmp_path):
    sae = se.SparseAutoencoder(16, 64, se.TopK(2))
    sae.provenance = PLACE
    sae.save_pretrained(tmp_path, format)
    assert se.SparseAutoencoder.from_pretrained(tmp_path).provenance == PLACE


def test_a_card_names_the_model_that_was_said_since(tmp_path):
    """As of activations in memory, which do not say theirs when they are trained on."""
    se.SparseAutoencoder(16, 64, se.TopK(2)).save_pretrained(tmp_path / "trained")
    sae = se.SparseAutoencoder.from_pretrained(tmp_path / "trained")
    assert "not said" in str(sae.card)
    sae.provenance = PLACE
    sae.save_pretrained(tmp_path / "said")
    card = se.SparseAutoencoder.from_pretrained(tmp_path / "said").card
    assert card == replace(sae.card, model_name=PLACE.model)


@pytest.mark.parametrize("format", ["saelens", "gemma_scope_2"])
def test_targets_of_transcoders_are_kept(format, tmp_path):
    sae = se.SparseAutoencoder(16, 64, se.JumpReLU(64), d_out=8)
    sae.provenance = replace(PLACE, site="mlp_in", target_layer=9, target_site="mlp_out", d_target=8)
    sae.save_pretrained(tmp_path, format)
    assert se.SparseAutoencoder.from_pretrained(tmp_path).provenance == sae.provenance


def edited(folder, name, change):
    cfg = json.loads((folder / name).read_text())
    change(cfg)
    (folder / name).write_text(json.dumps(cfg))
    return se.SparseAutoencoder.from_pretrained(folder).provenance


def test_what_somebody_wrote_into_the_formats_own_fields_wins(tmp_path):
    """Their library reads those: they may have been edited, or the files renamed, since we wrote them."""
    sae = se.SparseAutoencoder(16, 64, se.TopK(2))
    sae.provenance = PLACE
    sae.save_pretrained(tmp_path)
    hook = edited(tmp_path, "cfg.json", lambda cfg: cfg["metadata"].update(hook_name="blocks.3.hook_mlp_out"))
    assert hook == replace(PLACE, layer=3, site="mlp_out")
    model = edited(tmp_path, "cfg.json", lambda cfg: cfg["metadata"].update(model_name="gpt2-xl"))
    assert model == replace(hook, model="gpt2-xl", revision=None)
    odd = edited(tmp_path, "cfg.json", lambda cfg: cfg["metadata"].update(hook_name="my.place"))
    assert (odd.layer, odd.site) == (None, "my.place")  # and not what it was before
    assert edited(tmp_path, "cfg.json", lambda cfg: cfg.pop("metadata")) is None


@pytest.mark.parametrize(
    ("format", "name", "change", "expected"),
    [
        ("saelens", "cfg.json", lambda cfg: (cfg.pop("metadata"), cfg.update(
            hook_name="blocks.8.hook_resid_pre", model_name="gpt2-small", context_size=128)),
         {"model": "gpt2-small", "layer": 8, "site": "resid_pre", "context_length": 128}),
        ("saelens", "cfg.json", lambda cfg: (cfg.pop("metadata"), cfg.pop("architecture"), cfg.update(
            hook_point="blocks.8.hook_resid_pre", activation_fn_str="topk", activation_fn_kwargs={"k": 2})),
         {"layer": 8, "site": "resid_pre"}),
        ("saelens", "cfg.json", lambda cfg: cfg.update(metadata={
            "hook_name": "blocks.1.hook_resid_pre", "prepend_bos": True, "sequence_separator_token": "bos"}),
         {"layer": 1, "site": "resid_pre", "first_token": "bos", "separator": "bos"}),
        ("saelens", "cfg.json", lambda cfg: cfg.update(metadata={
            "hook_name": "blocks.1.hook_resid_pre", "prepend_bos": False, "sequence_separator_token": None}),
         {"layer": 1, "site": "resid_pre", "first_token": "none", "separator": "none"}),
        ("saelens", "cfg.json", lambda cfg: cfg.update(metadata={
            "hook_name": "blocks.1.hook_resid_pre", "sequence_separator_token": 50256}),
         {"layer": 1, "site": "resid_pre", "separator": "50256"}),
        ("saelens", "cfg.json", lambda cfg: cfg.update(metadata={"hook_name": "transformer.h.1"}),
         {"layer": 1, "site": "resid_post"}),
        ("dictionary_learning", "config.json", lambda cfg: cfg.update(sae_engine=None, trainer=cfg["trainer"] | {
            "lm_name": "EleutherAI/pythia-70m", "layer": 3, "submodule_name": "resid_post_layer_3"}),
         {"model": "EleutherAI/pythia-70m", "layer": 3, "site": "resid_post"}),
        ("dictionary_learning", "config.json", lambda cfg: cfg.update(sae_engine=None, trainer=cfg["trainer"] | {
            "lm_name": "EleutherAI/pythia-70m", "layer": 3}),
         {"model": "EleutherAI/pythia-70m", "layer": 3}),
        ("batchtopk", "config.json", lambda cfg: cfg.update(model_name="gpt2-small", layer=8,
                                                            hook_point="blocks.8.hook_resid_pre"),
         {"model": "gpt2-small", "layer": 8, "site": "resid_pre"}),
    ],
    ids=["version 5", "version 3", "version 6", "no separator", "separator by id", "module", "submodule", "layer",
         "hook_point"],
)  # fmt: skip
def test_what_other_libraries_wrote(format, name, change, expected, tmp_path):
    se.SparseAutoencoder(16, 64, se.TopK(2)).save_pretrained(tmp_path, format)
    assert edited(tmp_path, name, change) == se.Provenance(**expected)
    again = se.SparseAutoencoder.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again", format)  # into the same words, which alone say it to their library
    own = {"saelens": lambda cfg: cfg["metadata"].pop("sae_engine")}.get(format, lambda cfg: cfg.pop("sae_engine"))
    assert edited(tmp_path / "again", name, own) == again.provenance


@pytest.mark.parametrize(
    ("format", "place", "options", "expected"),
    [
        ("openai", "gpt2-small/resid_delta_mlp_v5_32k/autoencoders/8.pt", {"normalize_activations": "layer_norm"},
         {"model": "openai-community/gpt2", "layer": 8, "site": "mlp_out"}),
        ("openai", "8.pt", {"normalize_activations": "layer_norm"}, {"layer": 8}),
        ("sparsify", "layers.3.mlp", {}, {"layer": 3, "site": "mlp"}),
        ("sparsify", "h.3", {"apply_b_dec_to_input": False}, {"layer": 3, "site": "resid_pre", "target_layer": 3,
                                                             "target_site": "resid_post"}),
        ("sparsify", "best", {"apply_b_dec_to_input": False}, {"target_site": "unknown"}),
        ("gemma_scope", "models--google--gemma-scope-9b-it-res/snapshots/0a/layer_20/width_16k/average_l0_71", {},
         {"model": "google/gemma-2-9b-it", "layer": 20, "site": "resid_post"}),
        ("gemma_scope", "layer_20", {}, None),
    ],
    ids=["openai", "layer", "hookpoint", "transcoder", "unnamed", "gemma_scope", "no release"],
)  # fmt: skip
def test_what_the_names_of_released_files_say(format, place, options, expected, tmp_path):
    rule = se.JumpReLU(64) if format == "gemma_scope" else se.TopK(2)
    sae = se.SparseAutoencoder(16, 64, rule, **options)
    sae.save_pretrained(tmp_path / place, format)
    wanted = None if expected is None else se.Provenance(**expected)
    assert se.SparseAutoencoder.from_pretrained(tmp_path / place).provenance == wanted


def test_another_form_of_it_belongs_where_it_did(tmp_path):
    sae = se.SparseAutoencoder(16, 64, se.BatchTopK(2))
    sae.provenance = PLACE
    sae(torch.randn(32, 16))
    assert se.inference_form(sae).provenance == copy.deepcopy(sae).provenance == PLACE
    sae.save_pretrained(tmp_path / "first", "dictionary_learning")
    convert(tmp_path / "first", tmp_path / "second", to="saelens", inference=True)
    assert se.SparseAutoencoder.from_pretrained(tmp_path / "second").provenance == PLACE
    metadata = json.loads((tmp_path / "second" / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == (PLACE.model, "blocks.8.hook_resid_pre")


def test_what_is_no_provenance_of_this_autoencoder():
    sae = se.SparseAutoencoder(16, 64, se.TopK(2))
    with pytest.raises(TypeError, match="provenance must be a Provenance or None, got dict"):
        sae.provenance = PLACE.to_dict()
    with pytest.raises(ValueError, match="provenance has d = 768, the autoencoder 16"):
        sae.provenance = replace(PLACE, d=768)
    for changed, message in (({"layer": "8"}, "layer must be an int"), ({"layer": -1}, "layer must be at least 0"),
                             ({"model": 3}, "model must be a string"), ({"excluded": "bos"}, "excluded must be")):
        with pytest.raises((TypeError, ValueError), match=message):
            replace(PLACE, **changed)
    assert se.Provenance.from_dict(PLACE.to_dict() | {"of_a_later_version": 1}) == PLACE
    assert se.Provenance.from_dict([1]) is None
