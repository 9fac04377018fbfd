"""``make gpu`` without a GPU, every process faked: which parts run, in what order and time, and what the end says.

``test_gpu_rehearsal.py`` runs the real processes on a device that the emulator plays.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest

MACHINE = '{"gpu": "a GPU", "free_gib": 80.0, "operations": ["topk", "decode", "train"]}'
# The interpreter: notes what it was asked, and does what HANG, RED or NO_GPU say of a call that has their words.
PYTHON = """#!/bin/sh
printf '%s\\n' "$(echo "$*" | tr '\\n' ' ')" >> "{calls}"
case "$*" in *"$HANG"*) [ -n "$HANG" ] && exec sleep 600 ;; esac
case "$*" in *"$RED"*) [ -n "$RED" ] && echo "assertion of $RED" && exit 1 ;; esac
case "$*" in
  *find_spec*) [ -n "$OURS" ]; exit ;;
  *--machine*) for last; do :; done; [ -n "$NO_GPU" ] || echo '{machine}' > "$last" ;;
  *run.py*) echo "rows of $*" ;;
  *pytest*) echo "== 3 passed in 1.00s ==" ;;
  *smoke.py*) echo "right" ;;
esac
"""
SANITIZER = """#!/bin/sh
printf '%s\\n' "compute-sanitizer $(echo "$*" | tr '\\n' ' ')" >> "{calls}"
if [ -n "$DEAD" ]; then echo "========= Error: Failed to initialize"; echo; exit 1; fi
exit 0
"""


class Fake:
    """The programs that gpu.py starts, and gpu.py with them first on the path."""

    def __init__(self, folder, *, sanitizer=True):
        self.calls, self.out, bin_ = folder / "calls", folder / "out", folder / "bin"
        bin_.mkdir()
        self.calls.touch()
        self.python = bin_ / "python"
        programs = {self.python: PYTHON}
        if sanitizer:
            programs[bin_ / "compute-sanitizer"] = SANITIZER
        for program, text in programs.items():
            program.write_text(text.format(calls=self.calls, machine=MACHINE))
            program.chmod(0o755)
        path = str(bin_) + (os.pathsep + os.environ["PATH"] if sanitizer else os.pathsep + "/usr/bin:/bin")
        silent = dict.fromkeys(("HANG", "RED", "NO_GPU", "DEAD", "OURS"), "")
        self.environment = {**os.environ, **silent, "PATH": path, "GPU_JOBS": "6"}

    def start(self, *arguments, **environment):
        command = [sys.executable, gpu.__file__, "--out", self.out, "--python", self.python, *arguments]
        return subprocess.Popen(
            list(map(str, command)), env=self.environment | environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, *arguments, **environment):
        process = self.start(*arguments, **environment)
        text, _ = process.communicate(timeout=120)
        assert text == (self.out / "gpu.txt").read_text()
        return process.returncode, text

    def parts(self):
        """One word for each call, equal neighbours once."""
        words = ("find_spec", "--machine", "pip install", "libcuda", "compute-sanitizer", "--report-only",
                 "--only operations sizes", "--only steps parts", "--only compiled sweeps", "-m sanitizer", "pytest",
                 "smoke.py")  # fmt: skip
        found = [next(word for word in words if word in call) for call in self.calls.read_text().splitlines()]
        return [word for place, word in enumerate(found) if place == 0 or word != found[place - 1]]


@pytest.fixture
def fake(tmp_path):
    if os.name != "posix":
        pytest.skip("needs a POSIX shell")
    return Fake(tmp_path)


def summary(text):
    """What the end says of each part."""
    lines = text.split("== summary\n")[1].splitlines()
    return {line.split(":")[0].split(",")[0][8:].strip(): line[:8].strip() for line in lines}


ALL = ["install", "machine", "smoke", "headline", "steps", "tests", "sanitizer probe", "sanitizer", "sweeps", "report"]


def test_parts_in_the_order_in_which_they_would_be_missed(fake):
    status, text = fake.run()
    assert status == 0, text
    assert summary(text) == dict.fromkeys(ALL, "passed")
    calls = fake.parts()
    for smoke in ("smoke.py", "-m sanitizer"):  # at the same time
        assert smoke in calls[3:7]
    order = ["pip install", "--machine", "--only operations sizes", "--only steps parts", "pytest", "compute-sanitizer",
             "--only compiled sweeps", "--report-only"]  # fmt: skip
    places = [calls.index(word) for word in order]
    assert places == sorted(places), calls
    assert all(str(fake.out) in line for line in fake.calls.read_text().splitlines() if "run.py" in line)


def test_a_tree_that_is_importable_is_not_installed(fake):
    status, text = fake.run(OURS="1")
    assert status == 0 and summary(text) == {name: "passed" for name in ALL if name != "install"}


def test_tests_of_the_gpu_files_come_first(fake):
    fake.run(GPU_JOBS="1")  # so that calls are noted in the order of their starts
    ran = [line for line in fake.calls.read_text().splitlines() if "pytest" in line and "not serial" in line]
    names = [Path(next(word for word in line.split() if word.endswith(".py"))).stem for line in ran]
    first = gpu.on_the_gpu()
    assert first and set(names[: len(first)]) == first
    assert names[len(first) :] and all("-m gpu and" in line for line in ran[len(first) :])
    assert len(names) == len(set(names)), "a file runs once"


def test_red_tests_stop_nothing_and_fail_the_run(fake):
    status, text = fake.run(RED="test_decode.py -v --tb=short -m not slow")
    assert status == 1
    assert summary(text) == dict.fromkeys(ALL, "passed") | {"tests": "FAILED"}
    assert "FAILED   test_decode, " in text and "assertion of test_decode" in text
    assert "assertion of" in (fake.out / "gpu" / "tests" / "test_decode.txt").read_text()


@pytest.mark.parametrize("part", ["headline", "steps", "sweeps", "machine"])
def test_a_failed_part_stops_only_what_needs_it(fake, part):
    words = {"headline": "only operations", "steps": "only steps", "sweeps": "only compiled", "machine": "--machine"}
    status, text = fake.run(RED=words[part])
    expected = dict.fromkeys(ALL, "passed") | {part: "FAILED"}
    if part == "machine":
        expected = {"install": "passed", part: "FAILED", "torch sees no GPU": "FAILED", "report": "passed"}
    assert status == 1 and summary(text) == expected


def test_without_a_gpu_it_says_so_at_once(fake):
    status, text = fake.run(NO_GPU="1")
    assert status == 1 and "torch sees no GPU" in text and "smoke" not in summary(text)


def test_a_sanitizer_that_does_not_work_costs_one_line(fake):
    status, text = fake.run(DEAD="1")
    assert status == 0
    assert "not run  sanitizer: it does not work here: Error: Failed to initialize" in text
    assert "sanitizer probe" not in summary(text) and summary(text)["sweeps"] == "passed"
    assert fake.calls.read_text().count("compute-sanitizer") == 1


def test_the_sanitizer_starts_python_itself_few_times(fake):
    """Of what it does not start itself it checks nothing: "No attachable process found", and a green run."""
    fake.run(GPU_JOBS="16")
    calls = [line.split() for line in fake.calls.read_text().splitlines()]
    checks = [call for call in calls if call[0] == "compute-sanitizer" and "pytest" in call]
    assert 2 <= len(checks) <= gpu.SANITIZED
    for call in checks:
        options = call[1 : call.index(str(fake.python))]
        assert all(word.startswith("--") for word in options[::2]) and len(options) % 2 == 0, call
    for tool in ("memcheck", "racecheck"):
        ran = [Path(word).stem for call in checks if tool in call for word in call if word.endswith(".py")]
        assert sorted(ran) == sorted(file.stem for file in gpu.marked("sanitizer"))


def test_no_sanitizer_costs_one_line(tmp_path):
    if shutil.which("compute-sanitizer", path="/usr/bin:/bin"):
        pytest.skip("this machine has one where it cannot be hidden")
    status, text = Fake(tmp_path, sanitizer=False).run()
    assert status == 0 and "not run  sanitizer: no compute-sanitizer on the PATH" in text


@pytest.fixture
def short(fake, monkeypatch):
    """gpu.py with limits of a second, for parts that hang."""
    limits = "gpu.LIMITS = dict.fromkeys(gpu.LIMITS, 4.0); gpu.GRACE_SECONDS = 1.0; gpu.LEAST_SECONDS = 0.5"
    wrapper = fake.out.parent / "short.py"
    path = f"sys.path.insert(0, {str(gpu.BENCHMARKS)!r})"
    wrapper.write_text(f"import sys; {path}; import gpu; {limits}; sys.exit(gpu.main())")
    return fake, wrapper


@pytest.mark.parametrize(
    ("part", "word"), [("smoke", "smoke.py topk"), ("headline", "only operations"), ("tests", "-m not slow")]
)
def test_a_part_that_hangs_is_ended_and_the_rest_runs(short, part, word):
    fake, wrapper = short
    command = [sys.executable, wrapper, "--out", fake.out, "--python", fake.python]
    done = subprocess.run(
        list(map(str, command)), env=fake.environment | {"HANG": word}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    found = summary(done.stdout)
    assert found[part] == "TIMEOUT" and found["sweeps"] == found["report"] == "passed", done.stdout


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_still_writes_the_report(fake, how):
    process = fake.start(HANG="--only steps parts")
    wait_for(lambda: "--only steps parts" in fake.calls.read_text())
    process.send_signal(how)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"interrupted by {how.name}" in text and summary(text)["headline"] == summary(text)["report"] == "passed"
    assert "--report-only" in fake.parts() and "--only compiled sweeps" not in fake.parts()


def test_killed_it_has_written_what_there_was(fake):
    process = fake.start(HANG="--only steps parts")
    try:
        wait_for(lambda: "--only steps parts" in fake.calls.read_text())
        process.kill()
        process.communicate(timeout=60)
        text = (fake.out / "gpu.txt").read_text()
        assert "passed   headline" in text and "== steps" in text
        assert "rows of" in (fake.out / "gpu" / "headline.txt").read_text()
    finally:  # the hanging part leads a group of its own
        for line in subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines():
            pid, _, command = line.strip().partition(" ")
            if command.strip() == "sleep 600" and str(fake.out) in environ(pid):
                os.kill(int(pid), signal.SIGKILL)


def environ(pid):
    try:
        return Path("/proc", pid, "environ").read_text() + Path("/proc", pid, "cmdline").read_text()
    except OSError:
        return ""


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_time_that_is_left_goes_to_the_sweeps(fake):
    fake.run("--seconds", "400")
    (sweeps,) = [line for line in fake.calls.read_text().splitlines() if "--only compiled sweeps" in line]
    seconds = int(sweeps.split("--seconds ")[1].split()[0])
    assert 250 < seconds <= 400 - gpu.LIMITS["report"] - gpu.CLOSING_SECONDS


def test_without_time_nothing_is_begun_but_the_report(fake):
    status, text = fake.run("--seconds", "1")
    assert fake.parts() == ["find_spec", "--report-only"] and status == 1
    assert {name: kind for name, kind in summary(text).items() if kind != "not run"} == {
        "torch sees no GPU": "FAILED", "report": "passed"
    }  # fmt: skip


def test_as_many_processes_as_cores_and_gpu_memory_allow(monkeypatch):
    monkeypatch.delenv("GPU_JOBS", raising=False)
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert [gpu.jobs_for(gib) for gib in (78.0, 24.0, 2.0, None)] == [16, 8, 1, 4]
    monkeypatch.setenv("GPU_JOBS", "3")
    assert gpu.jobs_for(78.0) == 3


def test_parts_fit_into_the_time():
    """What has a limit leaves the sweeps something, even where every part takes all of its time."""
    assert sum(gpu.LIMITS.values()) + 45 <= gpu.TOTAL_SECONDS < 600


def test_the_lists_are_read_from_the_tests():
    assert {"test_row_topk", "test_training_step"} <= gpu.on_the_gpu()
    assert {"test_row_topk", "test_latent_pass"} <= {file.stem for file in gpu.marked("sanitizer")}
    assert all((gpu.TESTS / f"{name}.py").exists() for name in gpu.on_the_gpu())
