"""Held-out error of the same training with Adam's moments in float32, in bfloat16, and in bfloat16 to the nearest.

    python benchmarks/narrow_moments.py [--steps 4000] [--seeds 3] [--markdown FILE]

Activations of the embedded model, TopK. The last is no way of ``TrainStep``: it shows what rounding by chance is for. A
second moment forgets within 1 / (1 - beta2) = 1,000 steps, so a run has to be some times longer to show anything.
"""
from __future__ import annotations

import argparse
import functools
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

import sae_engine as se
from sae_engine._files import replace_file
from sae_engine.data import evaluation_text, load_language_model, stdlib_texts, stream_activations
from sae_engine.training import TrainStep

LAYER, LATENTS, K, BATCH, LEARNING_RATE = 3, 512, 16, 256, 1e-3
NEAREST = "bfloat16, to the nearest"
KEPT = ("float32", "bfloat16", NEAREST)


def activations() -> tuple[Tensor, Tensor]:
    """Rows to train on and held-out ones, each with mean 0 and deviation 1."""
    lm = load_language_model()
    found = (
        torch.cat(list(stream_activations(lm, text, layer=LAYER, max_tokens=tokens))).float()
        for text, tokens in ((stdlib_texts(), 40_960), (evaluation_text(), 4_096))
    )
    rows, held = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in found)
    return rows, held


def trained(rows: Tensor, held: Tensor, kept: str, steps: int, seed: int) -> float:
    """Held-out FVU at the end."""
    torch.manual_seed(seed)
    sae = se.SparseAutoencoder(rows.shape[1], LATENTS, se.TopK(K))
    step = TrainStep(sae, lr=LEARNING_RATE, moments="float32" if kept == NEAREST else kept)
    for _ in range(steps):
        step(rows[torch.randint(len(rows), (BATCH,))])
        if kept == NEAREST:
            for moment in (m for weight in (sae.W_dec, sae.W_enc) for m in step.optimizer.moments(weight)):
                moment.copy_(moment.bfloat16())
    with torch.no_grad():
        return se.losses.fvu(sae.eval()(held), held).item()


def markdown(results: dict[str, list[float]], steps: int) -> str:
    """The table, and what it was made with."""
    seeds = len(next(iter(results.values())))
    lines = [
        "# Adam's moments in bfloat16",
        "",
        f"Held-out FVU after {steps:,} steps of {BATCH} tokens (TopK {K}, {LATENTS:,} latents, layer {LAYER} of the "
        f"embedded model, lr {LEARNING_RATE:g}), a column a seed. One thread, "
        f"torch {metadata.version('torch')}, {platform.machine()}; "
        f"`python benchmarks/narrow_moments.py --steps {steps} --seeds {seeds}` makes this file.",
        "",
        "| moments of both weights | " + " | ".join(f"seed {n}" for n in range(seeds)) + " | mean | spread |",
        "|---|" + "---|" * (seeds + 2),
    ]
    for name, found in results.items():
        numbers = [*found, sum(found) / seeds, max(found) - min(found)]
        lines.append(f"| {name} | " + " | ".join(f"{number:.4f}" for number in numbers) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Held-out error with moments of Adam in fewer bits.")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, not to the terminal")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows, held = activations()
    results: dict[str, list[float]] = {name: [] for name in KEPT}
    for seed in range(args.seeds):
        for name, found in results.items():
            found.append(trained(rows, held, name, args.steps, seed))
            print(f"{name}, seed {seed}: held-out FVU {found[-1]:.4f}", file=sys.stderr, flush=True)
    text = markdown(results, args.steps)
    if args.markdown is None:
        print(text, end="")
    else:
        replace_file(args.markdown, functools.partial(Path.write_text, data=text, encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
