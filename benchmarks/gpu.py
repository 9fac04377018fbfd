"""Everything that wants a GPU, in one go and without a network: ``make gpu``, or ``python benchmarks/gpu.py``.

Ten minutes on a lent GPU must leave evidence behind, whatever goes wrong. So the parts run in the order in which their
results would be missed, each in processes and with a limit of its own, and no part waits for another to succeed:

    install, machine    this tree made importable; versions, GPU, memory
    smoke               each kernel once against the reference, which also compiles what is timed next
    headline            the operations at the quoted sizes
    steps               whole training steps, forward and backward beside published times, parts of a step
    tests               the files whose tests run on the GPU, then the tests of other files that need one
    sanitizer           memcheck and racecheck, where compute-sanitizer works
    sweeps              contestants that take long to compile, then the sweeps over F and k, in the time that is left
    report              from the rows that there are

All tests take twice the time that they have there (198 s on 16 cores beside an H200): ``--parts tests`` runs them
alone, for as long as there is.

Everything shown is also in OUT/gpu.txt, and what each process said in OUT/gpu/, as it is said: a kill loses nothing.
This program needs the standard library alone and never touches the GPU itself.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS, TESTS = ROOT / "benchmarks", ROOT / "tests"
TOTAL_SECONDS = 580.0  # a lent GPU is often held for ten minutes at most
LIMITS = {
    "install": 30.0, "machine": 30.0, "smoke": 75.0, "headline": 120.0, "steps": 90.0, "tests": 100.0,
    "sanitizer probe": 10.0, "sanitizer": 60.0, "report": 20.0,
}  # fmt: skip
PARTS = ("smoke", "headline", "steps", "tests", "sanitizer", "sweeps")
CLOSING_SECONDS = 10.0  # what a benchmark gets beyond its --seconds to write its report
GRACE_SECONDS = 5.0  # between an interrupt and a kill
LEAST_SECONDS = 5.0  # a part is not begun with less
SANITIZED = 8  # processes at a time: each checks several files, for torch takes long to import under a sanitizer
GIB_A_PROCESS = 3.0  # of GPU memory: a context, and what a test allocates
PASSED, FAILED, TIMEOUT, NOT_RUN = "passed", "FAILED", "TIMEOUT", "not run"

WHOSE = """
import importlib.util, os, sys
found = [importlib.util.find_spec(name) for name in ("sae_engine", "sae_kernels")]
sys.exit(not all(found) or not os.path.samefile(os.path.dirname(found[0].origin), {0!r}))
"""
# The driver alone, without torch, whose start takes the sanitizer longer than a trivial program needs.
PROBE = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
device, context, memory, size = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t(64)
for error in (
    cuda.cuInit(0), cuda.cuDeviceGet(ctypes.byref(device), 0),
    cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), cuda.cuCtxSetCurrent(context),
    cuda.cuMemAlloc_v2(ctypes.byref(memory), size), cuda.cuMemsetD8_v2(memory, ctypes.c_ubyte(1), size),
    cuda.cuCtxSynchronize(), cuda.cuMemFree_v2(memory),
):
    assert error == 0, f"CUDA driver: error {error}"
"""


class Stopped(Exception):
    """A signal asked for the end."""


