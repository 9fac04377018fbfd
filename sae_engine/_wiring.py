"""Which sites each source of a cross-layer coder reads and writes, and where those lie in the concatenated vectors."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from . import _checks as check

NAMED = ("joint", "causal", "each", "local")

Ranges = tuple[tuple[range, range], ...]  # of each source: sites that it reads, sites that it writes


def widths_of(name: str, given: Any) -> tuple[int, ...]:
    """Widths of sites.

    Raises:
        TypeError, ValueError: there is none, or one is no positive int; names the argument.
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{name} must be a sequence of widths, one a site, got {given!r}")
    if not given:
        raise ValueError(f"{name} must hold the width of at least one site, got none")
    return tuple(check.integer_k(width, name=f"{name}[{number}]") for number, width in enumerate(given))


def columns_of(widths: Sequence[int], sites: range) -> slice:
    """Where these sites lie in the concatenation of all.

    Example:
        >>> columns_of([4, 2, 3], range(1, 3))
        slice(4, 9, None)
    """
    ends = list(accumulate(widths, initial=0))
    return slice(ends[sites.start], ends[sites.stop])


def ranges_of(wiring: Any, reads: int, writes: int) -> Ranges:
    """The sites of each source, for ``reads`` sites to read and ``writes`` sites to write.

    Raises:
        TypeError: ``wiring`` is neither a name nor a sequence of pairs of sites.
        ValueError: the name is unknown or needs as many sites to write as to read, a range lies outside of the sites,
            or nobody writes one of them.

    Example:
        >>> ranges_of("causal", 2, 2)
        ((range(0, 1), range(0, 2)), (range(1, 2), range(1, 2)))
        >>> ranges_of([((0, 2), 0), (1, 1)], 2, 2)
        ((range(0, 2), range(0, 1)), (range(1, 2), range(1, 2)))
    """
    if isinstance(wiring, str):
        return _named(wiring, reads, writes)
    if not isinstance(wiring, Sequence):
        raise TypeError(f"wiring must be one of {NAMED} or a sequence of (reads, writes), got {wiring!r}")
    found = []
    for number, pair in enumerate(wiring):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"wiring[{number}] must be a pair (reads, writes) of sites, got {pair!r}")
        found.append((_range(f"wiring[{number}][0]", pair[0], reads), _range(f"wiring[{number}][1]", pair[1], writes)))
    if not found:
        raise ValueError("wiring must hold at least one source, got none")
    unwritten = sorted(set(range(writes)).difference(*(sites for _, sites in found)))
    if unwritten:
        raise ValueError(f"wiring must have each site written by some source, nobody writes {unwritten}")
    return tuple(found)


def _named(name: str, reads: int, writes: int) -> Ranges:
    if name not in NAMED:
        raise ValueError(f"wiring must be one of {NAMED} or a sequence of (reads, writes), got {name!r}")
    if name == "joint":
        return ((range(reads), range(writes)),)
    if name != "each" and reads != writes:
        raise ValueError(f"wiring={name!r} needs as many sites in writes as in reads, got {writes} and {reads}")
    last = {"causal": lambda s: range(s, writes), "each": lambda s: range(writes), "local": lambda s: range(s, s + 1)}
    return tuple((range(s, s + 1), last[name](s)) for s in range(reads))


def _range(name: str, given: Any, number: int) -> range:
    """An int, a ``range`` or a pair (first, end) as a range of sites."""
    if isinstance(given, range):
        first, end, step = given.start, given.stop, given.step
    elif isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2:
        first, end, step = *(check.count(f"{name}[{i}]", value) for i, value in enumerate(given)), 1
    elif (single := check.integer_in(given)) is not None:
        first, end, step = single, single + 1, 1
    else:
        raise TypeError(f"{name} must be the number of a site, a range or a pair (first, end), got {given!r}")
    if step != 1 or not 0 <= first < end <= number:
        raise ValueError(f"{name} must be a range of neighbouring sites within 0..{number - 1}, got {given!r}")
    return range(first, end)
