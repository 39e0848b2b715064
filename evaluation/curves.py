"""The report's charts beside the heat map: changes with their intervals, lines over versions, tries, layers."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation import wording
from evaluation.comparison import Change
from evaluation.drawing import BAD, GOOD, INK, LINE, MUTED, PAGE, axes_at, canvas, label
from registry.verdicts import Try

WIDTH, PANEL, LETTER = 720.0, 134.0, 6.8  # pixels
Numbered = tuple[int, Try]  # as in the table beside the picture
Line = tuple[str, Sequence[float]]  # task, and its value after every version; NaN where it is not known


def draw_changes(changes: Sequence[Change]) -> Figure:
    """A row a task: the change and its interval, better to the right; perplexities below, in their own unit."""
    groups = [[each for each in changes if each.is_perplexity is less] for less in (False, True)]
    heights = [24.0 * len(group) for group in groups]
    left, top = 80 + LETTER * max(len(_named(each)) for each in changes), 8.0
    figure = canvas(left + 400, sum(height + 56 for height in heights if height))
    for group, height in zip(groups, heights, strict=True):
        if group:
            _draw_group(axes_at(figure, left, top, 380, height), group)
            top += height + 56
    return figure


def _draw_group(axes: Axes, group: Sequence[Change]) -> None:
    less = group[0].is_perplexity
    axes.axvline(0.0, color=INK, linewidth=1.0)
    for row, change in enumerate(group):
        colour, value = BAD if change.failed else GOOD, 100 * change.value
        if change.interval:
            axes.plot([100 * end for end in change.interval], [row, row], color=colour, linewidth=2.5)
        axes.plot([value], [row], "X" if change.failed else "o", color=colour, markersize=9, markeredgecolor=PAGE)
        # The picture says it without its table, too.
        text, beside = f"{'✕ ' * change.failed}{wording.signed(change.value)}", axes.get_yaxis_transform()
        axes.text(-0.02, row, text, transform=beside, ha="right", va="center_baseline", weight="bold", color=colour)
    axes.set_yticks(range(len(group)), [_named(change) for change in group])
    axes.tick_params(axis="y", length=0, pad=72)
    axes.set_ylim(len(group) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    unit = "change of perplexity in %, axis turned" if less else "change in points"
    axes.set_xlabel(f"{unit} (right is better)")
    if less:
        axes.invert_xaxis()


def _named(change: Change) -> str:
    return label(change.task) + (" (new)" if change.new else "")


def draw_panels(lines: Sequence[Line], title: str, less: bool) -> Figure:
    """A small panel a task, dashed at the value with which it arrived, and tinted where it is worse than that.

    One scale for all of them, unless `less` is better: perplexities of different texts do not compare.
    """
    across = 4
    down = math.ceil(len(lines) / across)
    figure = canvas(WIDTH, 30 + PANEL * down)
    figure.text(4 / WIDTH, 1 - 16 / (30 + PANEL * down), title, weight="bold")
    known = [value for _, values in lines for value in values if math.isfinite(value)]
    limits = _room(known) if known and not less else None
    for place, line in enumerate(lines):
        left, top = 32 + (WIDTH - 4) / across * (place % across), 56 + PANEL * (place // across)
        _draw_line(axes_at(figure, left, top, WIDTH / across - 40, PANEL - 58), line, limits, less)
    return figure


def _draw_line(axes: Axes, line: Line, limits: tuple[float, float] | None, less: bool) -> None:
    task, values = line
    known = [(place, value) for place, value in enumerate(values, 1) if math.isfinite(value)]
    axes.set_xlim(0.5, len(values) + 0.5)
    axes.set_ylim(limits or _room([value for _, value in known]))
    axes.set_xticks([1, len(values)])
    axes.set_yticks(axes.get_ylim(), [f"{end:g}" for end in axes.get_ylim()])
    axes.tick_params(labelsize=10, length=3)
    if known:
        (start, first), (end, last) = known[0], known[-1]
        axes.plot([start, end], [first, first], color=MUTED, linewidth=1.0, linestyle=(0, (3, 2)))
        worse, places = [(max if less else min)(first, value) for value in values], range(1, len(values) + 1)
        axes.fill_between(places, [*worse], first, color=BAD, alpha=0.3, linewidth=0)
        axes.plot(places, values, color=GOOD, linewidth=1.8, solid_capstyle="round")
        axes.plot([end], [last], "o", color=GOOD, markersize=5, markeredgecolor=PAGE)
    axes.text(0.0, 1.23, label(task, 18), transform=axes.transAxes, fontsize=12, weight="bold")
    axes.text(0.0, 1.06, _moved(values), transform=axes.transAxes, fontsize=10)


def _moved(values: Sequence[float]) -> str:
    """'71.0, −12.1 since it came'."""
    known = [value for value in values if math.isfinite(value)]
    if not known or not math.isfinite(values[-1]):
        return "not measured" + (f", {known[-1]:.1f} before" if known else "")
    change = f"{known[-1] - known[0]:+.1f}".replace("-", wording.MINUS)
    return f"{known[-1]:.1f}, {change} since it came" if len(known) > 1 else f"{known[-1]:.1f}, new"


def _room(values: Sequence[float]) -> tuple[float, float]:
    """Limits on round numbers around the values."""
    if not values:
        return 0.0, 1.0
    spread = max(max(values) - min(values), 0.05 * max(map(abs, values)), 1e-6)
    step = 10.0 ** math.floor(math.log10(spread))
    return math.floor(min(values) / step) * step, (math.floor(max(values) / step) + 1) * step


def draw_tries(tries: Sequence[Numbered]) -> Figure:
    """The tries by number; the front joined, the chosen one ringed, hollow what the rules would not let pass."""
    figure = canvas(560, 400)
    axes = axes_at(figure, 60, 12, 484, 290)
    front = sorted(((each.old, each.new) for _, each in tries if each.best))
    if front:
        axes.plot(
            [100 * old for old, _ in front], [100 * new for _, new in front], color=MUTED, linewidth=1.5, zorder=1
        )
    for place, each in tries:
        _draw_try(axes, place, each)
    axes.margins(0.12)
    axes.grid()
    axes.set_xlabel("mean of the old tasks, %")
    axes.set_ylabel("new task, %")
    _explain(figure, axes)
    return figure


def _draw_try(axes: Axes, place: int, each: Try) -> None:
    at, colour = (100 * each.old, 100 * each.new), GOOD if each.passed else BAD
    if each.chosen:
        axes.plot(*at, "o", markersize=19, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=2.0)
    face = colour if each.passed else PAGE
    shape = "o" if each.best else "s"
    axes.plot(*at, shape, color=colour, markersize=9, markerfacecolor=face, markeredgewidth=1.8)
    axes.annotate(str(place), at, (12, 7), textcoords="offset points", weight="bold" if each.chosen else "normal")


def _explain(figure: Figure, axes: Axes) -> None:
    common: dict[str, Any] = {"linestyle": "none", "markersize": 8}
    marks = {
        "on the front": axes.plot([], [], "o", color=GOOD, **common)[0],
        "not on it": axes.plot([], [], "s", color=GOOD, **common)[0],
        "would not pass": axes.plot([], [], "o", color=BAD, markerfacecolor=PAGE, markeredgewidth=1.8, **common)[0],
        "chosen": axes.plot([], [], "o", color=INK, markerfacecolor="none", linestyle="none", markersize=13)[0],
    }
    figure.legend(list(marks.values()), list(marks), loc="lower center", ncols=4, fontsize=11, handletextpad=0.3)


def draw_layers(layers: Sequence[str], cosine: Sequence[float], removed: Sequence[float]) -> Figure:
    """Two rows of bars in the model's order, a bar a layer; names below while there is room for them."""
    named = len(layers) <= 12
    figure = canvas(WIDTH, 390 if named else 320)
    panels = [axes_at(figure, 64, top, WIDTH - 80, 110) for top in (28, 168)]
    titles = ("cosine of the expert's change with the total", "share of the change that was removed")
    for axes, values, title in zip(panels, (cosine, removed), titles, strict=True):
        axes.stairs(values, [place + 0.5 for place in range(len(layers) + 1)], fill=True, color=GOOD, linewidth=0)
        axes.axhline(0.0, color=INK, linewidth=1.0)
        axes.set_xlim(0.5, len(layers) + 0.5)
        axes.set_title(title, loc="left", fontsize=12, weight="bold")
        axes.grid(axis="y")
        axes.tick_params(axis="x", length=3, labelbottom=False)
    panels[1].set_ylim(0.0, max(1e-3, *(1.1 * value for value in removed if math.isfinite(value)), 0.0))
    _name_layers(panels, layers, named)
    return figure


def _name_layers(panels: Sequence[Axes], layers: Sequence[str], named: bool) -> None:
    last, start = panels[-1], _shared(layers)
    last.tick_params(axis="x", labelbottom=True)
    if not named:
        last.set_xlabel("layer, in the model's order")
        return
    for axes in panels:
        axes.set_xticks(range(1, len(layers) + 1), [label(name[start:], 28) for name in layers])
    for text in last.get_xticklabels():
        text.set(rotation=25, ha="right", rotation_mode="anchor", fontsize=10)
    for axes in panels:
        for edge in range(1, len(layers)):
            axes.axvline(edge + 0.5, color=LINE, linewidth=0.8)


def _shared(names: Sequence[str]) -> int:
    """How many letters all names begin with, in whole components: 8 for "encoder.0" and "encoder.11"."""
    first, last = min(names), max(names)
    same = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:same].rfind(".") + 1
