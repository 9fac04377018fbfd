"""Launch configurations that a search has found: opt-in, in a table that can be written and read. Imports torch only.

``SAE_AUTOTUNE_TABLE=file``  what the table holds is used, the heuristics of ``_tuning.py`` for all else
``SAE_AUTOTUNE=1``           what it lacks is searched for on the GPU when first met, and added to it

Without either, nothing here runs. A function of ``_tuning.py`` that :func:`searched` decorates gives a default, and
candidates that are as right; launchers call it as ever. A choice is looked up by operation, architecture, dtype, the
function's arguments, and the batch (the length of the operation's first tensor), rounded up to a power of two: a batch
smaller than any that was searched takes the next larger one's, so that the last of an epoch never searches. A search
needs one process: several ranks read one finished table, and choose alike.
"""
import contextlib
import functools
import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

FORMAT = 1
GAIN = 0.97  # of the default's time: what is not faster by more than a clock's noise does not replace it
FOLDER = Path("sae-engine")  # of the user's cache


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
_session: ContextVar["_Session | None"] = ContextVar("autotune_session", default=None)


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


def default_path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / FOLDER / f"autotune-{fingerprint()}.json"


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
                    f"{fingerprint()}): remove it, or make one with `sae-engine tune`"
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


class _Session:
    """What one call of an operation gets. ``missing`` are the choices, with their arguments, that the table lacks."""

    def __init__(self, table: Table | None, place: tuple[str, str, str], batch: int):
        self.table, self.place, self.batch = table, place, batch
        self.forced: dict[Key, str] = {}
        self.asked: dict[Key, tuple[Choice, tuple]] = {}
        self.missing: dict[Key, tuple[Choice, tuple]] = {}

    def choose(self, choice: Choice, args: tuple) -> Any:
        key = Key(*self.place, choice.name, choice.key(*args))
        configurations = _configurations(choice, args)
        if len(configurations) < 2:
            return choice.default(*args)
        self.asked[key] = choice, args
        if key in self.forced:
            return configurations.get(self.forced[key], choice.default(*args))
        found = self.table.configuration(key, self.batch) if self.table else None
        if found is None:
            self.missing[key] = choice, args
            return choice.default(*args)
        size, name = found
        if name not in configurations and size == self.batch:
            raise RuntimeError(f"{self.table and self.table.path}: {choice.name}{args} has no configuration {name!r}")
        return configurations.get(name, choice.default(*args))  # a smaller batch may have fewer to choose from


def settled_session() -> tuple | None:
    """Names what choices follow from beside their arguments; None while a search tries one after the other."""
    session = _session.get()
    if session is None:
        return ()
    if session.table is None or session.forced or _searches():
        return None
    return (session.table.path, *session.place, session.batch)


@contextlib.contextmanager
def _choosing(session: _Session) -> Iterator[_Session]:
    token = _session.set(session)
    try:
        yield session
    finally:
        _session.reset(token)


@contextlib.contextmanager
def forcing(forced: dict[str, str]) -> Iterator[_Session]:
    """For tests: the named choices take these labels wherever they have them; what is asked is recorded."""

    class Forcing(_Session):
        def choose(self, choice: Choice, args: tuple) -> Any:
            key = Key(*self.place, choice.name, args)
            self.asked[key] = choice, args
            return _configurations(choice, args).get(forced.get(choice.name, ""), choice.default(*args))

    with _choosing(Forcing(None, ("", "", ""), 0)) as session:
        yield session


def is_on() -> bool:
    return _searches() or bool(os.environ.get("SAE_AUTOTUNE_TABLE"))


def _searches() -> bool:
    wanted = os.environ.get("SAE_AUTOTUNE", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"SAE_AUTOTUNE must be 0 or 1, got {wanted!r}")
    return wanted == "1"


@functools.cache
def _table(path: str) -> Table:
    """Read once: a process chooses alike from its start to its end."""
    return Table(Path(path) if path else default_path())


