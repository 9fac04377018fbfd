"""The shape of the code in numbers: ``make structure``.

    python benchmarks/structure.py

Ways: the files of the packages that one call enters above the implementations (``kernels/stock``, ``kernels/device``,
the reference; what these call is below them), and how often it goes from one file to another. Operations: the files in
which each is named, and which adding one like it would touch. Tests hold all of it but the number of lines.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
ENGINE = sorted((ROOT / "sae_engine").rglob("*.py"))
LONGEST = 500  # lines that a file may have

# --- imports ---------------------------------------------------------------------------------------------------------


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return "sae_kernels" + name.removeprefix("kernels") if within(name, "kernels") else name


def source_of(name: str) -> Path | None:
    place = ROOT.joinpath(*name.replace("sae_kernels", "kernels", 1).split("."))
    return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), None)


def ours(names: Iterable[str]) -> set[str]:
    return {name for name in names if within(name, "sae_kernels") or within(name, "sae_engine")}


def imports(path: Path, *, anywhere: bool = True) -> set[str]:
    """Names that a file imports, ours in full: `from . import x` in kernels/ gives `sae_kernels.x`.

    Without ``anywhere`` only what importing the file itself imports: nothing inside functions or `if TYPE_CHECKING`.
    With it also what ``import_module`` is called with: of a name that is not written out, all that it may become.
    """
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    pending: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    names: set[str] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            submodule = {f"{base}.{alias.name}" for alias in node.names}
            is_file = {name for name in submodule if source_of(name) is not None}
            names.update(is_file or {base})
        elif anywhere and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names.update(_dynamic(node, package))
            pending.extend(node.args)
        elif anywhere or not (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ):
            pending.extend(ast.iter_child_nodes(node))
    return names


def _dynamic(call: ast.Call, package: str) -> set[str]:
    """The modules of ours that a call of ``import_module`` may import; a name that it is handed whole is another's."""
    parts = [ast.unparse(part) for part in getattr(call.args[0], "values", call.args[:1])]
    text = "".join(package if part == "{__name__}" else part.strip("'") if part[0] == "'" else "*" for part in parts)
    if text == "*":
        return set()
    pattern = re.escape(package + text if text.startswith(".") else text).replace(r"\*", r"\w+")
    return {name for name in map(module_name, [*KERNELS, *ENGINE]) if re.fullmatch(pattern, name)}


def circles() -> dict[str, set[str]]:
    """The modules that import in a circle, and what each imports: at any time, by a name put together then too."""
    graph = {module_name(path): ours(imports(path)) - {module_name(path)} for path in [*KERNELS, *ENGINE]}
    while leaves := {name for name, below in graph.items() if not below & graph.keys()}:
        graph = {name: below for name, below in graph.items() if name not in leaves}
    while tops := graph.keys() - set().union(*graph.values(), set()):  # these only stand on a circle
        graph = {name: below for name, below in graph.items() if name not in tops}
    return graph


# --- the way of a call -----------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """Files in the order in which a call first enters them, and how often it goes from one to another."""

    files: list[str]
    changes: int


def way(call: Callable[[], object]) -> Way:
    """The way of ``call()``, which has run once before: what is made at a first call is not part of it."""
    call()
    entered: list[str] = []
    implementations = tuple(str(ROOT / "kernels" / name) for name in ("stock/", "device/", "reference.py"))
    packages = str(ROOT / "kernels") + "/", str(ROOT / "sae_engine") + "/"

    def source(frame: FrameType) -> str:
        name = frame.f_code.co_filename
        return name if name.startswith("/") else str(Path(name).resolve())

    def is_implementation(frame: FrameType) -> bool:
        return source(frame).startswith(implementations)

    def callers(frame: FrameType | None) -> Iterator[FrameType]:
        while frame is not None:
            yield frame
            frame = frame.f_back

    def note(frame: FrameType, event: str, argument: Any) -> None:
        name = source(frame)
        is_step = event == "call" and not frame.f_code.co_name.startswith("<")  # as a comprehension's is
        if is_step and name.startswith(packages) and not any(map(is_implementation, callers(frame))):
            entered.append(str(Path(name).relative_to(ROOT)))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return Way(list(dict.fromkeys(entered)), sum(a != b for a, b in itertools.pairwise(entered)))


