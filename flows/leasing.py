"""Holding a line while it is changed: claim, keep alive, remember what became of it, give back."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flows.about import about
from flows.alive import holder, is_dead
from flows.telling import say
from flows.wiring import House
from registry.records import FoldinError, Lease, Refusal


@contextmanager
def held(
    house: House, line: str, *, seize: bool = False, told: Callable[[str], None] = lambda text: None
) -> Iterator[Lease]:
    """The lease of a line for as long as the block runs; waits for a living holder, takes over from a dead one.

    Args:
        house: whose ledger holds the lease.
        line: name of the line.
        seize: take the line from a living holder too, who then can write nothing more (a rollback does).
        told: hears once of every holder that is waited for.

    Raises:
        FoldinError: E_LOCKED when a living holder kept the line for three lease times; E_FENCED, instead of whatever
            failed in the block, when the line was taken over meanwhile.
    """
    seconds = house.config.registry.lease_seconds
    lease = _seize(house, line, seconds) if seize else _wait(house, line, seconds, told)
    stop = threading.Event()
    keeper = threading.Thread(target=_keep, args=(house, lease, seconds, stop), daemon=True)
    keeper.start()
    try:
        with about(line=line):
            yield lease
    except (FoldinError, OSError, RuntimeError, ValueError):
        # Who took over also removed the scratch folder: what fails after that fails for this reason alone.
        with house.ledger.leases.fenced(lease):
            raise
    finally:
        try:
            remember(house, lease)
        finally:
            stop.set()
            keeper.join()
            house.ledger.leases.release(lease)


def remember(house: House, lease: Lease) -> None:
    """Let MLflow keep the line's history; when it cannot now, the next holder does.

    A holder that is overtaken in here may write an older history over a newer one, which the next holder mends.
    """
    try:
        house.ledger.leases.check(lease)
        house.mlflow.runs.keep_history(lease.line, house.ledger.export(lease.line))
    except (FoldinError, OSError) as error:
        if isinstance(error, FoldinError) and error.refusal.code == "E_FENCED":
            return
        say(f"line {lease.line}: its history was not written to MLflow, the next watch will: {error}")


def _wait(house: House, line: str, seconds: float, told: Callable[[str], None]) -> Lease:
    me, leases = holder(), house.ledger.leases
    patience, waited_for = time.monotonic() + 3 * seconds, ""
    while True:
        lease = leases.claim(line, me, seconds)
        seen = leases.holder(line)
        if lease is None and seen.holder and is_dead(seen.holder):
            lease = leases.seize(line, me, seconds, seen.fence)
        if lease is not None:
            return lease
        if time.monotonic() > patience:
            raise FoldinError(
                Refusal(
                    code="E_LOCKED",
                    what="another process has been working on the line all the time",
                    where=f"line {line}",
                    found=f"holder {seen.holder}",
                    remedy="wait until it is done; `foldin status` shows what it does",
                )
            )
        if seen.holder and seen.holder != waited_for:
            told(f"line {line} is held by {seen.holder}; waiting")
            waited_for = seen.holder
        time.sleep(min(1.0, seconds / 10))


def _seize(house: House, line: str, seconds: float) -> Lease:
    lease = house.ledger.leases.seize(line, holder(), seconds)
    assert lease is not None, "seizing without a fence always succeeds"
    return lease


def _keep(house: House, lease: Lease, seconds: float, stop: threading.Event) -> None:
    """Renew three times per lease; once it was taken over there is nothing left to keep."""
    while not stop.wait(seconds / 3):
        try:
            if not house.ledger.leases.renew(lease, seconds):
                return
        except FoldinError:
            continue  # the ledger is busy or away; the fence decides at the next write
