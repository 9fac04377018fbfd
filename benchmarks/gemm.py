"""The encoder's product on a CPU by MKL and by oneDNN: the measurement behind ``kernels/stock/linear.py``.

    python benchmarks/gemm.py

Both with bias, in fp32, on the same operands, in turn; rows go to ``results/<device>/gemm.jsonl``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out; the repository root stays out

import torch
from rows import Row, device_slug, environment, now_utc, store
from timing import OtherLoad, method, time_interleaved

from sae_kernels.stock import linear as stock_linear

SHAPES = ((2048, 768, 16384), (2048, 512, 65536), (4096, 4096, 8192), (128, 768, 16384), (1, 768, 16384))  # B, d, F
PROVIDERS = {
    "MKL": torch.addmm,
    "oneDNN": lambda bias, x, weight: torch.ops.mkldnn._linear_pointwise(x, weight.T, bias, "none", [], ""),
}


@torch.no_grad()
def measure(shape: tuple[int, int, int], by_latent: bool, seconds: float) -> list[Row]:
    """Rows of both; ``by_latent``: the weight is latent-contiguous in memory, otherwise row-major."""
    rows, width, latents = shape
    torch.manual_seed(0)
    x, bias = torch.randn(rows, width), torch.randn(latents)
    weight = torch.randn(latents, width).T if by_latent else torch.randn(width, latents)
    calls = [[lambda run=run: run(bias, x, weight)] for run in PROVIDERS.values()]
    others = OtherLoad()
    timings = time_interleaved(calls, x.device, budget_seconds=seconds)
    load = others.cores()
    return [
        {"op": "linear", "provider": provider, "shape": dict(zip("BDF", shape, strict=True)), "dtype": "float32",
         "weight": "latent-contiguous" if by_latent else "row-major", "chosen": stock_linear.by_onednn(x, weight),
         "seed": 0, "method": method(x.device), **environment(x.device), **timing.fields(), "other_load": load,
         "utc": now_utc()}
        for provider, timing in zip(PROVIDERS, timings, strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the encoder's product by MKL and by oneDNN.")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each shape and layout")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results", metavar="FOLDER")
    options = parser.parse_args()
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        sys.exit("this build of PyTorch has not both of MKL and oneDNN: there is nothing to choose")
    stored: list[Row] = []
    for shape in SHAPES:
        for by_latent in (True, False):
            mkl, onednn = measure(shape, by_latent, options.seconds)
            stored += [mkl, onednn]
            print("B={} d={} F={}".format(*shape), f"{mkl['weight']:<18} MKL {mkl['ms_p50']:8.2f} ms, oneDNN "
                  f"{onednn['ms_p50']:8.2f} ms; chosen here: {'oneDNN' if mkl['chosen'] else 'MKL'}")  # fmt: skip
    store(options.out / device_slug(torch.device("cpu")) / "gemm.jsonl", stored)


if __name__ == "__main__":
    main()
