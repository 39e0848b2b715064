"""Where a fold runs: in this process, or on a worker of the work pool that the line names, and what became of it there.

The worker tells nothing but whether its run ended well: what it did is in the ledger.
"""

import time
from collections.abc import Collection
from typing import Any, cast
from uuid import UUID

from httpx import HTTPError
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import OrchestrationResult
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.states import Cancelled, Cancelling, Crashed

from evaluation.escape import clean
from flows.telling import say
from flows.waiting import WAITS, waiting
from flows.wiring import House, house
from registry.records import ExpertState, FoldinError, Refusal

LOOK = 1.0  # seconds between two looks at a run
SILENCE = 60.0  # seconds that a run may say it runs while nobody holds the line
STUCK = 600.0  # seconds that it may be about to run: an image may have to be fetched
Outcome = dict[str, Any]  # expert, state, reason, version
Merge = Flow[..., Any]  # merge_expert or merge_batch


def folded(merge: Merge, line: str, config_file: str) -> list[Outcome]:
    """Run a flow that folds what waits first in a line, where the line wants it; what became of each expert.

    Raises:
        FoldinError: E_RUNNER when the pool's run failed for a reason that is no expert's; as the flow.
        RuntimeError: it died, as it might have died here; it counts as an attempt.
    """
    at = house(config_file)
    runner = at.config.line(line).runner
    if not runner.pool:
        return _as_list(merge(line, config_file))
    before = at.ledger.experts(line, ExpertState.PENDING)
    ended = _in_pool(at, merge, line, config_file)
    if isinstance(ended, str):
        say(f"line {line}: {ended}; it is folded here, on the CPU")
        return _as_list(merge(line, config_file, fallback=ended))
    _check_ended(ended, line, runner.pool)
    return outcomes_of(at, line, {each.id for each in before})


def outcomes_of(at: House, line: str, experts: Collection[int]) -> list[Outcome]:
    """What became of experts that waited, by their ids; nothing of those that still do."""
    held = waiting(at, line)
    versions = {expert: each.version for each in at.ledger.merges(line) for expert in each.experts}
    found: list[Outcome] = []
    for each in at.ledger.experts(line):
        if each.id not in experts:
            continue
        if held and held.expert_id == each.id:
            told = {"state": WAITS, "reason": held.verdict.reason, "version": held.version}
        elif each.state is ExpertState.PENDING:
            continue
        else:
            version = versions.get(each.id) if each.state is ExpertState.FOLDED else None
            told = {"state": str(each.state), "reason": each.reason, "version": version}
        found.append({"expert": each.name, **told})
    return found


def _as_list(found: Any) -> list[Outcome]:  # noqa: ANN401 - what a flow returns
    return found if isinstance(found, list) else [found] if found else []


def _in_pool(at: House, merge: Merge, line: str, config_file: str) -> State[Any] | str:
    """How the run in the pool ended; or why it shall be folded here."""
    name, runner = f"{merge.name}/{line}", at.config.line(line).runner
    try:
        run = cast("FlowRun", run_deployment(name, parameters={"line": line, "config_file": config_file}, timeout=0))
    except ObjectNotFound as error:
        if runner.fallback == "cpu":
            return f"Prefect has no deployment {name}"
        what, remedy = "Prefect has no such deployment", "set PREFECT_API_URL to the server that `foldin serve` uses"
        raise FoldinError(Refusal("E_SERVER", what, f"deployment {name}", remedy=remedy)) from error
    say(f"line {line}: the fold waits for a worker of the pool {runner.pool}")
    with get_client(sync_client=True) as client:
        try:
            return _awaited(client, at, line, run.id)
        except (KeyboardInterrupt, TerminationSignal):
            client.set_flow_run_state(run.id, Cancelling())  # who ends this run ends what it began
            raise


def _awaited(client: SyncPrefectClient, at: House, line: str, run: UUID) -> State[Any] | str:
    runner, begun, heard = at.config.line(line).runner, time.monotonic(), time.monotonic()
    silence = max(SILENCE, 2 * at.config.registry.lease_seconds)
    while True:
        state = _state_of(client, run)
        now = time.monotonic()
        if state is not None and state.is_final():
            return state
        if state is None or state.is_scheduled() or at.ledger.leases.alive(line):
            heard = now
        late = state is not None and not state.is_running() and now > begun + runner.patience
        if late and runner.fallback == "cpu" and _taken_back(client, run):
            return f"no worker of the pool {runner.pool} took the fold within {runner.patience:g} s"
        if state is not None and now > heard + (max(STUCK, runner.patience) if state.is_pending() else silence):
            # Its worker died without a word: Prefect would show it so for ever.
            ended = Cancelled if state.is_cancelling() else Crashed
            client.set_flow_run_state(run, ended(message="nobody holds the line"), force=True)
        time.sleep(LOOK)


def _state_of(client: SyncPrefectClient, run: UUID) -> State[Any] | None:
    """How a run stands; None while Prefect does not answer. One that was deleted was cancelled."""
    try:
        return client.read_flow_run(run).state
    except ObjectNotFound:
        return Cancelled(message="the run was deleted")
    except HTTPError:
        return None


def _taken_back(client: SyncPrefectClient, run: UUID) -> bool:
    """Whether a run that nobody has begun will never begin; the lease keeps one that begins all the same from harm."""
    answer: OrchestrationResult[Any] = client.set_flow_run_state(run, Cancelled(message="no worker took it in time"))
    return bool(answer.state and answer.state.is_cancelled())


def _check_ended(state: State[Any], line: str, pool: str) -> None:
    """Nothing, when a run ended well, or a person ended it."""
    if state.is_completed():
        return
    told = clean(state.message or state.name or "", 1000)
    if state.is_cancelled():
        what, remedy = "the fold was cancelled", "watch the line again; what waits is folded then"
        raise FoldinError(Refusal("E_CANCELLED", what, f"line {line}", remedy=remedy))
    if "FoldinError" in told:
        what, remedy = f"the fold in the pool {pool} failed", "mend what it names; the run's log in Prefect says more"
        raise FoldinError(Refusal("E_RUNNER", what, f"line {line}", found=told, remedy=remedy))
    raise RuntimeError(f"the run in the pool {pool} ended as {state.name}: {told}")
