"""`make test-versions`: the tests that depend on torch and Triton, for each row of ``sae_engine/_versions.py``.

A row's torch and Triton lie in an environment of their own, .venvs/torch-VERSION. Where the interpreter that runs this
file has the row's torch, or --torch installed asks for its own in every row, it is used as it is, and a Triton that it
lacks lies in .venvs/triton-VERSION and comes first on the path. All of that is installed once and kept.

What a row runs:
    binaries    every kernel compiled ahead of time: no spills, no narrow loads, nothing compiled anew
    launches    every launch lowered at the edges of its sizes, small rows compiled (tests/test_frontend.py)
    hard cases  the Triton back end against the reference in Triton's interpreter; oldest and newest Triton alone
    torch       operators, torch.compile, autograd and modules on the other back ends; once for each torch
--quick leaves the running interpreter's own versions out, which `make test` has tested, and torch with them; it
compiles the oldest and the newest Triton's binaries for one GPU, and draws a few hard cases in place of all.

Each of these is one process, and --jobs of them run at a time: a row has parts that cannot be shared out.
"""
import argparse
import concurrent.futures
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / ".venvs"
MATRIX = runpy.run_path(str(ROOT / "sae_engine" / "_versions.py"))["MATRIX"]
LENGTHS = ["torch", "launches", "binaries", "hard cases"]  # checks by the time that they take
ENDS = (MATRIX[0][1], MATRIX[-1][1])  # the oldest and the newest Triton
# The interpreter of Triton 3.6 makes an int of an array of one element, which NumPy 2.4 refuses.
BESIDE_TRITON = {"3.6.0": ["numpy<2.4"]}

DRAWN = ["tests/test_selection_properties.py", "-k", "triton"]
LAUNCHES = ["tests/test_frontend.py", "-m", "not slow"]
OF_STEMS = [f"tests/test_{file.stem}.py" for file in sorted((ROOT / "kernels" / "device").glob("[a-z]*.py"))]
HARD_CASES = [*(test for test in OF_STEMS if (ROOT / test).exists()), "tests/test_operations.py",
              "tests/test_selection_properties.py", "-m", "not slow and not serial"]  # fmt: skip
ON_TORCH = [*(f"tests/test_{stem}.py" for stem in (
    "operations", "registration", "layering", "gradients", "codes", "activations", "autoencoder", "encode", "decode",
    "losses", "memory")), "-k", "not triton", "-m", "not serial"]  # fmt: skip


class Row(NamedTuple):
    """One environment: its interpreter, the folder of a Triton that comes before the environment's own, versions."""

    python: str
    overlay: Path | None
    torch: str
    triton: str

    def environment(self, **more: str) -> dict[str, str]:
        """This process's variables, without those that decide where Triton runs."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        path = {} if self.overlay is None else {"PYTHONPATH": str(self.overlay)}
        cache = {"TRITON_CACHE_DIR": str(ROOT / ".cache" / "triton")}  # its keys tell versions apart
        return {**kept, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **path, **cache, **more}


def checks(row: Row, *, quick: bool, with_torch: bool) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """(name, command, environment) of everything that a row runs."""
    archs = ["--arch", "sm_90"] if quick else []
    listing = KEPT / f"kernels-{row.triton}.md"
    kernels = ["-W", "ignore", "benchmarks/kernel_report.py", "--quick", *archs]
    yield "binaries", [row.python, *kernels, "--markdown", str(listing)], row.environment()
    pytest = [row.python, "-m", "pytest", "-q"]
    yield "launches", [*pytest, *LAUNCHES], row.environment()
    if row.triton in ENDS:
        tests, which = (DRAWN, {"DRAWN_CASES": "20"}) if quick else (HARD_CASES, {"INTERPRET_ALL": "1"})
        yield "hard cases", [*pytest, *tests], row.environment(TRITON_INTERPRET="1", **which)
    if with_torch:
        yield "torch", [*pytest, *ON_TORCH], row.environment(TRITON_INTERPRET="1")


def installed(package: str) -> str:
    """The running interpreter's version of a package, without a build's name: 2.13.0 of 2.13.0+cpu; "" without it."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return ""


