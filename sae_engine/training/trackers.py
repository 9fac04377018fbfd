"""Where the numbers of a run go: JSON lines always, wandb, TensorBoard and trackio on request.

``metrics.jsonl`` is what reports are made of and what a resumed run continues; the others are copies for people to
watch. Whoever trains hands over plain numbers under these names, SAELens' where it has one. With several autoencoders
in a run, those of one are prefixed by its name and a slash.

    tokens                                          of the run: trained on so far
    losses/overall_loss, losses/mse_loss, losses/…  of an autoencoder
    metrics/explained_variance, metrics/l0
    sparsity/dead_features                          a count
    details/current_learning_rate, details/…
    evaluation/…                                    what ``metrics.evaluate_during`` returns
    data/…                                          of the run: ``RowStream.counts``
    performance/tokens_per_second                   since the line before, as the two that follow
    performance/starved                             the share of the time that the step waited for activations
    performance/seconds/PART                        what the time went to: language_model, step, evaluation …
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import numbers
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .progress import Progress

if TYPE_CHECKING:
    from .config import LoggerConfig

_LOGGER = logging.getLogger(__name__)
__all__ = ["Guarded", "JsonLines", "Progress", "TensorBoard", "Tracker", "Trackio", "Wandb", "read_metrics",
           "trackers_for", "without_secrets"]  # fmt: skip

_SECRET = re.compile(r"token|.*(auth|access|hf|api)_(token|key)|.*(password|secret)", re.IGNORECASE)
RESERVED = ("step", "time")  # what a line of metrics.jsonl says beside the numbers that it is given


class Tracker:
    """Somewhere that the numbers of one run go. A tracker of your own overrides what it needs; these do nothing.

    Example:
        >>> class Printed(Tracker):
        ...     def log(self, metrics, step):
        ...         print(step, metrics)
        >>> Printed().log({"metrics/l0": 32.0}, step=10)
        10 {'metrics/l0': 32.0}
    """

    name = "tracker"

    def start(self, config: dict[str, Any], name: str, id: str | None = None) -> str | None:
        """Begins a run, or goes on with the one that once returned ``id``. ``config`` is of JSON's types."""
        return None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers that belong to ``step``, the count of updates. It never falls, and may come twice."""

    def histogram(self, name: str, values: Tensor | Sequence[float], step: int) -> None:
        """The distribution of ``values``, of which those that are not finite are left out."""

    def finish(self, status: str = "finished") -> None:
        """Ends the run: ``"finished"``, ``"interrupted"`` (it can be resumed) or ``"failed"``."""


# ------------------------------------------------------------------------------------------------ JSON lines


class JsonLines(Tracker):
    """One object a line: ``{"step": 20, "tokens": 81920, "time": "2026-01-31T12:00:00+00:00", "metrics/l0": 32.0, …}``.

    Every line is handed to the operating system whole before :meth:`log` returns, so a killed process loses none and a
    killed machine at most the last ones; what is left of a torn line is cut off by whoever opens the file next. Numbers
    are written so that they are read back bit for bit. JSON has no NaN and no infinity: both are written as ``null``,
    which every reader takes for a missing number, and which :func:`read_metrics` returns as NaN.

    Args:
        path: of the file; its folder is made where it is missing.

    Raises:
        TypeError, ValueError: (from :meth:`log`) what is no number, or has a name that the line needs itself.
        OSError: (from :meth:`log`) the line could not be written; the file then ends with the line before it.

    Example:
        >>> import tempfile
        >>> lines = JsonLines(Path(tempfile.mkdtemp()) / "metrics.jsonl")
        >>> lines.log({"tokens": 4096, "metrics/l0": 32.0, "losses/mse_loss": math.nan}, step=1)
        >>> [{key: line[key] for key in ("step", "tokens", "metrics/l0")} for line in read_metrics(lines.path)]
        [{'step': 1, 'tokens': 4096, 'metrics/l0': 32.0}]
        >>> lines.finish()
    """

    name = "jsonl"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: int | None = None

    def start(self, config: dict[str, Any], name: str, id: str | None = None) -> str | None:
        self._open()
        return None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        line: dict[str, Any] = {"step": int(step)}
        if "tokens" in metrics:
            line["tokens"] = _number("tokens", metrics["tokens"])
        line["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        for key, value in metrics.items():
            if key in RESERVED:
                raise ValueError(f"metrics must not be called {' or '.join(map(repr, RESERVED))}, got {key!r}")
            line[key] = _number(key, value)
        text = json.dumps({key: _or_null(value) for key, value in line.items()}, allow_nan=False) + "\n"
        file = self._open()
        before = os.fstat(file).st_size
        try:
            _write_all(file, text.encode())
        except OSError as error:
            with suppress(OSError):  # the line's beginning takes room that was there before
                os.ftruncate(file, before)
            raise type(error)(error.errno, error.strerror, str(self.path)) from error

    def sync(self) -> int:
        """Waits until all lines are on the disk; the file's length in bytes, as :meth:`truncate` takes it."""
        file = self._open()
        os.fsync(file)
        return os.fstat(file).st_size

    def truncate(self, length: int) -> None:
        """Cuts off what was written after :meth:`sync` returned ``length``.

        ValueError where the file is shorter than that: it is not the one that was written then.
        """
        file = self._open()
        found = os.fstat(file).st_size
        if not 0 <= length <= found:
            raise ValueError(f"{self.path} must have at least {length} bytes, those written by then, got {found}")
        os.ftruncate(file, length)

    def finish(self, status: str = "finished") -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        """The file, opened to append, without the rest of a torn line."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            content = self.path.read_bytes()
            if whole := len(_whole_lines(content)) - len(content):
                os.ftruncate(self._file, len(content) + whole)
        return self._file


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a ``metrics.jsonl``, a torn last one left out.

    Args:
        path: what :class:`JsonLines` wrote, perhaps until it was killed, perhaps still does.

    Returns:
        A dictionary a line, in the order of the file: ``step``, ``tokens``, ``time`` (a string) and the numbers;
        ``null`` is NaN.

    Raises:
        OSError: there is no such file.
        ValueError: a line that is whole is not one of ours; names the file and the line.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> _ = path.write_text('{"step": 1, "metrics/l0": null}' + chr(10) + '{"step": 2, "metr')
        >>> read_metrics(path)
        [{'step': 1, 'metrics/l0': nan}]
    """
    lines = []
    for number, text in enumerate(_whole_lines(Path(path).read_bytes()).splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a JSON object, {error}") from None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"{path}, line {number}: must be an object with an integer 'step'")
        if wrong := [key for key, value in line.items() if key != "time" and not isinstance(value, int | float | None)]:
            raise ValueError(f"{path}, line {number}: {wrong[0]!r} must be a number, got {line[wrong[0]]!r}")
        lines.append({key: math.nan if value is None else value for key, value in line.items()})
    return lines


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _write_all(file: int, data: bytes) -> None:
    while data:  # a disk that is nearly full takes a part, and says so at the next call
        data = data[os.write(file, data) :]


def _number(key: str, value: Any) -> int | float:
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, str | bytes):  # which float() would read
        raise TypeError(f"metrics must be numbers, got {key!r}: {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"metrics must be numbers, got {key!r}: {type(value).__name__}") from None


def _or_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(values: Tensor | Sequence[float]) -> Tensor:
    """A vector of 32-bit floats on the host."""
    found = torch.as_tensor(values).detach().flatten().to("cpu", torch.float32)
    return found[found.isfinite()]


# ---------------------------------------------------------------------------------------- other people's


class Wandb(Tracker):
    """Weights & Biases; its mode, key and entity come from its own settings and environment (``WANDB_MODE=offline``).

    A resumed run goes on under its id. Steps that wandb had before the run was killed are not sent again: they would be
    the same numbers.

    Args:
        project: of wandb's projects.
        folder: in which wandb keeps its files, below ``wandb/``.

    Raises:
        ImportError: the package is not installed.
    """

    name = "wandb"

    def __init__(self, project: str, folder: str | Path) -> None:
        self._wandb = _required("wandb")
        self._project, self._folder = project, str(folder)
        self._run: Any = None
        self._first = 0

    def start(self, config: dict[str, Any], name: str, id: str | None = None) -> str | None:
        self._run = self._wandb.init(
            project=self._project, name=name, id=id, config=config, dir=self._folder,
            resume=None if id is None else "allow",
            reinit="create_new",  # a run that the caller has open stays the caller's
        )  # fmt: skip
        self._first = 0 if id is None else int(self._run.step)
        return self._run.id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if step >= self._first:
            self._run.log({key: _number(key, value) for key, value in metrics.items()}, step=step)

    def histogram(self, name: str, values: Tensor | Sequence[float], step: int) -> None:
        finite = _finite(values)
        if step >= self._first and len(finite):
            self._run.log({name: self._wandb.Histogram(finite.numpy())}, step=step)

    def finish(self, status: str = "finished") -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


class TensorBoard(Tracker):
    """TensorBoard's event files in ``folder``; ``tensorboard --logdir FOLDER`` shows them.

    A resumed run hides what the killed one wrote after the checkpoint: from its first step on, the new file counts.

    Raises:
        ImportError: the package tensorboard is not installed.
    """

    name = "tensorboard"

    def __init__(self, folder: str | Path) -> None:
        _required("tensorboard")
        self._folder = Path(folder)
        self._writer: Any = None
        self._config: str | None = None
        self._resumed = False

    def start(self, config: dict[str, Any], name: str, id: str | None = None) -> str | None:
        self._resumed = id is not None
        self._config = json.dumps(config, indent=2, default=str)
        return self._folder.name

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        writer = self._at(step)
        for key, value in metrics.items():
            writer.add_scalar(key, _number(key, value), step)
        writer.flush()

    def histogram(self, name: str, values: Tensor | Sequence[float], step: int) -> None:
        finite = _finite(values)
        if len(finite):
            self._at(step).add_histogram(name, finite, step)

    def finish(self, status: str = "finished") -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _at(self, step: int) -> Any:
        """The writer, made at the first step because that is what a resumed run's file begins with."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step if self._resumed else None)
            if self._config is not None:
                indented = "".join(f"    {line}\n" for line in self._config.splitlines())  # Markdown's code
                self._writer.add_text("config", indented, step)
        return self._writer


class Trackio(Tracker):
    """trackio, in its local database; ``trackio show`` opens its page. Its environment variables are its own.

    A resumed run is found by its name, and is not sent again what trackio had before the run was killed.

    Raises:
        ImportError: the package is not installed.
    """

    name = "trackio"

    def __init__(self, project: str) -> None:
        self._trackio = _required("trackio")
        self._project = project
        self._run: Any = None
        self._first = 0

    def start(self, config: dict[str, Any], name: str, id: str | None = None) -> str | None:
        resume = "never" if id is None else "allow"
        self._run = self._trackio.init(
            project=self._project, name=name if id is None else id, config=config, resume=resume, embed=False
        )
        # Where the run goes on: trackio shows it nowhere else. Without it what followed the checkpoint is sent twice.
        self._first = 0 if id is None else getattr(self._run, "_next_step", 0)
        return self._run.name

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if step >= self._first:
            self._run.log({key: _number(key, value) for key, value in metrics.items()}, step=step)

    def histogram(self, name: str, values: Tensor | Sequence[float], step: int) -> None:
        finite = _finite(values)
        if step >= self._first and len(finite):
            self._run.log({name: self._trackio.Histogram(finite.numpy())}, step=step)

    def finish(self, status: str = "finished") -> None:
        self._run.finish()


class Guarded(Tracker):
    """A tracker whose failures never stop a run: the first is logged as a warning, the others are passed over.

    One that cannot be started is left alone from then on. Later failures may pass, as a network's do, so it is tried
    again with every line.

    Example:
        >>> class Unreachable(Tracker):
        ...     name = "remote"
        ...     def log(self, metrics, step):
        ...         raise OSError("no network")
        >>> Guarded(Unreachable()).log({"metrics/l0": 32.0}, step=1)
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.name = tracker, tracker.name
        self._started, self._warned = True, False

    def start(self, config: dict[str, Any], name: str, id: str | None = None) -> str | None:
        self._started = False
        found = self._try(lambda: (self.tracker.start(without_secrets(config), name, id),))
        self._started = found is not None
        return found[0] if found is not None else id  # an id that is known stays: a later resume may reach it

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._started:
            self._try(lambda: self.tracker.log(metrics, step))

    def histogram(self, name: str, values: Tensor | Sequence[float], step: int) -> None:
        if self._started:
            self._try(lambda: self.tracker.histogram(name, values, step))

    def finish(self, status: str = "finished") -> None:
        if self._started:
            self._try(lambda: self.tracker.finish(status))

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever another library raises: a run of days must not end with it
            if not self._warned:
                self._warned = True
                reason = " ".join(str(error).split()) or "no reason given"
                _LOGGER.warning(
                    "%s: %s: %s. The run goes on, metrics.jsonl has every number; this is said once.",
                    self.name, type(error).__name__, reason,
                )  # fmt: skip
            return None


def trackers_for(logger: LoggerConfig, folder: str | Path) -> list[Tracker]:
    """What ``logger.report_to`` names, behind the JSON lines of ``folder / "metrics.jsonl"``, which come first.

    Raises:
        ImportError: a package that was asked for is not installed; says how to.
        ValueError: ``report_to`` names what is no tracker, or one twice.

    Example:
        >>> import tempfile
        >>> from sae_engine.training.config import LoggerConfig
        >>> [tracker.name for tracker in trackers_for(LoggerConfig(), tempfile.mkdtemp())]
        ['jsonl']
    """
    folder = Path(folder)
    makers: dict[str, Callable[[], Tracker]] = {
        "wandb": lambda: Wandb(logger.project, folder),
        "tensorboard": lambda: TensorBoard(folder / "tensorboard"),
        "trackio": lambda: Trackio(logger.project),
    }
    wanted = tuple(logger.report_to)
    if isinstance(logger.report_to, str) or not makers.keys() >= set(wanted) or len(set(wanted)) < len(wanted):
        raise ValueError(f"logger.report_to must be some of {tuple(makers)}, each once, got {logger.report_to!r}")
    return [JsonLines(folder / "metrics.jsonl"), *(Guarded(makers[name]()) for name in wanted)]


def without_secrets(config: Any) -> Any:
    """A configuration in which tokens and passwords are stars: what leaves the machine is seen by others.

    Example:
        >>> without_secrets({"model_name": "gpt2", "model_from_pretrained_kwargs": {"token": "hf_abc"}})
        {'model_name': 'gpt2', 'model_from_pretrained_kwargs': {'token': '***'}}
    """
    if isinstance(config, Mapping):
        return {key: "***" if _SECRET.fullmatch(str(key)) and isinstance(value, str) else without_secrets(value)
                for key, value in config.items()}  # fmt: skip
    return [without_secrets(value) for value in config] if isinstance(config, list | tuple) else config


def _required(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # the package is there and something inside it is broken: not ours to explain
            raise
        message = f"logger.report_to has {package!r}, whose package is not installed: pip install {package}"
        raise ImportError(message, name=package) from error
