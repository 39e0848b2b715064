"""What the reading verbs answer, as plain facts: the same for people, for --json and for tests."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.alive import is_dead
from flows.blackout import blackout_now
from flows.naming import find_expert
from flows.placing import here
from flows.versions import PAGE_FILE, REPORT_FILE, chain, extents, find_merge, open_version
from flows.waiting import decided_by, facts_of, state_of
from flows.wiring import House
from registry.files import read_json
from registry.lineage import Extent, Node, ancestry, met, parents_of, tree
from registry.records import Event, Expert, ExpertState, FoldinError, Refusal

SCORE = ("metric", "value", "split", "examples")


def status(house: House, name: str) -> dict[str, Any]:
    """One line now: champion, alias, what blocks it, who holds it, whether it rests, its experts by state."""
    line = house.ledger.line(name)
    experts = house.ledger.experts(name)
    holder, settings = house.ledger.leases.holder(name).holder, house.config.lines.get(name)
    return {
        "line": name,
        "champion": line.champion,
        "alias": house.mlflow.champion(name),
        "blocked": line.blocked,
        "working": "" if is_dead(holder) else holder,
        "blackout": blackout_now(settings.blackout, settings.timezone) if settings else "",
        "waiting": facts_of(house, name),
        "experts": {str(state): sum(each.state is state for each in experts) for state in ExpertState},
        "pending": [expert_facts(each) for each in experts if each.state is ExpertState.PENDING],
    }


def log(house: House, name: str) -> dict[str, Any]:
    """A line's history: its versions with their parents, base first; all its experts; the moves of the champion."""
    experts = house.ledger.experts(name)
    champion = house.ledger.line(name).champion
    current = set(chain(house, name, champion)) if champion else set()
    merges = house.ledger.merges(name)
    states = {each.version: state_of(house, each) for each in merges if each.version is not None}
    places, kept = met(merges, experts), extents(house, name)
    return {
        "line": name,
        "champion": champion,
        "versions": [
            {
                **_node(node, current),
                "state": states[node.version],
                "retired": kept[node.version] is Extent.RETIRED,
                "thin": kept[node.version] is Extent.THIN,
            }
            for node in tree(merges, experts)
        ],
        "experts": [{**expert_facts(each), "into": places[each.id]} for each in experts],
        "events": [event_facts(each) for each in house.ledger.events(name)],
    }


def show(house: House, name: str, number: int | None) -> dict[str, Any]:
    """One version: parents, experts in order, method, digests, verdict, accuracies; the champion when None."""
    version = open_version(house, name, _champion(house, name) if number is None else number)
    merge = find_merge(house, name, version.number)
    report = read_json(version.folder / REPORT_FILE)
    memory = version.memory
    return {
        "line": name,
        "version": version.number,
        "parents": chain(house, name, version.number)[1:],
        "merge_key": merge.merge_key,
        "manifest_sha256": version.manifest_sha256,
        "weights_sha256": memory.weights_sha256,
        "thin": version.thin,
        "base_sha256": memory.base_sha256,
        "method": memory.method,
        "parameters": dict(memory.parameters),
        "experts": [each._asdict() for each in memory.experts],
        "suites": dict(memory.suites),
        "profile": dict(memory.profile),
        "verdict": state_of(house, merge),
        "decided": decided_by(house, merge),
        "checks": [{key: _measured(value) for key, value in asdict(each).items()} for each in merge.verdict.checks],
        "scores": {task: {key: each[key] for key in SCORE} for task, each in report["report"]["scores"].items()},
        "search": report["lineage"].get("search", ""),
        "summary": report["summary"],
        "folder": str(version.folder),
        "report": str(version.folder / PAGE_FILE),
    }


