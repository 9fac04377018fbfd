"""A training step of cross-layer transcoders and of a crosscoder on a CPU, beside dense PyTorch and what none avoids.

    python benchmarks/crosslayer.py                     # one thread; a few minutes
    python benchmarks/crosslayer.py --only crosscoder --seconds 20

In fp32, a whole step each: forward, gradients, Adam; transcoders by TopK, the crosscoder by BatchTopK ranked by the sum
of each latent's decoder norms. In turn, round by round, by the time of this process' own processor, so that others on
the machine count as little as may be. ``dense, a source`` is the fastest dense form, one product for all the sites that
a source writes, autograd and fused Adam; ``dense, a pair`` has one for each of them, as published trainers do.
``floor`` is the encoders' products and fused Adam alone. Rows go to
``results/<device>/crosslayer.jsonl``; ``TrainStep`` is to be 2.6, 2.6, 3.4 and 4.5 times as fast as the first.
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
from sae_engine.training import TrainStep
from sae_engine.training.forward import PreActivations

METHOD = "process_time of one thread; variants interleaved round by round; median and 20th/80th percentile"
OURS, AUTOGRAD, FLOOR = "TrainStep", "encode and decode, autograd", "floor"
DENSE, PAIRS = "dense, a source", "dense, a pair"
# Layers (of a crosscoder: models), width, latents, k, tokens; and how many times as fast as dense a step is to be.
SIZES = {
    "clt 6": (6, 128, 2048, 16, 1024, 2.6), "clt 12": (12, 128, 2048, 16, 512, 2.6),
    "clt wide": (6, 256, 8192, 16, 512, 3.4), "crosscoder": (2, 256, 8192, 32, 1024, 4.5),
}  # fmt: skip
LEARNING_RATE = 1e-4
Calls = dict[str, Callable[[], object]]


def made(name: str, seed: int = 0) -> se.Crosscoder:
    torch.manual_seed(seed)
    layers, d, latents, k, *_ = SIZES[name]
    if name == "crosscoder":
        return se.Crosscoder([d] * layers, [d] * layers, latents, se.BatchTopK(k), decoder_norm="sum",
                             rescale_acts_by_decoder_norm=True)  # fmt: skip
    return se.Crosscoder.clt(layers, d, latents, se.TopK(k))


def dense(coder: se.Crosscoder, x: Tensor, k: int, *, by_pair: bool) -> Tensor:
    """The reconstruction (B, d_out) through dense codes."""
    out = coder.b_dec.expand(len(x), -1).clone()
    for source in coder.sources:
        pre = x[:, source.reads] @ source.W_enc + source.b_enc
        if isinstance(coder.activation, se.BatchTopK):
            score = (torch.relu(pre) * coder.norms_of(source)).detach().flatten()
            kept = torch.zeros_like(score).scatter(0, score.topk(k * len(x)).indices, 1.0)
            codes = torch.relu(pre) * kept.view_as(pre)
        else:
            values, indices = pre.topk(k, dim=1)
            codes = torch.zeros_like(pre).scatter(1, indices, torch.relu(values))
        if not by_pair:
            out[:, source.writes] += codes @ source.W_dec
            continue
        width = coder.written_widths[0]
        for number in range(len(source.written_sites)):
            first = source.writes.start + number * width
            out[:, first : first + width] += codes @ source.W_dec[:, number * width : (number + 1) * width]
    return out


def calls_of(name: str) -> Calls:
    layers, d, _, k, tokens, _ = SIZES[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, layers * d, generator=generator)
    target = x if name == "crosscoder" else torch.randn(tokens, layers * d, generator=generator)

    def ordinary(forward: Callable[[se.Crosscoder], Tensor]) -> Callable[[], object]:
        coder = made(name)
        optimizer = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE, fused=True)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = (forward(coder) - target).square().sum() / tokens
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    step = TrainStep(made(name), lr=LEARNING_RATE)
    coder, buffer = made(name), PreActivations()
    adam = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE, fused=True)
    for p in coder.parameters():
        p.grad = torch.zeros_like(p)

    @torch.no_grad()
    def floor() -> None:
        for source in coder.sources:
            buffer.product(x[:, source.reads], source.W_enc, source.b_enc)
        adam.step()

    return {
        OURS: lambda: step(x, target)["loss"], AUTOGRAD: ordinary(lambda coder: coder(x)),
        DENSE: ordinary(lambda coder: dense(coder, x, k, by_pair=False)),
        PAIRS: ordinary(lambda coder: dense(coder, x, k, by_pair=True)), FLOOR: floor,
    }  # fmt: skip


def check(calls: Calls) -> None:
    """RuntimeError where a first step's loss is another: what is timed does the same work."""
    losses = {name: float(call()) for name, call in calls.items() if name != FLOOR}  # type: ignore[arg-type]
    for name, loss in losses.items():
        if abs(loss - losses[DENSE]) > 1e-4 * abs(losses[DENSE]):
            raise RuntimeError(f"{name} has a loss of {loss}, {DENSE} of {losses[DENSE]}")


def measure(name: str, seconds: float) -> list[Row]:
    calls, others, device = calls_of(name), OtherLoad(), torch.device("cpu")
    check(calls)
    taken: dict[str, list[float]] = {provider: [] for provider in calls}
    started = time.perf_counter()
    while len(taken[FLOOR]) < 3 or time.perf_counter() - started < seconds:
        for provider, call in calls.items():
            before = time.process_time()
            call()
            taken[provider].append((time.process_time() - before) * 1e3)
    load, (layers, d, latents, k, tokens, _) = others.cores(), SIZES[name]
    shape = {"L": layers, "d": d, "F": latents, "k": k, "B": tokens}
    return [
        {"kind": "crosslayer", "case": name, "provider": provider, "baseline": provider == DENSE, "shape": shape,
         "dtype": "float32", "threads": 1, "seed": 0, "method": METHOD, **environment(device),
         **summarize(times).fields(), "other_load": load, "utc": now_utc()}
        for provider, times in taken.items()
    ]  # fmt: skip


def shown(rows: list[Row]) -> str:
    """Medians, and how many times as long as ours each takes."""
    ms = {row["provider"]: row["ms_p50"] for row in rows}
    lines = [f"{rows[0]['case']} {rows[0]['shape']}, {rows[0]['device']}, others took {rows[0]['other_load']} cores"]
    lines += [f"  {provider:<28} {time_:8.1f} ms  {time_ / ms[OURS]:5.2f} × ours" for provider, time_ in ms.items()]
    return "\n".join([*lines, f"  to be {SIZES[rows[0]['case']][-1]} times as fast as {DENSE}"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps of cross-layer coders on a CPU beside dense PyTorch.")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each size")
    parser.add_argument("--only", choices=[*SIZES], help="one of them")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results", metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: list[Row] = []
    for name in SIZES if options.only is None else [options.only]:
        rows = measure(name, options.seconds)
        print(shown(rows), flush=True)
        found += rows
    store(options.out / device_slug(torch.device("cpu")) / "crosslayer.jsonl", found)


if __name__ == "__main__":
    main()
