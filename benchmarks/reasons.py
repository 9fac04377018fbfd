"""Why ours takes longer than stock code, where it does in the cells of the default table and in training: the report
says it there."""

from __future__ import annotations

from collections.abc import Sequence

from derived import Cell, fmt_ratio, is_ours, knob_text, same_code
from rows import Row

LEVEL = 0.95  # of the fastest other's speed

# On a CPU, by operation and by what a cell has: its dtype where that is the cause, else its case.
REASONS: dict[tuple[str, str], str] = {
    ("topk", "bfloat16"): "several 16-bit numbers of a row tie with its k-th; ours finds the lowest columns among "
    "them, torch.topk takes any",
    ("topk", "main"): "ours looks in every row for ties with the k-th entry and returns ascending columns, which costs "
    "a sort",
    ("topk", "small"): "ours keeps the lowest columns of a tie and returns them in ascending order, which costs a sort",
    ("threshold", "main"): "ours compares and collects some rows at a time, which stay in the cache: on one thread "
    "that takes 0.8 of nonzero's time (76 against 95 ms on an AMD EPYC), on two the pieces are short to be shared",
    ("threshold", "small"): "torch.where writes a dense result and needs no positions; ours are compressed rows with "
    "offsets and 32-bit indices, which keep NaN",
    ("decode", "bfloat16"): "ours adds the bias to the fp32 sum and rounds once, for which weights are widened, some "
    "columns at a time; embedding_bag rounds the sum and then the sum with the bias",
    **dict.fromkeys(
        [("decode", "small"), ("decode_error", "small")],
        "checks of the arguments and the choice of a back end, 0.13 ms a call on an AMD EPYC, where the sums take 0.46",
    ),
    ("to_dense", "small"): "offsets are compared with those of rows of one length, and indices widened to 64 bits",
    ("decode-backward_values", "small"): "each entry's row is found anew; embedding_bag's forward pass has left it",
}  # fmt: skip

# On a GPU, by operation.
GPU_REASONS = {
    "threshold": "without a capacity the host waits for the number of entries, which small matrices do not hide",
    "decode-backward_weight": "ours transposes the codes first; the product is given them dense, and at few latents "
    "multiplies them in less time than transposing takes",
}

# Of training on a CPU, by rule.
TRAINING_REASONS = {
    "top-AFA": "with its authors' initial weights the first steps keep two fifths of all latents; above a fifth or so, "
    "dense products are faster than sums over codes, which also have to be transposed for the weights' gradients",
}


def remarks(found: Sequence[Cell]) -> list[str]:
    """One line for each cell in which ours is slower than the fastest of all others by more than a twentieth."""
    lines = []
    for cell in found:
        if cell.ours is None:
            continue
        rivals = (row for row in cell.rows if not (is_ours(row) or row.get("yardstick")))
        others = [row for row in rivals if same_code(row, cell.ours)]
        if not others:
            continue
        best = min(others, key=lambda row: row["ms_p50"])
        ratio = best["ms_p50"] / cell.ours["ms_p50"]
        if ratio < LEVEL:
            known = [REASONS.get((cell.op_id, key)) for key in (cell.dtype, cell.case.partition(",")[0])]
            known = [GPU_REASONS.get(cell.op_id)] if cell.ours.get("cuda") else known
            reason = next(filter(None, known), "no reason is known: to be looked into")
            lines.append(f"{cell.op_id}: {fmt_ratio(ratio)} the speed of {best['provider']}; {reason}.")
    return lines


def training_remarks(averaged: Sequence[Row]) -> list[str]:
    """One line for each rule and knob of :func:`derived.means` at which dense PyTorch trains faster by as much."""
    speeds = {(m["rule"], knob_text(m), m["is_ours"]): m["tokens_per_second"] for m in averaged}
    lines = []
    for (rule, knob, is_mine), speed in speeds.items():
        dense = speeds.get((rule, knob, False))
        if is_mine and dense and speed / dense < LEVEL:
            reason = TRAINING_REASONS.get(rule, "no reason is known: to be looked into")
            lines.append(f"{rule}, {knob}: {fmt_ratio(speed / dense)} the tokens/s of dense PyTorch; {reason}.")
    return lines
