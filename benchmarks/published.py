"""Times that others have published of a step like ours, at the sizes where we time forward and backward ourselves.

They are yardsticks and were not measured here: another machine, another program, what their authors say of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from derived import fmt_ms, note_text, shape_text, table
from rows import Row
from shapes import DEEP, WIDE, Case


@dataclass(frozen=True)
class Published:
    """``ms`` of forward and backward without an optimizer, as ``source`` has it; ``remark`` is what it says of how."""

    who: str
    case: Case
    ms: float
    gpu: str
    source: str
    remark: str


TIMES = (
    Published(
        "NVIDIA, sparse autoencoder recipe of BioNeMo", WIDE, 134.0, "H100",
        "https://github.com/NVIDIA-BioNeMo/bionemo-recipes/pull/1613",
        "fp32 parameters, its Triton decoder: 54 ms forward and 80 ms backward, inputs normalized on the way "
        "(83 and 108 ms with its dense decoder)",
    ),
    Published(
        "FlashSAE", DEEP, 108.4, "not stated",
        "https://github.com/SmallMelon-L/FlashSAE/tree/main/result/overall_speed_up",
        "`all_times_sparse.pt`, expansion factor 32 (434.0 ms for its dense baseline); the file names the factor, "
        "neither GPU nor dtype nor the other sizes",
    ),
)  # fmt: skip


def section(rows: Sequence[Row], last: Row) -> list[str]:
    """Markdown: each published time beside what was measured at its size; nothing where nothing was."""
    found = [(times, [r for r in rows if r["kind"] == "step" and r["case"] == times.case.name]) for times in TIMES]
    if not any(measured for _, measured in found):
        return []
    lines = []
    for times, measured in found:
        shape = shape_text(times.case.shape("BdFk"))
        lines.append([shape, times.who, "as published", times.gpu, "not measured here", fmt_ms(times.ms)])
        for row in measured:
            if row["contestant"] != "yardstick":
                how = f"{row['dtype']}, torch {row['torch']}"
                note = note_text(row, last)
                lines.append([shape, row["provider"], how, row["device"], note, fmt_ms(row["ms_p50"])])
    sources = "\n".join(f"- {times.who}: {times.source}; {times.remark}." for times in TIMES)
    compared = table(("size", "who", "how", "GPU", "note", "time"), lines, left=5)
    return ["### Beside published times", TEXT, compared, sources]


TEXT = (
    "Forward and backward of a TopK autoencoder, without an optimizer. Published times are their authors': another "
    "machine, other software, not measured here, so a ratio between the two kinds of lines is an orientation and no "
    "result."
)
