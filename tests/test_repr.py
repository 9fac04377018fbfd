"""What is printed first: a line or three that say what a thing is, and wait for no device."""
import pytest
import torch
from played_cuda import Played

import sae_engine as se
from sae_engine import losses
from sae_engine.losses import Loss
from sae_engine.training import CapturedStep, TrainStep

RULES = {
    "TopK(k=3)": lambda: se.TopK(3), "AuxTopK(k=3, relu=False)": lambda: se.AuxTopK(3, relu=False),
    "ReLU()": se.ReLU, "BatchTopK(k=2.5)": lambda: se.BatchTopK(2.5),
    "BatchTopK(k=2, threshold_lr=0.5, initial_threshold=0)": lambda: se.BatchTopK(
        2, threshold_lr=0.5, initial_threshold=0),
    "MatryoshkaBatchTopK(k=2, widths=(4, 9), threshold_start=3)": lambda: se.MatryoshkaBatchTopK(
        2, (4, 9), threshold_start=3),
    "JumpReLU(d_sae=9, bandwidth=0.1)": lambda: se.JumpReLU(9, bandwidth=0.1),
    "LogJumpReLU(d_sae=9)": lambda: se.LogJumpReLU(9), "Gated(d_sae=9)": lambda: se.Gated(9),
    "GateOf()": lambda: se.Gated(9).gate, "TopAFA(capacity=90)": lambda: se.TopAFA(capacity=90),
    "FeatureChoice(d_sae=9, k=2, budgets='uniform')": lambda: se.FeatureChoice(9, 2, budgets="uniform"),
    "SampledTopK(k=2, score='entropy')": lambda: se.SampledTopK(2, score="entropy"),
    "GradientTopK(k=2, beta=0.5)": lambda: se.GradientTopK(2, beta=0.5),
    "AuxZipfTopK(k=2)": lambda: se.AuxZipfTopK(2, shortfall=torch.ones(9)),
}  # fmt: skip


@pytest.mark.parametrize("text", RULES)
def test_rules_show_their_options(text):
    assert repr(RULES[text]()) == text


def test_autoencoders():
    sae = se.SparseAutoencoder(6, 9, se.TopK(3))
    assert repr(sae) == (
        "SparseAutoencoder(\n  d_in=6, d_sae=9, dtype=torch.float32, device=cpu\n  (activation): TopK(k=3)\n)")
    sae = se.SparseAutoencoder(6, 9, se.TopK(3), d_out=5, skip=True, rescale_acts_by_decoder_norm=True)
    assert "d_in=6, d_sae=9, d_out=5, skip=True, rescale_acts_by_decoder_norm=True, dtype" in repr(sae)
    sae = se.SparseAutoencoder(6, 9, se.TopK(3), apply_b_dec_to_input=False, normalize_activations="layer_norm")
    assert "apply_b_dec_to_input=False, normalize_activations='layer_norm'" in repr(sae)


def test_steps_count_their_calls():
    class Own(Loss):
        name = "own"

        def value(self, batch):
            return batch.output.sum()

    step = TrainStep(se.SparseAutoencoder(6, 9, se.TopK(3)), lr=1e-3, losses=[losses.L1(0.5), Own()])
    step(torch.randn(4, 6))
    text = repr(step)
    assert text.startswith("TrainStep(TopK(k=3), losses=[")
    assert text.endswith("L1(coefficient=0.5), Own()], lr=0.001, compute_dtype=torch.float32, calls=1)")
    assert " object at " not in text


def test_nothing_is_read_of_a_device():
    if torch.cuda.is_available():
        pytest.skip("played here; test_waits asks a real device about codes")
    with Played() as played, torch.device("cuda"):
        sae = se.SparseAutoencoder(6, 9, se.LogJumpReLU(9))
        step = TrainStep(sae, lr=1e-3, losses=losses.TanhL0(0.5))
        captured = CapturedStep(step)
        with played.refusing():
            assert "lr=<on cuda:0>" in repr(step) and repr(captured) == f"CapturedStep({step!r}, captured=False)"
            assert "device=cuda:0" in repr(sae)


def test_a_language_model_is_a_line():
    pytest.importorskip("transformers")
    from sae_engine.data import load_language_model

    text = repr(load_language_model())
    assert text.startswith("LanguageModel(name='embedded'") and "\n" not in text and len(text) < 200
