"""Perplexity against activation sparsity, by rule: on the embedded model, and on a gated one that is trained here.

    python benchmarks/lm_quality.py                    # minutes: trains the gated model first, in a cache folder
    python benchmarks/lm_quality.py --quick            # seconds, to see that it works; nothing is written

Rules learn from every other document of the evaluation text and are measured on the rest, at all positions. Prints two
tables and writes them, with machine, versions and commit, to ``benchmarks/results/<device>/lm_quality.md``.

The gated model has Llama's architecture and the embedded model's tokenizer, and has read the same standard library for
a fixed number of steps: the same weights on the same machine, and good for nothing else.
"""
from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import torch
from rows import ROOT, device_slug, environment
from train_embedded_model import batches, loss_of, rate_at, token_stream

import sae_engine as se
from sae_engine.data import HELD_OUT_MODULES, LanguageModel, evaluation_text, load_language_model, stdlib_texts

CACHE = ROOT / ".cache" / "gated_model"
SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True}  # fmt: skip
STEPS, CONTEXTS, PEAK = 1500, 8, 3e-3
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
TOKENS = 4096  # to learn from, and as many to measure

Rule = Callable[[float], Any]
HIDDEN: dict[str, Rule] = {
    "\\|h\\| > τ": lambda s: se.lm.Threshold(s),
    "\\|h\\|·‖w‖ > τ (Sparsing Law)": lambda s: se.lm.Threshold(s, weigh="down"),
    "\\|h\\|·‖w‖, k a token (WINA)": lambda s: se.lm.TopShare(s, weigh="down"),
    "\\|h\\| > τ, compensated": lambda s: se.lm.Threshold(s, compensate=True),
    "\\|h\\|·‖w‖ > τ, compensated": lambda s: se.lm.Threshold(s, weigh="down", compensate=True),
}
GATE: dict[str, Rule] = {
    "\\|a\\| > τ (CATS)": lambda s: se.lm.Threshold(s),
    "\\|a\\|·E\\|u\\| > τ (CHESS)": lambda s: se.lm.Threshold(s, weigh="up"),
    "\\|a\\|·rms u > τ": lambda s: se.lm.Threshold(s, weigh="up_rms"),
    "\\|a\\|·E\\|u\\|·‖w‖ > τ": lambda s: se.lm.Threshold(s, weigh="up*down"),
    "\\|a\\|·E\\|u\\|·‖w‖, k a token": lambda s: se.lm.TopShare(s, weigh="up*down"),
    "\\|a\\|·E\\|u\\| > τ, compensated": lambda s: se.lm.Threshold(s, weigh="up", compensate=True),
    "\\|a\\|·E\\|u\\|·‖w‖ > τ, compensated": lambda s: se.lm.Threshold(s, weigh="up*down", compensate=True),
}
INPUTS: dict[str, Rule] = {
    "\\|x\\| > τ (TEAL)": lambda s: se.lm.Threshold(s),
    "\\|x\\|·‖w‖, k a token (WINA)": lambda s: se.lm.TopShare(s, weigh="down"),
}

PUBLISHED = """What the papers' abstracts say of models of seven billion parameters and more; none of them was run here:

| paper | model, share dropped | what is lost |
|---|---|---|
| TEAL, arXiv:2408.14690 | Llama 2 and 3, Mistral, 40 to 50 % of the whole model | "minimal" |
| La RoSA, arXiv:2507.01299 | LLaMA2-7B, 40 %, rotated inputs | 0.17 of perplexity, 0.54 points of accuracy |
| TEAL and CATS, as La RoSA measured them | the same | 1.77 and 17.14 points of accuracy more than that |
| WINA, arXiv:2505.19427 | four models | up to 2.94 % less than TEAL loses |
| CHESS, arXiv:2409.01366 | eight tasks | less than CATS loses |

TEAL and WINA sparsify the second half of each context alone; here every position is sparsified.
"""  # the abstracts' figures


