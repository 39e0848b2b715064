"""The flows that find what waits: look at MLflow, agree with the ledger, fold everything pending in order."""

import shutil
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact

from flows.approval import present
from flows.champion import mend_served, reconcile
from flows.discovery import discover
from flows.leasing import held
from flows.merge import MAX_ATTEMPTS, merge_expert
from flows.starting import start
from flows.telling import say
from flows.waiting import WAITS, stands_still, waiting
from flows.wiring import House, house
from registry.records import ExpertState, Lease


@flow(name="watch", flow_run_name="watch {line}", persist_result=False)
def watch(line: str, config_file: str = "foldin.toml") -> list[dict[str, Any]]:
    """Adopt or mend the alias, enrol new experts, fold all that wait, until a look finds none; what became of each."""
    at = house(config_file)
    start(at, line, at.config.line(line))
    outcomes: list[dict[str, Any]] = []
    while look(at, line):
        folded = fold_pending(line, config_file)
        if not folded:
            break
        outcomes += folded
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


@flow(name="nightly", flow_run_name="nightly {line}", persist_result=False)
def nightly(line: str, config_file: str = "foldin.toml") -> list[dict[str, Any]]:
    """The scheduled fold: the same look, and a table of what was folded and what was not."""
    outcomes = watch(line, config_file)
    rows = [{key: str(value or "") for key, value in outcome.items()} for outcome in outcomes]
    create_table_artifact(rows or [{"expert": "none waited"}], key="nightly", description=f"nightly fold of {line}")
    return outcomes


def fold_pending(line: str, config_file: str) -> list[dict[str, Any]]:
    """Fold the experts that wait, one flow run each, until none can be folded now."""
    at = house(config_file)
    pending = len(at.ledger.experts(line, ExpertState.PENDING))
    outcomes: list[dict[str, Any]] = []
    if not pending:
        return outcomes
    shown = create_progress_artifact(0.0, key="folding", description=f"{line}: {pending} waiting")
    assert isinstance(shown, UUID), "inside a synchronous flow it is no coroutine"
    crashes = 0
    while at.ledger.experts(line, ExpertState.PENDING):
        try:
            outcome = merge_expert(line, config_file)
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
            # The expert's fault until proven otherwise: after MAX_ATTEMPTS it is set aside and the next one is folded.
            get_run_logger().exception("the fold failed")
            say(f"line {line}: the fold failed: {error}")
            crashes += 1
            if crashes > MAX_ATTEMPTS:
                raise
            continue
        if outcome is None:
            break
        crashes = 0
        outcomes.append(outcome)
        update_progress_artifact(shown, progress=min(100.0, 100.0 * len(outcomes) / pending))
        if outcome["state"] == WAITS:
            break
    return outcomes
