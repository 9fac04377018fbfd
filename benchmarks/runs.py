"""Runs of the library's own trainer on rows in memory, as programs here make them: their configuration, their times."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sae_engine as se
from sae_engine.data.memory import TensorStream
from sae_engine.training import Architecture, Callback, Run, TrainConfig, Trainer
from sae_engine.training.config import DataConfig, EvalConfig, LoggerConfig, OptimConfig, OutputConfig, SAEConfig

MEAN_BATCHES = 16  # of which b_dec starts as the mean
PARTS = 20  # of a run, each with a line of metrics; the first is left out of its speed


@dataclass(frozen=True)
class Trained:
    """An autoencoder in training form, and what its training told; the errors are per element, a mean for each line."""

    sae: se.SparseAutoencoder
    errors: list[float]
    l0s: list[float]
    tokens_per_second: float
    seconds: float


class Within(Callback):
    """What a program does at the start of its runs, and tells of each update."""

    def __init__(self, start: Callable[[Trainer], object] | None, told: Callable[[int], object]) -> None:
        self.start, self.told = start, told

    def on_start(self, trainer: Trainer) -> None:
        if self.start is not None:
            self.start(trainer)

    def on_update(self, trainer: Trainer) -> None:
        self.told(trainer.update)


def entry(architecture: Architecture, d_sae: int) -> SAEConfig:
    """Of rows as they are: ``b_dec`` from their mean, no auxiliary loss."""
    return SAEConfig(
        name="sae", hook_name="model.rows", architecture=architecture, d_sae=d_sae, normalize_activations="none",
        b_dec_init="mean", aux_k_coefficient=0.0,
    )  # fmt: skip


def train(
    sae: SAEConfig, rows: Tensor, *more: Tensor, batch: int, steps: int, seed: int, lr: float,
    betas: tuple[float, float], eps: float = 1e-8, parts: int = PARTS,
    start: Callable[[Trainer], object] | None = None, told: Callable[[int], object] = lambda update: None,
) -> Trained:  # fmt: skip
    """One pass over ``rows`` (steps · batch, d) at a constant learning rate, in the order that ``seed`` gives.

    Args:
        more: rows of what the architecture's rule is given beside the pre-activations.
        parts: lines of metrics.
        start: changes first weights.
        told: is called with the number of each update.
    """
    every = max(steps // parts, 1)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        config = TrainConfig(
            saes=(sae,), seed=seed, device=str(rows.device),
            data=DataConfig(training_tokens=steps * batch, shuffle_tokens=MEAN_BATCHES * batch),
            optim=OptimConfig(
                lr=lr, adam_beta1=betas[0], adam_beta2=betas[1], adam_eps=eps, train_batch_size_tokens=batch,
                lr_warm_up_steps=0, lr_decay_steps=0, sparsity_warm_up_steps=0, nonfinite="raise",
            ),
            eval=EvalConfig(eval_steps=0, eval_tokens=0),
            logger=LoggerConfig(logging_steps=every, progress=False),
            output=OutputConfig(output_path=f"{folder}/run", save_steps=steps),
        )  # fmt: skip
        trainer = Trainer(config, dataset=[rows, *more], callbacks=[Within(start, told)])
        run = trainer.train()
        found, lines = seconds(run), run.metrics()
    return Trained(
        trainer.trainees["sae"].sae, [line["losses/mse_loss"] / rows.shape[1] for line in lines],
        [line["metrics/l0"] for line in lines], found["tokens"] / found["whole"], found["whole"],
    )  # fmt: skip


def batches(rows: Tensor, *, batch: int, seed: int) -> TensorStream:
    """The batches that :func:`train` sees, one after the other, by ``next()[0]``."""
    return TensorStream([rows], batch_rows=batch, seed=seed, chunk_rows=MEAN_BATCHES * batch)


@torch.no_grad()
def first_weights(sae: SAEConfig, rows: Tensor, *, batch: int, steps: int, seed: int) -> se.SparseAutoencoder:
    """The autoencoder as :func:`train` starts with it."""
    made = sae.build(rows.shape[1], rows.shape[1], steps=steps, seed=seed, device=rows.device)
    made.b_dec.copy_(batches(rows, batch=batch, seed=seed).first_chunk()[0].mean(0))
    return made


def seconds(run: Run) -> dict[str, float]:
    """What the updates of a run took, part by part, checkpoints and all before the first line of metrics apart."""
    lines: list[dict[str, Any]] = [line for line in run.metrics() if "performance/seconds/step" in line]
    parts = [key for key in lines[0] if key.startswith("performance/seconds/")]
    spent = {key.rpartition("/")[2]: sum(line[key] for line in lines[1:]) for key in parts}
    tokens = lines[-1]["tokens"] - lines[0]["tokens"]
    whole = sum((b["tokens"] - a["tokens"]) / b["performance/tokens_per_second"]
                for a, b in itertools.pairwise(lines))  # fmt: skip
    return {"tokens": tokens, "whole": whole - spent.pop("saving", 0.0), **spent}
