"""What happened to every expert, in order, exactly once; and who may change a line right now.

Every write of a merge carries the fence of its lease and is refused when somebody took the line over since: the lease
gives progress, the fence gives safety. Times come from the database.
"""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, func, insert, select, update

from registry import database, history, rows
from registry.leases import Leases
from registry.measures import Measures
from registry.records import Decision, Event, Expert, ExpertState, ExpertVersion, Lease, Line, Merge, plain
from registry.rows import event_from, expert_from, line_from, merge_from
from registry.schema import events, experts, leases, lines, merges, now


class Ledger:
    """The verbs on the ledger's tables. Cheap to make; safe to use from several threads and processes."""

    def __init__(self, url: str, patience: float = 30.0) -> None:
        """Open, and migrate when needed, the ledger at a SQLAlchemy URL; wait `patience` seconds for other writers."""
        self._engine = database.connect(url, patience)
        self.leases, self.measures = Leases(self._engine), Measures(self._engine)

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    # lines

    def add_line(self, name: str, base_sha256: str) -> Line:
        """Create a line, or return the one there is; its base can never be exchanged.

        Raises:
            FoldinError: E_BASE when the line exists with another base.
        """
        with database.transaction(self._engine) as tx:
            if tx.execute(select(lines).where(lines.c.name == name)).first() is None:
                tx.execute(insert(lines).values(name=name, base_sha256=base_sha256, blocked="", created=now()))
                tx.execute(insert(leases).values(line=name, holder="", fence=0, expires=0.0))
        line = self.line(name)
        rows.check_base(line, base_sha256)
        return line

    def line(self, name: str) -> Line:
        """One line.

        Raises:
            FoldinError: E_LINE when there is none of that name.
        """
        with database.transaction(self._engine) as tx:
            row = tx.execute(select(lines).where(lines.c.name == name)).first()
            known = [other for (other,) in tx.execute(select(lines.c.name).order_by(lines.c.name))]
        if row is None:
            raise rows.unknown_line(name, known)
        return line_from(row)

    def lines(self) -> list[Line]:
        """Every line, by name."""
        with database.transaction(self._engine) as tx:
            return [line_from(row) for row in tx.execute(select(lines).order_by(lines.c.name))]

    def block(self, lease: Lease, because: str) -> None:
        """Keep a line from folding until `because` is "" again; each change is an event."""
        with self.leases.fenced(lease) as tx:
            before = tx.execute(select(lines.c.blocked).where(lines.c.name == lease.line)).scalar_one()
            if before == because:
                return
            tx.execute(update(lines).where(lines.c.name == lease.line).values(blocked=because))
            rows.note(tx, lease, "blocked" if because else "unblocked", because=because or before, done=True)

    # experts

    def enrol(self, line: str, found: ExpertVersion, task: str) -> bool:
        """Put a registered expert at the end of the queue; False when it is there already."""
        try:
            with database.transaction(self._engine) as tx:
                rows.enrol(tx, line, found, task)
        except database.IntegrityError:
            return False
        return True

    def newest_enrolled(self, line: str, model: str) -> int:
        """The highest version of a watched model that the ledger knows; 0 when none."""
        mine = (experts.c.line == line) & (experts.c.model == model)
        with database.transaction(self._engine) as tx:
            return tx.execute(select(func.max(experts.c.version)).where(mine)).scalar() or 0

    def experts(self, line: str, state: ExpertState | None = None) -> list[Expert]:
        """The experts of a line in the order of folding, optionally those in one state."""
        query = select(experts).where(experts.c.line == line).order_by(experts.c.seq)
        if state is not None:
            query = query.where(experts.c.state == state)
        with database.transaction(self._engine) as tx:
            return [expert_from(row) for row in tx.execute(query)]

    def begin(self, lease: Lease, expert: Expert, task: str) -> int:
        """Count one more attempt at an expert, and note its task; returns how many never ended, this one included."""
        return self._on_expert(lease, expert, {"attempts": experts.c.attempts + 1, "task": task}).attempts

    def clear_attempts(self, lease: Lease, expert: Expert) -> None:
        """Forget the attempts: this one ended cleanly, for a reason that was not the expert's."""
        self._on_expert(lease, expert, {"attempts": 0})

    def note_digest(self, lease: Lease, expert: Expert, digest: str) -> Expert | None:
        """Store the content digest of an expert's weights; returns an earlier expert with the same weights, if any."""
        self._on_expert(lease, expert, {"digest": digest})
        same = (experts.c.line == lease.line) & (experts.c.digest == digest) & (experts.c.seq < expert.seq)
        with database.transaction(self._engine) as tx:
            earlier = map(expert_from, tx.execute(select(experts).where(same).order_by(experts.c.seq)))
            return next((each for each in earlier if rows.stands_for(each, expert)), None)

    def settle(self, lease: Lease, expert: Expert, state: ExpertState, code: str, reason: str) -> None:
        """End an expert without a fold: rejected, quarantined or withdrawn, always with a reason."""
        self._on_expert(lease, expert, {"state": state, "code": code, "reason": reason, "settled": now()})

    def requeue(self, lease: Lease, expert: Expert, because: str, who: str) -> Expert:
        """Put an expert that has ended at the end of the queue again, in a generation of its own."""
        with self.leases.fenced(lease) as tx:
            return rows.requeue(tx, lease, expert, because, who)

    # merges

    def merge(self, merge_key: str) -> Merge | None:
        """The merge of a key, or None when it was never gated."""
        with database.transaction(self._engine) as tx:
            row = tx.execute(select(merges).where(merges.c.merge_key == merge_key)).first()
        return merge_from(row) if row else None

    def registered(self, line: str, version: int) -> Merge | None:
        """The merge that became a version, or None when none did."""
        mine = (merges.c.line == line) & (merges.c.version == version)
        with database.transaction(self._engine) as tx:
            row = tx.execute(select(merges).where(mine)).first()
        return merge_from(row) if row else None

    def parents(self, line: str) -> dict[int, int | None]:
        """Version -> the version it was folded into, None for the base, of all that were registered, ascending."""
        mine = (merges.c.line == line) & merges.c.version.is_not(None)
        with database.transaction(self._engine) as tx:
            query = select(merges.c.version, merges.c.parent).where(mine).order_by(merges.c.version)
            return {row.version: row.parent for row in tx.execute(query)}

    def merges(self, line: str) -> list[Merge]:
        """Every gated merge of a line, oldest first; the first is the base itself."""
        with database.transaction(self._engine) as tx:
            query = select(merges).where(merges.c.line == line).order_by(merges.c.id)
            return [merge_from(row) for row in tx.execute(query)]

    def record_verdict(
        self, lease: Lease, merge: Merge, *, published: bool = False, scores: Mapping[str, float] | None = None
    ) -> Merge:
        """Store the gate's answer, with METRIC.TASK -> value as monitoring shows it; the first one for a key stands.

        Unless it was about other weights, of which nothing was published: then it is forgotten. A search that is made
        again, elsewhere or with less time, may choose otherwise.
        """
        with self.leases.fenced(lease) as tx:
            mine = merges.c.merge_key == merge.merge_key
            row = tx.execute(select(merges).where(mine)).first()
            about = merge_from(row).verdict.weights_sha256 if row else ""
            if row and row.version is None and about != merge.verdict.weights_sha256 and not published:
                tx.execute(delete(merges).where(mine))
                row = None
            if row is None:
                facts = {"merge_key": merge.merge_key, "parent": merge.parent, **rows.experts_of(merge)}
                told = {**plain(merge.verdict), "scores": dict(scores or {})}
                answer = {"outcome": merge.verdict.outcome, "verdict": json.dumps(told)}
                made = {"line": merge.line, "run_id": merge.run_id, "fence": lease.fence, "created": now()}
                tx.execute(insert(merges).values(**facts, **answer, **made))
        recorded = self.merge(merge.merge_key)
        assert recorded is not None
        return recorded

    def commit(self, lease: Lease, done: Merge) -> Event:
        """Make a registered version the champion: its expert is folded, the alias still has to follow.

        Returns:
            The move, not done yet; `confirm` it once the alias was seen on the target.
        """
        with self.leases.fenced(lease) as tx:
            assert done.version is not None
            rows.keep(tx, done)
            rows.check_parent(tx, lease.line, done.parent)
            kind = "init" if done.parent is None else "fold"
            return rows.move_champion(tx, lease, kind, done.version, because="", who="foldin")

    def keep(self, lease: Lease, merge: Merge) -> None:
        """Note a registered version that grows beside the champion, which stays where it is."""
        with self.leases.fenced(lease) as tx:
            rows.keep(tx, merge)

    def remark(self, lease: Lease, kind: str, because: str, who: str) -> None:
        """Append an event that moves nothing."""
        with self.leases.fenced(lease) as tx:
            rows.note(tx, lease, kind, because=because, who=who, done=True)

    def hold(self, lease: Lease, held: Merge) -> None:
        """Let a registered version wait for a person; its expert stays pending, the champion where it is."""
        with self.leases.fenced(lease) as tx:
            rows.hold(tx, lease, held)

    def decide(self, lease: Lease, waiting: Merge, decision: Decision, because: str, who: str) -> Event:
        """A person's answer to a version that waits; approved, it is a move of the champion, to be confirmed.

        Raises:
            FoldinError: E_FENCED when the line was taken over, or the champion is not the version's parent any more.
        """
        with self.leases.fenced(lease) as tx:
            return rows.decide(tx, lease, waiting, decision, because, who)

    def move(self, lease: Lease, kind: str, target: int, because: str, who: str) -> Event:
        """Make an older or newer version of the line the champion: a rollback, an adoption, a repair."""
        with self.leases.fenced(lease) as tx:
            return rows.move_champion(tx, lease, kind, target, because, who)

    def confirm(self, lease: Lease, move: Event) -> None:
        """Note that the alias was seen on the move's target."""
        with self.leases.fenced(lease) as tx:
            tx.execute(update(events).where(events.c.id == move.id).values(done=True))

    def events(self, line: str) -> list[Event]:
        """The history of a line, oldest first."""
        with database.transaction(self._engine) as tx:
            query = select(events).where(events.c.line == line).order_by(events.c.id)
            return [event_from(row) for row in tx.execute(query)]

    def export(self, line: str) -> bytes:
        """Everything that is known of a line, for another ledger to `restore`."""
        return history.export(self._engine, line)

    def restore(self, document: Mapping[str, Any]) -> None:
        """Put a line back that this ledger does not know, from `history.read`; all of it or nothing."""
        history.restore(self._engine, document)

    def _on_expert(self, lease: Lease, expert: Expert, values: dict[str, Any]) -> Expert:
        with self.leases.fenced(lease) as tx:
            query = update(experts).where(experts.c.id == expert.id).values(**values)
            return expert_from(tx.execute(query.returning(experts)).one())
