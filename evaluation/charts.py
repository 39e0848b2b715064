"""Which charts a report has, and their words. What is left out has nothing to show."""

import math
from collections.abc import Callable, Sequence

from evaluation import curves, wording
from evaluation.comparison import Change
from evaluation.drawing import Chart, label
from evaluation.matrix import draw_matrix
from evaluation.report import Record, Rows

MOST_TASKS = 60  # in one picture
MOST_VERSIONS = 24  # in the heat map; the lines show all


def charts(record: Record, changes: Sequence[Change]) -> dict[str, Chart]:
    """Name -> chart, in the order of the page; `changes` as evaluation.comparison finds them in the record."""
    makers: tuple[Callable[[Record], Chart | None], ...]
    makers = (accuracy_matrix, versions, perplexities, pareto, overlap)
    found = (tasks(changes), *(make(record) for make in makers))
    return {chart.name: chart for chart in found if chart}


def tasks(changes: Sequence[Change]) -> Chart | None:
    """The candidate's change on every task against the champion's value, with its interval."""
    found = changes[:MOST_TASKS]
    if not any(math.isfinite(each.value) for each in found):
        return None
    told = (f"{label(each.task)} {wording.signed(each.value)} ({wording.between(each.interval)})" for each in found)
    says = f"Candidate minus champion with 95 % intervals. {'; '.join(told)}."
    return Chart("tasks", "Change against the champion", says, lambda: curves.draw_changes(found))


def accuracy_matrix(record: Record) -> Chart | None:
    """The heat map: a row a task, a column a version."""
    names, rows = _known(record.matrix)
    if not names:
        return None
    first = max(0, len(rows) - MOST_VERSIONS)
    shown, title = rows[first:], "Accuracy after each fold, in per cent"
    heads = [str(number) for number in range(first + 1, len(rows) + 1)]
    values = [[row.get(name) for row in shown] for name in names]
    says = f"A row for each of {len(names)} tasks, a column for each version from {heads[0]} to {heads[-1]}."
    return Chart("accuracy_matrix", title, says, lambda: draw_matrix(names, heads, values, title))


def versions(record: Record) -> Chart | None:
    """Accuracy over versions, a panel a task."""
    return _lines("versions", "Accuracy over versions, in per cent", record.matrix, 100.0)


def perplexities(record: Record) -> Chart | None:
    """Perplexity over versions, a panel a task."""
    return _lines("perplexities", "Perplexity over versions, less is better", record.perplexities, 1.0)


def pareto(record: Record) -> Chart | None:
    """The search's tries: the old tasks' mean across, the new task upwards."""
    tries = [(place, each) for place, each in enumerate(record.tries, 1)]
    shown = [(place, each) for place, each in tries if math.isfinite(each.old) and math.isfinite(each.new)]
    if not shown:
        return None
    chosen = ", ".join(label(each.name, 40) for each in record.tries if each.chosen) or "none"
    says = f"{len(shown)} of {len(tries)} tries by the old tasks' mean and by the new task. Chosen: {chosen}."
    return Chart("pareto", "What the search found", says, lambda: curves.draw_tries(shown))


def overlap(record: Record) -> Chart | None:
    """Cosine and share removed, layer by layer."""
    layers = list(record.overlap)
    if not layers:
        return None
    cosine, removed = ([_at(record.overlap[name].get(what)) for name in layers] for what in ("cosine", "removed"))
    says = f"{len(layers)} layers. {_extreme(layers, cosine, 'cosine')} {_extreme(layers, removed, 'share removed')}"
    return Chart("overlap", "Overlap per layer", says, lambda: curves.draw_layers(layers, cosine, removed))


def _lines(name: str, title: str, matrix: Rows, scale: float) -> Chart | None:
    names, rows = _known(matrix)
    if not names or len(rows) < 2:
        return None
    lines = [(task, [scale * _at(row.get(task)) for row in rows]) for task in names]
    says = "; ".join(f"{label(task)}: {_ends(values)}" for task, values in lines)
    return Chart(name, title, f"{says}.", lambda: curves.draw_panels(lines, title, less=scale == 1.0))


def _known(matrix: Rows) -> tuple[list[str], list[dict[str, float]]]:
    """The tasks in the order of their arrival, and the rows that say something."""
    rows = [dict(row) for row in matrix if row]
    return list(dict.fromkeys(task for row in rows for task in row))[:MOST_TASKS], rows


def _ends(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    now = f"{values[-1]:.1f} now" if math.isfinite(values[-1]) else "not measured now"
    return f"{known[0]:.1f} at first, {now}" if known else "never measured"


def _extreme(layers: Sequence[str], values: Sequence[float], what: str) -> str:
    known = [(value, name) for name, value in zip(layers, values, strict=True) if math.isfinite(value)]
    if not known:
        return ""
    value, name = max(known, key=lambda pair: abs(pair[0]))
    return f"Largest {what}: {wording.number(value)} in {label(name, 80)}."


def _at(value: float | None) -> float:
    return math.nan if value is None else float(value)