def entries(path: Path) -> list[dict[str, Any]]:
    """What the file holds."""
    return Table(path).entries()


def run(operation: str, function: Callable[..., Any], args: tuple, *, mutates: bool) -> Any:
    """``function(*args)`` with the table's configurations, after a search for those that it lacks if asked for.

    A call inside another's belongs to that one.
    """
    if _session.get() is not None:
        return function(*args)
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    dtype = next((str(t.dtype) for t in tensors if t.is_floating_point()), "").removeprefix("torch.")
    table = _table(os.environ.get("SAE_AUTOTUNE_TABLE", ""))
    session = _Session(table, (operation, _architecture(tensors[0].device), dtype), batch_bin(tensors[0].shape[0]))
    with _choosing(session):
        if _searches() and not _is_capturing(tensors[0]):
            _search_missing(session, function, args, mutates)
        return function(*args)


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "gcnArchName", "").split(":")[0] if torch.version.hip else (
        f"sm_{properties.major}{properties.minor}"
    )


def _is_capturing(tensor: torch.Tensor) -> bool:
    """Inside a CUDA graph nothing can be timed; what is not in the table by then takes its default."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


# --- searching -----------------------------------------------------------------------------------------------------


def gpu_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Median milliseconds of one call, the L2 cache emptied before each. RuntimeError: ``device`` is no GPU."""
    if device.type != "cuda":
        raise RuntimeError(
            f"SAE_AUTOTUNE=1 compares times on a GPU, and this is {device.type}: in Triton's interpreter they mean "
            "nothing. Unset it; SAE_AUTOTUNE_TABLE alone uses a table without searching"
        )
    from triton.testing import do_bench

    return do_bench(call, warmup=10, rep=50, return_mode="median")


timer: Callable[[Callable[[], Any], torch.device], float] = gpu_ms  # tests put their own in its place
_settled: set[tuple] = set()  # calls for which nothing is missing any more


def _search_missing(session: _Session, function: Callable[..., Any], args: tuple, mutates: bool) -> None:
    call = (*session.place, session.batch, str(pytree.tree_map(_described, args)))
    if call in _settled:
        return
    if mutates:  # what is tried must not train
        args = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, args)
    while True:
        session.missing.clear()
        function(*args)
        if not session.missing:
            break
        key, (choice, arguments) = next(iter(session.missing.items()))
        _refuse_several_processes()
        found = _fastest(session, key, list(choice.by_label(*arguments)), functools.partial(function, *args), args)
        assert session.table is not None
        session.table.add(key, session.batch, found)
    _settled.add(call)


def _described(leaf: Any) -> Any:
    return (*map(batch_bin, leaf.shape), str(leaf.dtype)) if isinstance(leaf, torch.Tensor) else leaf


def _refuse_several_processes() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            "SAE_AUTOTUNE=1 searches in one process, and here several would choose differently: fill a table with "
            "`sae-engine tune`, then start them with SAE_AUTOTUNE_TABLE alone"
        )


def _fastest(
    session: _Session, key: Key, labels: list[str], call: Callable[[], Any], args: tuple
) -> dict[str, Any]:
    """The fastest configuration, its time and the default's; in two rounds, so that a warming clock favours none."""
    device = next(leaf.device for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor))
    times: dict[str, list[float]] = {}
    for round_ in range(2):
        for name in labels if round_ == 0 else reversed(labels):
            if round_ and name not in times:
                continue
            session.forced[key] = name
            try:
                taken = timer(call, device)
            except Exception as error:
                if name == labels[0] or type(error).__name__ != "OutOfResources":  # Triton's
                    raise
                continue  # this GPU has not the shared memory
            finally:
                del session.forced[key]
            times.setdefault(name, []).append(taken)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    best, default = min(medians, key=medians.__getitem__), labels[0]
    chosen = best if medians[best] < GAIN * medians[default] else default
    return {"configuration": chosen, "ms": medians[chosen], "default_ms": medians[default]}
