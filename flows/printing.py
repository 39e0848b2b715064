"""The reading verbs' answers as tables and trees on stdout.

Names and reasons are strangers' words: they go into `Text`, which knows no markup, after `clean`, which leaves nothing
that a terminal would obey.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from evaluation.escape import clean

STYLES = {"folded": "green", "rejected": "red", "quarantined": "red", "pending": "yellow", "rolled-back": "yellow"}
REFUSED = ("rejected", "quarantined")
THIN = "thin: made again from base and state when they are needed"
LONG = 100_000  # characters; what foldin itself wrote is not cut


def console() -> Console:
    """Where answers go; no colour and no wrapping when it is not a terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=160)


def print_status(lines: Sequence[Mapping[str, Any]]) -> None:
    """One row a line, then what blocks it and what waits for a person."""
    table = _table(
        "line", "champion", "pending", "folded", "rejected", "quarantined", "withdrawn", "rolled back", "now"
    )
    for line in lines:
        counts = line["experts"]
        states = ("pending", "folded", "rejected", "quarantined", "withdrawn", "rolled-back")
        states_now = {"BLOCKED": "blocked", "working": "working", "waits": "waiting", "blackout": "blackout"}
        now = next((word for word, key in states_now.items() if line[key]), "idle")
        champion = f"v{line['champion']}" if line["champion"] else "none"
        table.add_row(_text(line["line"]), champion, *(str(counts[state]) for state in states), now)
    console().print(table)
    for line in lines:
        if line["blocked"]:
            console().print(_text(f"{clean(line['line'])} is blocked: {line['blocked']}", 1000))
        if line["waiting"]:
            found = line["waiting"]
            which = f"{clean(line['line'])} v{found['version']} ({clean(found['expert'])})"
            console().print(_text(f"{which} waits for a person since {_when(found['since'])}: {found['reason']}", 1000))


def print_log(facts: Mapping[str, Any]) -> None:
    """The tree of versions; then the experts that are in none of them, and the moves of the champion."""
    if facts["versions"]:
        console().print(lineage_tree(facts))
    outside = [each for each in facts["experts"] if each["state"] in ("pending", "withdrawn")]
    if outside:
        table = _table("expert", "task", "state", "why")
        for each in outside:
            state = Text(each["state"], style=STYLES.get(each["state"], "default"))
            table.add_row(_text(each["name"]), _text(each["task"]), state, _text(each["reason"], 240))
        console().print(table)
    moves = _table("when", "what", "champion", "who", "because")
    for event in facts["events"]:
        when = _when(event["at"])
        move = f"{event['from'] or '-'} -> {event['to']}" if event["to"] else ""
        moves.add_row(when, event["kind"], move, _text(event["who"]), _text(event["because"], 240))
    console().print(moves)


def lineage_tree(facts: Mapping[str, Any]) -> Tree:
    """The versions of a line from its base, the champion marked, what is not in it dimmed.

    The way to the champion runs straight down: 200 folds must not run off the page. At a fork the branches that were
    left come first, one step in; the parent of a version is the one before it at its own depth, or the one it hangs on.
    Experts that were refused hang, marked x, on the version that they would have been folded into.
    """
    nodes = {node["version"]: node for node in facts["versions"]}
    refused: dict[int, list[Mapping[str, Any]]] = {}
    for each in facts["experts"]:
        if each["state"] in REFUSED:
            refused.setdefault(each["into"], []).append(each)
    whole = Tree(Text(clean(facts["line"]), style="bold"))
    open_ends = [(facts["versions"][0], whole)] if nodes else []
    while open_ends:
        node, level = open_ends.pop()
        here = level.add(_label(node, facts["champion"]))
        for each in refused.get(node["version"], ()):
            here.add(_refused(each))
        *left, straight = sorted((nodes[each] for each in node["children"]), key=_on_the_way) or [None]
        open_ends += [(straight, level)] if straight else []
        open_ends += [(branch, here) for branch in reversed(left)]
    return whole


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _on_the_way(node: Mapping[str, Any]) -> bool:
    return bool(node["in_champion"])


def _refused(expert: Mapping[str, Any]) -> Text:
    """An expert below the version that it would have been folded into."""
    text = f"x  {clean(expert['task'])}  ({clean(expert['name'])})  {expert['state']}: {clean(expert['reason'], 100)}"
    return Text(text, style="red")


def _label(node: Mapping[str, Any], champion: int | None) -> Text:
    content = f"+ {clean(node['task'])}  ({clean(node['expert'])})" if node["expert"] else "base"
    files = ", retired" if node.get("retired") else ", thin" if node.get("thin") else ""
    text = f"v{node['version']}  {content}{files}"
    if node["version"] == champion:
        return Text(f"{text}  <- champion", style="bold green")
    if node["state"] == "needs-approval":
        return Text(f"{text}  waits for a person", style="yellow")
    never = f"{node['state']}, " if node["state"] in ("declined", "superseded") else ""
    return Text(text) if node["in_champion"] else Text(f"{text}  {never}not in the champion", style="dim")


