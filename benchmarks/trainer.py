"""What a run costs beside its steps: from activations in memory, and from a language model with several autoencoders.

    python benchmarks/trainer.py                    # under five minutes on two cores
    python benchmarks/trainer.py --quick            # seconds, to see that it works

Prints two tables and writes them, with machine, versions and commit, to ``benchmarks/results/<device>/trainer.md``.

The first compares ``sae_engine.train`` on rows in memory with a bare loop over the same ``TrainStep`` on batches that
are there. Both are timed between the same two instants, the end of an early update and the end of the last, the device
waited for at each: so the first updates, which touch memory for the first time, are in neither time, and all that a run
does between the two (batches, scale, sums, log lines) is in its own. Rounds are short, a run and a loop in each, and
take turns at going first, because a machine drifts by more than what is looked for: what is asserted is the median of
the rounds' ratios, and the best of each stands beside it. The second trains 1 and N autoencoders from one pass of the
embedded model: N should cost N steps and one pass.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from rows import ROOT, device_slug, environment
from runs import seconds
from torch import Tensor

from sae_engine.training import Callback, TrainConfig, Trainer, TrainStep, train
from sae_engine.training.auto import resolved
from sae_engine.training.config import DataConfig, EvalConfig, LoggerConfig, OptimConfig, OutputConfig, SAEConfig

K = 32


@dataclass(frozen=True)
class Memory:
    """A comparison from memory: ``cold`` updates that are in no time, then ``timed`` ones, in so many ``rounds``."""

    d: int
    d_sae: int
    batch: int
    cold: int = 3
    timed: int = 12
    rounds: int = 6


QUICK, USUAL = [Memory(64, 512, 256, rounds=2)], [Memory(256, 4096, 1024, 10, 60, 7), Memory(768, 16384, 2048)]


def settings(saes: Sequence[SAEConfig], *, updates: int, batch: int, cold: int, device: str = "cpu") -> TrainConfig:
    """A run without evaluations, since a bare loop has none; its first line of metrics is of the ``cold`` updates."""
    return TrainConfig(
        saes=tuple(saes), device=device, data=DataConfig(training_tokens=updates * batch),
        optim=OptimConfig(train_batch_size_tokens=batch), eval=EvalConfig(eval_steps=0, eval_tokens=0),
        logger=LoggerConfig(progress=False, logging_steps=cold), output=OutputConfig(save_steps=updates),
    )  # fmt: skip


def into(config: TrainConfig, folder: Path) -> TrainConfig:
    return replace(config, output=replace(config.output, output_path=str(folder)))


class Timed:
    """The time between the end of update ``cold`` and the end of update ``last``, the device waited for at both."""

    def __init__(self, device: torch.device, cold: int, last: int) -> None:
        self.device, self.between, self.instants = device, (cold, last), [0.0, 0.0]

    def updated(self, update: int) -> None:
        if update in self.between:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.instants[self.between.index(update)] = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.instants[1] - self.instants[0]


class InRun(Callback):
    def __init__(self, timed: Timed) -> None:
        self.timed = timed

    def on_update(self, trainer: Trainer) -> None:
        self.timed.updated(trainer.update)


def run_of(config: TrainConfig, rows: Tensor, timed: Timed) -> dict[str, float]:
    """Where the time of a run went, by its own log."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds(train(into(config, Path(folder) / "run"), dataset=rows, callbacks=[InRun(timed)]))


def loop_of(config: TrainConfig, rows: Tensor, timed: Timed) -> None:
    """The step of the run, in a loop over batches that are there."""
    (entry,) = config.saes
    sae = entry.build(rows.shape[1], rows.shape[1], steps=config.updates, seed=config.seed, device=rows.device)
    optim: Any = config.optim_of(entry)
    step = TrainStep(sae, lr=optim.lr, dead_after=optim.dead_after, memory_budget=optim.memory_budget,
                     nonfinite=optim.nonfinite)  # fmt: skip
    batches = rows.split(optim.train_batch_size_tokens)
    for number in range(config.updates):
        step(batches[number % len(batches)])
        timed.updated(number + 1)


