"""Which operations are timed at which sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from shapes import DEEP, MAIN, PUBLISHED, S1, S2, S3, SMALL, SWEEP, WIDE, Case

if TYPE_CHECKING:
    from registry import Op

__all__ = ["BF16", "DEEP", "FP32", "MAIN", "PUBLISHED", "S1", "S2", "S3", "SMALL", "SWEEP", "WIDE", "Case", "cases"]
FP32, BF16 = torch.float32, torch.bfloat16
BF16_ON_CPU = {"topk", "batch_topk", "decode"}  # the others would time conversions


def cases(op: Op, device: torch.device, extent: str = "default") -> list[tuple[Case, torch.dtype]]:
    """What to time: ``extent`` is "quick" (a smoke run), "default" or "full"."""
    if extent not in ("quick", "default", "full"):
        raise ValueError(f"extent must be quick, default or full, got {extent!r}")
    if op.is_plain:  # the definition, its baseline, makes matrices of codes
        return [(S1, BF16)] if device.type == "cuda" else [(SMALL, FP32)]
    if device.type != "cuda":
        chosen = [(SMALL, FP32)] if extent == "quick" else [(MAIN, FP32), (SMALL, FP32)]
        if op.name in BF16_ON_CPU and op.mode == "forward" and extent != "quick":
            chosen.append((MAIN, BF16))
        main, dtype = (SMALL if extent == "quick" else MAIN), FP32
    else:
        chosen = [(S1, BF16)] if extent == "quick" else [(S1, BF16), (S2, BF16), (S3, BF16), (S1, FP32)]
        if extent != "quick":
            chosen += [(case, BF16) for case in SWEEP]
        main, dtype = S1, BF16
    if "i" in op.sizes:
        chosen.append((replace(main, name=f"{main.name}, skewed", indices="zipf", group=f"{main.group}-zipf"), dtype))
    if op.name == "norm_match":  # where top-AFA is published: a row keeps an eighth of its latents
        wide = replace(main, name=f"{main.name}, wide rows", k=main.F // 8, group=f"{main.group}-wide")
        chosen.append((wide, dtype))
    return chosen
