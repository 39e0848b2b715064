"""The report's pictures as PNG files, drawn by matplotlib's objects on the Agg canvas: no global state, no display."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from evaluation.escape import clean

# Okabe and Ito's palette (2008): told apart by people with any common colour blindness, and in grey.
PALETTE = ("#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
DPI = 150


def heat_map(
    rows: Sequence[str],  # versions, oldest first
    tasks: Sequence[str],
    values: Sequence[Sequence[float | None]],  # (rows, tasks) accuracies in [0, 1]; None or NaN before a task arrived
    path: Path,
    title: str = "Accuracy after each fold",
) -> None:
    """Writes the accuracy matrix as a PNG: one row per version, one column per task, hatched where nothing is known."""
    figure = Figure(figsize=(max(5.0, 1.1 * len(tasks) + 2.5), max(2.8, 0.5 * len(rows) + 1.8)), layout="constrained")
    axes = figure.add_subplot()
    cells = [[math.nan if value is None else float(value) for value in row] for row in values]
    image = axes.imshow(cells, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
    figure.colorbar(image, ax=axes, label="accuracy")
    for row, line in enumerate(cells):
        for column, value in enumerate(line):
            _draw_cell(axes, row, column, value)
    _name_cells(axes, rows, tasks)
    axes.set_title(clean(title), parse_math=False)
    _save(figure, path)


def bar_chart(
    tasks: Sequence[str],
    series: Mapping[str, Sequence[float]],  # name ("base", "champion", ...) -> one accuracy in [0, 1] per task
    path: Path,
    title: str = "Accuracy by task",
) -> None:
    """Writes per-task bars as a PNG, one colour per series; a bar whose value is NaN is left out."""
    figure = Figure(figsize=(max(5.0, 0.45 * len(tasks) * len(series) + 2.5), 3.8), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(series))
    for place, values in enumerate(series.values()):
        left = [task + (place - (len(series) - 1) / 2) * width for task in range(len(tasks))]
        bars = axes.bar(left, values, 0.92 * width, color=PALETTE[place % len(PALETTE)])
        texts = ["" if math.isnan(value) else f"{value:.2f}" for value in values]
        axes.bar_label(bars, texts, fontsize=7, padding=1)
    _name_columns(axes, tasks)
    axes.set_ylim(0.0, 1.08)
    axes.set_ylabel("accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(clean(title), parse_math=False)
    _name_series(figure, list(series))
    _save(figure, path)


def _draw_cell(axes: Axes, row: int, column: int, value: float) -> None:
    if math.isnan(value):
        corner = (column - 0.5, row - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, facecolor="#E6E6E6", edgecolor="#B0B0B0", hatch="///", linewidth=0.0))
        return
    # viridis is dark below its middle
    axes.text(column, row, f"{value:.3f}", ha="center", va="center", color="white" if value < 0.55 else "black")


def _name_series(figure: Figure, names: Sequence[str]) -> None:
    patches = [Rectangle((0, 0), 1, 1, color=PALETTE[place % len(PALETTE)]) for place in range(len(names))]
    columns = max(1, len(names))
    legend = figure.legend(patches, _labels(names), loc="outside lower center", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _name_cells(axes: Axes, rows: Sequence[str], tasks: Sequence[str]) -> None:
    _name_columns(axes, tasks)
    axes.set_yticks(range(len(rows)), _labels(rows), parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _name_columns(axes: Axes, tasks: Sequence[str]) -> None:
    labels = _labels(tasks)
    axes.set_xticks(range(len(tasks)), labels, parse_math=False)
    if max(map(len, labels), default=0) > 10:
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")


def _labels(names: Sequence[str]) -> list[str]:
    return [clean(name, 24) for name in names]


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=DPI)
