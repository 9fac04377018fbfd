"""A cross-layer transcoder beside a transcoder for each layer, on the embedded model: errors, and the model they make.

Both are trained in one pass of the language model, on the same rows in the same order, with as many latents and
entries a token. Then all MLPs are replaced at once, with codes of the replaced run, on text that neither saw. The first
has more decoder weights at equal latents (here 2.5 times as many), which this table does not make up for.

    python benchmarks/replacement.py [--tokens 400000] [--d-sae 1024] [--k 8] [--seeds 1] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import sae_engine as se

READ, WRITTEN = "blocks.{0..3}.hook_resid_mid", "blocks.{0..3}.hook_mlp_out"
KINDS = {"cross-layer transcoder": "causal", "a transcoder a layer": "local"}
LINES = (
    ("evaluation/fvu", "FVU, all layers"), *((f"evaluation/fvu_{layer}", f"FVU, layer {layer}") for layer in range(4)),
    ("evaluation/l0", "L0, of all layers"), ("evaluation/dead", "dead latents"),
    ("evaluation/cross_layer", "squared decoder norms in later layers"),
    ("evaluation/ce_clean", "cross-entropy, the model"), ("evaluation/ce_spliced", "cross-entropy, all MLPs replaced"),
    ("evaluation/ce_ablated", "cross-entropy, zeros for all MLPs"),
    ("evaluation/ce_recovered", "cross-entropy recovered"), ("evaluation/kl", "KL from the model's predictions"),
)  # fmt: skip


def configuration(folder: Path, tokens: int, d_sae: int, k: int, seed: int) -> dict[str, Any]:
    common = {"hook_name": READ, "hook_name_out": WRITTEN, "architecture": "topk", "k": k, "d_sae": d_sae}
    return {
        "data": {"training_tokens": tokens}, "seed": seed,
        "saes": [{"name": name.replace(" ", "-"), "wiring": wiring, **common} for name, wiring in KINDS.items()],
        "optim": {"train_batch_size_tokens": 512}, "eval": {"eval_steps": 0},
        "output": {"output_path": str(folder), "save_steps": 10**6},
    }  # fmt: skip


def numbers(run: Any, name: str) -> dict[str, float]:
    prefix = f"{name.replace(' ', '-')}/"
    found: dict[str, float] = {}
    for line in run.metrics():
        found |= {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    lines = [f"| | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    for key, name in LINES:
        cells = []
        for of_kind in found.values():
            values = [each[key] for each in of_kind]
            spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.4g}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=8, help="entries a token and layer")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="keep the runs here")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=Path(__file__).parent).stdout.strip()  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {name: [] for name in KINDS}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(args.seeds):
            folder = (args.out or Path(temporary)) / f"seed{seed}"
            run = se.train(configuration(folder, args.tokens, args.d_sae, args.k, seed))
            for name, values in found.items():
                values.append(numbers(run, name))
    print(f"{args.tokens:,} tokens, {args.d_sae} latents a layer, k = {args.k} a layer, {args.seeds} seed(s), "
          f"{torch.get_num_threads()} thread(s) of {platform.processor() or platform.machine()}, "
          f"torch {torch.__version__}, commit {commit or 'unknown'}\n")  # fmt: skip
    print(table(found))


if __name__ == "__main__":
    main()
