"""NumPy's numbers and the names of dtypes are taken wherever a number or a dtype is; booleans are no numbers."""
import re

import numpy as np
import pytest
import torch

import sae_engine as se
from sae_engine import functional as f
from sae_engine import losses, metrics
from sae_engine.data import ActivationStore, collect_activations, load_language_model, stream_activations
from sae_engine.training import TrainStep, peak_bytes

B, D, F = 4, 8, 20


def built(rule, **options):
    return se.SparseAutoencoder(D, F, rule, **options)


# Each takes a converter of integers and one of floats, and gives something that Python's own numbers give as well.
ENTRY_POINTS = {
    "topk": lambda i, x: f.topk(pre(), i(3)).to_dense(),
    "batch_topk": lambda i, x: f.batch_topk(pre(), x(2.5)).to_dense(),
    "batch_topk, int": lambda i, x: f.batch_topk(pre(), i(2)).to_dense(),
    "feature_topm": lambda i, x: f.feature_topm(pre(), i(2)).to_dense(),
    "feature_topm, total": lambda i, x: f.feature_topm(
        pre(), torch.full((F,), 2), total=i(2 * F)).to_dense(),
    "feature_budgets": lambda i, x: f.feature_budgets(torch.rand(F), i(30), i(B), exponent=x(0.5), shift=i(1)),
    "zipf_shortfall": lambda i, x: f.zipf_shortfall(torch.rand(F), i(3), exponent=x(0.5)),
    "norm_match": lambda i, x: f.norm_match(pre(), torch.ones(B), capacity=i(60)).to_dense(),
    "energy_share": lambda i, x: f.energy_share(pre(), x(0.5), capacity=i(60)).to_dense(),
    "threshold": lambda i, x: f.threshold(pre(), x(0.25), bandwidth=x(0.5), capacity=i(90)).to_dense(),
    "decode_prefixes": lambda i, x: f.decode_prefixes(
        f.topk(pre(), 3), torch.rand(F, D), widths=(i(4), i(F))),
    "SparseDecoder": lambda i, x: se.SparseDecoder(i(F), i(D)).W_dec,
    "SparseAutoencoder": lambda i, x: se.SparseAutoencoder(
        i(D), i(F), se.TopK(i(3)), d_out=i(5), decoder_init_norm=x(0.5)).W_dec,
    "AuxTopK": lambda i, x: se.AuxTopK(i(3))(pre(), dead_mask=torch.rand(F) < 0.5),
    "BatchTopK": lambda i, x: se.BatchTopK(
        x(2.5), threshold_lr=x(0.5), threshold_start=i(1), initial_threshold=x(0.0))(pre()),
    "MatryoshkaBatchTopK": lambda i, x: se.MatryoshkaBatchTopK(i(2), [i(4), i(F)])(pre()),
    "FeatureChoice": lambda i, x: se.FeatureChoice(
        i(F), i(2), exponent=x(0.5), shift=i(0), mutual_steps=i(1), density_lr=x(0.5))(pre()),
    "SampledTopK": lambda i, x: se.SampledTopK(i(2), pool=x(2.0))(pre()),
    "StatisticalTopK": lambda i, x: se.StatisticalTopK(x(2.5))(pre()),
    "GradientTopK": lambda i, x: se.GradientTopK(i(2), beta=x(0.5))(pre(), attribution=torch.ones(B, F)),
    "JumpReLU": lambda i, x: se.JumpReLU(i(F), threshold=x(0.25), bandwidth=x(0.5))(pre()),
    "LogJumpReLU": lambda i, x: se.LogJumpReLU(i(F), threshold=x(0.25), bandwidth=x(0.5))(pre()),
    "Gated": lambda i, x: se.Gated(i(F))(pre()),
    "TopAFA": lambda i, x: built(se.TopAFA(capacity=i(60), target_scale=x(0.5)))(torch.randn(B, D)),
    "init_firing": lambda i, x: se.init_firing(built(se.JumpReLU(F)), torch.randn(B, D), i(4)).b_enc,
    "init_sparse": lambda i, x: se.init_sparse(built(se.TopAFA()), i(4)).W_enc,
    "RunningDensity": lambda i, x: updated(se.RunningDensity(i(F), rate=x(0.5))).density,
    "losses.evaluate": lambda i, x: losses.evaluate(
        built(se.TopK(2)), torch.randn(B, D),
        [losses.AuxK(k=i(3), coefficient=x(0.5)), losses.MultiTopK(factor=i(2), coefficient=x(0.5)),
         losses.AFA(x(0.5)), losses.L1(x(0.5)), losses.NestedReconstruction((i(4), i(F)))],
        dead=torch.ones(F, dtype=torch.bool))["loss"],
    "TrainStep": lambda i, x: TrainStep(
        built(se.TopK(2)), lr=x(0.125), grad_clip=x(1.0), accumulate=i(1), dead_after=i(10), memory_budget=i(10**6),
        density_interval=i(3))(torch.randn(B, D))["loss"],
    "peak_bytes": lambda i, x: torch.tensor(peak_bytes(i(B), i(D), i(F), i(3), memory_budget=i(10**6), k_aux=i(2))),
    "metrics": lambda i, x: metrics.decoder_cosines(torch.randn(F, D), block=i(7)),
}  # fmt: skip


