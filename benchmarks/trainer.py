"""What a run costs beside its steps: from activations in memory, and from a language model with several autoencoders.

    python benchmarks/trainer.py                    # some minutes on two cores
    python benchmarks/trainer.py --quick            # seconds, to see that it works

Prints two tables and writes them, with machine, versions and commit, to ``benchmarks/results/<device>/trainer.md``.

The first compares ``sae_engine.train`` on rows in memory with a bare loop over the same ``TrainStep`` on such batches,
by turns, and takes the shortest of three rounds each; what a run does beside (log lines at its own pace, one
checkpoint at the start and one at the end, the exported autoencoder) is inside its time as far as the clock of its
updates goes, the checkpoints apart. The second trains 1 and N autoencoders from one pass of the embedded model: N
should cost N steps and one pass.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from rows import ROOT, device_slug, environment
from runs import seconds
from torch import Tensor

from sae_engine.training import TrainStep, train
from sae_engine.training.run import Run

ROUNDS = 3


def settings(folder: Path, *, saes: list[dict[str, Any]], updates: int, batch: int) -> dict[str, Any]:
    """A run without evaluations, since a bare loop has none."""
    return {
        "data": {"training_tokens": updates * batch},
        "saes": saes,
        "optim": {"train_batch_size_tokens": batch},
        "eval": {"eval_steps": 0, "eval_tokens": 0},
        "logger": {"progress": False},
        "output": {"output_path": str(folder), "save_steps": updates},
    }


def bare(run: Run, rows: Tensor, updates: int, batch: int) -> float:
    """Tokens a second of the run's own step in a loop, on batches that are there."""
    (entry,) = run.config.saes
    sae = entry.build(rows.shape[1], rows.shape[1], steps=updates, seed=0, device=rows.device)
    optim: Any = run.config.optim_of(entry)
    step = TrainStep(sae, lr=optim.lr, dead_after=optim.dead_after, memory_budget=optim.memory_budget,
                     nonfinite=optim.nonfinite)  # fmt: skip
    batches = rows[: len(rows) // batch * batch].split(batch)
    for number in range(updates // 10 + 1):
        step(batches[number % len(batches)])
    wait(rows)
    begun = time.perf_counter()
    for number in range(updates):
        step(batches[number % len(batches)])
    wait(rows)
    return updates * batch / (time.perf_counter() - begun)


def wait(rows: Tensor) -> None:
    if rows.is_cuda:
        torch.cuda.synchronize(rows.device)


def from_memory(folder: Path, *, d: int, d_sae: int, k: int, batch: int, updates: int, device: str) -> list[str]:
    rows = torch.randn(batch * 16, d, generator=torch.Generator().manual_seed(0)).to(device)
    sae = {"name": "a", "hook_name": "model.rows", "architecture": "topk", "k": k, "d_sae": d_sae,
           "aux_k_coefficient": 0}  # fmt: skip
    ours, loops, parts = [], [], []
    for number in range(ROUNDS):
        run = train(settings(folder / f"memory-{number}", saes=[sae], updates=updates, batch=batch), dataset=rows)
        found = seconds(run)
        parts.append(found)
        ours.append(found["tokens"] / found["whole"])
        loops.append(bare(run, rows, updates, batch))
    share = max(ours) / max(loops)
    best = parts[ours.index(max(ours))]
    rest = ", ".join(f"{name} {best[name] / best['whole']:.1%}" for name in ("activations", "step", "logging"))
    return [f"| {d} | {d_sae:,} | {k} | {batch:,} | {max(loops):,.0f} | {max(ours):,.0f} | {share:.1%} | {rest} |"]


def from_a_model(folder: Path, *, several: int, d_sae: int, batch: int, updates: int) -> list[str]:
    lines = []
    alone: dict[str, float] | None = None
    for count in (1, several):
        saes = [{"name": f"seed{seed}", "hook_name": "blocks.2.hook_resid_pre", "d_sae": d_sae, "k": 32, "seed": seed}
                for seed in range(count)]  # fmt: skip
        rounds = [
            seconds(train(settings(folder / f"model-{count}-{number}", saes=saes, updates=updates, batch=batch)))
            for number in range(ROUNDS)
        ]
        whole = min(found["whole"] / found["tokens"] for found in rounds) * 1e6
        step = statistics.median(found["step"] / found["tokens"] for found in rounds) * 1e6
        passes = statistics.median(found["activations"] / found["tokens"] for found in rounds) * 1e6
        alone = alone or {"step": step, "activations": passes}
        expected = count * alone["step"] + alone["activations"]
        lines.append(f"| {count} | {whole:,.1f} | {passes:,.1f} | {step:,.1f} | {expected:,.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and short; nothing is written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    quick = options.quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        memory = [line for d, d_sae, batch in ([(64, 512, 256)] if quick else [(256, 4096, 1024), (768, 16384, 2048)])
                  for line in from_memory(folder / str(d), d=d, d_sae=d_sae, k=32, batch=batch,
                                          updates=30 if quick else 40, device=options.device)]  # fmt: skip
        model = from_a_model(folder, several=3, d_sae=256 if quick else 2048, batch=256 if quick else 1024,
                             updates=12 if quick else 40)  # fmt: skip
    device = torch.device(options.device)
    setting = ", ".join(f"{name} {value}" for name, value in environment(device).items() if value is not None)
    text = "\n".join([
        "# What a run costs beside its steps", "",
        f"`python benchmarks/trainer.py`: {setting}", "",
        "From memory, tokens a second, the best of three rounds by turns:", "",
        "| d | d_sae | k | batch | a bare loop | `sae_engine.train` | of the loop | where its time went |",
        "|---|---|---|---|---|---|---|---|", *memory, "",
        "From the embedded model, microseconds a token:", "",
        "| autoencoders | whole | model and shuffle | steps | expected: their steps and one pass |",
        "|---|---|---|---|---|", *model, "",
    ])  # fmt: skip
    print(text)
    if not quick:
        place = ROOT / "benchmarks" / "results" / device_slug(device) / "trainer.md"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
