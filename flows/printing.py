"""The reading verbs' answers as tables and trees on stdout."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from evaluation.escape import clean

STYLES = {"folded": "green", "rejected": "red", "quarantined": "red", "pending": "yellow", "rolled-back": "yellow"}


def console() -> Console:
    """Where answers go; no colour and no wrapping when it is not a terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=160)


def print_status(lines: Sequence[Mapping[str, Any]]) -> None:
    """One row a line, then what blocks it and what waits."""
    table = _table(
        "line", "champion", "pending", "folded", "rejected", "quarantined", "withdrawn", "rolled back", "now"
    )
    for line in lines:
        counts = line["experts"]
        states = ("pending", "folded", "rejected", "quarantined", "withdrawn", "rolled-back")
        now = "BLOCKED" if line["blocked"] else ("working" if line["working"] else "idle")
        champion = f"v{line['champion']}" if line["champion"] else "none"
        table.add_row(clean(line["line"]), champion, *(str(counts[state]) for state in states), now)
    console().print(table)
    for line in lines:
        if line["blocked"]:
            console().print(f"{clean(line['line'])} is blocked: {clean(line['blocked'], 1000)}", markup=False)


def print_log(facts: Mapping[str, Any]) -> None:
    """The tree of versions; then the experts that are in none of them, and the moves of the champion."""
    if facts["tree"]:
        console().print(lineage_tree(facts))
    outside = [each for each in facts["experts"] if each["state"] not in ("folded", "rolled-back")]
    if outside:
        table = _table("expert", "task", "state", "why")
        for each in outside:
            table.add_row(
                clean(each["name"]), clean(each["task"]), _coloured(each["state"]), escape(_brief(each["reason"]))
            )
        console().print(table)
    moves = _table("when", "what", "champion", "who", "because")
    for event in facts["events"]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["at"]))
        move = f"{event['from'] or '-'} -> {event['to']}" if event["to"] else ""
        moves.add_row(when, event["kind"], move, clean(event["who"]), escape(_brief(event["because"])))
    console().print(moves)


def lineage_tree(facts: Mapping[str, Any]) -> Tree:
    """The versions of a line from its base, the champion marked, what is not in it dimmed."""

    def label(node: Mapping[str, Any]) -> str:
        text = f"v{node['version']}  " + (
            f"+ {clean(node['task'])}  ({clean(node['expert'])})" if node["expert"] else "base"
        )
        text = escape(text)
        if node["version"] == facts["champion"]:
            return f"[bold green]{text}  <- champion[/]"
        return text if node["in_champion"] else f"[dim]{text}  not in the champion[/]"

    def grow(tree: Tree, node: Mapping[str, Any]) -> None:
        # A chain is drawn straight down, only a fork is indented: 200 folds must not run off the page.
        children = node["children"]
        for child in children:
            branch = tree if len(children) == 1 else tree.add(label(child))
            if len(children) == 1:
                tree.add(label(child))
            grow(branch, child)

    tree = Tree(f"[bold]{escape(clean(facts['line']))}[/]")
    tree.add(label(facts["tree"]))
    grow(tree, facts["tree"])
    return tree


def print_show(facts: Mapping[str, Any]) -> None:
    """One version: what is in it, how it was judged, how good it is."""
    title = f"{clean(facts['line'])} v{facts['version']}"
    table = _table("", title)
    parameters = ", ".join(f"{key} = {value}" for key, value in facts["parameters"].items()) or "defaults"
    rows = {
        "parents": " <- ".join(f"v{parent}" for parent in facts["parents"]) or "none: this is the base",
        "experts": "\n".join(f"{e['model']} v{e['version']}  ({e['task']})" for e in facts["experts"]) or "none",
        "method": f"{facts['method']} ({parameters})",
        "weights": facts["weights_sha256"],
        "base": facts["base_sha256"],
        "manifest": facts["manifest_sha256"],
        "verdict": facts["verdict"],
        "report": facts["report"],
    }
    for key, value in rows.items():
        table.add_row(key, escape(str(value)))
    console().print(table)
    if facts["checks"]:
        print_checks(facts["checks"])
    print_accuracy(facts["accuracy"])


def print_checks(checks: Sequence[Mapping[str, Any]]) -> None:
    """The gate's answers, rule by rule."""
    table = _table("", "rule", "why")
    for check in checks:
        mark = "[green]passed[/]" if check["passed"] else "[red]FAILED[/]"
        table.add_row(mark, check["rule"], escape(clean(check["text"], 200)))
    console().print(table)


def print_accuracy(accuracy: Mapping[str, float]) -> None:
    """Task and accuracy."""
    if accuracy:
        table = _table("task", "accuracy")
        for task, value in accuracy.items():
            table.add_row(clean(task), f"{value:.3f}")
        console().print(table)


def print_comparison(rows: Mapping[str, Mapping[str, float]], means: Mapping[str, float]) -> None:
    """Models by task, with the mean over the tasks last."""
    tasks = list(next(iter(rows.values())))
    table = _table("accuracy", *tasks, "mean")
    for column in table.columns[1:]:
        column.justify = "right"
    for title, row in rows.items():
        table.add_row(title, *(f"{row[task]:.3f}" for task in tasks), f"{means[title]:.3f}")
    console().print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _coloured(state: str) -> str:
    return f"[{STYLES.get(state, 'default')}]{state}[/]"


def _brief(text: str) -> str:
    return clean(text, 240)
