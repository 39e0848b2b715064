"""The page's building blocks: text, tables, figures, sections. Whatever was not written here passes `cell`."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from evaluation.escape import clean

LIMIT = 400  # letters of a stranger in one place
SHORT = 20  # letters that stay on one line


class Row(NamedTuple):
    """One row of a table."""

    cells: Sequence[str]
    kind: str = ""  # "failed" stands out; the words say it too


def cell(text: str, limit: int = LIMIT) -> str:
    """Anybody's words as text: control and bidirectional marks gone, cut, and no mark-up left."""
    return escape(clean(text, limit), quote=True)


def table(caption: str, heads: Sequence[str], rows: Iterable[Row], *, stacked: bool = False) -> str:
    """A table whose first column names its rows; a head that ends in "#" is a column of numbers.

    On a narrow screen a `stacked` table puts every cell on a line of its own, under its column's name.
    """
    names = [head.removesuffix("#") for head in heads]
    kinds = [' class="number"' if head.endswith("#") else "" for head in heads]
    top = "".join(f'<th scope="col"{kind}>{cell(name)}</th>' for name, kind in zip(names, kinds, strict=True))
    inside = [f' data-head="{cell(name)}"' if stacked else "" for name in names]
    body = "".join(_row(row, inside, kinds) for row in rows)
    shape = ' class="stacked"' if stacked else ""
    return (
        f'<div class="wide" role="region" aria-label="{cell(caption)}" tabindex="0"><table{shape}>'
        f"<caption>{cell(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(row: Row, heads: Sequence[str], kinds: Sequence[str]) -> str:
    first, *others = [
        (f"{kind or _shape(text)}{head}", cell(text)) for text, head, kind in zip(row.cells, heads, kinds, strict=True)
    ]
    rest = "".join(f"<td{attributes}>{text}</td>" for attributes, text in others)
    return f'<tr{_class(row.kind)}><th scope="row"{first[0]}>{first[1]}</th>{rest}</tr>'


def _shape(text: str) -> str:
    # A browser would rather break "docstring" in two than a sentence beside it in one place more.
    return ' class="short"' if len(text) <= SHORT else ""


def facts(pairs: Iterable[tuple[str, str]], kind: str = "") -> str:
    """Names and what belongs to them."""
    inner = "".join(f"<div><dt>{cell(name)}</dt><dd>{cell(text)}</dd></div>" for name, text in pairs)
    return f"<dl{_class(kind)}>{inner}</dl>" if inner else ""


def figure(svg: str, caption: str) -> str:
    """A drawn chart with the words that explain how to read it."""
    return f'<figure><div class="wide" tabindex="0">{svg}</div><figcaption>{cell(caption)}</figcaption></figure>'


def folded(summary: str, inner: str) -> str:
    """What is there for those who ask."""
    return f"<details><summary>{cell(summary)}</summary>{inner}</details>"


def paragraph(text: str, kind: str = "") -> str:
    """One paragraph."""
    return f"<p{_class(kind)}>{cell(text, 1000)}</p>"


def section(title: str, *parts: str) -> str:
    """A part of the page; '' when nothing is in it."""
    inner = "".join(parts)
    return f"<section><h2>{cell(title)}</h2>{inner}</section>" if inner else ""


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
