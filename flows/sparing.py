"""What ends a run and is no expert's fault: the machine, the platform, a person."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from prefect.exceptions import TerminationSignal

from flows.faults import is_out_of_memory, refused_by_system
from flows.wiring import House
from registry.files import shown
from registry.records import Expert, FoldinError, Lease, Refusal


@contextmanager
def sparing(at: House, lease: Lease, experts: Sequence[Expert]) -> Iterator[None]:
    """What ends the block and is not the experts' fault does not count against them; errors name the line."""
    try:
        with surroundings():
            yield
    except FoldinError as error:
        # What is an expert's fault is a refusal by now; this is not.
        if error.refusal.code != "E_FENCED":
            _clear(at, lease, experts)
        raise FoldinError(of_line(lease.line, error.refusal)) from error
    except (KeyboardInterrupt, TerminationSignal):
        _clear(at, lease, experts)  # a person or the platform ended the run
        raise


def _clear(at: House, lease: Lease, experts: Sequence[Expert]) -> None:
    for expert in experts:
        at.ledger.clear_attempts(lease, expert)


def of_line(line: str, refusal: Refusal) -> Refusal:
    """The same, with the line's name in it."""
    named = line in re.split(r"[\s,]+", refusal.where)
    return refusal if named else replace(refusal, where=", ".join(filter(None, (f"line {line}", refusal.where))))


@contextmanager
def surroundings() -> Iterator[None]:
    """Turn what the machine does to a run (disk, memory, network) into a typed error, which is no expert's fault."""
    from httpx import HTTPError

    try:
        yield
    except (OSError, HTTPError) as error:
        raise FoldinError(refused_by_system(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what, remedy = "there is not enough memory", "free some, or set device to one that has more"
        raise FoldinError(Refusal("E_MEMORY", what, found=shown(str(error)), remedy=remedy)) from error
