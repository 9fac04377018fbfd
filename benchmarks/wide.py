"""What wide dictionaries need on a GPU: by the formulas that the tests hold steps to, and measured where there is one.

    python benchmarks/wide.py                       # prints the tables of docs/scale.md, from formulas alone
    python benchmarks/wide.py --measure             # on a GPU: steps of them, timed, beside what the formula says

A step with TopK(32) on 32,768 tokens in bfloat16, pre-activations in slabs of 256 MiB; parameters in float32. The batch
is counted, cuBLAS' workspaces are not. What is measured also goes to ``benchmarks/results/<device>/wide.md``.
"""
from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from rows import ROOT, device_slug, environment

import sae_engine as se
from sae_engine.training import TrainStep, peak_bytes, state_bytes

TOKENS, K, SLAB_BYTES = 32_768, 32, 2**28
WIDTHS, LATENTS, CARDS_GB = (768, 2304, 4096), tuple(2**n for n in range(17, 21)), (24, 80, 141)
AS_IT_COMES = {"compute_dtype": "bfloat16"}
NARROW = {**AS_IT_COMES, "moments": "bfloat16", "copies": False}
COLD, TIMED = 3, 7  # steps: the first compile, allocate and, where a table is kept, search


@dataclass(frozen=True)
class Measured:
    """A step to be timed, of so many tokens."""

    tokens: int
    width: int
    latents: int
    options: dict
    slab_bytes: int = SLAB_BYTES

    @property
    def needed_gb(self) -> float:
        return needed_gb(self.width, self.latents, self.options, self.tokens, self.slab_bytes)


    def __str__(self) -> str:
        return f"| {self.tokens:,} | {self.width} | {self.latents:,} |"


MEASURED = [
    Measured(4096, 768, 2**17, AS_IT_COMES, 2**31),  # S2, whole
    Measured(4096, 2688, 344_064, AS_IT_COMES, 2**32),  # the largest published step on one GPU, whole and in slabs
    Measured(4096, 2688, 344_064, AS_IT_COMES),
    Measured(4096, 2688, 344_064, NARROW),
    *(Measured(TOKENS, width, 2**20, NARROW) for width in WIDTHS),
]


def needed_gb(
    width: int, latents: int, options: dict, tokens: int = TOKENS, slab_bytes: int = SLAB_BYTES
) -> float:
    """Gigabytes of all that a step keeps and takes while it runs, with the batch."""
    state = state_bytes(width, latents, **options)
    peak = peak_bytes(tokens, width, latents, K, memory_budget=slab_bytes, device_type="cuda", **options)
    return (state.kept - state.copies + peak + tokens * width * 2) / 1e9  # the peak has the copies too


def widest(width: int, card_gb: float, options: dict) -> str:
    fitting = [latents for latents in LATENTS if needed_gb(width, latents, options) <= card_gb]
    return f"2^{fitting[-1].bit_length() - 1}" if fitting else "none of them"


def sizes() -> list[str]:
    lines = ["| d | " + " | ".join(f"2^{n.bit_length() - 1}" for n in LATENTS) + " | moved a step at 2^20 |",
             "|---|" + "---|" * (len(LATENTS) + 1)]  # fmt: skip
    for width in WIDTHS:
        cells = [f"{needed_gb(width, n, NARROW):.1f} ({needed_gb(width, n, AS_IT_COMES):.1f})" for n in LATENTS]
        moved = [state_bytes(width, LATENTS[-1], **options).moved / 1e9 for options in (NARROW, AS_IT_COMES)]
        lines.append(f"| {width} | " + " | ".join(cells) + f" | {moved[0]:.0f} ({moved[1]:.0f}) |")
    return lines


def cards() -> list[str]:
    lines = ["| card | " + " | ".join(f"d = {width}" for width in WIDTHS) + " |", "|---|" + "---|" * len(WIDTHS)]
    for card in CARDS_GB:
        cells = [f"{widest(width, card, NARROW)} ({widest(width, card, AS_IT_COMES)})" for width in WIDTHS]
        lines.append(f"| {card} GB | " + " | ".join(cells) + " |")
    return lines


