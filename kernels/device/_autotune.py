"""Launch configurations from a table that ``make tune`` has filled, on request. Imports torch only.

``SAE_AUTOTUNE_TABLE=file`` names it; for what it lacks the heuristics of ``_tuning.py`` stay. Without it nothing here
runs. A function of ``_tuning.py`` that :func:`searched` decorates gives a default, and candidates that are as right;
launchers call it as ever. A choice is looked up by operation, architecture, dtype, the function's arguments, and the
batch (the length of the operation's first tensor), rounded up to a power of two: a batch smaller than any in the table
takes the next larger one's. No call searches: that is ``sae_engine/_tune.py``, so processes that read one table choose
alike.
"""
import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

FORMAT = 1


class Choice(NamedTuple):
    """A function of ``_tuning.py`` whose result is searched."""

    name: str
    default: Callable[..., Any]
    candidates: Callable[..., Iterable[Any]]
    key: Callable[..., tuple]

    def by_label(self, *args: Any) -> dict[str, Any]:
        """The configurations to choose from, the default among them and first, by what a table calls them."""
        default = self.default(*args)
        if default is None:  # no tile fits: another kernel, and nothing to choose
            return {}
        return {label(found): found for found in (default, *self.candidates(default, *args))}


class Key(NamedTuple):
    """What a configuration is looked up by, beside the batch."""

    operation: str
    arch: str
    dtype: str
    choice: str
    arguments: tuple


CHOICES: dict[str, Choice] = {}
_session: ContextVar["Session | None"] = ContextVar("autotune_session", default=None)
_search: ContextVar["tuple[Table, Search] | None"] = ContextVar("autotune_search", default=None)


def label(configuration: Any) -> str:
    """What a table calls a configuration; the number of groups follows from their size and the batch."""
    if not hasattr(configuration, "_asdict"):
        return str(configuration)
    return " ".join(f"{name}={value}" for name, value in configuration._asdict().items() if name != "number")


def searched(candidates: Callable[..., Iterable[Any]], key: Callable[..., tuple] = lambda *args: args):
    """Decorates a function of ``_tuning.py``: ``candidates(default, *args)`` are as right as what it returns.

    ``key`` leaves of the arguments what does not follow the batch.
    """

    def decorate(default):
        choice = CHOICES[default.__name__] = Choice(default.__name__, default, candidates, key)

        @functools.wraps(default)
        def choose(*args):
            session = _session.get()
            return default(*args) if session is None else session.choose(choice, args)

        return choose

    return decorate


@functools.lru_cache(maxsize=4096)
def _configurations(choice: Choice, args: tuple) -> dict[str, Any]:
    return choice.by_label(*args)