@dataclass
class Task:
    """A process: what it is called, its command, and what its environment has beside ours."""

    name: str
    command: Sequence[object]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Running:
    """A task's process, its log, and how much of that has been shown."""

    task: Task
    process: subprocess.Popen
    log: Path
    started: float
    shown: int = 0

    def interrupt(self, how: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, how)  # its children too: it leads a group of its own

    def last_line(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        return next((line.strip("= ") for line in reversed(lines) if line), "")


class Session:
    """Parts within one time limit, in one log; ``verdicts`` are the lines of the summary."""

    def __init__(self, out: Path, python: str, seconds: float) -> None:
        self.out, self.python, self.end = out, python, time.monotonic() + seconds
        self.verdicts: list[tuple[str, str]] = []
        self.running: list[Running] = []
        (out / "gpu").mkdir(parents=True, exist_ok=True)
        self.log: IO[str] = (out / "gpu.txt").open("w", encoding="utf-8")

    def say(self, text: str, end: str = "\n") -> None:
        print(text, end=end, flush=True)
        self.log.write(text + end)
        self.log.flush()

    def left(self) -> float:
        """Seconds for parts, less what the report needs."""
        return self.end - time.monotonic() - LIMITS["report"]

    def verdict(self, kind: str, text: str) -> None:
        self.verdicts.append((kind, text))
        self.say(f"{kind:8} {text}")

    # --- running ---------------------------------------------------------------------------------------------------

    def part(self, name: str, command: Sequence[object], seconds: float) -> str:
        """One process, shown as it speaks."""
        return self.spread(name, [Task(name, command)], seconds, jobs=1)

    def spread(self, name: str, tasks: Sequence[Task], seconds: float, jobs: int) -> str:
        """``jobs`` processes at a time, each with its own log. The part's verdict, which is also kept."""
        if seconds < LEAST_SECONDS:
            self.verdict(NOT_RUN, f"{name}: no time left")
            return NOT_RUN
        alone, started = len(tasks) == 1, time.monotonic()
        many = "" if alone else f", {len(tasks)} processes, {jobs} at a time"
        self.say(f"\n== {name} (at most {seconds:.0f} s{many}; {self.end - time.monotonic():.0f} s left of all)")
        waiting, outcomes = list(tasks), []
        while waiting or self.running:
            while waiting and len(self.running) < jobs:
                self._start(name, waiting.pop(0))
            time.sleep(0.05)
            late = time.monotonic() - started > seconds
            if late:
                self._stop()
            for run in list(self.running):
                status = run.process.poll()
                if alone:
                    self._show(run)
                if status is None and not late:
                    continue
                self.running.remove(run)
                kind = TIMEOUT if late else FAILED if status else PASSED
                outcomes.append(kind)
                if not alone:
                    took = time.monotonic() - run.started
                    self.say(f"  {kind:8} {run.task.name}, {took:.0f} s: {run.last_line()[:140]}")
            if late:
                for task in waiting:
                    self.say(f"  {NOT_RUN:8} {task.name}")
                outcomes += [TIMEOUT] * len(waiting)
                break
        kind = next((kind for kind in (FAILED, TIMEOUT) if kind in outcomes), PASSED)
        text = f"{name}, {time.monotonic() - started:.0f} s"
        if not alone and kind != PASSED:
            text += f": {outcomes.count(FAILED)} of {len(tasks)} failed, {outcomes.count(TIMEOUT)} did not finish"
        self.verdict(kind, text)
        return kind

    def _start(self, part: str, task: Task) -> None:
        log = self.log_of(part, task.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            try:
                process = subprocess.Popen(
                    list(map(str, task.command)), stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    cwd=ROOT, env={**os.environ, **task.environment}, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                stream.write(str(error).encode())
                process = subprocess.Popen(["false"], start_new_session=True)
        self.running.append(Running(task, process, log, time.monotonic()))

    def log_of(self, part: str, task: str) -> Path:
        folder, name = self.out / "gpu", task.replace("/", "-").replace(" ", "-")
        return folder / f"{name}.txt" if part == task else folder / part.replace(" ", "-") / f"{name}.txt"

    def _show(self, run: Running) -> None:
        """What it has said since the last time."""
        with run.log.open("rb") as stream:
            stream.seek(run.shown)
            new = stream.read()
        run.shown += len(new)
        if new:
            self.say(new.decode(errors="replace"), end="")

    def _stop(self) -> None:
        """Interrupts what runs, and kills what then still does."""
        for how, patience in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, 1.0)):
            for run in self.running:
                run.interrupt(how)
            deadline = time.monotonic() + patience
            while any(run.process.poll() is None for run in self.running) and time.monotonic() < deadline:
                time.sleep(0.05)

    def finds_this_tree(self) -> bool:
        """Whether the interpreter's ``sae_engine`` is that of this tree already."""
        with suppress(OSError, subprocess.TimeoutExpired):
            command = [self.python, "-c", WHOSE.format(str(ROOT / "sae_engine"))]
            return subprocess.run(command, capture_output=True, cwd=ROOT, timeout=LIMITS["install"]).returncode == 0
        return False

    # --- parts -----------------------------------------------------------------------------------------------------

    def machine(self) -> dict:
        """Versions and GPU, shown; the names of the smoke's operations and how many processes fit."""
        facts = self.out / "gpu" / "machine.json"
        facts.unlink(missing_ok=True)
        command = [self.python, BENCHMARKS / "smoke.py", "--machine", facts]
        self.part("machine", command, min(LIMITS["machine"], self.left()))
        return json.loads(facts.read_text()) if facts.exists() else {}

    def smoke(self, operations: Sequence[str], jobs: int, seconds: float) -> None:
        tasks = [Task(name, [self.python, BENCHMARKS / "smoke.py", name]) for name in operations]
        tasks += [Task(file.stem, self._pytest([file], "sanitizer")) for file in marked("sanitizer")]
        self.spread("smoke", tasks, min(seconds, self.left()), jobs)

    def benchmark(self, name: str, arguments: Sequence[str], seconds: float) -> None:
        seconds = min(seconds, self.left())
        limit = max(seconds - CLOSING_SECONDS, 1.0)
        command = [self.python, BENCHMARKS / "run.py", "--out", self.out, "--seconds", f"{limit:.0f}", *arguments]
        self.part(name, command, seconds)

    def tests(self, jobs: int, seconds: float) -> None:
        first = [TESTS / f"{name}.py" for name in sorted(on_the_gpu())]
        first.sort(key=lambda file: -file.stat().st_size)  # lest a long one be begun when the others have ended
        others = [file for file in marked("gpu") if file not in first]
        tasks = [Task(file.stem, self._pytest([file], "not slow and not serial")) for file in first]
        tasks += [Task(file.stem, self._pytest([file], "gpu and not slow and not serial")) for file in others]
        self.spread("tests", tasks, min(seconds, self.left()), jobs)

    def sanitizer(self, jobs: int, seconds: float) -> None:
        """The tests marked `sanitizer`, each allocation its own, so that a stray access has nowhere to land."""
        found = shutil.which("compute-sanitizer")
        if found is None:
            self.verdict(NOT_RUN, "sanitizer: no compute-sanitizer on the PATH")
            return
        before = len(self.verdicts)
        command = [found, "--tool", "memcheck", "--error-exitcode", "99", self.python, "-c", PROBE]
        if self.part("sanitizer probe", command, min(LIMITS["sanitizer probe"], self.left())) != PASSED:
            del self.verdicts[before:]  # no fault of ours
            log = self.log_of("sanitizer probe", "sanitizer probe")
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip("= ")]
            self.verdict(NOT_RUN, f"sanitizer: it does not work here: {said[-1].strip('= ') if said else 'no answer'}")
            return
        jobs, files, tasks = min(jobs, SANITIZED), marked("sanitizer"), []
        each = max(jobs // 2, 1)  # processes of either tool
        for tool in ("memcheck", "racecheck"):
            # It looks at the process that it starts and at none of that one's children: at python, not at a shell.
            under = [found, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "99",
                     "--print-limit", "20"]  # fmt: skip
            for some in filter(None, (files[start::each] for start in range(each))):
                name = " ".join([tool, *(file.stem for file in some)])
                command = self._pytest(some, "sanitizer", under)
                tasks.append(Task(name, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
        self.spread("sanitizer", tasks, min(seconds, self.left()), jobs)

    def _pytest(self, files: Sequence[Path], marks: str, under: Sequence[object] = ()) -> list[object]:
        """The files' tests, in the words that say at a kill which test was running. 5: there are none."""
        shell = '"$@"; status=$?; [ $status -eq 5 ] && exit 0; exit $status'
        return ["sh", "-c", shell, "sh", *under, self.python, "-m", "pytest", *files, "-v", "--tb=short", "-m", marks,
                "-p", "no:cacheprovider", "-p", "no:xdist"]  # fmt: skip

    def finish(self) -> int:
        """The report and the summary, in any case. The exit status: whether all that ran passed."""
        self._stop()
        self.running.clear()
        command = [self.python, BENCHMARKS / "run.py", "--report-only", "--out", self.out]
        self.part("report", command, LIMITS["report"])
        self.say("\n== summary")
        for kind, text in self.verdicts:
            self.say(f"{kind:8} {text}")
        return int(any(kind in (FAILED, TIMEOUT) for kind, _ in self.verdicts))


def on_the_gpu() -> set[str]:
    """The files whose tests run on a GPU, read without importing torch."""
    return runpy.run_path(str(TESTS / "helpers" / "on_the_gpu.py"))["ON_THE_GPU"]


def marked(mark: str) -> list[Path]:
    """The test files in which a mark is set."""
    return [file for file in sorted(TESTS.glob("test_*.py")) if f"mark.{mark}" in file.read_text()]


def jobs_for(free_gib: float | None) -> int:
    """As many processes as there are cores to compile on, as far as they find GPU memory."""
    asked = os.environ.get("GPU_JOBS")
    if asked:
        return max(int(asked), 1)
    cores = len(os.sched_getaffinity(0))
    return max(min(cores, int(free_gib / GIB_A_PROCESS)), 1) if free_gib else min(cores, 4)


def everything(session: Session, parts: Sequence[str]) -> None:
    python = session.python
    session.say(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    if not session.finds_this_tree():
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", "."]
        session.part("install", install, min(LIMITS["install"], session.left()))
    facts = session.machine()
    if not facts.get("gpu"):
        session.verdict(FAILED, "torch sees no GPU, and everything else needs one")
        return
    jobs = jobs_for(facts.get("free_gib"))
    last = [name for name in PARTS if name in parts][-1]

    def limit(name: str) -> float:
        """The last part may take what is left."""
        return session.left() if name == last else LIMITS[name]

    run = {
        "smoke": lambda: session.smoke(facts["operations"], jobs, limit("smoke")),
        "headline": lambda: session.benchmark("headline", ["--only", "operations", "sizes"], limit("headline")),
        "steps": lambda: session.benchmark("steps", ["--only", "steps", "parts"], limit("steps")),
        "tests": lambda: session.tests(jobs, limit("tests")),
        "sanitizer": lambda: session.sanitizer(jobs, limit("sanitizer")),
        "sweeps": lambda: session.benchmark("sweeps", ["--only", "compiled", "sweeps"], session.left()),
    }
    for name in PARTS:
        if name in parts:
            run[name]()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="All that wants a GPU, the most precious first, ending in a report.")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results", metavar="FOLDER", help="for all results")
    parser.add_argument("--python", default=sys.executable, help="the interpreter whose torch is used as it is")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for everything (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args(arguments)
    os.environ |= {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    session = Session(options.out.resolve(), options.python, options.seconds)

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # the report is being written
        raise Stopped(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        everything(session, options.parts)
    except Stopped as asked:
        session.verdict(FAILED, f"interrupted by {asked}; what had been measured is kept")
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
