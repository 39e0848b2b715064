"""What changed between two versions of a line: experts, tasks, layers."""

from collections.abc import Mapping
from typing import Any

from evaluation.escape import clean
from flows.telling import bar
from flows.versions import REPORT_FILE, Version, open_version
from flows.wiring import House
from registry.files import read_json

MOST_LAYERS = 20  # in the table for people, the most changed first


def difference(house: House, line: str, before: int, after: int) -> dict[str, Any]:
    """The facts, in the direction from `before` to `after`; raises as `open_version`.

    `layers` are tensors: the norm of the change over the norm of what was there, both over all entries in float64.
    """
    first, second = (open_version(house, line, number) for number in (before, after))
    old, new = ([list(each[:3]) for each in version.memory.experts] for version in (first, second))
    return {
        "line": line,
        "before": before,
        "after": after,
        "added": [each for each in new if each not in old],
        "removed": [each for each in old if each not in new],
        "parameters": {"before": dict(first.memory.parameters), "after": dict(second.memory.parameters)},
        "tasks": _tasks(first, second),
        "layers": _layers(first, second),
    }


def _tasks(before: Version, after: Version) -> dict[str, dict[str, Any]]:
    """Task -> its value in both reports, null where one was not measured on it."""
    scores = [read_json(version.folder / REPORT_FILE)["report"]["scores"] for version in (before, after)]
    names = list(dict.fromkeys((*scores[0], *scores[1])))
    return {
        name: {
            "metric": (scores[1].get(name) or scores[0][name])["metric"],
            **{key: _number(each.get(name)) for key, each in zip(("before", "after"), scores, strict=True)},
        }
        for name in names
    }


def _number(score: Mapping[str, Any] | None) -> float | None:
    return float(score["value"]) if score and isinstance(score["value"], int | float) else None


def _layers(before: Version, after: Version) -> dict[str, float]:
    """Tensor -> share of its norm that changed, the most changed first; what did not change is left out."""
    import torch

    first, second = before.weights(), after.weights()
    changed = {}
    with bar(f"comparing {len(first)} tensors") as progress:
        for number, name in enumerate(sorted(first.keys() & second.keys()), 1):
            one, other = first[name].to(torch.float64), second[name].to(torch.float64)
            moved, there = float((other - one).norm()), float(one.norm())
            if moved:
                changed[name] = moved / there if there else 1.0  # of zeros everything changed
            progress(number, len(first))
    return dict(sorted(changed.items(), key=lambda each: -each[1]))


def print_difference(facts: Mapping[str, Any]) -> None:
    """The facts for people."""
    from rich.table import Table
    from rich.text import Text

    from flows.printing import console

    for key, word in (("added", "+"), ("removed", "-")):
        for model, version, task in facts[key]:
            console().print(Text(f"{word} {clean(task)}  ({clean(model)} v{version})"))
    tasks = Table("task", "metric", f"v{facts['before']}", f"v{facts['after']}", "change", box=None, pad_edge=False)
    for name, each in facts["tasks"].items():
        old, new = each["before"], each["after"]
        change = f"{new - old:+.3f}" if old is not None and new is not None else ""
        tasks.add_row(
            Text(clean(name)),
            each["metric"],
            *("" if value is None else f"{value:.3f}" for value in (old, new)),
            change,
        )
    layers = Table("layer", "changed by", box=None, pad_edge=False)
    for name, share in list(facts["layers"].items())[:MOST_LAYERS]:
        layers.add_row(Text(clean(name, 200)), f"{share:.2%}")
    for table in (tasks, layers):
        if table.row_count:
            console().print(table)
    left = len(facts["layers"]) - MOST_LAYERS
    if left > 0:
        console().print(Text(f"and {left} more; --json has all"))
