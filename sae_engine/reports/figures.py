"""Figures as SVG, written here so that a report needs neither matplotlib nor a network: curves, frontiers, shares.

Each is a string with a ``viewBox`` and no size of its own, as wide as the page lets it be. What a label cannot say
without crowding is a ``<title>``, which browsers show under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0f6fb4", "#c8501e", "#2f8a4c", "#7d4bb0", "#a87b12", "#c2417c", "#138a92", "#5b6470")
DASHES = ("", "7 3", "2 3", "9 3 2 3")
INK, SOFT, GRID = "#22262b", "#5b6470", "#e3e6ea"
WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 70, 18, 34, 46  # of the area in which the data lies
MOST_POINTS = 400  # of one curve; a screen has no more
MOST_LABELS = 14  # beside points; more do not find room
CHARACTER = 6.3  # width of a character of a label, in the units of the viewBox, on average


@dataclass(frozen=True)
class Series:
    """A curve; points of which a coordinate is not finite interrupt it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dash: str = ""


@dataclass(frozen=True)
class Point:
    """Of a frontier. Points of one ``group`` are joined in the order of x."""

    label: str
    x: float
    y: float
    colour: str
    tip: str
    group: object = None


def colour_of(number: int) -> tuple[str, str]:
    """Colour and dashes of the curve with this number: distinct for the first 32."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def curves(title: str, series: Sequence[Series], *, x_label: str) -> str | None:
    """One chart of all series over a linear x; y is logarithmic where it spans more than a factor of 20.

    None where nothing finite is to be shown.
    """
    shown = [(s, _finite_runs(s)) for s in series]
    points = [point for _, runs in shown for run in runs for point in run]
    if not points:
        return None
    ys = [y for _, y in points]
    log = min(ys) > 0 and max(ys) > 20 * min(ys)
    x_axis, y_axis = Axis([x for x, _ in points], LEFT, WIDTH - RIGHT, exact=True), _y_axis(ys, log)
    parts = [*_frame(title, x_axis, y_axis, x_label, "")]
    for s, runs in shown:
        for run in runs:
            at = [(x_axis(x), y_axis(y)) for x, y in _thinned(run)]
            if len(at) == 1:
                parts.append(_dot(*at[0], s.colour, 2.5, s.label))
                continue
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
            dashes = f' stroke-dasharray="{s.dash}"' if s.dash else ""
            parts.append(
                f'<path d="{path}" fill="none" stroke="{s.colour}" stroke-width="1.7" stroke-linejoin="round"{dashes}>'
                f"<title>{escape(s.label)}</title></path>"
            )
    return _svg(title, parts)


def frontier(title: str, points: Sequence[Point], *, x_label: str, y_label: str) -> str | None:
    """Points with labels, over an x that is logarithmic where it spans more than a factor of 3."""
    found = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not found:
        return None
    xs, ys = [p.x for p in found], [p.y for p in found]
    x_axis = Axis(xs, LEFT, WIDTH - RIGHT, log=min(xs) > 0 and max(xs) > 3 * min(xs))
    y_axis = _y_axis(ys, min(ys) > 0 and max(ys) > 20 * min(ys))
    parts = [*_frame(title, x_axis, y_axis, x_label, y_label)]
    for group in dict.fromkeys(p.group for p in found if p.group is not None):
        members = sorted((p for p in found if p.group == group), key=lambda p: (p.x, p.y))
        if len(members) > 1:
            path = "M" + "L".join(f"{x_axis(p.x):.1f} {y_axis(p.y):.1f}" for p in members)
            colour = members[0].colour
            parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.2" opacity=".45"/>')
    places = [(x_axis(p.x), y_axis(p.y)) for p in found]
    parts += [_dot(x, y, p.colour, 4.5, p.tip) for p, (x, y) in zip(found, places, strict=True)]
    if len(found) <= MOST_LABELS:
        parts += _labels([p.label for p in found], places)
    return _svg(title, parts)


def shares(title: str, parts: Sequence[tuple[str, float, str]]) -> str:
    """One bar of what is at least 0, with colours, scaled to fill it. What the colours mean stands in a legend."""
    total, x, drawn = math.fsum(value for _, value, _ in parts), 0.0, []
    for name, value, colour in parts:
        width = 1000 * value / total if total else 0.0
        drawn.append(
            f'<rect x="{x:.2f}" width="{width:.2f}" height="26" fill="{colour}"><title>{escape(name)}</title></rect>'
        )
        x += width
    return _svg(title, drawn, width=1000, height=26)


# ------------------------------------------------------------------------------------------------------ axes


class Axis:
    """From numbers to places between ``low`` and ``high``, with round ticks. Its values are finite."""

    def __init__(
        self, values: Sequence[float], low: float, high: float, *, log: bool = False, exact: bool = False,
        least: float = -math.inf,
    ) -> None:  # fmt: skip
        self.log, self.low, self.high = log, low, high
        first, last = (self._scaled(min(values)), self._scaled(max(values)))
        margin = 0.0 if exact and last > first else 0.06 * (last - first) or 0.05 * abs(first) or 0.5
        self.first, self.last = max(first - margin, least), last + margin
        self.ticks = self._log_ticks() if log else _linear_ticks(self.first, self.last)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        share = (self._scaled(value) - self.first) / (self.last - self.first)
        return self.low + share * (self.high - self.low)

    def _log_ticks(self) -> list[float]:
        """Powers of ten, with 2 and 5 between them where few lie here, and round numbers where not even those do."""
        decades = range(math.floor(self.first), math.ceil(self.last) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            found = [m * 10.0**n for n in decades for m in steps]
            found = [value for value in found if self.first <= math.log10(value) <= self.last]
            if len(found) >= 4:
                break
        if len(found) < 3:
            found = [value for value in _linear_ticks(10**self.first, 10**self.last) if value > 0]
        while len(found) > 8:
            found = found[::2]
        return found

    def written(self) -> list[str]:
        """With as many digits as tell what they are."""
        step = min((b - a for a, b in zip(self.ticks, self.ticks[1:], strict=False)), default=1.0)
        digits = next(n for n in range(3, 18) if all(
            abs(float(f"{tick:.{n}g}") - tick) < 0.01 * step for tick in self.ticks) or n == 17)  # fmt: skip
        return [short(tick, digits) for tick in self.ticks]


def _y_axis(ys: Sequence[float], log: bool) -> Axis:
    """Upwards, and not below 0 where nothing is."""
    return Axis(ys, HEIGHT - BOTTOM, TOP, log=log, least=0.0 if not log and min(ys) >= 0 else -math.inf)


def _linear_ticks(first: float, last: float, wanted: int = 5) -> list[float]:
    power = 10.0 ** math.floor(math.log10((last - first) / wanted))
    steps = {m: range(math.ceil(first / (m * power) - 1e-9), math.floor(last / (m * power) + 1e-9) + 1)
             for m in (1, 2, 5, 10)}  # fmt: skip
    best = min(steps, key=lambda m: abs(len(steps[m]) - wanted))
    return [n * best * power for n in steps[best]]


def short(number: float, digits: int = 4) -> str:
    """At most so many digits, thousands as k, M, G, T."""
    if abs(number) < 1e-300:
        return "0"
    size = abs(number)
    if size < 1e-3 or size >= 1e15:
        mantissa, _, exponent = f"{number:.{digits - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit * (1 - 0.5 * 10**-digits):
            return f"{number / limit:.{digits}g}{unit}"
    return f"{number:.{digits}g}"


# -------------------------------------------------------------------------------------------------- drawing


def _finite_runs(series: Series) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.x, series.y, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thinned(run: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lowest and the highest point of each stretch, and the ends: no spike is lost."""
    if len(run) <= MOST_POINTS:
        return run
    size = math.ceil(len(run) / (MOST_POINTS // 2))
    kept, heights = {0, len(run) - 1}, [y for _, y in run]
    for start in range(0, len(run), size):
        stretch = range(start, min(start + size, len(run)))
        by_height = sorted(stretch, key=heights.__getitem__)
        kept |= {by_height[0], by_height[-1]}
    return [run[number] for number in sorted(kept)]


def _frame(title: str, x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> list[str]:
    parts = [f'<text x="0" y="16" font-size="14" font-weight="600" fill="{INK}">{escape(title)}</text>']
    bottom = HEIGHT - BOTTOM
    for tick, text in zip(y_axis.ticks, y_axis.written(), strict=True):
        y = y_axis(tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="{SOFT}">{text}</text>')
    for tick, text in zip(x_axis.ticks, x_axis.written(), strict=True):
        x = x_axis(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="{SOFT}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 19}" text-anchor="middle" fill="{SOFT}">{text}</text>')
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}" stroke="{SOFT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    if x_label:
        scale = ", logarithmic" if x_axis.log else ""
        parts.append(
            f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle" fill="{INK}">{escape(x_label + scale)}</text>'
        )
    if y_label:
        y = (TOP + bottom) / 2
        parts.append(
            f'<text x="12" y="{y}" text-anchor="middle" fill="{INK}" transform="rotate(-90 12 {y})">'
            f"{escape(y_label)}</text>"
        )
    return parts


def _dot(x: float, y: float, colour: str, radius: float, tip: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" stroke="#fff" stroke-width="1">'
        f"<title>{escape(tip)}</title></circle>"
    )


def _labels(texts: list[str], places: list[tuple[float, float]]) -> list[str]:
    """Each beside its point where it covers no other label and no point; where there is no such place, none."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    parts = []
    for text, (x, y) in zip(texts, places, strict=True):
        width = CHARACTER * len(text)
        for left, top in ((x + 8, y - 6), (x - 8 - width, y - 6), (x - width / 2, y - 20), (x - width / 2, y + 8),
                          (x + 6, y - 18), (x + 6, y + 6)):  # fmt: skip
            box = (left, top, left + width, top + 12)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= TOP - 6 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                at = f'x="{left:.1f}" y="{top + 10:.1f}"'
                parts.append(f'<text {at} font-size="11.5" fill="{INK}">{escape(text)}</text>')
                break
    return parts


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _svg(title: str, parts: Sequence[str], *, width: int = WIDTH, height: int = HEIGHT) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}" font-size="12">' + "".join(parts) + "</svg>"
    )
