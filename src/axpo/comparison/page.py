"""A page as blocks, written as Markdown and as HTML."""

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """The first column stands left, the others right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A file beside the page."""

    file: str
    text: str


Block = Heading | Paragraph | Table | Picture

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: .9rem; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
"""


def to_markdown(blocks: Sequence[Block]) -> str:
    """The first heading is the page's title."""
    parts = []
    for place, block in enumerate(blocks):
        match block:
            case Heading(text):
                parts.append(f"{'##' if place else '#'} {text}")
            case Paragraph(text):
                parts.append(text)
            case Picture(file, text):
                parts.append(f"![{text}]({file})")
            case Table(head, rows):
                cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
                rule = ["---", *["---:"] * (len(head) - 1)]
                parts.append("\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])))
    return "\n\n".join(parts) + "\n"


def to_html(blocks: Sequence[Block]) -> str:
    """One file, but for its pictures."""
    parts = []
    for place, block in enumerate(blocks):
        match block:
            case Heading(text):
                level = "h2" if place else "h1"
                parts.append(f"<{level}>{html.escape(text)}</{level}>")
            case Paragraph(text):
                parts.append(f"<p>{html.escape(text)}</p>")
            case Picture(file, text):
                parts.append(f'<p><img src="{html.escape(file)}" alt="{html.escape(text)}"></p>')
            case Table(head, rows):
                parts.append(
                    f"<table>\n{_row(head, 'th')}\n" + "\n".join(_row(row, "td") for row in rows) + "\n</table>"
                )
    title = next((html.escape(block.text) for block in blocks if isinstance(block, Heading)), "")
    start = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>\n'
    )
    return start + "\n".join(parts) + "\n</html>\n"


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
