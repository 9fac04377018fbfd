"""Text to run a language model on: files, this Python's standard library, the fixed evaluation text."""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from collections.abc import Collection, Iterable, Iterator
from importlib import resources
from pathlib import Path

from .._checks import flag

END_OF_TEXT = "<|endoftext|>"

# Whole modules the embedded model never saw; together they are the evaluation text (about 200 kB):
# prose-rich docstrings (fractions, heapq, statistics, textwrap) beside plain code (locks, shlex, decoder).
HELD_OUT_MODULES = (
    "asyncio/locks.py",
    "contextlib.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "json/decoder.py",
    "shlex.py",
    "statistics.py",
    "textwrap.py",
)

_FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "lib-dynload"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


def iter_text_files(
    paths: str | Path | Iterable[str | Path], suffixes: Collection[str] = (".txt", ".md", ".py", ".rst")
) -> Iterator[str]:
    """The text of files, one string per file, in a fixed order.

    Args:
        paths: a file, a folder (searched recursively, in sorted order) or several of them, taken in the
            order given. A file named directly is read whatever its suffix.
        suffixes: which files of a folder are read, with the dot: ``(".txt", ".md")``.

    Yields:
        each file's text, UTF-8, empty files left out.

    Raises:
        TypeError: ``paths`` or ``suffixes`` is not of the kind above.
        FileNotFoundError: a path does not exist. Checked for all of them before the first file is read.
        ValueError: there is no path, a folder has no such file, ``suffixes`` is empty or lacks a dot, or a file is not
            UTF-8.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "a.txt").write_text("A text.")
        ...     list(iter_text_files(folder))
        ['A text.']
    """
    if not isinstance(suffixes, Collection):
        raise TypeError(f"suffixes must be a collection of '.ext' strings, got {suffixes!r}")
    if isinstance(suffixes, str) or not suffixes or not all(isinstance(s, str) and s.startswith(".") for s in suffixes):
        raise ValueError(f"suffixes must be a non-empty collection of '.ext' strings, got {suffixes!r}")
    given = [paths] if isinstance(paths, (str, Path)) else list(paths) if isinstance(paths, Iterable) else [None]
    if not all(isinstance(path, (str, Path)) for path in given):
        raise TypeError(f"paths must be a path or several of them, got {paths!r:.80}")
    if not given or "" in given:  # of which Path makes the folder that one is in
        raise ValueError(f"paths must name a file or folder, got {paths!r:.80}")
    roots = [Path(path).expanduser() for path in given]
    files: list[Path] = []
    for root in roots:
        if not root.exists():
            raise FileNotFoundError(f"paths: {str(root)!r} does not exist")
        found = [root]  # a file, or what can be read like one
        if root.is_dir():
            found = sorted(p for p in root.rglob("*") if p.suffix in suffixes and p.is_file())
        if not found:
            raise ValueError(f"paths: folder {str(root)!r} has no file ending in one of {tuple(suffixes)}")
        files += found
    return _read_files(files)


def _read_files(files: list[Path]) -> Iterator[str]:
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"paths: {str(file)!r} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x} "
                f"({error.reason})"
            ) from error
        if text:
            yield text


def stdlib_texts(exclude: Collection[str] = HELD_OUT_MODULES, *, include_tests: bool = False) -> Iterator[str]:
    """The standard library's sources and the manual pages inside :mod:`pydoc`: text every Python has.

    Args:
        exclude: modules to leave out, as paths relative to the library: ``"json/decoder.py"``. The default
            leaves out what :func:`evaluation_text` is made of.
        include_tests: also read the library's own tests (about as much text again, and plainer).

    Yields:
        one string per module in sorted order, then one per manual page. Generated tables (character
        maps, build settings), files that do not decode and exact duplicates are left out. The same
        Python version gives the same text.

    Raises:
        TypeError: ``exclude`` is not a collection of strings.
        ValueError: this Python has no such module, so that nothing would be left out.

    Example:
        >>> len(next(stdlib_texts())) > 0
        True
    """
    if isinstance(exclude, str) or not isinstance(exclude, Collection) or not all(isinstance(m, str) for m in exclude):
        raise TypeError(f"exclude must be a collection of module paths, as ['json/decoder.py'], got {exclude!r}")
    root = Path(sysconfig.get_path("stdlib"))
    if unknown := sorted(name for name in exclude if name not in HELD_OUT_MODULES and not (root / name).is_file()):
        raise ValueError(f"exclude: the standard library in {str(root)!r} has no {unknown[0]!r}")
    flag("include_tests", include_tests)
    return _deduplicated(_stdlib_documents(frozenset(exclude), include_tests))


def _stdlib_documents(exclude: frozenset[str], include_tests: bool) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = _FOREIGN_FOLDERS if include_tests else _FOREIGN_FOLDERS | _TEST_FOLDERS
    names = {file.relative_to(root).as_posix(): file for file in root.rglob("*.py")}
    for name, file in sorted(names.items()):
        parts = name.split("/")
        generated = parts[0] == "pydoc_data" or parts[0].startswith("config-") or parts[-1].startswith("_sysconfig")
        if name in exclude or generated or not skipped.isdisjoint(parts[:-1]):
            continue
        try:
            with tokenize.open(file) as stream:  # honours the coding line of each source
                text = stream.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text and "decoding_table" not in text and "decoding_map" not in text:
            yield text
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions strip the manual pages
        return
    yield from (topics[name] for name in sorted(topics))


def _deduplicated(texts: Iterable[str]) -> Iterator[str]:
    seen: set[bytes] = set()
    for text in texts:
        digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


def evaluation_text() -> list[str]:
    """The fixed evaluation text: whole standard-library modules, about 200 kB, one string per module.

    It ships with the package, so it is the same on every machine and for every Python version, and the
    embedded model was not trained on it. Python Software Foundation License.

    Example:
        >>> 100_000 < sum(map(len, evaluation_text())) < 400_000
        True
    """
    file = resources.files("sae_engine.assets") / "embedded_model" / "evaluation.txt"
    return file.read_text(encoding="utf-8").split(END_OF_TEXT + "\n")
