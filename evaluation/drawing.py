"""A chart is drawn once, by matplotlib's objects, and leaves as a PNG on white or as SVG in the colours of its page.

Lengths are CSS pixels. matplotlib is slow to import; import this module only where something is drawn.
"""

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from evaluation.escape import clean

# What a PNG shows on white, and the page's name for it. INK is not black: matplotlib leaves black out of its SVG.
INK, MUTED, LINE, PAGE, GOOD, BAD = "#1c1c1e", "#6b6b70", "#d4d4d8", "#ffffff", "#0067a3", "#c43d00"
ON_PAGE = {INK: "currentColor"} | {
    colour: f"var(--{name})"
    for name, colour in {"muted": MUTED, "line": LINE, "page": PAGE, "good": GOOD, "bad": BAD}.items()
}
DOTS = 72  # per inch in matplotlib's SVG, so that one dot is one pixel of the page
SHARPER = 2  # dots of a PNG per pixel
THEME = {
    "text.parse_math": False,  # names are strangers' words, and "$" is one of their letters
    "text.color": INK,
    "font.size": 12.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 12.0,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",  # letters stay letters: selectable, and in the page's font
}
_ONE_AT_A_TIME = threading.Lock()  # matplotlib's settings and Python's warning filters belong to the whole process


class Chart(NamedTuple):
    """A picture and its words."""

    name: str  # of the PNG file without ".png"; part of the ids in the SVG
    title: str
    says: str  # what it shows, for those who cannot see it
    draw: Callable[[], Figure]  # called with THEME in force


def canvas(width: float, height: float) -> Figure:
    """An empty picture."""
    return Figure(figsize=(width / DOTS, height / DOTS), dpi=DOTS)


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes whose frame starts `left` and `top` of the picture's upper left corner."""
    across, down = (length * DOTS for length in figure.get_size_inches())
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def label(text: str, limit: int = 24) -> str:
    """A stranger's name, short enough to stand in a picture; both its ends stay, since names differ at either."""
    whole = clean(text, 400)
    half = limit // 2
    return whole if len(whole) <= limit else f"{whole[:half]}…{whole[half + 1 - limit :]}"


def write_png(chart: Chart, path: Path) -> Path:
    """The path, at which the chart now lies as a PNG; equal charts give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _theme(chart.name):
        figure = chart.draw()
        FigureCanvasAgg(figure)
        figure.savefig(path, format="png", dpi=SHARPER * DOTS, facecolor=PAGE)
    return path


def inline_svg(chart: Chart) -> str:
    """The chart as an <svg> element that needs no style sheet of its own; equal charts give equal text."""
    target = StringIO()
    with _theme(chart.name):
        figure = chart.draw()
        FigureCanvasSVG(figure)
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    return _for_a_page(target.getvalue(), chart)


@contextmanager
def _theme(salt: str) -> Iterator[None]:
    # The salt keeps the ids of two charts on one page apart.
    with _ONE_AT_A_TIME, matplotlib.rc_context(THEME | {"svg.hashsalt": salt}), warnings.catch_warnings():
        # The page's fonts have letters that matplotlib's own has not.
        warnings.filterwarnings("ignore", message="(?s).*Glyph .* missing from font")
        yield


def _for_a_page(drawn: str, chart: Chart) -> str:
    """matplotlib's document as an element: no namespaces, no style attributes (the page's policy forbids them)."""
    root = ElementTree.fromstring(drawn)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag, element.tail = element.tag.rpartition("}")[2], None
        element.text = element.text if element.tag == "text" else None
        element.attrib = _attributes(element)
    title, says = (ElementTree.Element(tag, {"id": f"{chart.name}-{tag}"}) for tag in ("title", "desc"))
    title.text, says.text = clean(chart.title, 200), clean(chart.says, 2000)
    root[:0] = [title, says]
    width, height = root.get("viewBox", "0 0 0 0").split()[2:]
    root.attrib |= {"role": "img", "aria-label": title.text, "aria-describedby": f"{chart.name}-desc"}
    root.attrib |= {"width": width, "height": height}
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(element: ElementTree.Element) -> dict[str, str]:
    given = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    if element.tag == "g":
        given.pop("id", None)  # "axes_1": no one refers to it, and every chart has one
    rules = [rule.partition(":") for rule in given.pop("style", "").split(";") if rule.strip()]
    given |= {name.strip(): value.strip() for name, _, value in rules}
    given.pop("font-family", None)
    return {name: _shorter(ON_PAGE.get(value, value)) for name, value in given.items() if name != "version"}


def _shorter(value: str) -> str:
    """The same numbers with two decimals, on one line."""
    rounded = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
    return " ".join(rounded.split())
