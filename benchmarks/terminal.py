"""What a run shows while it runs: a line for each result, and below it a line that says what runs now."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

from derived import bandwidth_gbps, failure_text, fmt_ms, fmt_ratio, place_text, rate_tflops
from rows import Row

EVERY_SECONDS = 10.0  # where the last line cannot be written anew
WIDTH = 110


class Terminal:
    """On a terminal the last line is written anew all the time; in a file one is added now and then."""

    def __init__(self, budget: str) -> None:
        self.started, self.budget = time.monotonic(), budget
        self.now, self.shown, self.live = "", 0.0, sys.stdout.isatty()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def say(self, text: str) -> None:
        self._clear()
        print(text, flush=True)
        self.progress()

    def progress(self, now: str | None = None) -> None:
        self.now = self.now if now is None else now
        text = f"[{self.elapsed:.0f} s of {self.budget}] {self.now}"
        if self.live:
            print(f"\r\033[K{text:.{WIDTH}}", end="", flush=True)
        elif time.monotonic() - self.shown > EVERY_SECONDS:
            self.shown = time.monotonic()
            print(text, flush=True)

    def end(self) -> None:
        self._clear()
        self.live, self.shown = False, float("inf")

    def _clear(self) -> None:
        if self.live:
            print("\r\033[K", end="")


def lines_of(rows: Sequence[Row]) -> Iterator[str]:
    """The lines that show rows as they come: one for a cell, and one for each row that failed."""
    yield from ("FAILED  " * ("WRONG" not in row["failed"]) + failure_text(row) for row in rows if "failed" in row)
    rows = [row for row in rows if "failed" not in row]
    kind = rows[0]["kind"] if rows else None
    if kind in ("operation", "step"):
        yield f"{place_text(rows[0])}: {', '.join(_timed(row, rows) for row in rows)}"
    elif kind == "part":
        whole = ", ".join(f"{row['provider']} {fmt_ms(row['ms_p50'])}" for row in rows if row["part"] == "whole step")
        yield f"{place_text(rows[0])}: {len(rows)} times; the whole step: {whole}"
    elif kind == "roof":
        yield "this machine: " + ", ".join(
            f"{row['op']} {row['dtype']} {rate_tflops(row):.3g} TFLOP/s" if row["flops"]
            else f"{row['op']} {bandwidth_gbps(row):.3g} GB/s" for row in rows
        )  # fmt: skip
    elif kind == "reconstruction":
        for row in rows:
            yield (f"{place_text(row)}, {row['provider']}: MSE {row['mse']:.4f}, FVU {row['fvu']:.4f}, "
                   f"L0 {row['l0']:.1f}, {row['tokens_per_second']:,.0f} tokens/s")  # fmt: skip
    elif kind == "curve":
        for row in rows:
            yield f"loss curve, {row['provider']}: {row['errors'][0]:.4f} … {row['errors'][-1]:.4f}"


def _timed(row: Row, rows: Sequence[Row]) -> str:
    """``torch.topk 24.7 ms (1.07×)``: how many times as long as ours."""
    ours = next((other for other in rows if other["provider"] == "ours"), None)
    beside = f" ({fmt_ratio(row['ms_p50'] / ours['ms_p50'])})" if ours and row is not ours else ""
    return f"{row['provider']} {fmt_ms(row['ms_p50'])}{beside}"
