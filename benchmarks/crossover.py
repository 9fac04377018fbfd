"""From which density on codes are better densified: the measurement behind ``densified.DENSE_SHARE``.

    python benchmarks/crossover.py [--device cuda] [--rows 8]

Times each operation on codes both ways over k and prints, per operation, the share k / F at which the GEMM overtakes
the gathers (log-linear between the two k around it). Rows go to ``results/<device>/crossover.jsonl``.
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out; the repository root stays out

import torch
from rows import Row, device_slug, environment, now_utc, store
from timing import method, time_interleaved
from tqdm import tqdm

from sae_engine import functional
from sae_engine.testing import force_dense
from sae_kernels.ops import ops
from sae_kernels.stock import densified

SIZES = {"cpu": (1024, 768, 8192, torch.float32), "cuda": (4096, 768, 32768, torch.bfloat16)}  # B, D, F, dtype
SHARES = [1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]


def calls(k: int, rows: int, device: torch.device) -> dict[str, object]:
    """Each operation on codes of k distinct latents a row."""
    _, width, num_latents, dtype = SIZES[device.type]
    torch.manual_seed(0)
    codes = functional.topk(torch.randn(rows, num_latents, device=device, dtype=dtype), k, relu=False)
    weight = torch.randn(num_latents, width, device=device, dtype=dtype)
    grad = torch.randn(rows, width, device=device, dtype=dtype)
    triple, transposed = (codes.values, codes.indices, codes.offsets), codes.by_latent
    backend = "triton" if device.type == "cuda" else "torch"
    return {
        "decode": lambda: ops.decode(*triple, weight, None, dtype, None, None, None, backend),
        "decode_backward_values": lambda: ops.decode_backward_values(grad, *triple, weight, backend),
        "decode_backward_weight": lambda: ops.decode_backward_weight(grad, codes.values, *transposed, dtype, backend),
    }


def forced(call, share: float):
    """The call with its path chosen: 0 densifies, infinity gathers."""

    def run():
        kept = densified.DENSE_SHARE
        densified.DENSE_SHARE = force_dense(share)
        try:
            return call()
        finally:
            densified.DENSE_SHARE = kept

    return run


def overtaken(ratios: list[float]) -> float | None:
    """The share at which gathers / GEMM first reaches 1; None where it never does."""
    for (low, a), (high, b) in pairwise(zip(SHARES, ratios, strict=True)):
        if a < 1 <= b:
            return math.exp(math.log(low) + math.log(high / low) * -math.log(a) / math.log(b / a))
    return SHARES[0] if ratios[0] >= 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Time operations on codes as gathers and as GEMMs over the density.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results", metavar="FOLDER")
    parser.add_argument("--rows", type=int, help="tokens, where those are few (densified.FEW_ROWS)")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows, width, num_latents, dtype = SIZES[device.type]
    rows = options.rows or rows
    measured: dict[str, list[float]] = {}
    stored: list[Row] = []
    for share in tqdm(SHARES, unit="density"):
        k = round(share * num_latents)
        for name, call in calls(k, rows, device).items():
            paths = {"gathers": forced(call, math.inf), "gemm": forced(call, 0.0)}
            timings = time_interleaved([[run] for run in paths.values()], device, budget_seconds=2, least_rounds=3)
            measured.setdefault(name, []).append(timings[0].ms_p50 / timings[1].ms_p50)
            shape = {"B": rows, "D": width, "F": num_latents, "K": k}
            stored += [
                {"op": name, "provider": path, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "seed": 0,
                 "method": method(device), **environment(device), **timing.fields(), "utc": now_utc()}
                for path, timing in zip(paths, timings, strict=True)
            ]  # fmt: skip
    store(options.out / device_slug(device) / "crossover.jsonl", stored)
    print("gathers / GEMM by share   " + "  ".join(f"1/{round(1 / s)}" for s in SHARES))
    for name, ratios in measured.items():
        at = overtaken(ratios)
        print(f"{name:<25} " + "  ".join(f"{r:.2f}" for r in ratios), f"  → {'never' if at is None else f'{at:.4f}'}")


if __name__ == "__main__":
    main()
