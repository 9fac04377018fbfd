"""A progress bar: tqdm's where it is installed, otherwise a line now and then."""

from __future__ import annotations

import sys
import time

EVERY_SECONDS = 10.0

try:
    from tqdm import tqdm as ProgressBar
except ModuleNotFoundError:

    class ProgressBar:  # type: ignore[no-redef]
        """The part of tqdm's interface that the benchmarks use."""

        def __init__(self, *, total: int, desc: str, unit: str = "it", disable: bool = False) -> None:
            self.total, self.desc, self.unit, self.disable = total, desc, unit, disable
            self.done, self.note, self.shown = 0, "", 0.0

        def __enter__(self) -> ProgressBar:
            return self

        def __exit__(self, *_: object) -> None:
            self.show()

        def set_postfix_str(self, note: str) -> None:
            self.note = note

        def update(self, count: int = 1) -> None:
            self.done += count
            if time.monotonic() - self.shown > EVERY_SECONDS:
                self.show()

        def show(self) -> None:
            self.shown = time.monotonic()
            if not self.disable:
                print(f"{self.desc}: {self.done}/{self.total} {self.unit} {self.note}", file=sys.stderr, flush=True)


__all__ = ["ProgressBar"]
