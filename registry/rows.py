"""From the ledger's rows to the types of `registry.records`, and the one rule that spans tables: who is folded."""

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from registry.lineage import ancestry, parents_of
from registry.records import (
    Decision,
    Event,
    Expert,
    ExpertState,
    ExpertVersion,
    FoldinError,
    Lease,
    Line,
    Merge,
    Refusal,
)
from registry.schema import events, experts, lines, merges, now
from registry.verdicts import Check, Outcome, Verdict


def line_from(row: Row[Any]) -> Line:
    """A line as the ledger holds it."""
    return Line(row.name, row.base_sha256, row.champion, row.blocked)


def expert_from(row: Row[Any]) -> Expert:
    """An expert as the ledger holds it."""
    return Expert(
        row.id,
        row.line,
        row.model,
        row.version,
        row.generation,
        row.seq,
        row.task,
        row.digest,
        ExpertState(row.state),
        row.code,
        row.reason,
        row.attempts,
    )


def event_from(row: Row[Any]) -> Event:
    """An event as the ledger holds it."""
    return Event(row.id, row.line, row.kind, row.origin, row.target, row.because, row.who, row.done, row.at)


def merge_from(row: Row[Any]) -> Merge:
    """A gated merge as the ledger holds it."""
    verdict = verdict_from(json.loads(row.verdict))
    decided = Decision(row.outcome) if row.outcome in set(Decision) else None
    return Merge(
        row.merge_key,
        row.line,
        row.expert_id,
        row.parent,
        verdict,
        row.run_id,
        row.version,
        row.manifest_sha256,
        decided,
        row.created,
        tuple(json.loads(row.also)),
    )


def verdict_from(table: dict[str, Any]) -> Verdict:
    """A verdict as `json.dumps(plain(verdict))` wrote it."""
    checks = tuple(Check(**{**each, "interval": _pair(each.get("interval"))}) for each in table["checks"])
    return Verdict(Outcome(table["outcome"]), checks, table.get("weights_sha256", ""))


def _pair(values: list[float] | None) -> tuple[float, float] | None:
    return None if values is None else (values[0], values[1])


def check_base(line: Line, base_sha256: str) -> None:
    """A line's base can never be exchanged."""
    if line.base_sha256 != base_sha256:
        what, remedy = "the line was started from another base", "restore it, or start a new line for this one"
        ours, theirs = (f"weights {digest[:12]}" for digest in (line.base_sha256, base_sha256))
        raise FoldinError(Refusal("E_BASE", what, f"line {line.name}", "", "", ours, theirs, remedy))


def unknown_line(name: str, known: Sequence[str]) -> FoldinError:
    """The error to raise for a line that the ledger does not have."""
    what = "no line of this name has been started"
    remedy = f"start it with `foldin init {name}`; if the ledger was lost, put it back with `foldin doctor --rebuild`"
    expected = f"one of {', '.join(known)}" if known else ""
    return FoldinError(Refusal("E_LINE", what, f"line {name}", expected=expected, remedy=remedy))


def move_champion(tx: Connection, lease: Lease, kind: str, target: int, because: str, who: str) -> Event:
    """Make a version the champion inside a fenced transaction; the alias follows once this is committed."""
    origin = tx.execute(select(lines.c.champion).where(lines.c.name == lease.line)).scalar_one()
    tx.execute(update(lines).where(lines.c.name == lease.line).values(champion=target))
    waiting = (experts.c.line == lease.line) & (experts.c.state == ExpertState.PENDING)
    tx.execute(
        update(experts).where(waiting).values(attempts=0)
    )  # who takes the line over ends other runs, not experts
    _settle_ancestry(tx, lease.line, target, f"the champion was moved from version {origin} to {target}: {because}")
    return note(tx, lease, kind, because=because, who=who, origin=origin, target=target, done=False)


def keep(tx: Connection, merge: Merge) -> None:
    """Note the version that a merge was registered as, whose experts it holds, and a person's yes carried over."""
    facts = {"version": merge.version, "manifest_sha256": merge.manifest_sha256, **experts_of(merge)}
    decided = {"outcome": merge.decided} if merge.decided else {}
    tx.execute(update(merges).where(merges.c.merge_key == merge.merge_key).values(**facts, **decided))


def experts_of(merge: Merge) -> dict[str, Any]:
    """The columns that say which experts a merge folded."""
    return {"expert_id": merge.expert_id, "also": json.dumps(merge.also)}


def stands_for(earlier: Expert, expert: Expert) -> bool:
    """Whether an earlier expert of the same weights makes a later one a duplicate.

    What the champion holds always does; what was rolled back only within a generation, since a person may ask for it
    again. What was rejected may be judged again.
    """
    back = earlier.state is ExpertState.ROLLED_BACK and earlier.generation == expert.generation
    return earlier.state is ExpertState.FOLDED or back


def enrol(tx: Connection, line: str, found: ExpertVersion, task: str) -> None:
    """Put a registered expert after all others; an IntegrityError when it is there already."""
    facts = {"line": line, "model": found.model, "version": found.version, "task": task}
    tx.execute(insert(experts).values(**facts, **_at_the_end(tx, line)))


