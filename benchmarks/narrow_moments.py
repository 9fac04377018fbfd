"""Held-out error of the same training with Adam's moments in float32, in bfloat16, and in bfloat16 to the nearest.

    python benchmarks/narrow_moments.py [--steps 4000] [--seeds 6] [--kept float32 bfloat16]

Activations of the embedded model, TopK. The last is no way of ``TrainStep``: it shows what rounding by chance is for. A
second moment forgets within 1 / (1 - beta2) = 1,000 steps, so a run has to be some times longer to show anything.

A row is stored as each run ends, and what a commit has measured on this machine is not measured again, so that the
program goes on where it was stopped. A seed gives weights and batches to all ways alike: their difference is paired.
"""
from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import torch
from rows import Row, environment, key, load, now_utc, store, write_atomically
from torch import Tensor

import sae_engine as se
from sae_engine.data import evaluation_text, load_language_model, stdlib_texts, stream_activations
from sae_engine.training import TrainStep

LAYER, LATENTS, K, BATCH, LEARNING_RATE = 3, 512, 16, 256, 1e-3
EXACT, NEAREST = "float32", "bfloat16, to the nearest"
KEPT = (EXACT, "bfloat16", NEAREST)
RESULTS = Path(__file__).resolve().parent / "results"


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
    step = TrainStep(sae, lr=LEARNING_RATE, moments=EXACT if kept == NEAREST else kept)
    for _ in range(steps):
        step(rows[torch.randint(len(rows), (BATCH,))])
        if kept == NEAREST:
            for moment in (m for weight in (sae.W_dec, sae.W_enc) for m in step.optimizer.moments(weight)):
                moment.copy_(moment.bfloat16())
    with torch.no_grad():
        return se.losses.fvu(sae.eval()(held), held).item()


def about(kept: str, steps: int, seed: int) -> Row:
    """What identifies a run."""
    return {
        "kind": "narrow moments", "moments": kept, "seed": seed, "steps": steps, "lr": LEARNING_RATE,
        "shape": {"B": BATCH, "F": LATENTS, "k": K}, "layer": LAYER, **environment(torch.device("cpu")),
    }  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """The table of runs of one machine and commit, and the differences of each pair from float32."""
    found = {(row["moments"], row["seed"]): row["fvu"] for row in rows}
    names = [name for name in KEPT if any(kept == name for kept, _ in found)]
    seeds = sorted({seed for _, seed in found if all((name, seed) in found for name in names)})
    of = {name: [found[name, seed] for seed in seeds] for name in names}
    first = rows[0]
    lines = [
        "# Adam's moments in bfloat16",
        "",
        f"Held-out FVU after {first['steps']:,} steps of {BATCH} tokens (TopK {K}, {LATENTS:,} latents, layer {LAYER} "
        f"of the embedded model, lr {LEARNING_RATE:g}), a row a seed, which gives both weights and batches. "
        f"{first['device']}, torch {first['torch']}, Python {first['python']}, commit `{str(first['commit'])[:7]}`; "
        "`benchmarks/narrow_moments.py` makes this file from the rows in `narrow-moments.jsonl`.",
        "",
        "| seed | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for seed, *numbers in zip(seeds, *of.values(), strict=True):
        lines.append(_line(str(seed), numbers))
    if len(seeds) < 2:
        return "\n".join(lines) + "\n"
    lines += [_line("mean", map(statistics.fmean, of.values())),
              _line("standard deviation", map(statistics.stdev, of.values())), ""]  # fmt: skip
    for name in names:
        if name != EXACT and EXACT in names:
            differences = [a - b for a, b in zip(of[name], of[EXACT], strict=True)]
            error = statistics.stdev(differences) / len(seeds) ** 0.5
            lines.append(f"- {name} minus {EXACT}, paired: {statistics.fmean(differences):+.4f} with a standard error "
                         f"of {error:.4f} ({len(seeds)} seeds); {sum(d > 0 for d in differences)} of them are above 0.")
    return "\n".join(lines) + "\n"


def _line(first: str, numbers: Iterable[float]) -> str:
    return f"| {first} | " + " | ".join(f"{number:.4f}" for number in numbers) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Held-out error with moments of Adam in fewer bits.")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--kept", nargs="+", choices=KEPT, default=KEPT, help="ways to keep moments; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="for narrow-moments.jsonl and .md")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    path = args.out / "narrow-moments.jsonl"
    rows, held = activations()
    for seed in range(args.seeds):
        for kept in args.kept:
            row = about(kept, args.steps, seed)
            if key(row) not in map(key, load(path)):
                store(path, [{**row, "fvu": trained(rows, held, kept, args.steps, seed), "utc": now_utc()}])
    same = about(EXACT, args.steps, 0) | {"seed": None, "moments": None}
    mine = [row for row in load(path) if key(row | {"seed": None, "moments": None}) == key(same)]
    text = markdown(mine)
    write_atomically(args.out / "narrow-moments.md", text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
