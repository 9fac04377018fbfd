"""What runs now, said to whoever listens; and a progress bar: tqdm's where installed, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

EVERY_SECONDS = 10.0
Listener = Callable[[str, Sequence[dict[str, Any]]], None]


class Lines:
    """On stderr, at most one line in ``EVERY_SECONDS``."""

    def __init__(self) -> None:
        self.shown = 0.0

    def __call__(self, text: str, at_stake: Sequence[dict[str, Any]] = ()) -> None:
        if time.monotonic() - self.shown > EVERY_SECONDS:
            self.shown = time.monotonic()
            print(text, file=sys.stderr, flush=True)


_listener: Listener = Lines()


def listen(listener: Listener) -> None:
    """From now on :func:`announce` calls ``listener`` instead."""
    global _listener
    _listener = listener


def announce(text: str, at_stake: Sequence[dict[str, Any]] = ()) -> None:
    """Says what is about to run. ``at_stake``: rows, still without numbers, that fail if the process dies of it."""
    _listener(text, at_stake)


try:
    from tqdm import tqdm as ProgressBar
except ModuleNotFoundError:

    class ProgressBar:  # type: ignore[no-redef]
        """The part of tqdm's interface that the benchmarks use."""

        def __init__(self, *, total: int, desc: str, unit: str = "it", disable: bool = False) -> None:
            self.total, self.desc, self.unit, self.disable = total, desc, unit, disable
            self.done, self.note, self.lines = 0, "", Lines()

        def __enter__(self) -> ProgressBar:
            return self

        def __exit__(self, *_: object) -> None:
            self.update(0)

        def set_postfix_str(self, note: str) -> None:
            self.note = note

        def update(self, count: int = 1) -> None:
            self.done += count
            if not self.disable:
                self.lines(f"{self.desc}: {self.done}/{self.total} {self.unit} {self.note}")


__all__ = ["ProgressBar", "announce", "listen"]
