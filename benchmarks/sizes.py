"""The sizes at which operations are timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from registry import Op


@dataclass(frozen=True)
class Case:
    """One size: B tokens, width d, F latents, k entries a token, and how popular the latents are."""

    name: str
    B: int
    d: int
    F: int
    k: int
    indices: str = "uniform"  # or "zipf": popularity falls as 1 / rank, as SAE latents' does
    group: str = "main"  # which figure a case belongs to

    def shape(self, sizes: str) -> dict[str, int | str]:
        """The sizes that an operation depends on, by letter; "i" stands for the distribution of the indices."""
        chosen: dict[str, int | str] = {letter: getattr(self, letter) for letter in sizes if letter != "i"}
        return {**chosen, "indices": self.indices} if "i" in sizes else chosen


SMALL = Case("small", B=512, d=256, F=4096, k=32, group="small")
MAIN = Case("main", B=2048, d=768, F=16384, k=32)
S1 = Case("S1", B=4096, d=768, F=32768, k=32, group="S1")
S2 = Case("S2", B=4096, d=768, F=131072, k=32, group="S2")
S3 = Case("S3", B=4096, d=4096, F=131072, k=64, group="S3")
# Where others have published a time of forward and backward: published.py.
WIDE = Case("d=2688", B=4096, d=2688, F=344064, k=32, group="published")
DEEP = Case("d=4096", B=4096, d=4096, F=131072, k=128, group="published")
PUBLISHED = (WIDE, DEEP)
SWEEP = (
    *(replace(S1, name=f"F={F}", F=F, group="sweep-F") for F in (8192, 16384, 32768, 65536, 131072, 262144)),
    *(replace(S1, name=f"k={k}", k=k, group="sweep-k") for k in (8, 16, 32, 64, 128, 256, 512)),
)
FP32, BF16 = torch.float32, torch.bfloat16
BF16_ON_CPU = {"topk", "batch_topk", "decode"}  # the others would time conversions


def cases(op: Op, device: torch.device, extent: str = "default") -> list[tuple[Case, torch.dtype]]:
    """What to time: ``extent`` is "quick" (a smoke run), "default" or "full"."""
    if extent not in ("quick", "default", "full"):
        raise ValueError(f"extent must be quick, default or full, got {extent!r}")
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
