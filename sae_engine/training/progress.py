"""How far a run is, on the terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from .. import _checks as check


class Progress:
    """How far a run is: one line that is written over on a terminal, elsewhere a line of its own every half minute.

    It shows the tokens trained on, the rate of the last minute, the time that is left at that rate, and the share of
    that minute in which the step waited for activations; in the end those of the whole.

    Args:
        total_tokens: of the whole run, those of a run that is resumed included.
        show: False: nothing is ever written.
        stream: where to; None is standard error.
        clock: seconds, as ``time.monotonic`` gives them.

    Raises:
        TypeError, ValueError: ``total_tokens`` is no positive integer.

    Example:
        >>> import io, itertools
        >>> stream, clock = io.StringIO(), itertools.count(0, 40)
        >>> bar = Progress(1_000_000, True, stream=stream, clock=lambda: next(clock))
        >>> bar.update(0)
        >>> bar.update(200_000, waited=10.0)
        >>> print(stream.getvalue().splitlines()[-1])
         20 % of 1.00M tokens, 5.00k tokens/s, 2:40 left, waited for activations 25 %
    """

    WINDOW = 60.0  # seconds over which the rate is taken
    EVERY = 30.0  # seconds between two lines that are not written over
    REDRAW = 0.1  # seconds between two that are

    def __init__(
        self, total_tokens: int, show: bool = True, *, stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.total = check.integer_k(total_tokens, name="total_tokens")
        self._stream = sys.stderr if stream is None else stream
        self._show, self._clock = bool(show), clock
        self._rewrites = self._show and self._stream.isatty()
        self._samples: deque[tuple[float, int, float]] = deque()  # time, tokens, seconds waited for activations
        self._began: tuple[float, int, float] | None = None
        self._waited: float | None = None
        self._drawn: float | None = None  # when the last line was written
        self._line = ""  # the last line as it was written
        self._latest = ""

    def update(self, tokens: int, waited: float | None = None) -> None:
        """``tokens`` trained on so far; ``waited``: of the seconds since the last call, those without activations."""
        if not self._show:
            return
        if waited is not None:
            self._waited = (self._waited or 0.0) + waited
        now = self._clock()
        if self._drawn is not None and tokens < self.total and now - self._drawn < self._pause():
            return
        sample = now, tokens, self._waited or 0.0
        self._began = self._began or sample
        self._samples.append(sample)
        while len(self._samples) > 2 and now - self._samples[1][0] >= self.WINDOW:
            self._samples.popleft()
        before, self._latest = self._latest, self._text(tokens)
        if self._rewrites or self._latest != before:
            self._draw(self._latest)
        self._drawn = now

    def note(self, text: str) -> None:
        """A line that stays, above the one that is written over."""
        if self._show:
            self._erase()
            self._write(text + "\n")
            if self._rewrites and self._latest:
                self._draw(self._latest)

    def close(self) -> None:
        """Leaves the last line where it is; what is written next begins a new one."""
        if self._rewrites and self._line:
            self._write("\n")
        self._line = self._latest = ""
        self._show = False

    def _pause(self) -> float:
        return self.REDRAW if self._rewrites else self.EVERY

    def _text(self, tokens: int) -> str:
        done = tokens >= self.total
        before, first, had_waited = self._began if done and self._began else self._samples[0]
        now, _, waited = self._samples[-1]
        rate = (tokens - first) / (now - before) if now > before else 0.0
        parts = [f"{100 * tokens // self.total:3d} % of {_short(self.total)} tokens"]
        if rate > 0:
            parts.append(f"{_short(rate)} tokens/s")
            left = f"{_duration((self.total - tokens) / rate)} left"
            parts.append(f"{_duration(now - before)} in all" if done else left)
        if self._waited is not None and now > before:
            parts.append(f"waited for activations {100 * (waited - had_waited) / (now - before):.0f} %")
        return ", ".join(parts)

    def _draw(self, text: str) -> None:
        if self._rewrites:
            self._erase()
            self._line = text[: max(1, shutil.get_terminal_size().columns - 1)]  # a line that wraps is not written over
            self._write(self._line)
        else:
            self._write(text + "\n")

    def _erase(self) -> None:
        if self._rewrites and self._line:
            self._write("\r" + " " * len(self._line) + "\r")
            self._line = ""

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # a terminal that was closed under a run that goes on
            self._show = self._rewrites = False


def _short(number: float) -> str:
    """Three digits: 950, 5.20k, 1.00M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * limit:
            scaled = number / limit
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{number:.0f}" if number >= 9.95 or number == int(number) else f"{number:.1f}"


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"
