"""One token through a gated MLP on a CPU, dense and by ``sparse_mlp``: the table behind what ``se.lm`` promises.

    python benchmarks/lm.py --quick                 # one size, two dtypes, one thread: a minute
    python benchmarks/lm.py --threads 2             # all sizes

The gate is always computed, and a threshold keeps the share of its activations. Ways and sparsities take turns, weights
rotate over several layers, and inputs change, so that rows come from memory; the best of many runs counts. What is
timed is the process's time on processors over threads, which a busy machine does not stretch. Several threads need
OMP_WAIT_POLICY=passive, so that waiting costs none: set before anything is imported, unless it is set already.

Limit: the dense time if only bytes cost, of which (1 + 2 * kept) / 3 are left. A row's dense time is the better of
``F.linear`` and ``weight @ x``.
"""
from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from rows import environment
from torch import Tensor

from sae_engine import functional
from sae_kernels.stock.linear import one_row

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
SIZES = ((512, 2048), (1024, 4096), (2048, 8192), (4096, 14336))  # d, F
REQUIRED = {0.5: 0.95, 0.8: 1.45, 0.9: 1.75, 0.95: 2.0, 0.98: 2.3}  # from 2048 x 8192 on
DENSEST = 0.45  # of neurons kept that are still gathered; a layer with more runs dense
ROTATED_BYTES = 1 << 28  # of weights that take turns: several times what a CPU's caches hold

Layer = tuple[Tensor, Tensor, Tensor]  # gate and up (F, d); down (F, d), a row a neuron


def as_models_do(x: Tensor, layer: Layer, _threshold: float) -> Tensor:
    gate, up, down = layer
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down.T)


def by_vectors(x: Tensor, layer: Layer, _threshold: float) -> Tensor:
    gate, up, down = layer
    return (down.T @ (F.silu(gate @ x[0]) * (up @ x[0])))[None]


def sparse(x: Tensor, layer: Layer, threshold: float) -> Tensor:
    gate, up, down = layer
    activations = F.silu(one_row(x, gate, None))
    kept = torch.where(activations.abs() > threshold, activations, 0.0)
    return functional.sparse_mlp(x, kept, up, down, backend="torch")


DENSE: dict[str, Callable[..., Tensor]] = {"F.linear": as_models_do, "weight @ x": by_vectors}


class Setting:
    """Layers and inputs of one size, and the thresholds that keep a share of each layer's gate at each input."""

    def __init__(self, d: int, num_neurons: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        layers = max(ROTATED_BYTES // (3 * d * num_neurons * dtype.itemsize), 2)
        drawn = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        self.layers: list[Layer] = [
            tuple((drawn(num_neurons, d) / d**0.5).to(dtype) for _ in range(3)) for _ in range(layers)  # type: ignore[misc]
        ]
        self.inputs = [drawn(1, d).to(dtype) for _ in range(3)]
        self.turns = list(itertools.product(range(layers), range(len(self.inputs))))
        self.thresholds = {
            (turn, sparsity): self._threshold(*turn, sparsity) for turn in self.turns for sparsity in SPARSITIES}

    def _threshold(self, layer: int, number: int, sparsity: float) -> float:
        gate = F.silu(self.layers[layer][0] @ self.inputs[number][0]).abs().float()
        return float(gate.kthvalue(round(sparsity * len(gate))).values)

    def check(self) -> None:
        """What is timed is right: against the dense MLP of what is kept, in fp64, where 16 bits round a few times."""
        turn = self.turns[0]
        x, (gate, up, down) = self.inputs[turn[1]], self.layers[turn[0]]
        threshold = self.thresholds[turn, 0.9]
        activations = F.silu(one_row(x, gate, None))
        kept = torch.where(activations.abs() > threshold, activations, 0.0).double()
        truth = (kept * (x.double() @ up.double().T)) @ down.double()
        error = (sparse(x, (gate, up, down), threshold).double() - truth).abs().max() / truth.abs().max()
        if not error <= 4 * torch.finfo(x.dtype).eps * (1 if x.dtype.itemsize == 2 else 16):
            raise SystemExit(f"sparse_mlp is off by {error:.1e} of the largest number")


def measured(setting: Setting, seconds: float, threads: int) -> dict[str | float, float]:
    """The best milliseconds of each dense way, by its name, and of the sparse one, by its sparsity."""
    best: dict[str | float, float] = {}
    runs: list[tuple[str | float, Callable[..., Tensor]]] = [*DENSE.items(), *((s, sparse) for s in SPARSITIES)]
    turns = itertools.cycle(setting.turns)
    end, rounds = time.monotonic() + seconds, 0
    while rounds < 3 or time.monotonic() < end:
        for name, run in runs:
            turn = next(turns)
            threshold = setting.thresholds[turn, name] if isinstance(name, float) else 0.0
            x, layer = setting.inputs[turn[1]], setting.layers[turn[0]]
            start = time.process_time()
            run(x, layer, threshold)
            best[name] = min(best.get(name, float("inf")), (time.process_time() - start) * 1e3 / threads)
        rounds += 1
    return best


def table(best: dict[str | float, float], d: int, num_neurons: int, dtype: torch.dtype) -> list[str]:
    dense = min(best[name] for name in DENSE)
    name = str(dtype).removeprefix("torch.")
    cells = [f"{dense / best[s]:.2f}" for s in SPARSITIES]
    if d >= 2048:
        cells = [f"{cell} ({'met' if dense / best[s] >= REQUIRED[s] or 1 - s > DENSEST else 'MISSED'})"
                 for s, cell in zip(SPARSITIES, cells, strict=True)]  # fmt: skip
    ways = ", ".join(f"{way} {best[way]:.2f}" for way in DENSE)
    return [f"| {d} x {num_neurons} {name} | {dense:.2f} ms ({ways}) | " + " | ".join(cells) + " |"]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Time one token's gated MLP, dense and sparse, on a CPU.")
    parser.add_argument("--quick", action="store_true", help="2048 x 8192 alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each size and dtype (default: 20)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = environment(torch.device("cpu"))
    print(", ".join(f"{name} {known[name]}" for name in ("device", "torch", "commit") if name in known)
          + f", {options.threads} thread(s); processor time over threads, best of many")  # fmt: skip
    print("| d x F | dense | " + " | ".join(f"{s:.0%}" for s in SPARSITIES) + " |")
    print("|---" * (2 + len(SPARSITIES)) + "|")
    print("| limit by bytes | | " + " | ".join(f"{3 / (3 - 2 * s):.2f}" for s in SPARSITIES) + " |")
    for d, num_neurons in ((2048, 8192),) if options.quick else SIZES:
        for name in options.dtypes:
            setting = Setting(d, num_neurons, getattr(torch, name))
            setting.check()
            best = measured(setting, options.seconds, options.threads)
            print(*table(best, d, num_neurons, getattr(torch, name)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
