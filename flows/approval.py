"""A person decides: the version that waits, the decision, and the form on Prefect's page."""

from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from pydantic import Field

from evaluation.escape import clean
from flows.access import admitted, asks_in_prefect
from flows.champion import agree, follow, reconcile
from flows.leasing import held
from flows.notifying import notify, spared
from flows.options import LineConfig
from flows.recording import registered
from flows.signing import require_signature
from flows.telling import say
from flows.thinning import restore
from flows.versions import find_merge, verified
from flows.waiting import WAITS, expert_of, facts_of, mend, settled_before, state_of, undecided, waiting
from flows.wiring import House, house
from registry.records import Decision, Lease, Merge

if TYPE_CHECKING:
    from evaluation.report import Record
    from flows.folding import Candidate
    from flows.work import Work


class Answer(RunInput):
    """The form on Prefect's page."""

    approve: bool = Field(description="Yes makes the version champion, no rejects its expert.")
    because: str = Field(description="Kept in the line's history.", min_length=1, max_length=2000, pattern=r"\S")
    who: str = Field(description="Your name.", min_length=1, max_length=100, pattern=r"\S")


def hold(work: "Work", merge: Merge, candidate: "Candidate", record: "Record") -> dict[str, Any]:
    """Register a version that a person decides, note it in the ledger, show it: in this order, each step repeatable."""
    at, line, expert = work.house, work.lease.line, work.expert
    held = registered(work, merge, candidate, record)
    at.ledger.hold(work.lease, held)
    present(at, line)
    reason = held.verdict.reason
    say(f"{expert.name}: folded into {line} v{held.version}, which waits for a person: {reason or 'it passed'}")
    return {"expert": expert.name, "state": WAITS, "reason": reason, "version": held.version}


def present(at: House, line: str) -> None:
    """Show what waits in MLflow and, where the deployment `approval` is served, as a form in Prefect."""
    mend(at, line)
    merge = waiting(at, line)
    if merge is not None and asks_in_prefect(at.config.line(line)):
        with spared("the form in Prefect"):
            moved = max((each.id for each in at.ledger.events(line) if each.target is not None), default=0)
            _ask(merge, moved)


def _ask(merge: Merge, moved: int) -> None:
    """Start the run that suspends itself: once for a version, its expert and the last move of the champion."""
    from prefect.deployments import run_deployment
    from prefect.exceptions import ObjectNotFound

    try:
        run_deployment(
            f"approval/{merge.line}",
            parameters={"version": merge.version},
            timeout=0,
            as_subflow=False,
            idempotency_key=f"{merge.merge_key}:{merge.expert_id}:{moved}",
        )
    except ObjectNotFound:  # nobody serves forms here; the command line is always there
        return


@flow(name="approval", flow_run_name="{line} v{version}: may it be champion?", persist_result=False)
def approval(line: str, version: int, config_file: str = "foldin.toml") -> str:
    """Wait for a person's answer to a version, and act on it; how the version stands then.

    The run is suspended, and starts again from here with the answer, perhaps after the version was decided elsewhere.
    """
    at = house(config_file)
    facts = facts_of(at, line)
    if facts is None or facts["version"] != version:
        state = state_of(at, find_merge(at, line, version))
        say(f"{line} v{version} does not wait any more: {state}")
        return state
    told = clean(f"{line} v{version}, {facts['expert']}: {facts['reason']}", 1000)
    answer = suspend_flow_run(wait_for_input=Answer.with_initial_data(description=told), key="answer")
    decision = Decision.APPROVED if answer.approve else Decision.DECLINED
    return str(decide(at, line, version, decision, answer.because, answer.who)["state"])


@flow(name="approve", flow_run_name="approve {line} v{version}", persist_result=False)
def approve(
    line: str, version: int, because: str, who: str = "a person", config_file: str = "foldin.toml"
) -> dict[str, Any]:
    """Make a version that waits the champion, verified first; raises as `decide`."""
    return decide(house(config_file), line, version, Decision.APPROVED, because, who)


@flow(name="reject", flow_run_name="reject {line} v{version}", persist_result=False)
def reject(
    line: str, version: int, because: str, who: str = "a person", config_file: str = "foldin.toml"
) -> dict[str, Any]:
    """Reject the expert whose version waits; the champion stays. Raises as `decide`."""
    return decide(house(config_file), line, version, Decision.DECLINED, because, who)


def decide(at: House, line: str, version: int, decision: Decision, because: str, who: str) -> dict[str, Any]:
    """Take a person's decision about a version that waits; what became of its expert. Repeated, it changes nothing.

    Raises:
        FoldinError: E_ACCESS when the line lets others decide, E_DECIDED when it was decided otherwise or needs no
            decision, E_SUPERSEDED when the champion was moved meanwhile, E_VERSION when there is no such version,
            E_DIGEST when an approved one is damaged, E_SIGNATURE when it lacks the signature that the line asks for,
            E_BLOCKED when the alias champion stands where a person put it; the champion is then unchanged.
    """
    settings = at.config.line(line)
    who = admitted(settings, line, "approve", who)
    with held(at, line, told=say) as lease:
        merge = find_merge(at, line, version)
        before = settled_before(at, merge, decision)
        mend(at, line)  # the alias stands on what waits until MLflow shows the decision: that is how a rerun sees it
        if not before:
            _take(at, lease, version, decision, because, who)
        elif decision is Decision.APPROVED:
            reconcile(at, lease, say)  # an earlier run may have died before it moved the alias
        mend(at, line)
    outcome = {"expert": expert_of(at, merge).name, "state": str(decision), "reason": because, "version": version}
    if before:
        say(f"{line} v{version} was {decision} before; nothing changes")
        return outcome
    say(f"{line} v{version} ({outcome['expert']}): {decision} by {who}: {because}")
    _notify(settings, line, outcome, who)
    return outcome


def _take(at: House, lease: Lease, version: int, decision: Decision, because: str, who: str) -> None:
    """Write the decision into the ledger, and let the champion's alias follow one that approves."""
    line = lease.line
    if decision is Decision.APPROVED:
        agree(at, lease, say, "approve")
    merge = undecided(at, line, version)
    if decision is Decision.APPROVED:
        require_signature(at, line, version, verified(at, line, version, weights=False)[0])
        restore(at, lease, version, because, who)
    move = at.ledger.decide(lease, merge, decision, because, who)
    if move.target is not None:
        follow(at, lease, move)


def _notify(settings: LineConfig, line: str, outcome: dict[str, Any], who: str) -> None:
    notify(settings, line, {**outcome, "reason": f"{who}: {outcome['reason']}"})
