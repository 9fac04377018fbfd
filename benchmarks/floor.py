"""A training step on a CPU beside what no exact one avoids, and slabs of a wide dictionary beside the bare product.

    python benchmarks/floor.py                      # two to three minutes of an idle machine, all its threads

In turn, round by round, in fp32, B=2048 d=768 k=32: with 16,384 latents a whole TrainStep, the encoder's product alone
and torch's fused Adam alone on both weights; with 131,072 latents the bare product into memory that is there, encoder
and TopK on whole pre-activations, and in slabs of a tenth of their memory. Rows go to ``results/<device>/floor.jsonl``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out; the repository root stays out

import torch
from rows import Row, device_slug, environment, now_utc, store
from timing import OtherLoad, method, time_interleaved

import sae_engine as se
from sae_engine._slabs import rectangles, running_of
from sae_engine.training import TrainStep
from sae_engine.training.forward import PreActivations
from sae_kernels.stock.linear import whole_rows_from

B, D, K = 2048, 768, 32
STEP_LATENTS, WIDE_LATENTS = 16_384, 131_072
SHARE = 10  # of the whole pre-activations' memory that slabs take: a tenth
PRODUCT, ADAM, STEP = "encoder's product", "fused Adam", "TrainStep"
BARE, WHOLE, SLABS = "bare product", "whole, TopK", "slabs, TopK"
Calls = dict[str, Callable[[], object]]


def step_calls() -> Calls:
    torch.manual_seed(0)
    x = torch.randn(B, D)
    step = TrainStep(se.SparseAutoencoder(D, STEP_LATENTS, se.TopK(K)), lr=1e-4)
    weights = [torch.nn.Parameter(torch.randn(STEP_LATENTS, D)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    adam, buffer, encoder = torch.optim.Adam(weights, lr=1e-4, fused=True), PreActivations(), weights[0].detach().T
    return {STEP: lambda: step(x), PRODUCT: lambda: buffer.product(x, encoder, None), ADAM: adam.step}


def slab_calls() -> Calls:
    """As a training step encodes: into one buffer, which serves every call."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(B, D), torch.randn(WIDE_LATENTS, D), torch.randn(WIDE_LATENTS)
    rule, whole, slab = se.TopK(K), PreActivations(), PreActivations()

    def in_slabs() -> se.SparseCodes:
        (running,), shape = running_of(
            [rule], [{}], B, WIDE_LATENTS, B * WIDE_LATENTS // SHARE, "auto", dense_gradient=False,
            whole_rows_from=whole_rows_from(x, weight.T),
        )
        for part in rectangles(B, WIDE_LATENTS, shape):
            running.add(slab.product(x[part.tokens], weight[part.latents].T, bias[part.latents]), *part)
        return running.finish()[0]

    def at_once() -> se.SparseCodes:
        return rule.select(whole.product(x, weight.T, bias))

    with torch.no_grad():
        same = (in_slabs().indices == at_once().indices).float().mean()
    if same < 0.999:  # products of other sizes round apart, so that a few entries trade places at the cut
        raise RuntimeError(f"{SLABS} keeps other entries than {WHOLE}: only {same:.4f} of them are the same")
    return {BARE: lambda: whole.product(x, weight.T, None), WHOLE: at_once, SLABS: in_slabs}


@torch.no_grad()
def measure(latents: int, calls: Calls, seconds: float) -> list[Row]:
    others, device = OtherLoad(), torch.device("cpu")
    timings = time_interleaved([[call] for call in calls.values()], device, budget_seconds=seconds)
    load = others.cores()
    return [
        {"kind": "floor", "provider": name, "shape": {"B": B, "d": D, "F": latents, "k": K}, "dtype": "float32",
         "seed": 0, "method": method(device), **environment(device), **timing.fields(), "other_load": load,
         "utc": now_utc()}
        for name, timing in zip(calls, timings, strict=True)
    ]  # fmt: skip


def shown(rows: list[Row], over: tuple[str, ...]) -> str:
    """Medians, and what they are of the sum of the floor's."""
    floor = sum(row["ms_p50"] for row in rows if row["provider"] in over)
    lines = [f"F={rows[0]['shape']['F']:,}, {rows[0]['device']}, other processes took {rows[0]['other_load']} cores"]
    for row in rows:
        ms = row["ms_p50"]
        lines.append(f"  {row['provider']:<18} {ms:8.1f} ms  {ms / floor:5.2f} ×  ({row['samples']} rounds)")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="A CPU's training step and its slabs beside the bare product.")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each of the two comparisons")
    parser.add_argument("--only", choices=("step", "slabs"), help="one of them")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results", metavar="FOLDER")
    options = parser.parse_args()
    found: list[Row] = []
    for name, latents, make, over in (
        ("step", STEP_LATENTS, step_calls, (PRODUCT, ADAM)), ("slabs", WIDE_LATENTS, slab_calls, (BARE,)),
    ):  # fmt: skip
        if options.only in (None, name):
            rows = measure(latents, make(), options.seconds)
            print(shown(rows, over), flush=True)
            found += rows
    store(options.out / device_slug(torch.device("cpu")) / "floor.jsonl", found)


if __name__ == "__main__":
    main()