def holders(house: House, name: str, text: str) -> dict[str, Any]:
    """Every version that holds an expert, and since when the champion has; raises as `find_expert`."""
    merges, events = house.ledger.merges(name), house.ledger.events(name)
    known = house.ledger.experts(name)
    wanted = find_expert(text, known, f"line {name}")
    mine = {each.id for each in known if (each.model, each.version) == (wanted.model, wanted.version)}
    parents = parents_of(merges)
    own = {each.version for each in merges if mine.intersection(each.experts) and each.version is not None}
    holding = {version for version in parents if own.intersection(ancestry(parents, version))}
    champion = house.ledger.line(name).champion
    since = None
    for event in (each for each in events if each.target is not None):
        since = (since or event.at) if event.target in holding else None
    facts = [{"version": version, "parent": parents[version]} for version in sorted(holding)]
    return {**expert_facts(wanted), "versions": facts, "champion": champion, "in_champion_since": since}


def page_of(house: House, name: str, text: str) -> Path:
    """The page that shows how an expert was judged last, whether it was folded or not.

    Raises:
        FoldinError: E_EXPERT for an expert that the line does not know, or that was never judged.
    """
    expert = find_expert(text, house.ledger.experts(name), f"line {name}")
    judged = [merge for merge in house.ledger.merges(name) if expert.id in merge.experts and merge.run_id]
    if not judged:
        what, found = "the expert was never judged", ": ".join(filter(None, (expert.state, expert.reason.rstrip("."))))
        remedy = f"`foldin log {name}` shows why"
        raise FoldinError(Refusal("E_EXPERT", what, f"expert {expert.name}", found=found, remedy=remedy))
    return house.mlflow.runs.artifact(judged[-1].run_id, Path(PAGE_FILE).name, house.config.home / "downloads")


def score(house: House, name: str, number: int | None) -> dict[str, Any]:
    """One version measured on every task that the champion knows, now."""
    from flows.scoring import Bench, Subject, known_tasks
    from flows.scoring import score as measure

    settings = here(house.config.line(name))
    champion = _champion(house, name)
    version = open_version(house, name, champion if number is None else number)
    knows = open_version(house, name, champion)
    base = open_version(house, name, chain(house, name, version.number)[-1])
    tasks = known_tasks(house, settings, knows.memory, knows.folder)
    subject = Subject(version.memory.weights_sha256, version.weights())
    scores = measure(Bench(house, settings, base), subject, tasks)
    return {
        "line": name,
        "version": version.number,
        "scores": {task: {key: _measured(getattr(each, key)) for key in SCORE} for task, each in scores.items()},
        "errors": {task: found.error for task, found in scores.items() if found.error},
    }


def expert_facts(expert: Expert) -> dict[str, Any]:
    """One expert for people."""
    keys = ("seq", "model", "version", "task", "state", "code", "reason", "digest")
    return {"name": expert.name, **{key: getattr(expert, key) for key in keys}}


def event_facts(event: Event) -> dict[str, Any]:
    """One event for people."""
    return {
        "kind": event.kind,
        "from": event.origin,
        "to": event.target,
        "because": event.because,
        "who": event.who,
        "at": event.at,
    }


def _node(node: Node, current: set[int]) -> dict[str, Any]:
    return {
        "version": node.version,
        "parent": node.parent,
        "children": list(node.children),
        "expert": ", ".join(each.name for each in node.experts) or None,
        "task": ", ".join(each.task for each in node.experts) or None,
        "in_champion": node.version in current,
    }


def _champion(house: House, name: str) -> int:
    champion = house.ledger.line(name).champion
    if champion is not None:
        return champion
    raise FoldinError(
        Refusal(
            code="E_LINE",
            what="the line has no champion yet",
            where=f"line {name}",
            expected="a registered base",
            found="a start that never ended",
            remedy=f"end it with `foldin init {name}`",
        )
    )


def _measured(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """What could not be measured is null, and what has no limit a text: neither NaN nor infinity is JSON."""
    if isinstance(value, tuple):
        return [_measured(each) for each in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)
