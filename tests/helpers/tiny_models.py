"""Language models of four families with random weights, a tokenizer, and documents for them."""

import functools
import tempfile

from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from sae_engine.data import LanguageModel, collect_activations

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 300}
WIDE = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 32}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=300, n_positions=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=32)),
}
DOCUMENTS = [f"def f_{i}(x):\n    return x ** {i}  # the power {i}\n" * (1 + i % 4) for i in range(40)]


@functools.cache
def tokenizer_of_bytes():
    """A byte-level BPE of 300 tokens, in the files of GPT-2's tokenizer."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(DOCUMENTS, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        bpe.save_model(folder)
        return GPT2TokenizerFast.from_pretrained(folder)


def tiny_gpt2():
    return LanguageModel(
        model=MODELS["gpt2"]().eval(), tokenizer=tokenizer_of_bytes(), name="tiny", revision=None, sha256="0" * 64,
        d_model=32, num_layers=3, max_length=32, is_embedded=False,
    )  # fmt: skip


def collect(lm, folder, texts=DOCUMENTS, **options):
    defaults = {"layer": 1, "shard_tokens": 300, "batch_size": 4, "progress": False, "text_source": "powers"}
    return collect_activations(lm, texts, folder, **{**defaults, **options})
