"""A step of a cross-layer transcoder by the published recipe, whose thresholds learn from wide windows.

    python benchmarks/windows.py                        # one thread; ten minutes
    python benchmarks/windows.py --only start --latents 1024

Four layers of width 256, 512 tokens, JumpReLU with windows of width 1, ``TanhL0`` and ``PreActivation``. ``start`` is
the recipe's start, where a twentieth of the latents fires; in ``spread`` pre-activations are as wide (0.55) and codes
as few (1 %) as after some hundred updates of 1,024 latents. ``window in the codes`` is the same step with a loss that
does not say its slope at 0, so that codes hold the dropped half of the window as zeros; ``dense`` is autograd through
dense codes, one product a source, and fused Adam. In turn, round by round, by the time of this process' own processor;
memory by torch's record of a step's allocations, beyond what lives on. Before, their losses are compared. Rows go to
``results/<device>/windows.jsonl``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out; the repository root stays out

import torch
from rows import Row, device_slug, environment, now_utc, store
from timing import OtherLoad, summarize
from torch import Tensor

import sae_engine as se
from sae_engine.losses import PreActivation, TanhL0
from sae_engine.testing import allocated_by
from sae_engine.training import TrainStep

METHOD = "process_time of one thread; variants interleaved round by round; median and 20th/80th percentile"
OURS, IN_CODES, DENSE = "TrainStep", "window in the codes", "dense, a source"
LAYERS, D, TOKENS, WIDTH, THRESHOLD = 4, 256, 512, 1.0, 0.03
PRICE, SCALE, PULL, RATE = 4.0, 4.0, 3e-6, 1e-6
STATES = {"start": (None, 0.05), "spread": (0.55, 0.01)}  # deviation of pre-activations, share that fires
LATENTS = (1024, 8192)
ROUNDS = 5


class Untold(TanhL0):
    """The same loss, which does not say its slope at 0."""

    def value(self, batch: se.losses.LossInput) -> Tensor:
        return super().value(batch)


class Jump(torch.autograd.Function):
    """JumpReLU with the rectangle estimator, dense."""

    @staticmethod
    def forward(ctx, pre, theta):
        ctx.save_for_backward(pre, theta)
        return torch.where(pre > theta, pre, 0.0)

    @staticmethod
    def backward(ctx, grad):
        pre, theta = ctx.saved_tensors
        inside = (pre - theta).abs() < WIDTH / 2
        return torch.where(pre > theta, grad, 0.0), -(theta / WIDTH * grad * inside).sum(0)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, TOKENS, LAYERS * D, generator=generator)
    return x, target


def made(latents: int, state: str) -> se.Crosscoder:
    torch.manual_seed(0)
    rules = [se.LogJumpReLU(latents, threshold=THRESHOLD, bandwidth=WIDTH) for _ in range(LAYERS)]
    coder = se.Crosscoder.clt(LAYERS, D, latents, rules)
    (deviation, fires), (x, _) = STATES[state], data()
    with torch.no_grad():
        for source in coder.sources:
            pre = x[:, source.reads] @ source.W_enc
            if deviation is not None:
                source.W_enc.mul_(deviation / pre.std())
                pre *= deviation / pre.std()
            first = int((1 - fires) * TOKENS)  # between two tokens: rounding moves none across the threshold
            coder.b_enc[source.number] = THRESHOLD - pre.sort(dim=0).values[first - 1 : first + 1].mean(0)
    return coder


def dense_step(coder: se.Crosscoder, x: Tensor, target: Tensor) -> Callable[[], Tensor]:
    adam = torch.optim.Adam(coder.parameters(), lr=RATE, fused=True)

    def step() -> Tensor:
        adam.zero_grad()
        out, added = coder.b_dec.expand(len(x), -1).clone(), torch.zeros(())
        for source in coder.sources:
            pre = torch.addmm(source.b_enc, x[:, source.reads], source.W_enc)
            theta, norms = source.activation.threshold, source.W_dec.norm(dim=1)
            codes = Jump.apply(pre, theta)
            out[:, source.writes] += codes @ source.W_dec
            added = added + PRICE * torch.tanh(SCALE * codes * norms).sum()
            added = added + PULL * (torch.relu(theta - pre) * norms).sum()
        loss = ((out - target).square().sum() + added) / len(x)
        loss.backward()
        adam.step()
        return loss.detach()

    return step


def measure(latents: int, state: str) -> list[Row]:
    x, target = data()
    l0, calls = 0.0, {}
    for name, loss in ((OURS, TanhL0), (IN_CODES, Untold)):
        step = TrainStep(made(latents, state), lr=RATE, losses=[loss(PRICE, SCALE), PreActivation(PULL)])
        calls[name] = lambda step=step: step(x, target)
    calls[DENSE] = dense_step(made(latents, state), x, target)
    reports = {name: call() for name, call in calls.items()}
    l0, wanted = float(reports[OURS]["l0"]), float(reports[DENSE])
    for name in (OURS, IN_CODES):
        if abs(float(reports[name]["loss"]) - wanted) > 1e-4 * wanted:
            raise RuntimeError(f"{name} has a loss of {float(reports[name]['loss'])}, {DENSE} of {wanted}")
    memory = {name: allocated_by(call).peak for name, call in calls.items()}
    others, taken = OtherLoad(), {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            before = time.process_time()
            call()
            taken[name].append((time.process_time() - before) * 1e3)
    load, shape = others.cores(), {"L": LAYERS, "d": D, "F": latents, "B": TOKENS}
    return [
        {"kind": "windows", "case": state, "provider": name, "baseline": name == DENSE, "shape": shape, "l0": l0,
         "peak_bytes": memory[name], "dtype": "float32", "threads": 1, "seed": 0, "method": METHOD,
         **environment(torch.device("cpu")), **summarize(times).fields(), "other_load": load, "utc": now_utc()}
        for name, times in taken.items()
    ]  # fmt: skip


def shown(rows: list[Row]) -> str:
    first = rows[0]
    lines = [f"{first['case']} {first['shape']}, L0 {first['l0']:.0f}, {first['device']}, others {first['other_load']}"]
    lines += [f"  {row['provider']:<22} {row['ms_p50']:8.0f} ms {row['ms_p50'] / first['ms_p50']:6.2f} × ours "
              f"{row['peak_bytes'] / 1e6:8.0f} MB" for row in rows]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps with wide windows of thresholds.")
    parser.add_argument("--only", choices=[*STATES], help="one of them")
    parser.add_argument("--latents", type=int, choices=LATENTS, help="of each layer; both")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results", metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    place = options.out / device_slug(torch.device("cpu")) / "windows.jsonl"
    for latents in LATENTS if options.latents is None else [options.latents]:
        for state in STATES if options.only is None else [options.only]:
            rows = measure(latents, state)
            print(shown(rows), flush=True)
            store(place, rows)


if __name__ == "__main__":
    main()