def pre():
    return torch.randn(B, F)


def updated(density):
    density.update(f.topk(pre(), 3))
    return density


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_numpy_numbers_are_numbers(name):
    found = []
    for integer, number in ((int, float), (np.int64, np.float32), (np.uint8, np.float64)):
        if integer is np.uint8 and name in ("TrainStep", "peak_bytes"):
            integer = np.int32
        torch.manual_seed(0)
        found.append(ENTRY_POINTS[name](integer, number))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_rules_hold_python_numbers(tmp_path):
    """So that they are written into checkpoints, and into reports, as any other."""
    rule = se.BatchTopK(np.int64(3), threshold_lr=np.float32(0.5), initial_threshold=np.float64(0.25))
    assert [type(v) for v in (rule.k, rule.threshold_lr, rule.initial_threshold)] == [int, float, float]
    built(rule).save_pretrained(tmp_path)
    again = se.SparseAutoencoder.from_pretrained(tmp_path, dtype="float64")
    assert again.activation.options() == rule.options() and again.W_dec.dtype == torch.float64
    loss = losses.AuxK(k=np.int64(3), coefficient=np.float32(0.5))
    assert repr(loss) == repr(losses.AuxK(k=3, coefficient=0.5))


@pytest.mark.parametrize("make", [
    lambda v: f.topk(pre(), v), lambda v: f.batch_topk(pre(), v), lambda v: f.feature_topm(pre(), v),
    lambda v: f.threshold(pre(), v), lambda v: f.threshold(pre(), 0.0, capacity=v), lambda v: se.TopK(v),
    lambda v: se.BatchTopK(2, threshold_start=v), lambda v: se.BatchTopK(2, initial_threshold=v),
    lambda v: se.JumpReLU(F, threshold=v), lambda v: se.SparseAutoencoder(v, F, se.TopK(2)), lambda v: losses.L1(v),
    lambda v: losses.AuxK(k=v), lambda v: se.MatryoshkaBatchTopK(2, (v, F)),
    lambda v: f.feature_budgets(torch.rand(F), v, B),
])  # fmt: skip
@pytest.mark.parametrize("value", [True, np.True_, "3", 1j, [3]], ids=repr)
def test_what_is_no_number_is_refused(make, value):
    with pytest.raises(TypeError, match=r"must (be|hold)"):
        make(value)


def test_dtypes_by_name():
    assert built(se.TopK(2), dtype="float64").W_dec.dtype == torch.float64
    assert se.SparseDecoder(F, D, dtype="torch.bfloat16").W_dec.dtype == torch.bfloat16
    step = TrainStep(built(se.TopK(2)), lr=1e-3, compute_dtype="bfloat16")
    assert step.compute_dtype == torch.bfloat16
    sizes = {"memory_budget": 10**6, "k_aux": 2}
    assert peak_bytes(B, D, F, 3, compute_dtype="bfloat16", **sizes) == peak_bytes(
        B, D, F, 3, compute_dtype=torch.bfloat16, **sizes)  # fmt: skip


@pytest.mark.parametrize(("value", "error"), [
    ("bf16", ValueError), ("int8", ValueError), ("nn", ValueError), (torch.int8, TypeError), (np.float32, TypeError),
    (32, TypeError), (True, TypeError),
])  # fmt: skip
def test_other_dtypes_are_refused(value, error, tmp_path):
    for name, make in {
        "dtype": lambda: built(se.TopK(2), dtype=value), "compute_dtype": lambda: TrainStep(
            built(se.TopK(2)), lr=1e-3, compute_dtype=value),
    }.items():  # fmt: skip
        with pytest.raises(error, match=re.escape(f"{name} must be float32, bfloat16")):
            make()
    with pytest.raises(error, match="dtype must be"):
        se.SparseAutoencoder.from_pretrained(tmp_path, dtype=value)


def test_activations_take_them_too(tmp_path):
    pytest.importorskip("transformers")
    lm = load_language_model(dtype="float32")
    texts = ["one two three four five six seven eight nine ten"] * 4
    whole = {"layer": 1, "context_length": 8, "batch_size": 2, "max_tokens": 9}
    options = {name: np.int64(number) for name, number in whole.items()}
    streamed = torch.cat(list(stream_activations(lm, texts, dtype="bfloat16", **options)))
    store = collect_activations(
        lm, texts, tmp_path, dtype="bfloat16", shard_tokens=np.int64(5), progress=False, **options)  # fmt: skip
    assert store.dtype == torch.bfloat16 and torch.equal(store.tensor("float32"), streamed.float())
    again = ActivationStore(tmp_path).batches(np.int64(4), shuffle=False, seed=np.int64(1), dtype="float32")
    assert torch.equal(torch.cat(list(again)), streamed.float())