def batch_bin(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


# --- the table -----------------------------------------------------------------------------------------------------


@functools.cache
def fingerprint() -> str:
    """Names these kernels: a table of others says nothing about them."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Table:
    """Configurations by key and batch bin. RuntimeError: the file is damaged, or of other kernels."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[Key, dict[int, dict[str, Any]]] = {}
        self._read()

    def _read(self) -> None:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        try:
            whole = json.loads(text)
            version, kernels, entries = whole["format"], whole["kernels"], whole["entries"]
            if (version, kernels) != (FORMAT, fingerprint()):
                raise RuntimeError(
                    f"{self.path} is a table of other kernels (format {version}, kernels {kernels}, not {FORMAT}, "
                    f"{fingerprint()}): remove it, or make one with `make tune`"
                )
            for entry in entries:
                named = {name: entry[name] for name in Key._fields}
                key = Key(**{**named, "arguments": tuple(entry["arguments"])})
                if not (isinstance(entry["configuration"], str) and isinstance(entry["batch"], int)):
                    raise TypeError(f"entry {entry!r}")
                self.found.setdefault(key, {}).setdefault(entry["batch"], entry)
        except (KeyError, TypeError, ValueError) as error:
            raise RuntimeError(f"{self.path} is no table of configurations, or damaged: {error!r}") from error

    def entries(self) -> list[dict[str, Any]]:
        return [entry for sizes in self.found.values() for entry in sizes.values()]

    def configuration(self, key: Key, batch: int) -> tuple[int, str] | None:
        """Batch bin and label of what was found for this batch, or the next larger one."""
        fitting = [size for size in self.found.get(key, ()) if size >= batch]
        return (min(fitting), self.found[key][min(fitting)]["configuration"]) if fitting else None

    def add(self, key: Key, batch: int, found: dict[str, Any]) -> None:
        """Adds what was found and replaces the file, which another process may have added to: what it holds stays."""
        mine = {**key._asdict(), "arguments": list(key.arguments), "batch": batch, **found}
        self._read()
        self.found.setdefault(key, {}).setdefault(batch, mine)
        whole = {"format": FORMAT, "kernels": fingerprint(), "entries": self.entries()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)


# --- choosing ------------------------------------------------------------------------------------------------------


class Session:
    """What one call of an operation gets.

    A search reads in ``missing`` which choices, with their arguments, the table lacks, and tries labels by ``forced``.
    """

    def __init__(self, table: Table, place: tuple[str, str, str], batch: int):
        self.table, self.place, self.batch = table, place, batch
        self.forced: dict[Key, str] = {}
        self.missing: dict[Key, tuple[Choice, tuple]] = {}

    def choose(self, choice: Choice, args: tuple) -> Any:
        key = Key(*self.place, choice.name, choice.key(*args))
        configurations = _configurations(choice, args)
        if len(configurations) < 2:
            return choice.default(*args)
        if key in self.forced:
            return configurations.get(self.forced[key], choice.default(*args))
        found = self.table.configuration(key, self.batch)
        if found is None:
            self.missing[key] = choice, args
            return choice.default(*args)
        size, name = found
        if name not in configurations and size == self.batch:
            raise RuntimeError(f"{self.table.path}: {choice.name}{args} has no configuration {name!r}")
        return configurations.get(name, choice.default(*args))  # a smaller batch may have fewer to choose from


class Forced(Session):
    """For tests: named choices take these labels wherever they have them; what is asked is recorded."""

    def __init__(self, labels: dict[str, str]):
        self.labels = labels
        self.asked: dict[Choice, tuple] = {}

    def choose(self, choice: Choice, args: tuple) -> Any:
        configurations = _configurations(choice, args)
        if len(configurations) > 1:
            self.asked[choice] = args
        return configurations.get(self.labels.get(choice.name, ""), choice.default(*args))


Search = Callable[[Session, Callable[[], Any], torch.device], None]  # fills the session's table for one call


def settled_session() -> tuple | None:
    """Names what choices follow from beside their arguments; None while they are tried one after the other."""
    session = _session.get()
    if session is None:
        return ()
    if isinstance(session, Forced) or _search.get() is not None:
        return None
    return (session.table.path, *session.place, session.batch)


@contextlib.contextmanager
def choosing(session: Session) -> Iterator[None]:
    """Inside, ``session`` makes all choices."""
    token = _session.set(session)
    try:
        yield
    finally:
        _session.reset(token)


@contextlib.contextmanager
def searching(table: Table, search: Search) -> Iterator[None]:
    """Inside, every call of an operation on this thread is handed to ``search`` before it runs with ``table``."""
    token = _search.set((table, search))
    try:
        yield
    finally:
        _search.reset(token)


def is_on() -> bool:
    return bool(os.environ.get("SAE_AUTOTUNE_TABLE")) or _search.get() is not None


@functools.cache
def _table(path: str) -> Table:
    """Read once: a process chooses alike from its start to its end."""
    return Table(Path(path))


def run(operation: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` with the table's configurations. A call inside another's belongs to that one."""
    if _session.get() is not None:
        return function(*args)
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    dtype = next((str(t.dtype) for t in tensors if t.is_floating_point()), "").removeprefix("torch.")
    device = tensors[0].device
    table, search = _search.get() or (_table(os.environ["SAE_AUTOTUNE_TABLE"]), None)
    session = Session(table, (operation, _architecture(device), dtype), batch_bin(tensors[0].shape[0]))
    with choosing(session):
        if search is not None:
            search(session, functools.partial(function, *args), device)
        return function(*args)


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "gcnArchName", "").split(":")[0] if torch.version.hip else (
        f"sm_{properties.major}{properties.minor}"
    )


def gpu_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Median milliseconds of one call on the current GPU, the L2 cache emptied before each: what a search compares."""
    from triton.testing import do_bench

    return do_bench(call, warmup=10, rep=50, return_mode="median")
