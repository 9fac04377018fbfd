"""A training step of cross-layer transcoders and of a crosscoder, beside dense PyTorch and what none avoids.

    python benchmarks/crosslayer.py                     # one thread; a few minutes
    python benchmarks/crosslayer.py --only crosscoder --seconds 20
    python benchmarks/crosslayer.py --device cuda       # GPT-2's size in bf16 on a GPU

A whole step each: forward, gradients, Adam; transcoders by TopK, the crosscoder by BatchTopK ranked by the sum of each
latent's decoder norms. On a CPU in fp32, in turn, round by round, by the time of this process' own processor, so that
others on the machine count as little as may be. ``dense, a source`` is the fastest dense form, one product for all the
sites that a source writes, autograd and fused Adam; ``dense, a pair`` has one for each of them, as published trainers
do. ``floor`` is the encoders' products and fused Adam alone. Rows go to ``results/<device>/crosslayer.jsonl``;
``TrainStep`` is to be 2.6, 2.6, 3.4 and 4.5 times as fast as the first.

On a GPU products are in bf16, parameters and Adam in fp32, one variant after the other by CUDA events, and ``floor`` is
the encoders' products by cuBLAS and what Adam moves (26 bytes a parameter) at the rate of a copy. The dense forms run
under autocast; compiled, they are one graph with their backward. Before anything is timed, an update in fp32 of a coder
whose rows no tile of the latent pass holds is compared with the dense one's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out; the repository root stays out

import torch
from rows import Row, device_slug, environment, failure, now_utc, store
from timing import OtherLoad, summarize
from torch import Tensor
from wide import COLD, TIMED, copied_gb_a_second, milliseconds

import sae_engine as se
from sae_engine.training import TrainStep, state_bytes
from sae_engine.training.forward import PreActivations

METHOD = "process_time of one thread; variants interleaved round by round; median and 20th/80th percentile"
GPU_METHOD = f"CUDA events around steps in a row; one variant after the other; {TIMED} steps after {COLD}"
OURS, AUTOGRAD, FLOOR = "TrainStep", "encode and decode, autograd", "floor"
DENSE, PAIRS, COMPILED = "dense, a source", "dense, a pair", "dense, a source, compiled"
# Layers (of a crosscoder: models), width, latents, k, tokens; and how many times as fast as dense a step is to be.
SIZES = {
    "clt 6": (6, 128, 2048, 16, 1024, 2.6), "clt 12": (12, 128, 2048, 16, 512, 2.6),
    "clt wide": (6, 256, 8192, 16, 512, 3.4), "crosscoder": (2, 256, 8192, 32, 1024, 4.5),
}  # fmt: skip
GPU_SIZES = {"clt gpt2": (12, 768, 24_576, 10, 8192, 3.5)}
CHECKED = (3, 3072, 1024, 10, 64, 0)  # on a GPU before: rows of 9,216, 6,144 and 3,072 numbers
LEARNING_RATE = 1e-4
Calls = dict[str, Callable[[], object]]


def made(name: str, seed: int = 0, device: str = "cpu") -> se.Crosscoder:
    torch.manual_seed(seed)
    layers, d, latents, k, *_ = (SIZES | GPU_SIZES)[name]
    if name == "crosscoder":
        return se.Crosscoder([d] * layers, [d] * layers, latents, se.BatchTopK(k), decoder_norm="sum",
                             rescale_acts_by_decoder_norm=True)  # fmt: skip
    return se.Crosscoder.clt(layers, d, latents, se.TopK(k), device=device)


def dense(coder: se.Crosscoder, x: Tensor, k: int, *, by_pair: bool) -> Tensor:
    """The reconstruction (B, d_out) through dense codes."""
    out = coder.b_dec.expand(len(x), -1).clone()
    for source in coder.sources:
        pre = torch.addmm(source.b_enc, x[:, source.reads], source.W_enc)
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


# --- on a GPU --------------------------------------------------------------------------------------------------------


def data_of(size: tuple, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs and targets (tokens, layers d)."""
    layers, d, _, _, tokens, _ = size
    generator = torch.Generator(device).manual_seed(1)
    x, target = torch.randn(2, tokens, layers * d, generator=generator, device=device).to(dtype)
    return x, target