def milliseconds(call, times: int = TIMED) -> list[float]:
    """Milliseconds of each of ``times`` calls, between CUDA events, after ``COLD`` calls that are not timed."""
    for _ in range(COLD):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(events)]


def product_ms(case: Measured) -> float:
    """The encoder's product alone, by cuBLAS into one slab after the other."""
    chunk = min(max(case.slab_bytes // (2 * case.tokens), 1), case.latents)
    x = torch.randn(case.tokens, case.width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(case.latents, case.width, device="cuda", dtype=torch.bfloat16)
    slab = torch.empty(case.tokens * chunk, device="cuda", dtype=torch.bfloat16)

    def product() -> None:
        for rows in weight.split(chunk):
            torch.mm(x, rows.T, out=slab[: case.tokens * len(rows)].view(case.tokens, len(rows)))

    return statistics.median(milliseconds(product))


def copied_gb_a_second() -> float:
    """The rate of copying a large tensor, in gigabytes read and written a second."""
    a, b = (torch.empty(2**30, dtype=torch.float32, device="cuda") for _ in range(2))
    return 8 * 2**30 / statistics.median(milliseconds(lambda: b.copy_(a))) / 1e6


def measured(case: Measured, rate: float) -> str:
    """A row of the table."""
    product = product_ms(case)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    sae = se.SparseAutoencoder(case.width, case.latents, se.TopK(K), device="cuda")
    step = TrainStep(sae, lr=1e-4, memory_budget=case.slab_bytes, **case.options)
    x = torch.randn(case.tokens, case.width, device="cuda", dtype=torch.bfloat16)
    step(x)
    torch.cuda.reset_peak_memory_stats()  # making the weights may take more than a step
    found = milliseconds(lambda: step(x))
    peak = torch.cuda.max_memory_allocated() - before
    moved = state_bytes(case.width, case.latents, **case.options).moved / 1e6 / rate
    floor, ms = product + moved, statistics.median(found)
    which = "fp32 moments, copies" if case.options is AS_IT_COMES else "bf16 moments"
    slabs = "whole" if case.slab_bytes >= 2 * case.tokens * case.latents else f"slabs of {case.slab_bytes >> 20} MiB"
    return (f"{case} {which}, {slabs} | **{ms:,.1f}** | {min(found):,.1f} to {max(found):,.1f} | {product:,.1f} | "
            f"{moved:,.1f} | {ms / floor:.2f} | {case.tokens / ms * 1e3:,.0f} | {peak / 1e9:.2f} | "
            f"{case.needed_gb:.2f} |")  # fmt: skip


def measure() -> str:
    device = torch.device("cuda")
    rate = copied_gb_a_second()
    torch.cuda.empty_cache()
    setting = ", ".join(f"{name} {value}" for name, value in environment(device).items() if value is not None)
    lines = [
        "# Wide dictionaries, measured", "", f"`python benchmarks/wide.py --measure`: {setting}", "",
        f"TopK({K}), `TrainStep` in bfloat16 with Adam; medians of {TIMED} steps after {COLD + 1}, milliseconds. The "
        "floor is the encoder's product (cuBLAS, into one slab after the other) and what an update moves of "
        f"parameters, moments and copies, at the {rate:,.0f} GB/s of a copy. Memory is the most that torch had "
        "allocated in a step, cuBLAS' workspace with it, beside the formula.", "",
        "| tokens | d | latents | | step | fastest to slowest | product | Adam's bytes | × floor | tokens/s | GB held "
        "| formula |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    room = torch.cuda.mem_get_info()[0] / 1e9
    for case in MEASURED:
        fits = case.needed_gb * 1.03 < room
        lines.append(measured(case, rate) if fits else f"{case} needs {case.needed_gb:.0f} GB |" + " |" * 8)
        print(lines[-1], flush=True)
        torch.cuda.empty_cache()
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="time steps on this GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    options = parser.parse_args()
    if not options.measure:
        print("\n".join([*sizes(), "", *cards()]))
        return
    if not torch.cuda.is_available():
        parser.error("--measure needs a GPU, and torch sees none")
    text = measure()
    place = options.out / device_slug(torch.device("cuda")) / "wide.md"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
