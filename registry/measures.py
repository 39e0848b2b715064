"""What monitoring asks the ledger, all of it in one look, and what the steps of folds took, which is added up here.

Nothing else rests on it: no write carries a fence, since the time that an overtaken run spent was spent all the same.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, Row, Select, and_, func, insert, select, update

from registry import database
from registry.records import ExpertState
from registry.rows import verdict_from
from registry.schema import events, experts, leases, lines, merges, now, steps
from registry.verdicts import Check, Outcome

WHOLE = ""  # the name of a whole fold among its steps


class Cost(NamedTuple):
    """What the runs of one step took."""

    runs: int = 0
    failures: int = 0  # of these, ended with an error
    seconds: float = 0.0
    bytes: int = 0  # of the folders that they left

    def plus(self, other: "Cost") -> "Cost":
        """Both together."""
        runs, failures = self.runs + other.runs, self.failures + other.failures
        return Cost(runs, failures, self.seconds + other.seconds, self.bytes + other.bytes)


@dataclass(frozen=True)
class LineFacts:
    """How one line stands."""

    line: str
    champion: int | None
    blocked: bool
    waits: bool  # for a person
    held: bool
    lease_age: float  # seconds since it was taken; 0 when nobody holds it
    lease_left: float  # seconds until it may be taken over; below 0 when its holder went silent
    experts: Mapping[str, int] = field(default_factory=dict)  # state -> how many
    oldest_pending: float = 0.0  # seconds since it was enrolled; 0 when none is pending
    events: Mapping[str, int] = field(default_factory=dict)  # kind -> how many
    steps: Mapping[str, Cost] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)  # of the champion: METRIC.TASK -> value
    checks: tuple[Check, ...] = ()  # of the newest verdict


class Measures:
    """The verbs of monitoring."""

    def __init__(self, engine: Engine) -> None:
        """Work on an open ledger."""
        self._engine = engine

    def add(self, line: str, costs: Mapping[str, Cost]) -> None:
        """Add what steps took."""
        for step, cost in costs.items():
            try:
                self._add(line, step, cost)
            except database.IntegrityError:  # another process was the first to add
                self._add(line, step, cost)

    def _add(self, line: str, step: str, cost: Cost) -> None:
        mine = (steps.c.line == line) & (steps.c.step == step)
        more = {name: steps.c[name] + value for name, value in cost._asdict().items()}
        with database.transaction(self._engine) as tx:
            if not tx.execute(update(steps).where(mine).values(**more)).rowcount:
                tx.execute(insert(steps).values(line=line, step=step, **cost._asdict()))

    def answers(self) -> None:
        """Nothing, when the ledger can be read.

        Raises:
            FoldinError: E_LEDGER when it cannot.
        """
        with database.reading(self._engine) as tx:
            tx.execute(select(lines.c.name).limit(1)).first()

    def look(self) -> list[LineFacts]:
        """How every line stands at one moment, by name."""
        with database.reading(self._engine) as tx:
            counted = _by_line(
                tx, select(events.c.line, events.c.kind, func.count().label("n")).group_by("line", "kind")
            )
            took = _by_line(tx, select(steps))
            stands = _by_line(tx, _experts())
            judged = {row.line: row.verdict for row in tx.execute(_newest())}
            served = {row.line: row.verdict for row in tx.execute(_champions())}
            waits = {line for (line,) in tx.execute(_waiting())}
            return [
                LineFacts(
                    **_line(row),
                    waits=row.name in waits,
                    experts={each.state: each.n for each in stands.get(row.name, ())},
                    oldest_pending=max((each.age for each in stands.get(row.name, ()) if each.age), default=0.0),
                    events={each.kind: each.n for each in counted.get(row.name, ())},
                    steps={each.step: Cost(*each[2:]) for each in took.get(row.name, ())},
                    scores=json.loads(served.get(row.name, "{}")).get("scores", {}),
                    checks=verdict_from(json.loads(judged[row.name])).checks if row.name in judged else (),
                )
                for row in tx.execute(_lines())
            ]


def _lines() -> Select[Any]:
    both = lines.join(leases, leases.c.line == lines.c.name)
    left, age = leases.c.expires - now(), now() - leases.c.since
    return select(lines, leases.c.holder, left.label("left"), age.label("age")).select_from(both).order_by(lines.c.name)


def _line(row: Row[Any]) -> dict[str, Any]:
    taken = row.holder != ""
    return {
        "line": row.name,
        "champion": row.champion,
        "blocked": row.blocked != "",
        "held": taken and row.left > 0,
        "lease_age": float(row.age or 0.0) if taken else 0.0,
        "lease_left": float(row.left) if taken else 0.0,
    }


def _experts() -> Select[Any]:
    age = func.max(now() - experts.c.enrolled).filter(experts.c.state == ExpertState.PENDING)
    columns = experts.c.line, experts.c.state, func.count().label("n"), age.label("age")
    return select(*columns).group_by(experts.c.line, experts.c.state)


def _newest() -> Select[Any]:
    """The verdict that was recorded last in each line, but for that of the base, which nobody judged."""
    last = select(func.max(merges.c.id)).where(merges.c.expert_id.is_not(None)).group_by(merges.c.line)
    return select(merges.c.line, merges.c.verdict).where(merges.c.id.in_(last))


def _champions() -> Select[Any]:
    own = and_(merges.c.line == lines.c.name, merges.c.version == lines.c.champion)
    return select(merges.c.line, merges.c.verdict).select_from(merges.join(lines, own))


def _waiting() -> Select[Any]:
    """Lines with a version that a person has to decide about: folded into the champion, its expert still pending."""
    held = merges.join(lines, and_(merges.c.line == lines.c.name, merges.c.parent == lines.c.champion))
    held = held.join(experts, and_(experts.c.id == merges.c.expert_id, experts.c.state == ExpertState.PENDING))
    mine = (merges.c.outcome == Outcome.WAITING) & merges.c.version.is_not(None)
    return select(merges.c.line).select_from(held).where(mine).distinct()


def _by_line(tx: Connection, query: Select[Any]) -> dict[str, list[Row[Any]]]:
    found: dict[str, list[Row[Any]]] = {}
    for row in tx.execute(query):
        found.setdefault(row.line, []).append(row)
    return found
