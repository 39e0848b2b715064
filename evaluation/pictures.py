"""Charts as PNG files: those of a report, and the heat map and the bars that studies draw of their own numbers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from evaluation.charts import charts
from evaluation.comparison import changes
from evaluation.drawing import Chart, axes_at, canvas, label, write_png
from evaluation.matrix import draw_matrix
from evaluation.report import Record

# Okabe and Ito's palette (2008): told apart by people with any common colour blindness, and in grey.
PALETTE = ("#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


def write_plots(record: Record, folder: Path) -> list[Path]:
    """Every chart that the record has something for, on white: accuracy_matrix.png, tasks.png, versions.png, ..."""
    return [write_png(chart, folder / f"{name}.png") for name, chart in charts(record, changes(record)).items()]


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],  # (rows, columns) shares in [0, 1]; None: blank, NaN: not measured
    path: Path,
    title: str = "Accuracy after each fold, in per cent",
) -> None:
    """Writes a matrix as a PNG: a colour and a number a cell."""
    write_png(Chart("heat_map", title, title, lambda: draw_matrix(rows, columns, values, title)), path)


def bar_chart(
    tasks: Sequence[str],
    series: Mapping[str, Sequence[float]],  # name ("base", "opcm", ...) -> one accuracy in [0, 1] per task
    path: Path,
    title: str = "Accuracy by task",
) -> None:
    """Writes per-task bars as a PNG, one colour per series; a bar whose value is NaN is left out."""
    write_png(Chart("bars", title, title, lambda: _draw_bars(tasks, series, title)), path)


def _draw_bars(tasks: Sequence[str], series: Mapping[str, Sequence[float]], title: str) -> Figure:
    inner = max(320.0, 34.0 * len(tasks) * len(series))
    slanted = max(map(len, tasks), default=0) > 10
    figure = canvas(inner + 70, 370 if slanted else 310)
    axes = axes_at(figure, 56, 34, inner, 210)
    width = 0.8 / max(1, len(series))
    for place, values in enumerate(series.values()):
        left = [task + (place - (len(series) - 1) / 2) * width for task in range(len(tasks))]
        bars = axes.bar(left, values, 0.92 * width, color=PALETTE[place % len(PALETTE)])
        texts = ["" if math.isnan(value) else f"{value:.2f}" for value in values]
        axes.bar_label(bars, texts, fontsize=9, padding=1)
    _name_bars(figure, list(series))
    axes.set_xticks(range(len(tasks)), [label(task) for task in tasks])
    if slanted:
        for text in axes.get_xticklabels():
            text.set(rotation=25, ha="right", rotation_mode="anchor")
    axes.set_ylim(0.0, 1.08)
    axes.set_ylabel("accuracy")
    axes.set_title(label(title, 80), loc="left", weight="bold", fontsize=12)
    return figure


def _name_bars(figure: Figure, names: Sequence[str]) -> None:
    patches = [Rectangle((0, 0), 1, 1, color=PALETTE[place % len(PALETTE)]) for place in range(len(names))]
    figure.legend(patches, [label(name) for name in names], loc="lower center", ncols=min(6, max(1, len(names))))
