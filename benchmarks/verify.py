"""No speed without a green gate: an operation whose test file is red is not timed.

Test files run once, all that are due in one pytest process; a pass is remembered under ``.cache/`` by the hash of the
kernels, the engine, the test file, the versions and the device. On a CPU the tests of the Triton back end are left
out (they run in Triton's interpreter, for minutes, and what is timed there is the torch back end); on a GPU nothing is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from rows import ROOT, device_name, now_utc, write_atomically

CACHE = ROOT / ".cache" / "verified.json"
TIMEOUT_SECONDS = 900


class NotVerified(RuntimeError):
    """The tests could not be run at all: pytest is missing, collection failed, or time ran out."""


def verify(
    test_files: Iterable[str], device: torch.device, *, cache: Path = CACHE, timeout: float = TIMEOUT_SECONDS
) -> dict[str, str | None]:
    """None for each green test file, otherwise what is wrong with it.

    Args:
        test_files: names within ``tests/``.
        device: where the operations will be timed.
        cache: file that remembers passes.
        timeout: seconds for those that have to run.
    """
    names = list(dict.fromkeys(test_files))
    verdicts: dict[str, str | None] = {
        name: f"tests/{name} is missing" for name in names if not (ROOT / "tests" / name).is_file()
    }
    hashes = {name: content_hash(name, device) for name in names if name not in verdicts}
    passed = _load(cache)
    verdicts |= {name: None for name, digest in hashes.items() if digest in passed}
    due = [name for name in hashes if name not in verdicts]
    if due:
        found = _run(due, device, timeout)
        _remember(found, hashes, cache)
        verdicts |= found
    return {name: verdicts[name] for name in names}


def remember(report: Path, device: torch.device, *, cache: Path = CACHE) -> list[str]:
    """The files that pytest's JUnit ``report`` of a finished run of this very tree shows green: they do not run again.

    The run must have left out what :func:`verify` leaves out, and nothing else.
    """
    names = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    verdicts = _verdicts(names, report)
    _remember(verdicts, {name: content_hash(name, device) for name in names}, cache)
    return [name for name in names if verdicts[name] is None]


def _remember(verdicts: dict[str, str | None], hashes: dict[str, str], cache: Path) -> None:
    green = {hashes[name]: {"file": name, "utc": now_utc()} for name, verdict in verdicts.items() if verdict is None}
    if green:
        write_atomically(cache, json.dumps(_load(cache) | green, indent=1) + "\n")


def content_hash(test_file: str, device: torch.device) -> str:
    """Of everything that a pass depends on."""
    digest = hashlib.sha256()
    sources = [*(ROOT / "kernels").glob("*.py"), *(ROOT / "sae_engine").rglob("*.py")]
    for path in [*sorted(sources), ROOT / "tests" / "conftest.py", ROOT / "tests" / test_file]:
        if path.is_file():
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    digest.update(f"{device_name(device)} {torch.__version__} {platform.python_version()}".encode())
    return digest.hexdigest()


def _load(cache: Path) -> dict[str, dict]:
    try:
        passed = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or not ours: everything is run again
        return {}
    return passed if isinstance(passed, dict) else {}


def _run(names: list[str], device: torch.device, timeout: float) -> dict[str, str | None]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not serial and not slow"]
        command += [f"--junitxml={report}", *([] if device.type == "cuda" else ["-k", "not triton"])]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(min(os.cpu_count() or 1, 4)), "--dist", "loadfile"]
        command += [str(Path("tests") / name) for name in names]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise NotVerified(f"the tests took more than {timeout:.0f} s: {' '.join(names)}") from error
        if not report.exists():
            shown = (done.stdout + done.stderr).strip().splitlines()[-5:]
            raise NotVerified("pytest did not run the tests:\n  " + "\n  ".join(shown))
        return _verdicts(names, report)


def _verdicts(names: list[str], report: Path) -> dict[str, str | None]:
    """Per file from pytest's report: green needs at least one test that ran and none that failed."""
    ran: dict[str, int] = dict.fromkeys(names, 0)
    red: dict[str, list[str]] = {name: [] for name in names}
    for test in ElementTree.parse(report).iter("testcase"):
        # classname is "tests.test_decode" or "tests.test_decode.TestClass"; a collection error has it in name
        where = f"{test.get('classname')}.{test.get('name')}".split(".")
        name = next((name for name in names if Path(name).stem in where), None)
        if name is None:
            continue
        if test.find("failure") is not None or test.find("error") is not None:
            red[name].append(str(test.get("name")))
        elif test.find("skipped") is None:
            ran[name] += 1
    verdicts: dict[str, str | None] = {}
    for name in names:
        if red[name]:
            verdicts[name] = f"tests/{name}: {len(red[name])} failed, first {red[name][0]}"
        else:
            verdicts[name] = None if ran[name] else f"tests/{name}: no test ran"
    return verdicts


def main() -> None:
    """``verify.py REPORT.xml``: takes over what `make gpu` has just run, instead of running it again."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python benchmarks/verify.py JUNIT-REPORT-OF-A-FINISHED-RUN")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    green = remember(Path(sys.argv[1]), device)
    print(f"{len(green)} test files are green on {device_name(device)}")


if __name__ == "__main__":
    main()
