"""Gives jobs to a process that measures, keeps what comes back, and outlives whatever becomes of that process.

It touches no device. The rows at stake when a process dies get a row that says so; if that was a single provider's, the
job is done again without it, so that a library that crashes costs nobody else their numbers.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any

from rows import Row, failure
from terminal import Terminal, lines_of

SILENT_SECONDS = 120.0  # after so long without a word a process hangs; a compilation on a busy machine takes less
TICK_SECONDS = 0.5


def grace(seconds: float) -> float:
    """After a budget of so many seconds, how long a job that was begun in time may go on."""
    return min(seconds / 12, 20.0)


class Gone(Exception):
    """The process has ended, or hangs; says why."""


class Refused(Exception):
    """Nothing can be measured with these arguments."""


class Worker:
    """A process that measures. Its messages are read as they come, so that it never waits for us."""

    def __init__(self, command: Sequence[str], log: IO[str]) -> None:
        # In a session of its own: Ctrl-C is for us, and the compilers that it starts end with it.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        self.messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                self.messages.put(json.loads(line))
        finally:  # also after half a line, of one that was killed
            self.messages.put(None)

    def order(self, job: int, without: Sequence[str]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died; what is heard next says how
            self.process.stdin.write(json.dumps({"job": job, "without": list(without)}) + "\n")
            self.process.stdin.flush()

    def hear(self, seconds: float) -> dict[str, Any] | None:
        """The next message, or None after so long without one. Gone: there will be none."""
        try:
            message = self.messages.get(timeout=seconds)
        except queue.Empty:
            return None
        if message is None:
            raise Gone(f"its process {_ending(self.process.wait())}")
        if "lost" in message:
            raise Gone(message["lost"])
        return message

    def end(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # all of it has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # an order that was never read
                pipe.close()


def _ending(status: int) -> str:
    return f"ended with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"


class Supervisor:
    """Jobs in turn while there is time.

    Args:
        command: starts a process that measures.
        keep: is called with rows as they come, and with none after each job.
        seconds: no job is begun after so many; :func:`grace` later the last one is ended.
        silence: a process that says nothing for so many seconds is ended.
    """

    def __init__(
        self, command: Sequence[str], log: IO[str], terminal: Terminal, keep: Callable[[list[Row]], None], *,
        seconds: float, silence: float = SILENT_SECONDS,
    ) -> None:  # fmt: skip
        self.command, self.log, self.terminal, self.keep = command, log, terminal, keep
        self.seconds, self.silence = seconds, silence
        self.jobs: list[str] = []
        self.next = 0  # of the jobs
        self.remarks: list[str] = []  # on what has no numbers and no row
        self.bad = False  # a result is wrong, or something of ours has failed
        self._worker: Worker | None = None
        self._without: list[str] = []  # providers that a process died of in this job: it is done again without them
        self._at_stake: list[Row] = []
        self._heard = 0.0

    def start(self) -> dict[str, Any]:
        """Starts a process; what it says of itself. Gone: it did not come up."""
        self._at_stake, self._heard = [], self.terminal.elapsed
        self._worker = Worker(self.command, self.log)
        hello = self._hear(math.inf)
        if "refused" in hello:
            raise Refused(hello["refused"])
        self.jobs = hello["jobs"]
        return hello

    def work(self) -> None:
        """All jobs, or those that there is time for."""
        while self.next < len(self.jobs) and self.terminal.elapsed < self.seconds:
            name = self.jobs[self.next]
            self.terminal.progress(name)
            try:
                if self._worker is None:
                    self.start()
            except Gone as gone:
                self._complain(f"after {name} no process comes up any more: {gone}")
                return
            try:
                self._one_job(name)
            except Gone as gone:
                self.end()
                self._bury(name, str(gone))
            except TimeoutError:
                self.end()
                self.remarks.append(f"{name}: out of time")
                self.next += 1
            self.keep([])

    def end(self) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def left(self) -> list[str]:
        """Jobs that have not been begun."""
        return self.jobs[self.next :]

    def _hear(self, end: float) -> dict[str, Any]:
        """The next message. Gone: there will be none. TimeoutError: none until ``end``."""
        assert self._worker is not None
        while True:
            message = self._worker.hear(TICK_SECONDS)
            now = self.terminal.elapsed
            if message is not None:
                self._heard = now
                return message
            self.terminal.progress()
            if now > end:
                raise TimeoutError
            if now - self._heard > self.silence:
                raise Gone(f"said nothing for {self.silence:g} s")

    def _one_job(self, name: str) -> None:
        assert self._worker is not None
        self._at_stake = []
        self._worker.order(self.next, self._without)
        while True:
            message = self._hear(self.seconds + grace(self.seconds))
            if "now" in message:
                self._at_stake = message["at_stake"]
                self.terminal.progress(message["now"])
            elif "rows" in message:
                self._take(message["rows"])
            else:
                if message["failed"] is not None:
                    self._complain(f"{name}: {message['failed']}")
                self.next, self._without = self.next + 1, []
                return

    def _take(self, rows: list[Row]) -> None:
        for row in rows:
            reason = row.get("failed", "")
            self.bad |= bool(reason) and (reason.startswith("WRONG") or row["provider"].startswith(("ours", "sae_")))
        if rows:
            self.keep(rows)  # first: whoever sees a row may interrupt
        for line in lines_of(rows):
            self.terminal.say(line)

    def _bury(self, name: str, reason: str) -> None:
        """After a process has died: gives the rows at stake their reason, and decides where to go on."""
        self._take([failure(row, reason) for row in self._at_stake])
        if not self._at_stake:
            self._complain(f"{name}: {reason}")
        culprits = {row["provider"] for row in self._at_stake}
        if len(culprits) == 1 and not culprits & set(self._without):
            self._without += culprits
        else:
            self.next, self._without = self.next + 1, []

    def _complain(self, remark: str) -> None:
        self.bad = True
        self.remarks.append(remark)
        self.terminal.say(f"FAILED  {remark}")