def from_memory(size: Memory, device: torch.device) -> str:
    rows = torch.randn(size.batch * 16, size.d, generator=torch.Generator().manual_seed(0)).to(device)
    sae = SAEConfig(name="a", hook_name="model.rows", d_sae=size.d_sae, aux_k_coefficient=0.0)
    last = size.cold + size.timed
    config = resolved(
        settings([sae], updates=last, batch=size.batch, cold=size.cold, device=str(device)), [(size.d, size.d)],
        max_length=1024, device_type=device.type, embedded=False,
    )  # fmt: skip
    tokens = size.timed * size.batch
    pairs, spent = [], []
    for number in range(size.rounds):
        loop, run = (Timed(device, size.cold, last) for _ in range(2))
        if number % 2:
            spent.append(run_of(config, rows, run))
        loop_of(config, rows, loop)
        if not number % 2:
            spent.append(run_of(config, rows, run))
        pairs.append((tokens / loop.seconds, tokens / run.seconds))
    ratios = sorted(run / loop for loop, run in pairs)
    loops, runs = zip(*pairs, strict=True)
    rest = ", ".join(f"{name} {statistics.median(found[name] / found['whole'] for found in spent):.1%}"
                     for name in ("activations", "step", "logging"))  # fmt: skip
    return (f"| {size.d} | {size.d_sae:,} | {K} | {size.batch:,} | {statistics.median(loops):,.0f} | "
            f"{statistics.median(runs):,.0f} | **{statistics.median(ratios):.1%}** | "
            f"{ratios[0]:.1%} to {ratios[-1]:.1%} | {max(runs) / max(loops):.1%} | {rest} |")  # fmt: skip


def from_a_model(counts: Sequence[int], *, d_sae: int, batch: int, updates: int, rounds: int) -> list[str]:
    """Microseconds a token with so many autoencoders; the first count is 1."""
    found: dict[int, list[tuple[float, float, float]]] = {count: [] for count in counts}
    for number in range(rounds):
        for count in counts[:: -1 if number % 2 else 1]:
            saes = [SAEConfig(name=f"seed{seed}", hook_name="blocks.2.hook_resid_pre", d_sae=d_sae, seed=seed)
                    for seed in range(count)]  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                config = settings(saes, updates=updates, batch=batch, cold=updates // 10 + 1)
                spent = seconds(train(into(config, Path(folder) / "run")))
            whole, passes, steps = (spent[part] / spent["tokens"] * 1e6 for part in ("whole", "activations", "step"))
            found[count].append((whole, passes, steps))
    lines = []
    for count in counts:
        expected = [count * steps + passes for _, passes, steps in found[1]]
        whole, passes, steps = (statistics.median(values) for values in zip(*found[count], strict=True))
        share = statistics.median(mine[0] / then for mine, then in zip(found[count], expected, strict=True))
        lines.append(f"| {count} | {whole:,.1f} | {passes:,.1f} | {steps:,.1f} | "
                     f"{statistics.median(expected):,.1f} | {share:.2f} |")  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and short; nothing is written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    quick, device = options.quick, torch.device(options.device)
    memory = [from_memory(size, device) for size in (QUICK if quick else USUAL)]
    model = from_a_model((1, 3), d_sae=256 if quick else 2048, batch=256 if quick else 1024,
                         updates=12 if quick else 33, rounds=2 if quick else 3)  # fmt: skip
    setting = ", ".join(f"{name} {value}" for name, value in environment(device).items() if value is not None)
    text = "\n".join([
        "# What a run costs beside its steps", "",
        f"`python benchmarks/trainer.py`: {setting}", "",
        "From memory, tokens a second, the first updates of both left out; rounds by turns, their medians:", "",
        "| d | d_sae | k | batch | a bare loop | `sae_engine.train` | of the loop | in each round | best of each "
        "| where its time went |",
        "|---|---|---|---|---|---|---|---|---|---|", *memory, "",
        "From the embedded model, microseconds a token, medians of rounds by turns; expected: the steps of one, so "
        "many times, and its pass.", "",
        "| autoencoders | whole | model and shuffle | steps | expected | whole / expected |",
        "|---|---|---|---|---|---|", *model, "",
    ])  # fmt: skip
    print(text)
    if not quick:
        place = ROOT / "benchmarks" / "results" / device_slug(device) / "trainer.md"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