def print_show(facts: Mapping[str, Any]) -> None:
    """One version: what is in it, how it was judged, how good it is."""
    table = _table("", f"{facts['line']} v{facts['version']}")
    parameters = ", ".join(f"{key} = {value}" for key, value in facts["parameters"].items()) or "defaults"
    experts = [clean(f"{e['model']} v{e['version']}  ({e['task']}{_weight(e['weight'])})") for e in facts["experts"]]
    rows = {
        "parents": clean(" <- ".join(f"v{parent}" for parent in facts["parents"]), LONG) or "none: this is the base",
        "experts": "\n".join(experts) or "none",
        "method": clean(f"{facts['method']} ({parameters})", LONG),
        "weights": facts["weights_sha256"] + (f", {THIN}" if facts.get("thin") else ""),
        "base": facts["base_sha256"],
        "manifest": facts["manifest_sha256"],
        "verdict": clean(facts["verdict"] + _by(facts["decided"]), 1000),
        "report": clean(facts["report"], LONG),
    }
    for key, value in rows.items():
        table.add_row(key, Text(value))
    console().print(table)
    if facts["checks"]:
        print_checks(facts["checks"])
    print_scores(facts["scores"])


def _weight(weight: float) -> str:
    return "" if weight == 1 else f", weight {weight:g}"


def _by(decided: Mapping[str, Any] | None) -> str:
    return f" by {decided['who']} on {_when(decided['at'])}: {decided['because']}" if decided else ""


def print_checks(checks: Sequence[Mapping[str, Any]]) -> None:
    """The gate's answers, rule by rule."""
    table = _table("", "rule", "why")
    for check in checks:
        mark = Text("passed", style="green") if check["passed"] else Text("FAILED", style="red")
        table.add_row(mark, check["rule"], _text(check["text"], 200))
    console().print(table)


def print_scores(scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Task by task what was measured; None for what could not be."""
    if scores:
        table = _table("task", "metric", "value", "examples")
        for task, score in scores.items():
            value = "not measured" if score["value"] is None else f"{score['value']:.3f}"
            sample = "" if score["split"] == "gate" else f" of the {score['split']}"
            table.add_row(_text(task), _text(score["metric"]), value, f"{score['examples']}{sample}")
        console().print(table)


def print_comparison(
    rows: Mapping[str, Mapping[str, float]],
    means: Mapping[str, float],
    guarded: Mapping[str, Mapping[str, float]],  # guard -> model -> value
) -> None:
    """Models by task, with the mean over the tasks, and the guards after it."""
    tasks = list(next(iter(rows.values())))
    table = _table("accuracy", *tasks, "mean", *(f"{guard} (guard)" for guard in guarded))
    for column in table.columns[1:]:
        column.justify = "right"
    for title, row in rows.items():
        kept = (f"{each[title]:.3f}" if title in each else "" for each in guarded.values())
        table.add_row(_text(title), *(f"{row[task]:.3f}" for task in tasks), f"{means[title]:.3f}", *kept)
    console().print(table)


def print_replay(facts: Mapping[str, Any]) -> None:
    """What became of each expert, and how the branch compares with the champion."""
    table = _table("expert", "beside the champion", "why not")
    for each in facts["experts"]:
        became = f"{each['state']} as v{each['version']}" if each["version"] else each["state"]
        became += f", from its archive (error {each['error']:.4f})" if each["source"] == "archive" else ""
        table.add_row(_text(each["expert"]), became, _text(each["reason"], 240))
    if facts["experts"]:
        console().print(table)
    scores = _table("task", "metric", f"champion v{facts['champion']}", f"branch v{facts['version']}")
    for task, each in facts["scores"].items():
        values = ("not measured" if each[key] is None else f"{each[key]:.3f}" for key in ("champion", "branch"))
        scores.add_row(_text(task), _text(each["metric"]), *values)
    if facts["scores"]:
        console().print(scores)
    now = "is champion now" if facts["promoted"] else "is not the champion"
    console().print(_text(f"v{facts['version']} ({facts['verdict']}) {now}. {facts['reason']}".strip(), 1000))


def print_garbage(facts: Mapping[str, Any]) -> None:
    """Bytes of every version and which of its files are there, what may go, and what cannot."""
    table = _table("version", "bytes", "files")
    for version, each in facts["versions"].items():
        table.add_row(f"v{version}", f"{each['bytes']:,}", each["files"])
    console().print(table)
    items = _table("removed" if facts["done"] else "would go", "", "bytes", "why")
    for each in facts["items"]:
        items.add_row(each["kind"], _text(each["name"], LONG), f"{each['size']:,}", each["why"])
    whole = sum(each["size"] for each in facts["items"])
    if facts["items"]:
        console().print(items)
    for version, why in facts["left"].items():
        console().print(_text(f"v{version} stays whole: {why}", 1000))
    done = "removed" if facts["done"] else "may go; --yes removes them" if facts["items"] else "may go"
    console().print(f"{len(facts['items'])} things, {whole:,} bytes, {done}.")


def print_holders(facts: Mapping[str, Any]) -> None:
    """An expert, and the versions that hold it."""
    held = ", ".join(f"v{each['version']}" for each in facts["versions"]) or "no version"
    since = facts["in_champion_since"]
    now = f"in the champion (v{facts['champion']}) since {_when(since)}" if since else "not in the champion"
    state = f"{facts['state']}: {facts['reason']}" if facts["reason"] else facts["state"]
    for line in (f"{facts['name']} ({facts['task']}): {state}", f"held by {held}", now):
        console().print(_text(line, 2000))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(_text(column), overflow="fold")
    return table


def _text(words: str, limit: int = 120) -> Text:
    return Text(clean(words, limit))