def ways() -> dict[str, Way]:
    """Of an autoencoder's forward and of one training step, at toy sizes on the CPU."""
    import torch

    import sae_engine as se
    from sae_engine.training import TrainStep

    sae, x = se.SparseAutoencoder(16, 64, se.TopK(4)), torch.randn(32, 16)
    with torch.no_grad():
        found = {"sae(x), no gradient": way(lambda: sae(x))}
    step = TrainStep(se.SparseAutoencoder(16, 64, se.TopK(4)), lr=1e-3)
    return {**found, "sae(x)": way(lambda: sae(x)), "TrainStep": way(lambda: step(x))}


# --- the files of an operation ---------------------------------------------------------------------------------------


def _said(path: Path) -> Iterator[str]:
    """What a file names as one would to add an operation: functions that it defines, names in tables, schemas.

    In the packages a name that is handed to a function, or looked up in a table, is a use.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used: set[ast.AST] = set()
    if "benchmarks" not in path.parts:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) != "Operation":
                used.update(arg for arg in node.args if isinstance(arg, ast.Constant) and "(" not in str(arg.value))
            elif isinstance(node, ast.Subscript):
                used.add(node.slice)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in used:
            yield node.value.partition("(")[0]


class Files(NamedTuple):
    """Files that name an operation."""

    kernels: list[str]  # where it is defined and listed
    callers: list[str]  # files of sae_engine that call its operator; adding one needs the first
    benchmarks: list[str]

    @property
    def to_add(self) -> int:
        return len(self.kernels) + min(len(self.callers), 1)


def files_of_operations() -> dict[str, Files]:
    from sae_kernels.operations import OPERATIONS

    found = {name: Files([f"kernels/device/{row.stem}.py"], [], []) for name, row in OPERATIONS.items()}

    def note(paths: Iterable[Path], says: Callable[[Path], Iterable[str]], field: str) -> None:
        for path in paths:
            for name in OPERATIONS.keys() & set(says(path)):
                files = getattr(found[name], field)
                if (file := str(path.relative_to(ROOT))) not in files:
                    files.append(file)

    note(KERNELS, _said, "kernels")
    note(ENGINE, lambda path: re.findall(r"\bops\.(\w+)\(", path.read_text(encoding="utf-8")), "callers")
    note(sorted((ROOT / "benchmarks").glob("*.py")), _said, "benchmarks")
    return found


# --- sizes -----------------------------------------------------------------------------------------------------------


def lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def folders() -> dict[str, list[Path]]:
    """Python files by folder, the emulator of compiled kernels apart."""
    tests = sorted((ROOT / "tests").rglob("*.py"))
    emulator = [path for path in tests if "emulator" in path.parts]
    benchmarks = sorted((ROOT / "benchmarks").rglob("*.py"))
    return {"kernels": KERNELS, "sae_engine": ENGINE, "benchmarks": benchmarks,
            "examples": sorted((ROOT / "examples").rglob("*.py")),
            "tests": [path for path in tests if path not in emulator], "tests/emulator": emulator}  # fmt: skip


def main() -> None:
    for name, found in ways().items():
        print(f"{name + ':':<22} {len(found.files)} files, {found.changes} changes of file: {', '.join(found.files)}")
    print(f"import circles:        {', '.join(sorted(circles())) or 'none'}")
    for name, paths in folders().items():
        longest = max(paths, key=lines)
        print(f"{name + ':':<22} {sum(map(lines, paths)):>6} lines, {len(paths)} files, the longest "
              f"{longest.relative_to(ROOT)} with {lines(longest)}")  # fmt: skip
    print("operations: files to add one like it; benchmarks that single it out beside that")
    for name, files in files_of_operations().items():
        print(f"  {name:<24} {files.to_add}: {', '.join([*files.kernels, *files.callers])}; "
              f"{len(files.benchmarks)}: {', '.join(Path(file).stem for file in files.benchmarks)}")  # fmt: skip


if __name__ == "__main__":
    main()
