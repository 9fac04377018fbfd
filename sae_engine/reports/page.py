"""A page of headings, sentences, tables, figures and code, as Markdown and as one self-contained HTML file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape, unescape


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    """Sentences; what stands between backticks is code."""

    text: str


@dataclass(frozen=True)
class Tiles:
    """A few numbers that are seen first: what they are, and how much."""

    numbers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """``align`` has an l or r a column. ``marks`` are a colour a row, shown before its first cell."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str
    marks: Sequence[tuple[str, str]] = ()  # colour and dashes


@dataclass(frozen=True)
class Legend:
    """Names of the curves that follow, each with its colour and dashes; in HTML alone."""

    entries: Sequence[tuple[str, tuple[str, str]]]


@dataclass(frozen=True)
class Figures:
    """SVGs beside one another where there is room, or ``wide``, one below the other. Markdown has their titles."""

    drawn: Sequence[str]
    wide: bool = False


@dataclass(frozen=True)
class Code:
    text: str
    language: str = ""


@dataclass(frozen=True)
class Folded:
    """What few want to see: opened by a click, in Markdown at the end of the section."""

    summary: str
    blocks: Sequence[Block]


Block = Heading | Text | Tiles | Table | Legend | Figures | Code | Folded


@dataclass
class Page:
    title: str
    subtitle: str
    blocks: list[Block] = field(default_factory=list)

    def markdown(self) -> str:
        return "\n\n".join([f"# {self.title}", self.subtitle, *filter(None, map(_markdown, self.blocks))]) + "\n"

    def html(self) -> str:
        body = "\n".join(map(_html, self.blocks))
        # The policy is no browser's default: whatever a name in a configuration is, nothing is loaded and nothing runs.
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
            f'<h1>{escape(self.title)}</h1>\n<p class="subtitle">{_spans(self.subtitle)}</p>\n{body}\n'
            "</main>\n</body>\n</html>\n"
        )


# ------------------------------------------------------------------------------------------------ Markdown


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"## {block.text}"
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Tiles):
        return "\n".join(f"- {name}: **{value}**" for name, value in block.numbers)
    if isinstance(block, Table):
        return markdown_table(block)
    if isinstance(block, Code):
        return f"```{block.language}\n{block.text.rstrip()}\n```"
    if isinstance(block, Figures):
        titles = re.findall(r'^<svg[^>]*aria-label="([^"]*)"', "\n".join(block.drawn), re.MULTILINE)
        return f"*In the HTML page: {unescape('; '.join(titles))}.*" if titles else ""
    if isinstance(block, Folded):
        return "\n\n".join([f"### {block.summary}", *filter(None, map(_markdown, block.blocks))])
    return ""


def markdown_table(table: Table) -> str:
    """Padded, so that it reads in a terminal too."""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (table.head, *table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def padded(cells: Sequence[str]) -> str:
        made = (cell.ljust(w) if side == "l" else cell.rjust(w) for cell, w, side in zip(
            cells, widths, table.align, strict=True))  # fmt: skip
        return "| " + " | ".join(made) + " |"

    rule = "|" + "|".join("-" * (w + 2) if side == "l" else "-" * (w + 1) + ":" for w, side in zip(
        widths, table.align, strict=True)) + "|"  # fmt: skip
    return "\n".join([padded(lines[0]), rule, *map(padded, lines[1:])])


# ---------------------------------------------------------------------------------------------------- HTML


def _spans(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{_spans(block.text)}</h2>"
    if isinstance(block, Text):
        return f"<p>{_spans(block.text)}</p>"
    if isinstance(block, Tiles):
        tiles = (f"<div><b>{_spans(value)}</b><span>{_spans(name)}</span></div>" for name, value in block.numbers)
        return f'<div class="tiles">{"".join(tiles)}</div>'
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Legend):
        entries = (f"<span>{_mark(*mark)}{escape(name)}</span>" for name, mark in block.entries)
        return f'<p class="legend">{"".join(entries)}</p>'
    if isinstance(block, Figures):
        figures = "".join(f"<figure>{svg}</figure>" for svg in block.drawn)
        return f'<div class="figures{" wide" if block.wide else ""}">{figures}</div>'
    if isinstance(block, Code):
        return f"<pre><code>{escape(block.text.rstrip())}</code></pre>"
    return f"<details><summary>{_spans(block.summary)}</summary>{''.join(map(_html, block.blocks))}</details>"


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str, mark: str = "") -> str:
        sides = (' class="r"' if side == "r" else ' class="long"' if len(cell) > 44 else "" for side, cell in zip(
            table.align, cells, strict=True))  # fmt: skip
        made = [f"<{tag}{side}>{_spans(cell)}</{tag}>" for cell, side in zip(cells, sides, strict=True)]
        if mark:
            made[0] = made[0].replace(">", f">{mark}", 1)
        return f"<tr>{''.join(made)}</tr>"

    marks = [_mark(*mark) for mark in table.marks] or [""] * len(table.rows)
    rows = "".join(row(cells, "td", mark) for cells, mark in zip(table.rows, marks, strict=True))
    head = f"<thead>{row(table.head, 'th')}</thead>" if any(table.head) else ""
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def _mark(colour: str, dash: str) -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<svg class="mark" viewBox="0 0 22 10"><line x1="1" x2="21" y1="5" y2="5" stroke="{colour}" '
        f'stroke-width="4"{dashes}/></svg>'
    )


_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #22262b; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Liberation Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; padding-bottom: 5px; border-bottom: 1px solid #d9dde2; }
p { margin: 8px 0; max-width: 78ch; }
.subtitle { color: #5b6470; overflow-wrap: anywhere; }
code, pre { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", "Liberation Mono", Consolas, monospace; }
code { background: #f2f4f6; border-radius: 3px; padding: 1px 4px; overflow-wrap: anywhere; }
pre { background: #f6f7f9; border: 1px solid #e3e6ea; border-radius: 6px; padding: 12px 14px; overflow-x: auto; }
pre code { background: none; padding: 0; overflow-wrap: normal; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 10px; margin: 18px 0; }
.tiles div { border: 1px solid #e3e6ea; border-radius: 6px; padding: 10px 14px; }
.tiles b { display: block; font-size: 17px; line-height: 1.4; font-variant-numeric: tabular-nums; }
.tiles span { color: #5b6470; font-size: 13px; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px 6px 0; text-align: left; white-space: nowrap; border-bottom: 1px solid #e3e6ea; }
th { font-weight: 600; color: #5b6470; border-bottom-color: #b9c0c8; vertical-align: bottom; }
.r { text-align: right; }
.long { white-space: normal; min-width: 26ch; overflow-wrap: anywhere; }
.mark { width: 22px; height: 10px; margin-right: 7px; vertical-align: 0; }
.legend { max-width: none; font-size: 14px; }
.legend span { display: inline-block; margin-right: 20px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 22px 34px;
  margin: 16px 0; }
.figures.wide { grid-template-columns: 1fr; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; }
details { margin: 14px 0; }
summary { cursor: pointer; color: #0f6fb4; }
@media (max-width: 560px) { main { padding: 18px 14px 40px; } h1 { font-size: 22px; } }
@media print { main { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""
