"""Instructions that warps execute and bytes that they ask for where data decides: counted in the emulator of PTX.

    python benchmarks/counted.py                    # results/kernel-report/counted.json, which predict.py reads

The kernels are compiled for sm_90 and run by ``tests/emulator`` on normal numbers: slabs of latents merged into what
rows hold, one after the other, and the latent pass with as many entries a latent as a step has. Counts are of PTX,
whose instructions are nearly those of the binary. It needs g++ and no GPU.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "emulator"))

import torch
from rows import environment, write_atomically

import ptx_emulator
from sae_kernels import dispatch
from sae_kernels._terms import GATED, Term, lists_of
from sae_kernels.ops import ops

RESULTS = Path(__file__).resolve().parent / "results" / "kernel-report" / "counted.json"
BF16 = torch.bfloat16
SECTOR = 32  # bytes
ROWS, SLAB, SLABS, K = 4, 4096, 84, 32
# d, entries a latent: S2, the shape that NVIDIA has published, and a source of a cross-layer transcoder of GPT-2
PASSES = (768, 1.0), (2688, 8 / 21), (768, 10 / 3)
LATENTS = 84


def _launches(kernel: str) -> list[tuple[float, float]]:
    """Of the launches of a kernel since the last call: warp instructions and bytes, of a program."""
    found = [record for record in ptx_emulator.records if record.kernel == kernel]
    ptx_emulator.records.clear()
    return [(r.steps / _programs(r.grid), SECTOR * int(r.counters.sectors.sum()) / _programs(r.grid)) for r in found]


def _programs(grid: tuple[int, int, int]) -> int:
    return grid[0] * grid[1] * grid[2]


def merges() -> dict:
    """Slab after slab of latents: what one row costs, by the number of the slab; the first is selected from alone."""
    torch.manual_seed(0)
    pre = torch.randn(ROWS, SLAB * SLABS).to(BF16)
    indices = ops.topk(pre[:, :SLAB].contiguous(), None, None, K, False, False, "torch")[1].view(ROWS, K)
    values = pre.gather(1, indices.long())
    ptx_emulator.records.clear()
    for first in range(SLAB, pre.shape[1], SLAB):
        slab = pre[:, first : first + SLAB].contiguous()
        ops.merge_topk(values, None, indices, slab, None, None, first, False, "triton")
    if not torch.equal(values.sort(1).values, pre.topk(K).values.sort(1).values):
        raise RuntimeError("merge_topk on the emulator keeps other entries than torch.topk")
    found = _launches("_merge_topk_kernel")
    return {"C": SLAB, "k": K, "instructions": [round(i) for i, _ in found], "bytes": [round(b) for _, b in found]}


def latent_pass(width: int, entries_a_latent: float) -> dict:
    """What one program of the latent pass costs, which has some latents."""
    torch.manual_seed(0)
    entries = round(LATENTS * entries_a_latent)
    rows = -(-entries // 4)
    indices = torch.stack([torch.randperm(LATENTS)[:4].sort().values for _ in range(rows)]).flatten()[:entries].int()
    offsets = torch.arange(0, 4 * rows + 1, 4).clamp(max=entries)
    parameters = [torch.randn(LATENTS, width), torch.randn(LATENTS, width), torch.randn(LATENTS)]
    moments = [[torch.rand_like(p) for p in parameters] for _ in range(2)]
    copies = [p.to(BF16) for p in parameters[:2]]
    index = ops.by_latent(indices, offsets, LATENTS, "torch")
    empty = torch.empty(0, dtype=BF16)
    term = Term(torch.randn(rows, width).to(BF16), torch.rand(entries).to(BF16), empty, indices, offsets, *index, GATED)
    ptx_emulator.records.clear()
    ops.latent_adam(
        parameters, *moments, copies, torch.randn(rows, width).to(BF16), None, *lists_of([term]), torch.tensor(3.0),
        torch.tensor(1e-4), 0.9, 0.999, 1e-8, 0.0, True, torch.tensor(False), "triton",
    )  # fmt: skip
    ((instructions, size),) = _launches("_latents_kernel")
    return {"d": width, "entries_a_latent": entries_a_latent, "instructions": round(instructions), "bytes": round(size)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what warps execute in the emulator of PTX.")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args()
    ptx_emulator.install(arch=90, num_sms=132, seed=1, resident=1)
    on_cpu_tensors = mock.patch.object(dispatch, "interprets_triton", return_value=True)
    with ptx_emulator.configured(count=True, checks=()), on_cpu_tensors:
        found = {"merges": merges(), "latents": [latent_pass(*sizes) for sizes in PASSES]}
    made = {"triton": metadata.version("triton"), "torch": metadata.version("torch"),
            "commit": environment(torch.device("cpu"))["commit"]}  # fmt: skip
    write_atomically(options.out, json.dumps({**made, **found}, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
