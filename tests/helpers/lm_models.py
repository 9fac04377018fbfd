"""Tiny language models of many architectures, whose MLPs make zeros or do not, and what a test does with them."""
import torch
import transformers as t

COMMON = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
          "pad_token_id": 0}  # fmt: skip
GEMMA_3N = {
    **COMMON, "num_hidden_layers": 6, "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2, "laurel_rank": 4, "activation_sparsity_pattern": [0.9] * 3 + [0.0] * 3,
    "sliding_window": 32, "altup_num_inputs": 2,
}  # fmt: skip


def _gated(name, act="hidden_act"):
    def make(relu):
        config = getattr(t, f"{name}Config")(**COMMON, **({act: "relu"} if relu else {}))
        return getattr(t, f"{name}ForCausalLM")(config)

    return make


def _gpt2(relu):
    act = {"activation_function": "relu"} if relu else {}
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64, **act))


def _gpt_neox(relu):
    sizes = {k: COMMON[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                    "num_attention_heads", "max_position_embeddings")}  # fmt: skip
    return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**sizes, hidden_act="relu" if relu else "gelu"))


def _opt(relu):
    return t.OPTForCausalLM(t.OPTConfig(
        vocab_size=256, hidden_size=32, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, activation_function="relu" if relu else "gelu",
    ))  # fmt: skip


GATED = {
    "Llama": _gated("Llama"), "Mistral": _gated("Mistral"), "Qwen2": _gated("Qwen2"), "Qwen3": _gated("Qwen3"),
    "Gemma": _gated("Gemma"), "Gemma2": _gated("Gemma2", "hidden_activation"), "Phi3": _gated("Phi3"),
}  # fmt: skip
NOT_GATED = {"GPT2": _gpt2, "GPTNeoX": _gpt_neox, "OPT": _opt}
GEMMA3N = {"Gemma3n": lambda relu: t.Gemma3nForCausalLM(t.Gemma3nTextConfig(**GEMMA_3N))}  # its own zeros
MODELS = {**GATED, **GEMMA3N, **NOT_GATED}


def make(kind, *, relu=False):
    """``relu``: with an activation that makes zeros. The MLPs weigh more than they are made to, so that they tell."""
    torch.manual_seed(0)
    model = MODELS[kind](relu).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and ("mlp" in name or "fc" in name):
                parameter.mul_(4)
    return model


def token_ids(contexts=2, length=20, seed=1):
    return torch.randint(3, 256, (contexts, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stepwise(model, ids, prompt=12):
    """(steps, contexts, vocabulary) fp64: logits of a prompt's last token and of each token after it, which are given:
    a near-tie cannot part two runs."""
    out = model(input_ids=ids[:, :prompt], use_cache=True)
    logits = [out.logits[:, -1]]
    for place in range(prompt, ids.shape[1]):
        out = model(input_ids=ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.stack(logits).double()
