"""One place says which versions of torch and Triton are tested, and everything that names them agrees with it."""
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sae_engine import cli
from sae_engine._versions import MATRIX, PACKAGES, oldest_and_newest, within_tested_range
from sae_engine.cli import info

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def versions():
    """tests/versions.py, which `make test-versions` runs."""
    spec = importlib.util.spec_from_file_location("versions", ROOT / "tests" / "versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("package", PACKAGES)
def test_the_range_that_the_files_name_is_the_tested_one(package):
    oldest, newest = oldest_and_newest(package)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"{package}>={oldest}' in project
    name = {"torch": "torch", "triton": "Triton"}[package]
    for file in ("pyproject.toml", "README.md", "CHANGELOG.md"):
        words = re.sub(r"[\s#]+", " ", (ROOT / file).read_text(encoding="utf-8"))
        assert f"{name} {oldest} to {newest}" in words, file


def test_the_pinned_versions_are_a_row():
    pinned = dict(re.findall(r"^(torch|triton)==([\d.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    assert tuple(pinned[package] for package in PACKAGES) in MATRIX


@pytest.mark.parametrize(
    ("version", "inside"),
    [("2.9.1", False), ("2.10.0", True), ("2.13.0+cpu", True), ("2.15.3", True), ("2.16.0a0", False), ("3.0", False)],
)
def test_versions_compare_as_numbers(version, inside):
    assert within_tested_range("torch", version) is inside


def test_what_is_no_version_is_refused():
    with pytest.raises(ValueError, match="'nightly'"):
        within_tested_range("torch", "nightly")


@pytest.mark.parametrize(("triton", "said"), [("3.9.0", False), ("3.10.0", True), (None, False)])
def test_info_says_when_a_version_lies_outside(triton, said, monkeypatch, capsys):
    installed = {"torch": "2.13.0+cpu", "triton": triton, "transformers": None, "safetensors": None}
    monkeypatch.setattr(info, "_version", installed.get)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "3.6 to 3.9" in out and "2.10 to 2.15" in out
    assert ("3.10.0 lies outside" in out) is said and out.count("lies outside") == said


def test_make_runs_the_matrix():
    command = ["make", "-n", "test-versions", f"PYTHON={sys.executable}", "VERSIONS_ARGS=--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"tests/versions\.py .*--quick", done.stdout), done.stderr


def test_every_version_has_a_row_and_the_ends_draw_hard_cases(versions, monkeypatch):
    monkeypatch.setattr(versions, "installed", {"torch": "2.13.0", "triton": "3.7.1"}.get)
    assert versions.rows(quick=False, torch="matrix") == list(MATRIX)
    assert versions.rows(quick=False, torch="installed") == [("2.13.0", triton) for _, triton in MATRIX]
    assert versions.rows(quick=True, torch="installed") == [("2.13.0", "3.6.0"), ("2.13.0", "3.9.0")]
    drawn = {}
    for torch, triton in MATRIX:
        row = versions.Row("python", None, torch, triton)
        checks = versions.checks(row, quick=False, with_torch=True)
        drawn[triton] = [name for name, command, environment in checks]
        assert "TRITON_INTERPRET" not in row.environment()
    ends, others = ["binaries", "launches", "hard cases", "torch"], ["binaries", "launches", "torch"]
    assert drawn == {"3.6.0": ends, "3.7.1": others, "3.8.0": others, "3.9.0": ends}


def test_the_tests_that_a_row_names_exist(versions):
    for argument in (*versions.LAUNCHES, *versions.DRAWN, *versions.HARD_CASES, *versions.ON_TORCH):
        assert not argument.startswith("tests/") or (ROOT / argument).is_file(), argument


@pytest.mark.parametrize("broken", ["", "binaries", "install"])
def test_a_failure_is_shown_and_is_the_exit_status(broken, versions, monkeypatch, capsys):
    """Nothing is installed or run here: pip and the checks are played by one function."""

    def play(command, **options):
        failed = bool(broken) and {"binaries": "benchmarks/kernel_report.py", "install": "pip"}[broken] in command
        said = "7 passed in 1 s" if "pytest" in command else "what is wrong"
        return SimpleNamespace(returncode=int(failed), stdout=said)

    monkeypatch.setattr(versions.subprocess, "run", play)
    monkeypatch.setattr(versions, "installed", {"torch": "2.13.0", "triton": "3.7.1"}.get)
    monkeypatch.setattr(versions.Path, "touch", lambda path: None)
    monkeypatch.setattr(versions.shutil, "rmtree", lambda *args, **options: None)
    monkeypatch.setattr(versions.Path, "exists", lambda path: False)
    assert versions.main(["--quick"]) == (1 if broken else 0)
    out = capsys.readouterr().out
    assert ("what is wrong" in out) is bool(broken)
    expected = {"": "6 passed, 0 failed", "binaries": "4 passed, 2 failed", "install": "0 passed, 2 failed"}[broken]
    assert out.splitlines()[-1] == expected
