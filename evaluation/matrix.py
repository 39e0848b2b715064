"""The heat map: shares in a grid, a colour and a number each."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.drawing import INK, MUTED, axes_at, canvas, label

CELL, LINE_HEIGHT, LETTER, BOLD = 40.0, 26.0, 6.8, 7.8  # pixels
LIGHT, DARK = "#fefefe", "#010101"  # on a cell; not the page's colours, which change


def draw_matrix(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],  # (rows, columns) shares in [0, 1]; None: blank, NaN: not measured
    title: str = "",
) -> Figure:
    """The matrix with per cents in its cells."""
    names, heads = [label(row) for row in rows], [label(column, 16) for column in columns]
    left = 16 + LETTER * max(map(len, names), default=0)
    slanted = max(map(len, heads), default=0) > 4
    top = (30 if title else 6) + (14 + 4.2 * max(map(len, heads)) if slanted else 20)
    width, height = CELL * max(1, len(columns)), LINE_HEIGHT * max(1, len(rows))
    shown = label(title, 80)
    figure = canvas(max(left + width + (70 if slanted else 10), 8 + BOLD * len(shown)), top + height + 6)
    axes = axes_at(figure, left, top, width, height)
    _colour(axes, values, len(columns))
    _name(axes, names, heads, slanted)
    if title:
        figure.text(0.006, 1 - 16 / (top + height + 6), shown, weight="bold")
    return figure


def _colour(axes: Axes, values: Sequence[Sequence[float | None]], width: int) -> None:
    cells = [[math.nan if value is None else float(value) for value in row] for row in values]
    if cells and width:
        edges = [place - 0.5 for place in range(max(width, len(cells)) + 1)]
        corners = edges[: width + 1], edges[: len(cells) + 1]
        axes.pcolormesh(*corners, cells, cmap="viridis", vmin=0.0, vmax=1.0, edgecolors="none")
    axes.set_ylim(len(cells) - 0.5, -0.5)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if value is not None:
                _write(axes, row, column, float(value))


def _write(axes: Axes, row: int, column: int, value: float) -> None:
    unknown = math.isnan(value)
    # Below 0.42 of viridis white has the higher contrast, above it black.
    colour = INK if unknown else LIGHT if value < 0.42 else DARK
    text = "?" if unknown else "100" if value == 1.0 else f"{100 * value:.1f}"
    axes.text(column, row, text, ha="center", va="center_baseline", color=colour, fontsize=11)


def _name(axes: Axes, names: Sequence[str], heads: Sequence[str], slanted: bool) -> None:
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(heads)), heads)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, colors=MUTED, labelcolor=INK, labelsize=11)
    axes.spines[:].set_visible(False)
    if slanted:
        for text in axes.get_xticklabels():
            text.set(rotation=35, ha="left", rotation_mode="anchor")
