"""``make gpu`` from end to end without a GPU: the real programs, on a device that the emulator plays.

One operation and one test file, at sizes that an emulator finishes; nvidia-smi and compute-sanitizer are faked. What
goes wrong between parts is tested in ``test_gpu_script.py``.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "emulator"
# gpu.py with one test file in each list, and time for a busy machine.
SHORTENED = """
import sys; sys.path.insert(0, {benchmarks!r})
import gpu
gpu.on_the_gpu = lambda: {{"test_decode"}}
gpu.marked = lambda mark: [gpu.TESTS / "test_decode.py"]
gpu.LIMITS = dict.fromkeys(gpu.LIMITS, 500.0)
gpu.CLOSING_SECONDS = 60.0
sys.exit(gpu.main())
"""
NVIDIA_SMI = "#!/bin/sh\necho 999.99\n"
# Runs what it was to watch; the probe asks CUDA's driver, which is not here.
SANITIZER = """#!/bin/sh
case "$*" in *libcuda*) exit 0 ;; esac
while :; do case "$1" in --error-exitcode|--tool|--target-processes|--print-limit) shift 2 ;; *) break ;; esac; done
exec "$@"
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is built with g++"),
    pytest.mark.skipif(not EMULATOR.exists(), reason="the emulator is not part of this tree"),
]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder of results, the exit status and what was shown."""
    pytest.importorskip("triton", reason="the emulated device runs what Triton compiles")
    folder = tmp_path_factory.mktemp("rehearsal")
    programs = {"nvidia-smi": NVIDIA_SMI, "compute-sanitizer": SANITIZER}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "shortened.py").write_text(SHORTENED.format(benchmarks=str(ROOT / "benchmarks")))
    environment = {
        **os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "GPU_JOBS": "2",
        "PYTHONPATH": f"{EMULATOR / 'emulated_gpu'}{os.pathsep}{EMULATOR}", "EMULATED_GPU_OPERATIONS": "decode",
        "PYTEST_ADDOPTS": "-k small_and_complete", "TRITON_CACHE_DIR": str(ROOT / ".cache" / "triton"),
    }  # fmt: skip
    for name in ("TRITON_INTERPRET", "SAE_BACKEND", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, str(folder / "shortened.py"), "--out", str(folder / "out"), "--seconds", "1500"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1600,
    )  # fmt: skip
    return folder / "out", done.returncode, done.stdout


def test_every_part_passes(rehearsal):
    out, status, text = rehearsal
    assert status == 0, text[-6000:]
    verdicts = [line for line in text.split("== summary")[1].splitlines() if line]
    parts = ["machine", "smoke", "headline", "steps", "tests", "sanitizer probe", "sanitizer", "sweeps", "report"]
    assert [line.split()[0] for line in verdicts] == ["passed"] * len(parts), text[-6000:]
    assert [line[9:].split(",")[0] for line in verdicts] == parts
    assert text == (out / "gpu.txt").read_text()


def test_rows_and_report_are_of_the_emulated_device(rehearsal):
    out, _, text = rehearsal
    (folder,) = [path for path in out.iterdir() if path.is_dir() and path.name.startswith("emulated-gpu")]
    rows = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert {"operation", "roof", "step", "part"} <= {row["kind"] for row in rows}
    assert {row["device"] for row in rows} == {"Emulated GPU"} and {row["driver"] for row in rows} == {"999.99"}
    assert all("ms_p50" in row for row in rows if row["provider"].startswith("ours")), text[-6000:]
    assert {"ours, forward + backward", "dense PyTorch, forward + backward"} <= {row["provider"] for row in rows}
    report = (folder / "report.md").read_text()
    for heading in ("## Operations", "## A training step", "### Beside published times", "## Targets"):
        assert heading in report


def test_each_process_has_its_log(rehearsal):
    out, _, _ = rehearsal
    for log in ("smoke/decode", "smoke/train", "smoke/test_decode", "tests/test_decode", "headline", "steps", "sweeps",
                "sanitizer/memcheck-test_decode", "sanitizer/racecheck-test_decode"):  # fmt: skip
        assert (out / "gpu" / f"{log}.txt").read_text(), log
    assert "right" in (out / "gpu" / "smoke" / "decode.txt").read_text()
    assert "1 passed" in (out / "gpu" / "tests" / "test_decode.txt").read_text()