def gated_model(folder: Path, steps: int) -> LanguageModel:
    """The gated model, trained where the folder does not hold it yet."""
    tokenizer = load_language_model().tokenizer
    if not (folder / "model.safetensors").is_file():
        model = trained(tokenizer, steps)
        model.save_pretrained(folder)
    return load_language_model(folder, tokenizer=tokenizer)


def trained(tokenizer: Any, steps: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    mark = tokenizer.eos_token_id
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=mark, eos_token_id=mark, **SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.1)
    stream = token_stream(tokenizer.backend_tokenizer, list(stdlib_texts(exclude=HELD_OUT_MODULES)))
    begun, lately = time.monotonic(), []
    for step, ids in enumerate(itertools.islice(batches(stream, CONTEXTS, seed=0), steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step / steps, PEAK)
        loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        lately.append(float(loss.detach()))
        if len(lately) == 100:
            print(f"gated model: step {step + 1} of {steps}, loss {statistics.mean(lately):.3f}, "
                  f"{time.monotonic() - begun:.0f} s", flush=True)  # fmt: skip
            lately.clear()
    return model.eval()


def table(
    lm: LanguageModel, places: dict[str, dict[str, Rule]], sparsities: tuple[float, ...], tokens: int
) -> list[str]:
    """Markdown rows: the rise of perplexity in %, by rule and sparsity."""
    learning, held_out = evaluation_text()[::2], evaluation_text()[1::2]
    rows, before = [], math.nan
    for at, rules in places.items():
        for name, make in rules.items():
            rises = []
            for sparsity in sparsities:
                rule = make(sparsity)
                if rule.needs_fit:
                    rule.fit(lm, learning, at=at, tokens=tokens)
                se.lm.sparsify(lm, rule, at=at)
                try:
                    found = se.lm.report(lm, held_out, tokens=tokens)
                finally:
                    se.restore(lm)
                before = found.perplexity_before
                density = sum(layer.density for layer in found.layers) / len(found.layers)
                rises.append(f"{100 * found.rise:.2f} ({density:.0%} kept)")
            rows.append(f"| {at} | {name} | {' | '.join(rises)} |")
            print(rows[-1], flush=True)
    head = [f"{Path(lm.name).name} `{lm.sha256[:8]}`, perplexity {before:.2f}:", "",
            "| at | rule | " + " | ".join(f"{share:.0%}" for share in sparsities) + " |",
            "|---|---" + "|---" * len(sparsities) + "|"]  # fmt: skip
    return [*head, *rows, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, tokens and sparsities; nothing is written")
    parser.add_argument("--gated", type=Path, default=None, metavar="DIR", help=f"folder of the gated model; {CACHE}")
    options = parser.parse_args()
    quick = options.quick
    folder = options.gated or (CACHE.with_name("gated_model_quick") if quick else CACHE)
    gated = gated_model(folder, 3 if quick else STEPS)
    sparsities, tokens = ((0.7,), 256) if quick else (SPARSITIES, TOKENS)
    setting = ", ".join(f"{k} {v}" for k, v in environment(torch.device("cpu")).items() if v is not None)
    lines = [
        "# Perplexity against activation sparsity", "", f"`python benchmarks/lm_quality.py`: {setting}", "",
        f"Rise of the perplexity in %, and the share of entries that was kept; rules learned from {tokens:,} tokens, "
        "measured on as many others, all positions.", "",
    ]  # fmt: skip
    lines += table(load_language_model(), {"hidden": HIDDEN, "inputs": INPUTS}, sparsities, tokens)
    lines += table(gated, {"gate": GATE, "hidden": HIDDEN, "inputs": INPUTS}, sparsities, tokens)
    lines.append(PUBLISHED)
    print("\n".join(lines))
    if not quick:
        place = ROOT / "benchmarks" / "results" / device_slug(torch.device("cpu")) / "lm_quality.md"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
