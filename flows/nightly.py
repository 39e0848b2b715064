"""The scheduled flow: fold what waits in few passes, verify the champion, collect garbage, tell what came of it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from evaluation.escape import clean, markdown
from flows.batching import merge_batch
from flows.champion import blocked
from flows.collecting import Keep, collect
from flows.dispatching import outcomes_of
from flows.notifying import send
from flows.telling import say
from flows.versions import REPORT_FILE, look_at, verified
from flows.waiting import facts_of, how, waiting
from flows.watch import fold_all
from flows.wiring import House, house
from registry.files import read_json
from registry.records import ExpertState, FoldinError

Facts = dict[str, Any]


@flow(name="nightly", flow_run_name="nightly {line}", persist_result=False)
def nightly(line: str, config_file: str = "foldin.toml") -> Facts:
    """Fold what waits, several experts in one pass; verify the champion; remove what nobody needs; tell people.

    Raises:
        Exception: the first that failed of these, after the others were done and all was told.
    """
    at = house(config_file)
    before, ended, trouble = _champion(at, line), _ended(at, line), list[Exception]()
    with spared_to(trouble):
        fold_all(line, config_file, merge_batch)
    if _champion(at, line) is None:
        raise trouble[0]  # the line could not even be started
    with spared_to(trouble):
        verified(at, line, _champion(at, line) or 0)
    collected: list[str] = []
    if not trouble and not blocked(at, line):  # who has to look into it may want what is there
        with spared_to(trouble):
            collected = collect_old(at, line)
    facts = {
        "line": line,
        "champion": [before, _champion(at, line)],
        "outcomes": outcomes_of(at, line, {each.id for each in at.ledger.experts(line)} - ended),
        "tasks": moved(at, line, before),
        "waits": facts_of(at, line),
        "collected": collected,
        "trouble": [str(each) for each in (*trouble, blocked(at, line)) if each],
    }
    text = digest(facts)
    create_markdown_artifact(text, key="nightly", description=f"what the night brought {clean(line)}")
    if facts["outcomes"] or facts["trouble"]:
        send(at.config.line(line), summary(facts), text)
    if trouble:
        raise trouble[0]
    return facts


@contextmanager
def spared_to(trouble: list[Exception]) -> Iterator[None]:
    """What goes wrong in the block is said and kept, so that the rest of the night is done and people hear of it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - it is raised again, once all was told
        say(f"{type(error).__name__}: {error}" if not isinstance(error, FoldinError) else str(error))
        trouble.append(error)


def _champion(at: House, line: str) -> int | None:
    return at.ledger.line(line).champion if line in {each.name for each in at.ledger.lines()} else None


def _ended(at: House, line: str) -> set[int]:
    """The ids of the experts that wait no more, or for a person."""
    held = waiting(at, line)
    ended = {each.id for each in at.ledger.experts(line) if each.state is not ExpertState.PENDING}
    return ended | {held.expert_id or 0} if held else ended


def collect_old(at: House, line: str) -> list[str]:
    """Collect the line's garbage; the names of what was removed."""
    keep = Keep(int(at.config.registry.keep), int(at.config.registry.keep_thin))
    items, _ = collect(at, line, keep, "the nightly collection", "foldin")
    return [f"{each.kind} {each.name}" for each in items]


def moved(at: House, line: str, before: int | None) -> dict[str, tuple[float | None, float | None]]:
    """Task -> what the champion measured before the night, and what it measures now; {} when it is the same one."""
    now = at.ledger.line(line).champion
    if now is None or now == before:
        return {}
    after, earlier = _scores(at, line, now), _scores(at, line, before) if before else {}
    return {task: (earlier.get(task), value) for task, value in after.items()}


def _scores(at: House, line: str, number: int) -> dict[str, float | None]:
    report = read_json(look_at(at, line, number, whole=False).folder / REPORT_FILE)
    return {
        task: float(each["value"]) if not each["error"] else None for task, each in report["report"]["scores"].items()
    }


def summary(facts: Mapping[str, Any]) -> str:
    """One line: how many experts ended how."""
    states = [each["state"] for each in facts["outcomes"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "nothing was folded"
    return clean(f"foldin: {facts['line']}: {counts}{'; TROUBLE' if facts['trouble'] else ''}", 200)


def digest(facts: Mapping[str, Any]) -> str:
    """What the night brought, in Markdown; strangers' words are escaped."""
    before, now = facts["champion"]
    stays = f"The champion is v{now}, as before." if before == now else f"The champion is v{now}; it was v{before}."
    parts = [f"# {markdown(facts['line'])}", "", f"{summary(facts)}. {stays}", ""]
    parts += [f"**{markdown(each, 1000)}**\n" for each in facts["trouble"]]
    if facts["waits"]:
        found = facts["waits"]
        parts += [f"v{found['version']} ({markdown(found['expert'])}) waits: {how(facts['line'], found)}", ""]
    parts += _table(("expert", "became", "version", "why"), [_became(each) for each in facts["outcomes"]])
    parts += _table(
        ("task", "before", "now"), [(markdown(task), *map(_value, each)) for task, each in facts["tasks"].items()]
    )
    removed = facts["collected"]
    parts += [f"Removed as garbage: {', '.join(markdown(each) for each in removed)}." if removed else "No garbage.", ""]
    return "\n".join(parts)


def _became(outcome: Mapping[str, Any]) -> tuple[str, ...]:
    version = f"v{outcome['version']}" if outcome["version"] else ""
    return markdown(outcome["expert"]), str(outcome["state"]), version, markdown(str(outcome["reason"] or ""), 300)


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table; nothing when it has no rows."""
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]
