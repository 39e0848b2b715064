"""One fold, watched: what is said and traced in it names it, and what its steps took is added up in the ledger."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from flows.about import about, learn
from flows.telling import logger
from flows.tracing import tag
from registry.far import far_files
from registry.files import bytes_here
from registry.measures import WHOLE, Cost
from registry.records import FoldinError

if TYPE_CHECKING:
    from flows.work import Work
    from registry.measures import Measures

R = TypeVar("R")
Costs = dict[str, Cost]  # step -> what its runs took

_COSTS: ContextVar[Costs | None] = ContextVar("foldin_costs", default=None)


@runtime_checkable
class Leaves(Protocol):
    """What a step returns when it leaves files: an expert admitted, a candidate folded."""

    @property
    def folder(self) -> Path:
        """Where they are."""
        ...


def observed(work: "Work", fold: Callable[["Work"], dict[str, Any]]) -> dict[str, Any]:
    """Fold; what `fold` returns."""
    line, parent = work.lease.line, work.parent.number
    with about(line=line, expert=work.name, parent=parent), _added_up(work.house.ledger.measures, line):
        state = "failed"
        try:
            outcome = fold(work)
            state = str(outcome["state"])
            if outcome["version"]:
                learn(version=outcome["version"])
            return outcome
        finally:
            tag("fold one expert", state=state)


def measured(step: str, run: Callable[[], R]) -> R:
    """Run a step; what it returns. Outside a fold nothing is noted."""
    costs = _COSTS.get()
    if costs is None:
        return run()
    started, failures, left = time.monotonic(), 1, 0
    try:
        result = run()
        failures, left = 0, _bytes_left(result)
        return result
    finally:
        costs[step] = costs.get(step, Cost()).plus(Cost(1, failures, time.monotonic() - started, left))


def _bytes_left(result: object) -> int:
    if not isinstance(result, Leaves):
        return 0
    return bytes_here(result.folder) + sum(each.size for each in far_files(result.folder).values())


@contextmanager
def _added_up(measures: "Measures", line: str) -> Iterator[None]:
    """What the steps in the block take is written when it ends, however it does; a killed process writes nothing."""
    costs: Costs = {}
    token, started, failures = _COSTS.set(costs), time.monotonic(), 1
    try:
        yield
        failures = 0
    finally:
        _COSTS.reset(token)
        try:
            measures.add(line, {**costs, WHOLE: Cost(1, failures, time.monotonic() - started)})
        except FoldinError as error:  # the ledger is away; who needs it hears of it from what needs it
            logger.warning("line %s: what the fold took was not noted: %s", line, error)
