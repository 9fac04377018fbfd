"""What the site's sources need on their way into Sphinx: they are read on GitHub and in terminals as well.

Files of the repository that are no pages, a report or an example, are linked as downloads. In docstrings,
``(*batch, d_in)`` names a shape, whose star is no emphasis.
"""
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\(([^()\s#:]+)\)")


def with_downloads(text: str, folder: Path) -> str:
    """Markdown in which links from a file of ``folder`` to pages are the site's, and to other files downloads."""

    def link(found: re.Match[str]) -> str:
        label, target = found.groups()
        file = (folder / target).resolve()
        if not file.is_file():
            return found.group()
        if file.is_relative_to(ROOT / "docs"):  # a page, from the site's root: what is included lies elsewhere
            return f"[{label}](/{file.relative_to(ROOT / 'docs').as_posix()})"
        return f"{{download}}`{label.replace('`', '')} </../{file.relative_to(ROOT).as_posix()}>`"

    return LINK.sub(link, text)


def escaped(lines: list[str]) -> list[str]:
    """A docstring's lines, with the star of a shape's leading dimensions escaped outside of literals."""
    return ["".join(
        part if part.startswith("``") else re.sub(r"(?<=[(\[ ])\*(?=\w)", r"\\*", part)
        for part in re.split(r"(``.*?``)", line)
    ) for line in lines]  # fmt: skip


def setup(app: Any) -> dict[str, bool]:
    def page(app: Any, name: str, content: list[str]) -> None:
        content[0] = with_downloads(content[0], ROOT / "docs" / Path(name).parent)

    def included(app: Any, path: Path, parent: str, content: list[str]) -> None:
        content[0] = with_downloads(content[0], (ROOT / "docs" / path).resolve().parent)

    def docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        lines[:] = escaped(lines)

    app.connect("source-read", page)
    app.connect("include-read", included)
    app.connect("autodoc-process-docstring", docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
