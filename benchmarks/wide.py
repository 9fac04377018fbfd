"""What wide dictionaries need on a GPU, by the formulas that the tests hold steps to. Nothing here is measured.

    python benchmarks/wide.py                       # prints the tables of docs/scale.md

A step with TopK(32) on 32,768 tokens in bfloat16, pre-activations in slabs of 256 MiB; parameters in float32. The batch
is counted, cuBLAS' workspaces are not.
"""
from __future__ import annotations

from sae_engine.training import peak_bytes, state_bytes

TOKENS, K, SLAB_BYTES = 32_768, 32, 2**28
WIDTHS, LATENTS, CARDS_GB = (768, 2304, 4096), tuple(2**n for n in range(17, 21)), (24, 80, 141)
AS_IT_COMES = {"compute_dtype": "bfloat16"}
NARROW = {**AS_IT_COMES, "moments": "bfloat16", "copies": False}


def needed_gb(width: int, latents: int, options: dict) -> float:
    """All that a step keeps and takes while it runs, with the batch."""
    state = state_bytes(width, latents, **options)
    peak = peak_bytes(TOKENS, width, latents, K, memory_budget=SLAB_BYTES, device_type="cuda", **options)
    return (state.kept - state.copies + peak + TOKENS * width * 2) / 1e9  # the peak has the copies too


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


if __name__ == "__main__":
    print("\n".join([*sizes(), "", *cards()]))
