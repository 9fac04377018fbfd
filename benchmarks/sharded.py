"""A training step whose latents are cut over ranks: what it sends, computes, holds and takes, beside the estimate.

    python benchmarks/sharded.py                                        # on this machine's CPUs: 1, 2 and 4 ranks
    python benchmarks/sharded.py --data 2                               # 2 and 4 ranks in two groups
    torchrun --nproc-per-node=8 benchmarks/sharded.py --width 4096 --latents 1048576 --k 64 --tokens 32768

Under torchrun it measures that many ranks: bytes by part, beside what ``se.distributed.estimate`` says; milliseconds of
a step, of a shard's work without the others, and of each large collective alone, with its
GB/s. Without it, it starts torchrun for each number of ranks. Ranks that share a machine's cores slow one another down:
on CPUs only bytes, memory and a shard's work mean something.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))

import torch

import sae_engine as se
from sae_engine.distributed.layout import Ownership
from sae_engine.distributed.wire import shares

REPEATS = 5
# Parts of the estimate → collectives of a step with TopK, whose bytes they are.
PARTS = {"x": ("x",), "candidates": ("candidates",), "counts": ("counts",), "parts of the output": ("x_hat",),
         "gradient of the output": ("gradient",), "gradients over data": ("gradients over groups",),
         "parameters over data": ("parameters over groups",), "fired over data": ("fired",)}  # fmt: skip


def timed(
    work: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Milliseconds of ``work``: the median of a few calls after one that is not counted."""
    found = []
    for _ in range(REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append((clock() - begun) * 1e3)
    return statistics.median(found[1:])


def peak(device: torch.device) -> int:
    """The most bytes that this process has held at one time."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_of(sae: se.SparseAutoencoder, args: argparse.Namespace) -> se.training.TrainStep:
    return se.training.TrainStep(sae, lr=1e-4, compute_dtype=args.dtype, memory_budget=args.memory_budget)


def measured(args: argparse.Namespace) -> dict[str, object]:
    """What one rank measures, in the mesh that torchrun has started."""
    mesh = se.distributed.from_env(data=args.data)
    ranks, device = mesh.size(), torch.device(mesh.device_type)
    rows, cut = args.tokens // ranks, ranks // args.data
    first = step_of(se.SparseAutoencoder(args.width, 256, se.TopK(4), device=device), args)
    first(torch.randn(64, args.width, device=device))  # with what libraries take when they are first used
    before = peak(device)
    sae = se.SparseAutoencoder(args.width, args.latents, se.TopK(args.k), mesh=mesh)
    step, x = step_of(sae, args), torch.randn(rows, args.width, device=device)
    step(x)
    held = peak(device) - before
    assert sae.shards is not None
    wire = sae.shards.wire
    wire.bytes.clear()
    step(x)
    sent = dict(wire.bytes)
    milliseconds = timed(lambda: step(x), device)
    narrow = getattr(torch, args.dtype)
    every = [rows] * cut
    whole = torch.randn(rows * cut, args.width, device=device)
    collectives: dict[str, Callable[[], object]] = {
        "x": lambda: wire.gather_rows(x.to(narrow), every, "x"),
        "x_hat": lambda: wire.scatter_rows(whole, every, "x_hat"),
    }
    across = sae.shards.across
    if across is not None:
        weights = torch.randn(sae.share.d_sae, 2 * args.width, device=device)
        of_ranks = shares(len(weights), across.size)
        mine = weights[: of_ranks[across.rank]]
        collectives["gradients over groups"] = lambda: across.scatter_rows(weights, of_ranks, "gradients over groups")
        collectives["parameters over groups"] = lambda: across.gather_rows(mine, of_ranks, "parameters over groups")
    alone = {name: timed(work, device) for name, work in collectives.items()}
    # A shard's work: as many latents on one rank, for the tokens of its group.
    largest = Ownership.over(args.latents, [cut], 0).largest
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # others may use the cores
    small = se.SparseAutoencoder(args.width, largest, se.TopK(min(args.k, largest)), device=device)
    own = step_of(small, args)
    shard = timed(lambda: own(whole), device, clock) if mesh.get_rank() == 0 else 0.0
    sae.shards.agreement.meet("step")  # the others wait: they would take the first one's cores
    known = se.distributed.estimate(
        args.width, args.latents, args.k, args.tokens, ranks, compute_dtype=args.dtype,
        memory_budget=args.memory_budget, hardware=se.distributed.Hardware(devices_per_node=ranks),
    )  # fmt: skip
    (of_mesh,) = (one for one in known.meshes if one.latent == cut)
    differs = {part: [sum(sent.get(name, 0) for name in names), of_mesh.sent_bytes[part]]
               for part, names in PARTS.items()}  # fmt: skip
    return {
        "ranks": ranks, "cut": cut, "sent": sent, "estimate": differs, "step_ms": milliseconds, "shard_ms": shard,
        "collective_ms": alone, "held": held, "held_estimate": sum(of_mesh.memory_bytes.values()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", "rank": mesh.get_rank(),
    }  # fmt: skip


def table(rows: list[dict], args: argparse.Namespace) -> list[str]:
    one = rows[0]
    lines = [
        f"d = {args.width}, {args.latents} latents, TopK({args.k}), {args.tokens} tokens, {args.dtype}; "
        f"groups: {args.data}; "
        f"{one['device']}, torch {torch.__version__}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 1)}", "",
        "| ranks | sent by a rank | estimate | a shard's work | of 1/G | held by a rank | estimate | step |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        sent, said = (sum(pair[n] for pair in row["estimate"].values()) / 1e6 for n in (0, 1))
        share = one["shard_ms"] * one["cut"] / row["cut"] / row["shard_ms"]
        lines.append(
            f"| {row['ranks']} | {sent:.2f} MB | {said:.2f} MB | {row['shard_ms']:.0f} ms | {share:.0%} | "
            f"{row['held'] / 1e6:.0f} MB | {row['held_estimate'] / 1e6:.0f} MB | {row['step_ms']:.0f} ms |"
        )
    for row in rows:
        for name, ms in row["collective_ms"].items():
            if row["sent"].get(name):
                rate = row["sent"][name] / ms / 1e6
                lines.append(f"{row['ranks']} ranks, {name} alone: {ms:.2f} ms, {rate:.2f} GB/s sent by a rank")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 256, "latents": 16384, "k": 32, "tokens": 1024, "memory-budget": 2**24}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--data", type=int, default=1, help="groups of ranks, each with all latents")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="without torchrun; what makes groups")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "RANK" in os.environ:
        row = measured(args)
        if row["rank"] == 0:
            if args.out is not None:
                args.out.write_text(json.dumps(row))
            else:
                print(*table([row], args), sep="\n")
        return
    rows = []
    kept = {name.replace("_", "-"): value for name, value in vars(args).items() if name not in ("ranks", "out")}
    given = [f"--{name}={value}" for name, value in kept.items()]
    for ranks in (number for number in args.ranks if number % args.data == 0):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "row.json")
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            environment = {"OMP_NUM_THREADS": "1", **os.environ}
            subprocess.run([*start, __file__, *given, f"--out={out}"], check=True, env=environment)
            rows.append(json.loads(out.read_text()))
    print(*table(rows, args), sep="\n")


if __name__ == "__main__":
    main()
