"""Who may change a line right now: one lease a line, with a fence that only grows.

The lease gives progress, the fence gives safety: every write of a merge carries its fence and is refused when somebody
took the line over since, however late it comes. Expiry is judged by the database's clock.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import ColumnElement, Connection, Engine, Update, select, update

from registry import database
from registry.records import FoldinError, Lease, Refusal
from registry.schema import leases, now


class Leases:
    """The verbs on the table of leases."""

    def __init__(self, engine: Engine) -> None:
        """Work on an open ledger."""
        self._engine = engine

    def claim(self, line: str, holder: str, seconds: float) -> Lease | None:
        """The right to change a line for some seconds; None while somebody else has it."""
        free = (leases.c.line == line) & (leases.c.expires < now())
        return self._take(update(leases).where(free), line, holder, seconds)

    def seize(self, line: str, holder: str, seconds: float, fence: int | None = None) -> Lease | None:
        """Take a line over from whoever holds it, who can write nothing from now on.

        With `fence`, only from the holder seen with that number: two who find the same dead holder cannot both win.
        """
        theirs = leases.c.line == line
        if fence is not None:
            theirs &= leases.c.fence == fence
        return self._take(update(leases).where(theirs), line, holder, seconds)

    def holder(self, line: str) -> Lease:
        """Who took the line last; the holder is '' when it was given back."""
        with database.transaction(self._engine) as tx:
            row = tx.execute(select(leases).where(leases.c.line == line)).one()
        return Lease(line, row.holder, row.fence)

    def alive(self, line: str) -> bool:
        """Whether somebody holds the line now."""
        held = (leases.c.line == line) & (leases.c.expires >= now()) & (leases.c.holder != "")
        with database.transaction(self._engine) as tx:
            return tx.execute(select(leases.c.line).where(held)).first() is not None

    def renew(self, lease: Lease, seconds: float) -> bool:
        """Hold a lease for some seconds more; False when it was taken over."""
        with database.transaction(self._engine) as tx:
            return bool(tx.execute(update(leases).where(_held(lease)).values(expires=now() + seconds)).rowcount)

    def check(self, lease: Lease) -> None:
        """Nothing, while the lease is held; E_FENCED once the line was taken over."""
        with self.fenced(lease):
            pass

    def release(self, lease: Lease) -> None:
        """Give a line back; harmless when it was taken over."""
        with database.transaction(self._engine) as tx:
            tx.execute(update(leases).where(_held(lease)).values(expires=0.0, holder=""))

    @contextmanager
    def fenced(self, lease: Lease) -> Iterator[Connection]:
        """A transaction of the lease's holder. It locks the lease's row first, so nobody can take over inside it.

        Raises:
            FoldinError: E_FENCED when the line was taken over; nothing is written.
        """
        with database.transaction(self._engine) as tx:
            if not tx.execute(update(leases).where(_held(lease)).values(fence=lease.fence)).rowcount:
                raise FoldinError(
                    Refusal(
                        code="E_FENCED",
                        what="the line was taken over while this run worked on it; it may write no more",
                        where=f"line {lease.line}",
                        expected=f"fence {lease.fence}",
                        remedy="let the run that took over go on; what is pending will be folded by the next watch",
                    )
                )
            yield tx

    def _take(self, claim: Update, line: str, holder: str, seconds: float) -> Lease | None:
        with database.transaction(self._engine) as tx:
            mine = {"holder": holder, "fence": leases.c.fence + 1, "expires": now() + seconds, "since": now()}
            taken = tx.execute(claim.values(**mine)).rowcount
            fence = tx.execute(select(leases.c.fence).where(leases.c.line == line)).scalar_one()
        return Lease(line, holder, int(fence)) if taken else None


def _held(lease: Lease) -> ColumnElement[bool]:
    return (leases.c.line == lease.line) & (leases.c.fence == lease.fence)