def dense_step(coder: se.Crosscoder, x: Tensor, target: Tensor, k: int, lr: float, eps: float, *, by_pair: bool = False,
               compiled: bool = False, autocast: bool = True) -> Callable[[], Tensor]:  # fmt: skip
    optimizer = torch.optim.Adam(coder.parameters(), lr=lr, eps=eps, fused=True)

    def loss_of(x: Tensor, target: Tensor) -> Tensor:
        return (dense(coder, x, k, by_pair=by_pair) - target).square().sum() / len(x)

    run = torch.compile(loss_of) if compiled else loss_of

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = run(x, target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def checked(size: tuple = CHECKED, device: str = "cuda", backend: str = "auto") -> float:
    """The largest relative difference between what an update in fp32 and a dense one do to a parameter.

    Adam with eps 1 moves a number nearly in proportion to its gradient.

    Raises:
        RuntimeError: it is more than 1e-4.
    """
    layers, d, latents, k, *_ = size
    torch.manual_seed(0)
    ours = se.Crosscoder.clt(layers, d, latents, se.TopK(k), device=device)
    theirs = copy.deepcopy(ours)
    before = [p.detach().clone() for p in ours.parameters()]
    x, target = data_of(size, device, torch.float32)
    step = TrainStep(ours, lr=0.5, eps=1.0, backend=backend)
    other = dense_step(theirs, x, target, k, 0.5, 1.0, autocast=False)
    losses = step(x, target)["loss"], other()
    worst = float((losses[0] / losses[1] - 1).abs())
    for (name, p), q, start in zip(ours.named_parameters(), theirs.parameters(), before, strict=True):
        moved = (q.detach() - start).double()
        if not float(moved.norm()) > 0:
            raise RuntimeError(f"the dense update leaves {name} as it was: nothing is compared")
        worst = max(worst, float((p.detach() - q.detach()).double().norm() / moved.norm()))
    if not worst <= 1e-4:
        raise RuntimeError(f"an update differs from the dense one by {worst:.1e} of itself")
    return worst


def variants(name: str, device: str) -> dict[str, Callable[[], Callable[[], object]]]:
    """What makes each variant's step; it holds the parameters as long as it lives."""
    size = GPU_SIZES[name]
    x, target = data_of(size, device, torch.bfloat16)
    k = size[3]

    def ours() -> Callable[[], object]:
        step = TrainStep(made(name, device=device), lr=LEARNING_RATE, compute_dtype="bfloat16")
        return lambda: step(x, target)["loss"]

    def autograd() -> Callable[[], object]:
        coder = made(name, device=device)
        optimizer = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE, fused=True)

        def step() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16):
                loss = (coder(x).float() - target).square().sum() / len(x)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def other(**how: bool) -> Callable[[], Callable[[], object]]:
        return lambda: dense_step(made(name, device=device), x, target, k, LEARNING_RATE, 1e-8, **how)

    return {OURS: ours, AUTOGRAD: autograd, DENSE: other(), PAIRS: other(by_pair=True), COMPILED: other(compiled=True)}


