"""The numbers of a run, on their way from the device to its trackers and to the terminal."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .config import Resolved
from .metering import Arriving, Clock
from .trackers import JsonLines, Progress, Tracker, trackers_for


class Logs:
    """What is open while a run logs. A process that does not write has its clock and its lines, and nobody to tell.

    Args:
        config: complete.
        folder: of the run.
        update, total: updates that are made already, and of the whole run.
        saved: the state of the checkpoint that the run goes on from, or None.
        writes: whether this is the process that writes.

    Attributes:
        clock: of what time is spent on.
        ids: of the trackers, by name.
        status: what trackers are told in the end.
    """

    def __init__(
        self, config: Resolved, folder: Path, *, update: int, total: int, saved: Mapping[str, Any] | None,
        writes: bool,
    ) -> None:  # fmt: skip
        logged = config.logger
        self._batch = config.optim.train_batch_size_tokens * config.optim.gradient_accumulation_steps
        self.ids: dict[str, str | None] = {} if saved is None else dict(saved["trackers"])
        self.status = "failed"
        self.clock, self._logged = Clock(), update
        self._line: _Line | None = None
        self._progress = Progress(total * self._batch, show=logged.progress and writes)
        self._progress.update(update * self._batch)
        self._trackers: list[Tracker] = []
        self._lines: JsonLines | None = None
        if not writes:
            return
        self._trackers = trackers_for(logged, folder)
        name = logged.run_name or folder.name
        for tracker in self._trackers:
            self.ids[tracker.name] = tracker.start(config.to_dict(), name, self.ids.get(tracker.name))
        lines = self._trackers[0]
        assert isinstance(lines, JsonLines)
        self._lines = lines
        lines.truncate(0 if saved is None else saved["metrics_bytes"])

    def start(self, update: int, names: Sequence[str], values: Tensor, known: dict[str, float]) -> None:
        """A line of metrics sets out: ``values`` (n,), the last of them batches left out in a row, come from the
        device; ``known`` are the host's."""
        since, self._logged = update - self._logged, update
        self._line = _Line(update, since, list(names), Arriving(values), known, self.clock.taken())

    def arrived(self) -> tuple[dict[str, float], float] | None:
        """Writes the line that is on its way, if there is one: its metrics, and how many batches in a row were left
        out."""
        if self._line is None:
            return None
        line, self._line = self._line, None
        *values, in_a_row = line.values.read()
        metrics = dict(zip(line.names, values, strict=True))
        tokens = line.update * self._batch
        seconds, parts = line.times
        seconds -= parts["evaluation"]
        rate = line.updates * self._batch / seconds
        metrics |= line.known
        metrics |= {"tokens": tokens, "details/n_training_samples": tokens, "performance/tokens_per_second": rate,
                    "performance/starved": parts["activations"] / seconds,
                    **{f"performance/seconds/{part}": spent for part, spent in parts.items()}}  # fmt: skip
        self._tell(metrics, line.update)
        self._progress.update(tokens, parts["activations"])
        return metrics, in_a_row

    def record(self, metrics: Mapping[str, float], update: int) -> None:
        """A line that is here already."""
        self._tell({"tokens": update * self._batch, **metrics}, update)

    def sync(self) -> int:
        """Waits until all lines are on the disk; their bytes."""
        return 0 if self._lines is None else self._lines.sync()

    def finish(self) -> None:
        self._progress.close()
        for tracker in self._trackers:
            tracker.finish(self.status)

    def _tell(self, metrics: Mapping[str, float], update: int) -> None:
        for tracker in self._trackers:
            tracker.log(metrics, update)


class _Line(NamedTuple):
    """A line of metrics whose numbers are on their way from the device."""

    update: int
    updates: int  # that it sums up
    names: list[str]
    values: Arriving
    known: dict[str, float]  # what the host knew when it was started
    times: tuple[float, dict[str, float]]  # seconds, and of which parts they are
