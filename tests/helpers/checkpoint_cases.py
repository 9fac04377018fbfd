"""Autoencoders with nothing at 0, and checkpoints of them in every format."""

import json

import torch

import sae_engine as se

D, F, B = 12, 40, 9
RULES = {
    "TopK": lambda: se.TopK(4), "AbsTopK": lambda: se.AbsTopK(4),
    "BatchTopK": lambda: se.BatchTopK(3, threshold_lr=0.2),
    "MutualChoice": lambda: se.MutualChoice(4), "TopAFA": lambda: se.TopAFA(capacity=200 * F), "ReLU": se.ReLU,
    "JumpReLU": lambda: se.JumpReLU(F, bandwidth=0.2),
}  # fmt: skip


def build(rule, *, format=None, **options):
    """An autoencoder with nothing at 0, except what the format has no place for."""
    torch.manual_seed(1)
    sae = se.SparseAutoencoder(D, F, RULES[rule](), **{"decoder_init_norm": 0.7, **options})
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if name in ("b_enc", "b_dec", "W_skip") and p.requires_grad:
                p.normal_(std=0.1)
        if format == "batchtopk" and rule not in ("ReLU", "JumpReLU"):
            sae.b_enc.zero_()  # these have none there
        if rule == "JumpReLU":
            sae.activation.threshold.uniform_(0.05, 0.3)
        elif hasattr(sae.activation, "threshold"):
            sae.activation.threshold.fill_(0.123456789)  # no float32
    return sae


def write(format, folder, rule=None, **options):
    """A checkpoint of a format, in ``folder``."""
    rules = {"gemma_scope": "JumpReLU", "gemma_scope_2": "JumpReLU", "openai": "ReLU"}
    sae = build(rule or rules.get(format, "TopK"), format=format, **options)
    sae.save_pretrained(folder, format=format)
    return sae


def write_llama_scope(folder, dtype=torch.float32, d=D, d_sae=F, unit=True, **changes):
    """The two files of a Llama Scope SAE of layer 8, with weights of training; returns them."""
    from safetensors.torch import save_file

    torch.manual_seed(2)
    weights = {"encoder.weight": torch.randn(d_sae, d), "encoder.bias": torch.randn(d_sae) / 4,
               "decoder.weight": torch.randn(d, d_sae), "decoder.bias": torch.randn(d)}  # fmt: skip
    if unit:
        weights["decoder.weight"] /= weights["decoder.weight"].norm(dim=0)
    weights = {name: t.to(dtype) for name, t in weights.items()}
    hyperparams = {
        "hook_point_in": "blocks.8.hook_resid_post", "hook_point_out": "blocks.8.hook_resid_post", "d_model": d,
        "d_sae": d_sae, "expansion_factor": d_sae // d, "act_fn": "jumprelu", "jump_relu_threshold": 0.203125,
        "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 6.3125, "out": 6.3125},
        "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False, "top_k": 50,
    }  # fmt: skip
    (folder / "checkpoints").mkdir(parents=True)
    save_file(weights, folder / "checkpoints" / "final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps(hyperparams | changes))
    return weights


CIRCUIT_TRACER = {"model_name": "Qwen/Qwen3-0.6B", "model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in",
                  "feature_output_hook": "hook_mlp_out"}  # fmt: skip


def write_circuit_tracer(folder, layer=3, d=D, d_sae=F, threshold=False, skip=False, **changes):
    """One transcoder of a set of circuit-tracer's, and the set's configuration; returns the weights."""
    import yaml
    from safetensors.torch import save_file

    torch.manual_seed(3)
    weights = {"W_enc": torch.randn(d_sae, d), "W_dec": torch.randn(d_sae, d), "b_enc": torch.randn(d_sae) / 4,
               "b_dec": torch.randn(d)}  # fmt: skip
    weights |= {"activation_function.threshold": torch.rand(d_sae)} if threshold else {}
    weights |= {"W_skip": torch.randn(d, d)} if skip else {}
    save_file(weights, folder / f"layer_{layer}.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(CIRCUIT_TRACER | changes))
    return weights
