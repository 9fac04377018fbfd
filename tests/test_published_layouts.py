"""Layouts that are read and not written: Llama Scope's, and circuit-tracer's transcoder sets."""

import json

import pytest
import torch
from checkpoint_cases import B, D, F, write, write_circuit_tracer, write_llama_scope

import sae_engine as se
from sae_engine.checkpoints import formats
from sae_engine.testing import assert_same

SCALE = D**0.5 / 6.3125
CLOSE = {"rtol": 0, "atol": F * 40 * 2**-23}  # of sums of at most F fp32 products below 40, taken in two orders


@pytest.fixture
def x():
    return torch.randn(B, D) * 2


def llama_scope(weights, x, norms=1.0):
    """What their training computes of ``x``: latents, and the reconstruction."""
    pre = torch.nn.functional.linear(x * SCALE, weights["encoder.weight"], weights["encoder.bias"])
    kept = torch.where(pre * norms / SCALE > 0.203125, pre, 0.0)
    return kept, torch.nn.functional.linear(kept, weights["decoder.weight"], weights["decoder.bias"]) / SCALE


def test_llama_scope(tmp_path, x):
    weights = write_llama_scope(tmp_path)
    assert formats.detect(tmp_path) == "llama_scope"
    sae = se.SparseAutoencoder.from_pretrained(tmp_path).eval()
    latents, out = llama_scope(weights, x)
    assert type(sae.activation) is se.JumpReLU and sae.provenance == se.Provenance(layer=8, site="resid_post")
    torch.testing.assert_close(sae.encode(x).to_dense(), latents, **CLOSE)
    torch.testing.assert_close(sae(x), out, **CLOSE)
    file = se.SparseAutoencoder.from_pretrained(tmp_path / "checkpoints" / "final.safetensors")
    assert_same(file.W_enc.detach(), sae.W_enc.detach())
    sae.save_pretrained(tmp_path / "again")
    assert_same(se.SparseAutoencoder.from_pretrained(tmp_path / "again").eval()(x), sae(x))


def test_llama_scope_that_says_one_norm_alone(tmp_path, x):
    write_llama_scope(tmp_path / "one", dataset_average_activation_norm={"in": 6.3125})
    write_llama_scope(tmp_path / "both")
    one, both = (se.SparseAutoencoder.from_pretrained(tmp_path / name).eval() for name in ("one", "both"))
    assert_same(one(x), both(x))


def test_llama_scope_with_decoder_rows_of_any_length(tmp_path, x):
    """The threshold counts them, so latents are as large as what they add."""
    weights = write_llama_scope(tmp_path, unit=False)
    norms = weights["decoder.weight"].norm(dim=0)
    latents, out = llama_scope(weights, x, norms)
    sae = se.SparseAutoencoder.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(sae.encode(x).to_dense(), latents * norms, **CLOSE)
    torch.testing.assert_close(sae(x), out, **CLOSE)


@pytest.mark.parametrize("unit", [True, False])
def test_llama_scope_transcoder(unit, tmp_path, x):
    """By what its latents add to the output as it is, in fp64."""
    norm_in, norm_out, threshold = 2.75, 0.8125, 0.40625
    weights = {name: t.double() for name, t in write_llama_scope(
        tmp_path, unit=unit, hook_point_in="blocks.8.ln2.hook_normalized", hook_point_out="blocks.8.hook_mlp_out",
        dataset_average_activation_norm={"in": norm_in, "out": norm_out}, jump_relu_threshold=threshold,
    ).items()}  # fmt: skip
    directions = weights["decoder.weight"] / weights["decoder.weight"].norm(dim=0)
    pre = x.double() * (D**0.5 / norm_in) @ weights["encoder.weight"].T + weights["encoder.bias"]
    adds = pre * weights["decoder.weight"].norm(dim=0) * (norm_out / D**0.5)
    adds = torch.where(adds > threshold, adds, 0.0)
    out = adds @ directions.T + weights["decoder.bias"] * (norm_out / D**0.5)
    sae = se.SparseAutoencoder.from_pretrained(tmp_path).eval()
    assert 0.1 < (adds > 0).double().mean() < 0.9
    assert torch.equal(sae.encode(x).to_dense() > 0, adds > 0)
    torch.testing.assert_close(sae(x).double(), out, **CLOSE)
    place = se.Provenance(layer=8, site="ln2.hook_normalized", target_layer=8, target_site="mlp_out")
    assert sae.provenance == place
    sae.save_pretrained(tmp_path / "again")
    assert_same(se.SparseAutoencoder.from_pretrained(tmp_path / "again").eval()(x), sae(x))


