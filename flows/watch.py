"""The flow that finds what waits: look at MLflow, agree with the ledger, fold everything pending in order."""

import shutil
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows.about import about
from flows.approval import present
from flows.blackout import blackout_now
from flows.champion import mend_served, reconcile
from flows.discovery import discover
from flows.dispatching import Merge, Outcome, folded
from flows.leasing import held
from flows.merge import MAX_ATTEMPTS, merge_expert
from flows.options import LineConfig
from flows.starting import start
from flows.telling import say
from flows.waiting import WAITS, stands_still, waiting
from flows.wiring import House, house
from registry.records import ExpertState, Lease


@flow(name="watch", flow_run_name="watch {line}", persist_result=False)
def watch(line: str, config_file: str = "foldin.toml") -> list[dict[str, Any]]:
    """Adopt or mend the alias, enrol new experts, fold all that wait, until a look finds none; what became of each."""
    return fold_all(line, config_file, merge_expert)


def fold_all(line: str, config_file: str, merge: Merge) -> list[Outcome]:
    """Look, and fold what waits with a flow, until a look finds nothing that may be folded now."""
    at = house(config_file)
    outcomes: list[Outcome] = []
    with about(line=line):
        start(at, line, at.config.line(line))
        while look(at, line):
            found = fold_pending(line, config_file, merge)
            if not found:
                break
            outcomes += found
    return outcomes


def look(at: House, line: str) -> bool:
    """Agree with MLflow and enrol what is new there; whether something may be folded now."""
    with held(at, line, told=say) as lease:
        free = reconcile(at, lease, say)
        mend_served(at, lease, say)
        present(at, line)
        discover(at, lease, at.config.line(line))
        tidy(at, lease)
    return free and not stands_still(at, line)


def tidy(house: House, lease: Lease) -> None:
    """Empty the line's scratch folder when nothing is to be folded: a run that died after its commit left it there."""
    if not house.ledger.experts(lease.line, ExpertState.PENDING) or waiting(house, lease.line):
        shutil.rmtree(house.work(lease.line), ignore_errors=True)


def fold_pending(line: str, config_file: str, merge: Merge) -> list[Outcome]:
    """Fold the experts that wait, one flow run after another, until none can be folded now."""
    at = house(config_file)
    pending = len(at.ledger.experts(line, ExpertState.PENDING))
    outcomes: list[Outcome] = []
    if not pending:
        return outcomes
    shown = create_progress_artifact(0.0, key="folding", description=f"{line}: {pending} waiting")
    assert isinstance(shown, UUID), "inside a synchronous flow it is no coroutine"
    crashes = 0
    while at.ledger.experts(line, ExpertState.PENDING) and not rests(at.config.line(line), line):
        try:
            found = folded(merge, line, config_file)
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
            # The expert's fault until proven otherwise: after MAX_ATTEMPTS it is set aside and the next one is folded.
            get_run_logger().exception("the fold failed")
            say(f"line {line}: the fold failed: {error}")
            crashes += 1
            if crashes > MAX_ATTEMPTS:
                raise
            continue
        if not found:
            break
        crashes = 0
        outcomes += found
        update_progress_artifact(shown, progress=min(100.0, 100.0 * len(outcomes) / pending))
        if found[-1]["state"] == WAITS:
            break
    return outcomes


def rests(settings: LineConfig, line: str) -> bool:
    """Whether a line folds nothing by itself at this hour; said when it is so."""
    window = blackout_now(settings.blackout, settings.timezone)
    if window:
        say(f"line {line}: nothing is folded now (blackout {window}, {settings.timezone})")
    return bool(window)
