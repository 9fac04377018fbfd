"""``make gpu`` without a GPU: which parts run, in what order, with how much time, and what the end says."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.sh"
FAKE = """#!/bin/sh
echo "$@" | tr '\\n' ' ' >> "{calls}"
echo >> "{calls}"
case "$*" in
  *"import xdist"*) exit 1 ;;
  *"-m pytest"*"-m sanitizer"*) exit 0 ;;
  *"-m pytest"*) exit {tests} ;;
  *run.py*) exit {bench} ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    if shutil.which("bash") is None or shutil.which("timeout") is None:
        pytest.skip("needs bash and timeout")

    def go(*, tests=0, bench=0, **environment):
        python, calls = tmp_path / "python", tmp_path / "calls"
        python.write_text(FAKE.format(calls=calls, tests=tests, bench=bench))
        python.chmod(0o755)
        calls.write_text("")
        done = subprocess.run(
            ["bash", str(SCRIPT)], capture_output=True, text=True, timeout=120,
            env={**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), **environment},
        )  # fmt: skip
        return done, calls.read_text().splitlines()

    return go


def words(calls):
    """One word for each call of the interpreter."""
    names = ("import xdist", "verify.py", "run.py", "sanitizer", "pytest", "pip install", "import platform")
    return [next((name for name in names if name in call), "?") for call in calls]


def test_parts_in_order_and_their_time(run, tmp_path):
    done, calls = run(T_BENCH="100")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [w for w in words(calls) if w != "sanitizer"] == [
        "pip install", "import platform", "import xdist", "pytest", "verify.py", "run.py"
    ]  # fmt: skip
    report = str(tmp_path / "out" / "gpu-tests.xml")
    assert f"--junitxml={report}" in calls[3] and report in calls[4]
    assert "--seconds 75" in calls[-1] and "--only kernels --steps" in calls[-1] and str(tmp_path / "out") in calls[-1]
    assert "passed   benchmarks" in (tmp_path / "out" / "gpu.txt").read_text()


def test_the_rest_of_the_time_goes_to_the_benchmarks(run):
    _, calls = run(T_TOTAL="200", BENCH_ARGS="--quick")
    seconds = int(calls[-1].split("--seconds ")[1].split()[0])
    assert 100 < seconds <= 175 and calls[-1].split()[-1] == "--quick"


def test_red_tests_are_taken_over_and_fail_the_run(run):
    done, calls = run(tests=1)
    assert done.returncode == 1 and "FAILED   tests" in done.stdout and "verify.py" in words(calls)
    assert words(calls)[-1] == "run.py"  # what is green is still timed


def test_tests_that_did_not_finish_are_not_taken_over(run):
    done, calls = run(tests=2)
    assert done.returncode == 1 and "verify.py" not in words(calls) and words(calls)[-1] == "run.py"


def test_a_failed_benchmark_fails_the_run(run):
    done, _ = run(bench=3)
    assert done.returncode == 1 and "FAILED   benchmarks, exit status 3" in done.stdout