def test_llama_scope_in_16_bits_is_not_normalized_anew(tmp_path):
    """Rows that 16-bit numbers cannot bring nearer to length 1 are of length 1."""
    weights = write_llama_scope(tmp_path, dtype=torch.bfloat16, norm_activation="inference")
    sae = se.SparseAutoencoder.from_pretrained(tmp_path)
    assert_same(sae.W_dec.detach(), weights["decoder.weight"].T.contiguous())


@pytest.mark.parametrize(("changes", "message"), [
    ({"hook_point_out": "blocks.8.mlp", "sparsity_include_decoder_norm": False}, "a transcoder, from blocks.8"),
    ({"hook_point_out": "blocks.8.mlp", "apply_decoder_bias_to_pre_encoder": True}, "what it means is not known"),
    ({"dataset_average_activation_norm": {"in": 64.0, "out": 3.4}}, "norms in and out differ"),
    ({"dataset_average_activation_norm": None}, "activation_norm.in must be a positive number, got None"),
    ({"act_fn": "topk"}, "act_fn must be 'jumprelu' to be read, got 'topk'"),
    ({"norm_activation": "token-wise"}, "norm_activation must be 'dataset-wise' or 'inference' to be read"),
    ({"jump_relu_threshold": -1.0}, "jump_relu_threshold must be a positive number, got -1.0"),
    ({"d_model": D + 1}, "encoder.weight must have shape"),
])  # fmt: skip
def test_llama_scope_that_is_not_read(changes, message, tmp_path):
    write_llama_scope(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        se.SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [
    {}, {"skip": True}, {"threshold": True}, {"threshold": True, "skip": True}, {"activation": "relu"},
], ids=str)  # fmt: skip
def test_circuit_tracer(options, tmp_path, x):
    weights = write_circuit_tracer(tmp_path, **options)
    assert formats.detect(tmp_path) == "circuit_tracer"
    sae = se.SparseAutoencoder.from_pretrained(tmp_path / "layer_3.safetensors").eval()
    pre = x @ weights["W_enc"].T + weights["b_enc"]
    latents = pre.relu()
    if options.get("threshold"):
        latents = torch.where(pre > weights["activation_function.threshold"], pre, 0.0)
    out = latents @ weights["W_dec"] + weights["b_dec"]
    if options.get("skip"):
        out = out + x @ weights["W_skip"].T
    torch.testing.assert_close(sae.encode(x).to_dense(), latents, **CLOSE)
    torch.testing.assert_close(sae(x), out, **CLOSE)
    assert sae.provenance == se.Provenance(
        model="Qwen/Qwen3-0.6B", layer=3, site="mlp_in", target_layer=3, target_site="mlp_out"
    )


def test_circuit_tracer_with_the_settings_of_weights_and_biases_alone(tmp_path):
    write_circuit_tracer(tmp_path)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "wandb-config.yaml").write_text(f"wandb_version: 1\nd_model:\n  value: {D}\nd_feature:\n  value: {F}\n")
    sae = se.SparseAutoencoder.from_pretrained(tmp_path)
    assert type(sae.activation) is se.ReLU
    assert sae.provenance == se.Provenance(layer=3, target_site="unknown")


def test_a_set_of_transcoders_asks_for_one(tmp_path):
    for layer in (0, 1):
        write_circuit_tracer(tmp_path, layer)
    with pytest.raises(ValueError, match=r"several checkpoints .*'layer_1.safetensors'\]: name one"):
        se.SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"activation": "topk", "k": 5}, "activation 'topk' keeps negative pre-activations too"),
    ({"activation": "gelu"}, "activation 'gelu' is not that of weights without thresholds"),
    ({"activation": "relu", "threshold": True}, "activation 'relu' is not that of weights with thresholds"),
])  # fmt: skip
def test_circuit_tracer_that_is_not_read(changes, message, tmp_path):
    write_circuit_tracer(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        se.SparseAutoencoder.from_pretrained(tmp_path)


def test_thresholds_without_a_configuration(tmp_path):
    write_circuit_tracer(tmp_path, threshold=True)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.yaml is missing: layer_3.* 'circuit_tracer'"):
        se.SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["a: [", "- a", "name: 1\n"])
def test_a_yaml_file_beside_another_checkpoint_is_in_nobodys_way(content, tmp_path):
    sae = write("saelens", tmp_path)
    (tmp_path / "config.yaml").write_text(content)
    assert_same(se.SparseAutoencoder.from_pretrained(tmp_path).W_enc.detach(), sae.W_enc.detach())


def test_what_is_read_only_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"format must be one of .*, got 'llama_scope'"):
        se.SparseAutoencoder(D, F, se.ReLU()).save_pretrained(tmp_path, format="llama_scope")
    (tmp_path / "hyperparams.json").write_text(json.dumps({"jump_relu_threshold": 1.0}))
    with pytest.raises(FileNotFoundError, match=r"checkpoints/final.safetensors is missing"):
        se.SparseAutoencoder.from_pretrained(tmp_path)
