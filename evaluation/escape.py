"""Words that came from outside, made safe to show. Task names, tags and tensor names are written by strangers."""

import unicodedata
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def clean(text: str, limit: int = 120) -> str:
    """`text` on one line: control, format (bidirectional, zero width) and surrogate characters gone, cut to `limit`.

    >>> clean("city\\x1b[31m\\u202e red")
    'city[31m red'
    """
    # "C" covers Cc (control), Cf (bidi, zero width), Cs, Co and Cn; "Zl" and "Zp" break lines.
    kept = (" " if mark in "\n\r\t" else mark for mark in text if mark in "\n\r\t" or not _invisible(mark))
    line = " ".join("".join(kept).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def markdown(text: str, limit: int = 200) -> str:
    r"""`clean` text that stays text in Markdown: no markup, no link, no end of a table's cell.

    >>> print(markdown("[a](b) | c"))
    \[a\]\(b\) \| c
    """
    return "".join(f"\\{mark}" if mark in r"\`*_{}[]()<>#|!&" else mark for mark in clean(text, limit))


def _invisible(mark: str) -> bool:
    category = unicodedata.category(mark)
    return category.startswith("C") or category in ("Zl", "Zp")


def nearest(word: str, known: "Iterable[str]") -> str:
    """The clause that points to the nearest known word; when none is near, the list of up to twenty of them."""
    words = sorted(known)
    close = get_close_matches(word[:100], words, n=1)
    return f"did you mean {close[0]!r}" if close else f"use one of: {', '.join(words[:20])}"
