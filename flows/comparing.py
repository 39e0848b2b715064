"""What a line was worth: its champion beside the base, the experts alone, and two plain ways to merge them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.telling import bar
from flows.wiring import House


def compare(at: House, line: str, experts: Mapping[str, Path]) -> dict[str, Any]:
    """Base, experts, two plain merges and the champion on every task and guard, measured now; the facts, also printed.

    Args:
        at: where the line is.
        line: its name.
        experts: task -> folder.
    """
    from flows.printing import print_comparison
    from flows.scoring import GATE, Bench, Subject, known_tasks, score
    from flows.versions import chain, open_version
    from merging import merge
    from registry.weights import Checkpoint, content_sha256

    champion = at.ledger.line(line).champion or 0
    served = open_version(at, line, champion)
    base = open_version(at, line, chain(at, line, champion)[-1])
    settings = at.config.line(line)
    bench = Bench(at, settings, base)
    tasks = known_tasks(at, settings, served.memory, served.folder)
    opened = {name: Checkpoint.open(folder) for name, folder in experts.items()}

    def measure(title: str, weights: Any, names: Any) -> dict[str, float]:  # noqa: ANN401 - mappings of tensors
        with bar(f"measuring {title}") as progress:
            subject = Subject(content_sha256(weights)[0], weights)
            found = score(bench, subject, {name: tasks[name] for name in names}, GATE, progress)
        return {name: each.value for name, each in found.items()}

    rows = {"base": measure("the base", base.weights(), tasks)}
    # The line does not know the task of an expert that it refused.
    known = [name for name in tasks if name not in settings.guards]
    rows["experts, each on its own task"] = {name: measure(name, opened[name], [name])[name] for name in known}
    projected = served.memory.projected
    for title, method in (("average", "average"), ("task arithmetic 0.3", "task_arithmetic")):
        merged = merge(base.weights(), list(opened.values()), method, projected=projected)
        rows[title] = measure(title, merged, tasks)
    rows["OPCM (the champion)"] = measure("the champion", served.weights(), tasks)
    guarded = {name: {title: row.pop(name) for title, row in rows.items() if name in row} for name in settings.guards}
    means = {title: sum(row.values()) / len(row) for title, row in rows.items()}
    print_comparison(rows, means, guarded)
    return {
        "accuracy": rows,
        "mean_accuracy": means,
        "guarded": guarded,
        "searched": {"factor": served.memory.factor, "parameters": dict(served.memory.parameters)},
        "champion_weights_sha256": served.memory.weights_sha256,
    }