def floor_ms(name: str) -> tuple[float, float]:
    """The encoders' products by cuBLAS, and what Adam moves at the rate of a copy."""
    layers, d, latents, _, tokens, _ = GPU_SIZES[name]
    x = torch.randn(tokens, d, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(latents, d, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(tokens, latents, device="cuda", dtype=torch.bfloat16)
    product = layers * statistics.median(milliseconds(lambda: torch.mm(x, weight.T, out=out)))
    moved = sum(state_bytes(d, latents, d_out=(layers - s) * d, compute_dtype="bfloat16").moved for s in range(layers))
    return product, moved / 1e6 / copied_gb_a_second()


def profile(step: Callable[[], object]) -> None:
    """Prints where the time of one step goes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    kernels = sorted(found.key_averages(), key=lambda one: -one.device_time_total)[:20]
    for one in kernels:
        print(f"    {one.device_time_total / 1e3:9.3f} ms {one.count:5} × {one.key[:90]}", flush=True)


def measure_on_gpu(name: str, *, compiled: bool) -> Iterator[Row]:
    """A row for each variant as soon as it is there, ours before those that may fail."""
    device = torch.device("cuda")
    layers, d, latents, k, tokens, _ = GPU_SIZES[name]
    about = {"kind": "crosslayer", "case": name, "shape": {"L": layers, "d": d, "F": latents, "k": k, "B": tokens},
             "dtype": "bfloat16", "seed": 0, "method": GPU_METHOD, **environment(device)}  # fmt: skip
    print(f"{name} {about['shape']}, {about['device']}; fp32 update against the dense one: {checked():.1e}", flush=True)
    product, moved = floor_ms(name)
    print(f"  {FLOOR:<28} {product + moved:9.2f} ms: products {product:.2f}, Adam's bytes {moved:.2f}", flush=True)
    timing = {"ms_p50": product + moved, "ms_p20": product + moved, "ms_p80": product + moved, "samples": 1}
    yield {**about, "provider": FLOOR, "baseline": False, **timing, "utc": now_utc()}
    losses, ours_ms = {}, 0.0
    for provider, make in variants(name, "cuda").items():
        if provider == COMPILED and not compiled:
            continue
        torch.cuda.empty_cache()
        row = {**about, "provider": provider, "baseline": provider == DENSE, "utc": now_utc()}
        try:
            step = make()
            losses[provider] = float(step())  # type: ignore[arg-type]
            if abs(losses[provider] - losses[OURS]) > 1e-3 * losses[OURS]:
                raise RuntimeError(f"{provider} has a loss of {losses[provider]}, {OURS} of {losses[OURS]}")
            torch.cuda.reset_peak_memory_stats()  # making the weights may take more than a step
            times = milliseconds(step)
        except Exception as error:  # memory, or a compiler: the others still run
            if provider == OURS:
                raise
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"  {provider:<28} failed: {reason}", flush=True)
            yield failure(row, reason)
        else:
            peak = torch.cuda.max_memory_allocated()
            yield {**row, **summarize(times).fields(), "peak_bytes": peak, "loss": losses[provider]}
            ms = statistics.median(times)
            ours_ms = ours_ms or ms
            print(f"  {provider:<28} {ms:9.2f} ms ({min(times):.2f} to {max(times):.2f})  {ms / ours_ms:5.2f} × ours  "
                  f"{ms / (product + moved):5.2f} × floor  {peak / 1e9:6.1f} GB", flush=True)  # fmt: skip
            if provider == OURS:
                profile(step)
        step = None
        torch.compiler.reset()
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps of cross-layer coders beside dense PyTorch.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--no-compiled", action="store_true", help="on a GPU, leave out what takes minutes to compile")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each size on a CPU")
    parser.add_argument("--only", choices=[*SIZES, *GPU_SIZES], help="one of them")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results", metavar="FOLDER")
    options = parser.parse_args()
    sizes, device = GPU_SIZES if options.device == "cuda" else SIZES, torch.device(options.device)
    if options.only is not None and options.only not in sizes:
        parser.error(f"--only must be one of {', '.join(sizes)} with --device {options.device}, got {options.only}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none")
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
    place = options.out / device_slug(device) / "crosslayer.jsonl"
    for name in sizes if options.only is None else [options.only]:
        if device.type == "cuda":
            for row in measure_on_gpu(name, compiled=not options.no_compiled):
                store(place, [row])
            continue
        rows = measure(name, options.seconds)
        print(shown(rows), flush=True)
        store(place, rows)


if __name__ == "__main__":
    main()
