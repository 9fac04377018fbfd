"""Each library's own training step before and after ``se.accelerate``, side by side.

    python benchmarks/interop.py                                     # B=2048 d=768 F=16384 k=32, fp32
    python benchmarks/interop.py --size 256 64 1024 8 --only sparsify

What is timed is the library's trainer doing one step, gradient clipping, optimizer and statistics included; where its
trainer cannot be stepped from outside (sparsify), its training loop's calls in order. Both are made from the same seed,
their losses are compared first, and rounds are interleaved. Rows go to ``results/<device>/interop.jsonl``.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out; the repository root stays out
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # on a CPU its Triton decoder raises

import torch
from rows import Row, device_slug, environment, now_utc, store
from timing import OtherLoad, method, peak_memory_bytes, time_interleaved

import sae_engine as se

Step = Callable[[], object]


def batches(size: tuple[int, ...], device: torch.device) -> Iterator[torch.Tensor]:
    """Four batches in turn, the same for everyone."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(size[:2], generator=generator).to(device) for _ in range(4)]
    while True:
        yield from made


def sae_lens(architecture: str, k: float, **when_accelerated):
    def make(size: tuple[int, ...], device: torch.device, accelerated: bool) -> Step:
        from sae_lens import saes
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        B, d, F, _ = size
        options = when_accelerated if accelerated else {}
        config = getattr(saes, f"{architecture}Config")(d_in=d, d_sae=F, k=k * size[3], device=str(device), **options)
        cfg = SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=B, device=str(device), lr_end=3e-4,
            logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        data = batches(size, device)
        trainer = SAETrainer(cfg=cfg, sae=getattr(saes, architecture)(config), data_provider=data)
        return lambda: trainer.step(next(data)).loss

    return make


def dictionary_learning(name: str):
    def make(size: tuple[int, ...], device: torch.device, accelerated: bool) -> Step:
        from dictionary_learning import trainers

        _, d, F, k = size
        trainer = getattr(trainers, name)(
            steps=10**6, activation_dim=d, dict_size=F, k=k, layer=0, lm_name="none", seed=0, device=str(device)
        )
        data = batches(size, device)
        trainer.update(0, next(data))  # finds the geometric median
        return lambda: torch.tensor(trainer.update(1, next(data)))

    return make


def sparsify(size: tuple[int, ...], device: torch.device, accelerated: bool) -> Step:
    from sparsify import SparseCoder, SparseCoderConfig

    _, d, F, k = size
    coder = SparseCoder(d, SparseCoderConfig(num_latents=F, k=k), device=device)
    optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4)
    data = batches(size, device)
    fired = torch.zeros(F, dtype=torch.bool, device=device)

    def step() -> torch.Tensor:
        coder.set_decoder_norm_to_unit_norm()
        x = next(data)
        out = coder(x=x, y=x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())
        fired[out.latent_indices.flatten()] = True
        (out.fvu + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        return out.fvu

    return step


# name -> library, its package, what makes its training step
STEPS = {
    "SAELens TopK": ("sae_lens", "sae-lens", sae_lens("TopKTrainingSAE", 1)),
    # SAELens' own option. It does not run on a CPU unless accelerated, so the plain step is dense here too.
    "SAELens TopK, use_sparse_activations": (
        "sae_lens", "sae-lens", sae_lens("TopKTrainingSAE", 1, use_sparse_activations=True),
    ),
    "SAELens BatchTopK": ("sae_lens", "sae-lens", sae_lens("BatchTopKTrainingSAE", 1.0)),
    "dictionary_learning TopK": ("dictionary_learning", "dictionary-learning", dictionary_learning("TopKTrainer")),
    "dictionary_learning BatchTopK": (
        "dictionary_learning", "dictionary-learning", dictionary_learning("BatchTopKTrainer"),
    ),
    "sparsify TopK": ("sparsify", "eai-sparsify", sparsify),
}  # fmt: skip


def measure(name: str, size: tuple[int, ...], device: torch.device, seconds: float) -> list[Row]:
    """Rows of a library's step, plain and accelerated."""
    library, package, make = STEPS[name]
    steps: dict[str, Step] = {}
    for provider in ("plain", "accelerated"):
        torch.manual_seed(0)
        with se.accelerated(library) if provider == "accelerated" else nullcontext():
            steps[provider] = make(size, device, provider == "accelerated")
    losses = {provider: float(step()) for provider, step in steps.items()}  # the first step warms up, and must agree
    if abs(losses["accelerated"] - losses["plain"]) > 1e-4 * abs(losses["plain"]):
        sys.exit(f"{name}: losses differ after one step: {losses}")
    others = OtherLoad()
    timings = time_interleaved([[step] for step in steps.values()], device, budget_seconds=seconds)
    load = others.cores()
    shape = dict(zip(("B", "D", "F", "K"), size, strict=True))
    version = f"{package} {metadata.version(package)}"
    return [
        {"op": "training_step", "library": version, "model": name, "provider": provider, "shape": shape,
         "dtype": "float32", "seed": 0, "method": method(device), **environment(device), **timing.fields(),
         "peak_mem_bytes": peak_memory_bytes(steps[provider], device), "other_load": load, "utc": now_utc()}
        for provider, timing in zip(steps, timings, strict=True)
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time other libraries' training steps, plain and accelerated.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, nargs=4, default=(2048, 768, 16384, 32), metavar=("B", "d", "F", "k"))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each library's step")
    parser.add_argument("--only", default="", metavar="TEXT", help="steps whose name contains this")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results", metavar="FOLDER")
    options = parser.parse_args(arguments)
    device, size = torch.device(options.device), tuple(options.size)
    chosen = [name for name in STEPS if options.only.lower() in name.lower()]
    if not chosen:
        sys.exit(f"--only {options.only}: no step's name contains that; there are {', '.join(STEPS)}")
    warnings.simplefilter("ignore")  # the libraries' own
    print("B={} d={} F={} k={}, {}".format(*size, device))
    for name in chosen:
        try:
            rows = measure(name, size, device, options.seconds)
        except ImportError as error:
            print(f"{name:<38} skipped: {error}")
            continue
        store(options.out / device_slug(device) / "interop.jsonl", rows)
        plain, fast = rows
        ratio = plain["ms_p50"] / fast["ms_p50"]
        print(f"{name:<38} {plain['ms_p50']:9.1f} ms → {fast['ms_p50']:9.1f} ms  {ratio:5.2f}×  "
              f"(other processes kept {fast['other_load']} cores busy)")  # fmt: skip


if __name__ == "__main__":
    main()