def install(folder: Path, *commands: list[str]) -> None:
    """Runs the commands that fill a folder, unless an earlier run has finished them; one cut short is made anew."""
    if (folder / ".installed").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    print(f"  installing {folder.relative_to(ROOT)}", flush=True)
    for command in commands:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{tail(done.stdout)}")
    (folder / ".installed").touch()


def prepare(torch: str, triton: str, index: str) -> Row:
    """Installs what a row lacks."""
    beside = BESIDE_TRITON.get(triton, [])
    if torch != installed("torch"):
        folder = KEPT / f"torch-{torch}"
        python = str(folder / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "-c", str(constraints(without_numpy=bool(beside)))]
        install(
            folder,
            [sys.executable, "-m", "venv", str(folder)],
            [*pip, "setuptools"],
            [*pip, *(["--index-url", index] if index else []), f"torch=={torch}"],
            [*pip, "--no-deps", f"triton=={triton}"],
            [*pip, "--no-build-isolation", "-e", f"{ROOT}[test]", *beside],
        )
        return Row(python, None, torch, triton)
    if triton == installed("triton") and not beside:
        return Row(sys.executable, None, torch, triton)
    folder = KEPT / f"triton-{triton}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    install(folder, [*pip, f"triton=={triton}", *beside])
    return Row(sys.executable, folder, torch, triton)


def constraints(*, without_numpy: bool) -> Path:
    """constraints.txt without the packages that a row chooses itself."""
    chosen = r"(torch|triton|numpy)\b" if without_numpy else r"(torch|triton)\b"
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    KEPT.mkdir(exist_ok=True)
    path = KEPT / f"constraints{'-without-numpy' * without_numpy}.txt"
    path.write_text("".join(line for line in lines if not re.match(chosen, line)), encoding="utf-8")
    return path


def tail(text: str, lines: int = 40) -> str:
    """The last lines, where a failure says what it is."""
    return "\n".join("    " + line for line in text.splitlines()[-lines:])


def rows(*, quick: bool, torch: str) -> list[tuple[str, str]]:
    """The (torch, triton) pairs to run; ``torch`` "installed" puts the running one into every row."""
    own = installed("torch"), installed("triton")
    pairs = [(own[0] if torch == "installed" else row_torch, triton) for row_torch, triton in MATRIX]
    return [pair for pair in pairs if not quick or (pair[1] in ENDS and pair != own)]


def run(row: Row, name: str, command: list[str], environment: dict[str, str]) -> str:
    """Runs a check, says what came of it, and gives its verdict."""
    start = time.monotonic()
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=environment, **piped)
    verdict = "failed" if done.returncode else "passed"
    summary = next(iter(re.findall(r"\d+ passed.*", done.stdout)[-1:]), "").strip(" =")
    seconds = time.monotonic() - start
    said = f"torch {row.torch}, triton {row.triton}: {name:<11} {verdict} after {seconds:.0f} s {summary}"
    trouble = f"\n    {' '.join(command)}\n{tail(done.stdout)}" if done.returncode else ""
    print(said.rstrip() + trouble, flush=True)
    return verdict


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the matrix of torch and Triton versions.")
    parser.add_argument("--quick", action="store_true", help="minutes: the installed torch, oldest and newest Triton")
    parser.add_argument("--torch", choices=("matrix", "installed"), default="matrix", help="which torch each row has")
    parser.add_argument("--torch-index", default="", metavar="URL", help="where torch is taken from, PyPI by default")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes")
    args = parser.parse_args(argv)
    verdicts, seen, found = {"passed": 0, "failed": 0}, set(), []
    for torch, triton in rows(quick=args.quick, torch="installed" if args.quick else args.torch):
        print(f"torch {torch}, triton {triton}", flush=True)
        try:
            row = prepare(torch, triton, args.torch_index)
        except RuntimeError as error:
            print(f"  cannot be installed: {error}", flush=True)
            verdicts["failed"] += 1
            continue
        with_torch = not args.quick and torch not in seen
        found += [(row, *check) for check in checks(row, quick=args.quick, with_torch=with_torch)]
        seen.add(torch)
    longest_first = sorted(found, key=lambda check: LENGTHS.index(check[1]))
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for verdict in pool.map(lambda check: run(*check), longest_first):
            verdicts[verdict] += 1
    print("{passed} passed, {failed} failed".format(**verdicts))
    return 1 if verdicts["failed"] or not verdicts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