def requeue(tx: Connection, lease: Lease, expert: Expert, because: str, who: str) -> Expert:
    """One more row for an expert, pending, after all others."""
    end = _at_the_end(tx, lease.line)
    mine = experts.c.line == lease.line
    again = mine & (experts.c.model == expert.model) & (experts.c.version == expert.version)
    generation = tx.execute(select(func.max(experts.c.generation)).where(again)).scalar_one() + 1
    facts = {"line": lease.line, "model": expert.model, "version": expert.version, "task": expert.task}
    row = tx.execute(insert(experts).values(**facts, **end, generation=generation).returning(experts)).one()
    note(tx, lease, "requeued", because=f"{expert.name}: {because}", who=who, done=True)
    return expert_from(row)


def _at_the_end(tx: Connection, line: str) -> dict[str, Any]:
    """What an expert is when it joins the queue; the line's row is locked, so that a place is given once."""
    tx.execute(select(lines.c.name).where(lines.c.name == line).with_for_update())
    last = tx.execute(select(func.max(experts.c.seq)).where(experts.c.line == line)).scalar() or 0
    return {"seq": last + 1, "state": ExpertState.PENDING, "enrolled": now()}


def hold(tx: Connection, lease: Lease, held: Merge) -> None:
    """Let a registered version wait for a person, inside a fenced transaction. What was declined before waits anew."""
    check_parent(tx, lease.line, held.parent)
    keep(tx, held)
    key = merges.c.merge_key == held.merge_key
    tx.execute(update(merges).where(key).values(outcome=held.verdict.outcome, created=now()))
    tx.execute(update(experts).where(experts.c.id == held.expert_id).values(attempts=0))
    because = held.verdict.reason or "it passed its gate, and the line asks a person all the same"
    note(tx, lease, "waiting", because=f"v{held.version}: {because}", done=True)


def decide(tx: Connection, lease: Lease, waiting: Merge, decision: Decision, because: str, who: str) -> Event:
    """A person's answer, inside a fenced transaction: the version is champion, or its expert is rejected."""
    assert waiting.version is not None
    key = merges.c.merge_key == waiting.merge_key
    tx.execute(update(merges).where(key).values(outcome=decision))
    if decision is Decision.APPROVED:
        check_parent(tx, lease.line, waiting.parent)  # refused, nothing above was written
        return move_champion(tx, lease, decision, waiting.version, because, who)
    reason = f"{who} declined v{waiting.version}: {because}"
    end = {"state": ExpertState.REJECTED, "code": "E_DECLINED", "reason": reason, "settled": now()}
    tx.execute(update(experts).where(experts.c.id == waiting.expert_id).values(**end))
    return note(tx, lease, decision, because=f"v{waiting.version}: {because}", who=who, done=True)


def note(
    tx: Connection,
    lease: Lease,
    kind: str,
    *,
    because: str,
    done: bool,
    who: str = "foldin",
    origin: int | None = None,
    target: int | None = None,
) -> Event:
    """Append one event to the line's history."""
    facts = {"kind": kind, "origin": origin, "target": target, "because": because, "who": who, "done": done}
    query = insert(events).values(line=lease.line, fence=lease.fence, at=now(), **facts)
    return event_from(tx.execute(query.returning(events)).one())


def _settle_ancestry(tx: Connection, line: str, champion: int, reason: str) -> None:
    """Folded is every expert among the champion's ancestors; every other that had been folded is rolled back."""
    rows = tx.execute(select(merges).where((merges.c.line == line) & merges.c.version.is_not(None)))
    known = [merge_from(row) for row in rows]
    chain = set(ancestry(parents_of(known), champion))
    inside = [expert for merge in known if merge.version in chain for expert in merge.experts]
    gone = (experts.c.line == line) & (experts.c.state == ExpertState.FOLDED) & experts.c.id.not_in(inside)
    back = experts.c.id.in_(inside) & (experts.c.state != ExpertState.FOLDED)
    left = {"state": ExpertState.ROLLED_BACK, "code": "rolled-back", "reason": reason, "settled": now()}
    tx.execute(update(experts).where(gone).values(**left))
    tx.execute(
        update(experts).where(back).values(state=ExpertState.FOLDED, code="", reason="", attempts=0, settled=now())
    )


def check_parent(tx: Connection, line: str, parent: int | None) -> None:
    """A fold is committed only onto the version that it folded into; anything else would undo what came between."""
    champion = tx.execute(select(lines.c.champion).where(lines.c.name == line)).scalar_one()
    if champion != parent:
        raise FoldinError(
            Refusal(
                code="E_FENCED",
                what="the champion changed while this run folded; it may not be promoted",
                where=f"line {line}",
                expected=f"version {parent}" if parent else "no champion yet",
                found=f"version {champion}",
                remedy="run the watch again; the expert is folded into the champion there is now",
            )
        )
