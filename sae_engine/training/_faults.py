"""What is wrong with a configuration, all of it at once, and the checks that find it."""
from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .. import _checks as check
from ..data.sites import Site

Check = Callable[[Any], "str | None"]  # of a value: what is right instead, or None where it is
_NAME = re.compile(r"[\w.+=@-]+")


class ConfigError(ValueError):
    """Faults of a configuration: ``faults`` has the path and what is wrong there of each, the text a line of each.

    Example:
        >>> print(ConfigError([("saes.0.k", "must be at least 1, got 0"), ("optim.lr", "must be positive, got -1")]))
        saes.0.k: must be at least 1, got 0
        optim.lr: must be positive, got -1
    """

    def __init__(self, faults: Iterable[tuple[str, str]]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(f"{path}: {what}" if path else what for path, what in self.faults))

    def __reduce__(self) -> tuple:
        return type(self), (self.faults,)

    def below(self, path: str) -> ConfigError:
        """The same faults of what stands at ``path`` in something larger."""
        return ConfigError((f"{path}.{inner}" if inner else path, what) for inner, what in self.faults)


@contextmanager
def within(path: str, part: Any, field: str | None = None) -> Iterator[None]:
    """What goes wrong inside says, in one line, which field of a configuration leads to it.

    Args:
        path: of ``part`` in the configuration.
        field: of ``part``; an error that begins with the name of another one is of that one.
    """
    try:
        yield
    except ConfigError as error:
        raise error.below(path) from None
    except (ImportError, OSError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        begins = _ARGUMENT.match(said.removeprefix(f"{path}."))
        if begins and (begins[1] in ("name_or_path", "path") or hasattr(part, begins[1])):
            field, said = begins[1] if hasattr(part, begins[1]) else field, begins[2]
        kind = next(kind for kind in _KINDS if isinstance(error, kind))
        raise kind(f"{path}.{field}: {said}" if field else f"{path}: {said}") from error


_ARGUMENT = re.compile(r"(\w+)(?:: | (?=must |is neither |is for ))(.*)")  # as errors of the library begin
_KINDS = (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError, OSError, ImportError, TypeError,
          ValueError)  # fmt: skip


def settle(config: Any, *others: tuple[str, str | None], **checks: Check) -> None:
    """Raises :class:`ConfigError` with what the checks find in fields of ``config``, and ``others`` that are not None.

    Numbers that NumPy made become Python's, as which they can be written.
    """
    faults = [(name, what) for name, holds in checks.items() if (what := holds(getattr(config, name))) is not None]
    faults += [(name, what) for name, what in others if what is not None]
    if faults:
        raise ConfigError(faults)
    for name in checks:
        if (number := check.number_in(getattr(config, name))) is not None:
            object.__setattr__(config, name, number)


def nearest(word: str, known: Iterable[str]) -> str:
    """`` did you mean X?``, or nothing where no known word is like it."""
    like = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {like[0]}?" if like else ""


def as_tuples(config: Any, *names: str) -> None:
    """Makes tuples of lists in a frozen dataclass."""
    for name in names:
        if isinstance(value := getattr(config, name), Sequence) and not isinstance(value, str):
            object.__setattr__(config, name, tuple(value))


# ------------------------------------------------------------------------------------------------ checks


def whole(least: int = 1, most: int | None = None) -> Check:
    def holds(value: Any) -> str | None:
        if (number := check.integer_in(value)) is None:
            return f"must be an int, got {value!r}"
        if most is not None and not least <= number <= most:
            return f"must be in {least}..{most}, got {number}"
        return None if number >= least else f"must be at least {least}, got {number}"

    return holds


def real(range: str = "positive") -> Check:
    """A finite number that is ``"positive"``, ``"from 0"`` or a ``"share"`` in [0, 1)."""

    def holds(value: Any) -> str | None:
        if (number := check.number_in(value)) is None:
            return f"must be a number, got {value!r}"
        if number != number or number in (float("inf"), -float("inf")):
            return f"must be finite, got {value}"
        if range == "positive":
            return None if number > 0 else f"must be positive, got {value}"
        if range == "share":
            return None if 0 <= number < 1 else f"must lie in [0, 1), got {value}"
        return None if number >= 0 else f"must not be negative, got {value}"

    return holds


def one_of(*words: str) -> Check:
    def holds(value: Any) -> str | None:
        if value in words:
            return None
        return f"must be one of {', '.join(words)}, got {value!r}{nearest(str(value), words)}"

    return holds


def text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else f"must be a word, got {value!r}"


def flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else f"must be true or false, got {value!r}"


def auto(holds: Check) -> Check:
    """The check, of everything but the word ``"auto"``."""
    return lambda value: None if value == "auto" else _also("auto", value, holds)


def optional(holds: Check) -> Check:
    """The check, of everything but None."""
    return lambda value: None if value is None else holds(value)


def rate(value: Any) -> str | None:
    return real()(value) or (None if value <= 1 else f"must be at most 1, got {value}")


def widths(value: Any) -> str | None:
    ascending = isinstance(value, tuple) and all(whole()(width) is None for width in value)
    if ascending and value and all(a < b for a, b in itertools.pairwise(value)):
        return None
    return f"must be positive ints in ascending order, got {value!r}"


def place(value: Any) -> str | None:
    if (what := text(value)) is not None:
        return what
    try:
        Site.of(value)
    except ValueError as error:
        return str(error).removeprefix("site ")
    return None


def places(value: Any) -> str | None:
    """A place, or a list of at least one."""
    if not isinstance(value, tuple):
        return place(value)
    if not value:
        return "must name at least one place, got none"
    return next((what for one in value if (what := place(one)) is not None), None)


def spread(value: Any) -> Any:
    """``blocks.{0..2}.hook_resid_mid`` as the list that it stands for; anything else as it is.

    Example:
        >>> spread("blocks.{0..2}.hook_mlp_out")
        ('blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out', 'blocks.2.hook_mlp_out')
    """
    found = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", value) if isinstance(value, str) else None
    if found is None:
        return value
    before, first, last, after = found.groups()
    return tuple(f"{before}{number}{after}" for number in range(int(first), int(last) + 1))


def name_of_folder(value: Any) -> str | None:
    if isinstance(value, str) and _NAME.fullmatch(value) and value.strip("."):
        return None
    return f"must be a name for a folder, of letters, digits and . _ + = @ -, got {value!r}"


def repository(value: Any) -> str | None:
    if isinstance(value, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        return None
    return f"must be 'owner/repository', got {value!r}"


def device(value: Any) -> str | None:
    if (what := text(value)) is not None:
        return what
    try:
        torch.device(value)
    except RuntimeError:
        return f"must be a device such as cpu or cuda:1, got {value!r}"
    return None


def separator(value: Any) -> str | None:
    if value is None or value in ("eos", "bos", "none") or _integer(value) is None:
        return None
    return f"must be eos, bos, none or a token's id, got {value!r}"


def positions(value: Any) -> str | None:
    if isinstance(value, tuple) and len(value) == 2 and all(optional(_integer)(position) is None for position in value):
        return None
    return f"must be two positions, from and to, or null for none, got {value!r}"


def trackers(value: Any) -> str | None:
    known = ("wandb", "tensorboard", "trackio")
    if not isinstance(value, tuple):
        return f"must be a list of {', '.join(known)}, got {value!r}"
    return next((what for word in value if (what := one_of(*known)(word))), None)


def _integer(value: Any) -> str | None:
    return None if check.integer_in(value) is not None else f"must be an int, got {value!r}"


def _also(word: str, value: Any, holds: Check) -> str | None:
    what = holds(value)
    return what if what is None or not isinstance(value, str) else f"{what}, which is not {word!r} either"
