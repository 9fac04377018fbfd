"""Where an autoencoder belongs: from the store into the autoencoder, into its files and back."""

from dataclasses import replace

import pytest

import sae_engine as se
from sae_engine.data import EMBEDDED_FOLDER, collect_activations, load_language_model, weights_sha256

PLACE = se.Provenance(
    model="openai-community/gpt2", revision="607a30d", layer=8, site="resid_pre", d=16, normalize="none",
    dtype="float16", tokenizer="openai-community/gpt2", text="a text", context_length=128, separator="eos",
    excluded=("first", "50256"),
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
        separator="eos", excluded=("first",),
    )  # fmt: skip


@pytest.mark.parametrize("format", DESCRIBED)
def test_every_file_that_can_hold_it_does(format, tmp_path):
    sae = se.SparseAutoencoder(16, 64, se.TopK(2))
    sae.provenance = PLACE
    sae.save_pretrained(tmp_path, format)
    assert se.SparseAutoencoder.from_pretrained(tmp_path).provenance == PLACE


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
