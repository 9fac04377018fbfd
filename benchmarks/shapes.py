"""The sizes that are timed, by name. No torch: the report knows them too."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
