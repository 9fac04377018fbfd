"""Tokens a second of whole language models on a CPU, token by token: plain, and skipping weights.

    python benchmarks/lm_tokens.py --quick          # tiny models, seconds, to see that it works
    python benchmarks/lm_tokens.py --threads 2      # two models of some 200 M random parameters: minutes

One has Llama's architecture and goes on with a tenth of each gate's activations by a threshold (``se.lm.Threshold``,
which changes the function); the other has Gemma 3n's, whose first layers keep a twentieth by themselves, and is
accelerated, which changes nothing. The plain model and a copy that skips take turns, token by token from caches of
their own; what counts is the median time of a token.
"""
from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import torch
from rows import environment
from torch import Tensor

import sae_engine as se
from sae_engine.data import load_language_model

PROMPT, VOCABULARY = 16, 4096


class NoTokenizer:
    """Token ids are given; packing asks for the two marks."""

    bos_token_id = eos_token_id = 1


def llama(scale: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128 * scale, intermediate_size=512 * scale, num_hidden_layers=4,
        num_attention_heads=scale, num_key_value_heads=max(scale // 4, 1), max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gemma3n(scale: int) -> Any:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY, hidden_size=128 * scale,
        intermediate_size=512 * scale, num_hidden_layers=6, num_attention_heads=scale,
        num_key_value_heads=max(scale // 4, 1), head_dim=128, hidden_size_per_layer_input=64,
        layer_types=["sliding_attention"] * 3 + ["full_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=2, laurel_rank=16, activation_sparsity_pattern=[0.95] * 4 + [0.0] * 2, sliding_window=128,
        altup_num_inputs=2, max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    return Gemma3nForCausalLM(config)


def sparsified(model: Any) -> Any:
    ids = torch.randint(2, VOCABULARY, (4, 128), generator=torch.Generator().manual_seed(1))
    rule = se.lm.Threshold(0.9, weigh="up").fit(
        load_language_model(model, tokenizer=NoTokenizer()), list(ids), context_length=128, tokens=512
    )
    return se.lm.sparsify(model, rule)


class Decoding:
    """A model that reads a prompt, then given tokens one by one."""

    def __init__(self, model: Any) -> None:
        self.model, self.times = model, []
        self.logits: list[Tensor] = []
        ids = torch.arange(2, 2 + PROMPT)[None]
        self.cache = model(input_ids=ids, use_cache=True).past_key_values

    def step(self, token: int) -> None:
        begun = time.perf_counter()
        out = self.model(input_ids=torch.tensor([[token]]), past_key_values=self.cache, use_cache=True)
        self.times.append(time.perf_counter() - begun)
        self.logits.append(out.logits[:, -1])


@torch.no_grad()
def row(name: str, make: Any, change: Any, scale: int, tokens: int, dtype: torch.dtype) -> str:
    torch.manual_seed(0)
    plain = make(scale).eval().to(dtype)
    ways = [Decoding(plain), Decoding(change(copy.deepcopy(plain)))]
    for token in range(tokens):
        for way in ways if token % 2 else ways[::-1]:
            way.step(2 + 7 * token % (VOCABULARY - 2))
    before, after = (statistics.median(way.times[2:]) for way in ways)
    apart = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*(w.logits for w in ways), strict=True))
    size = sum(p.numel() for p in plain.parameters()) / 1e6
    what = f"{name}, {size:.0f} M parameters, {str(dtype).removeprefix('torch.')}"
    return f"| {what} | {1 / before:.1f} | {1 / after:.1f} | {before / after:.2f} | {apart:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, few tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scale, tokens = (1, 4) if options.quick else (16, 40)
    known = environment(torch.device("cpu"))
    print(", ".join(f"{name} {known[name]}" for name in ("device", "torch", "commit") if name in known)
          + f", {options.threads} thread(s); tokens a second, medians, by turns")  # fmt: skip
    print("| model | plain | skipping | ratio | logits apart, relative |\n|---|---|---|---|---|")
    for name in options.dtypes:
        dtype = getattr(torch, name)
        print(row("Llama's, a tenth kept by threshold", llama, sparsified, scale, tokens, dtype), flush=True)
        print(row("Gemma 3n's, accelerated", gemma3n, se.accelerate, scale, tokens, dtype), flush=True)


if __name__ == "__main__":
    main()
