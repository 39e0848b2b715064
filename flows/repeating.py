"""Flow runs that died with their worker: Prefect is told, and those that look for experts are run again."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from flows.alive import is_dead, lives

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.filters import FlowRunFilterState
    from prefect.client.schemas.objects import FlowRun

LOOKS = ("watch", "nightly")  # run again, they do what is still to be done
LATELY = timedelta(minutes=10)


def repeat_dead(client: "SyncPrefectClient", pool: str) -> int:
    """Call the runs crashed that died with an earlier worker of the pool, run again what only looks; how many died.

    Nobody else tells: each run would keep its line's place for five minutes, and every look meanwhile be dropped.
    Those that could still say that they crashed, since their worker died before them, are run again as well.
    Workers are named as `alive.holder` does. While one of them may be at work, nothing is done.
    """
    from prefect.client.schemas.objects import WorkerStatus
    from prefect.states import Crashed

    workers = client.read_workers_for_work_pool(pool)
    if any(each.status == WorkerStatus.ONLINE and not is_dead(each.name) for each in workers):
        return 0
    dead = _dead(client, pool)
    for run in dead:
        for each in (*_children(client, run), run):
            client.set_flow_run_state(each.id, Crashed(message="it died with its worker"))
    for run in _crashed_looks(client, pool):
        assert run.deployment_id is not None, "it was asked for"
        client.create_flow_run_from_deployment(
            run.deployment_id, parameters=run.parameters, tags=run.tags, idempotency_key=f"again {run.id}"
        )
    return len(dead)


def _crashed_looks(client: "SyncPrefectClient", pool: str) -> "list[FlowRun]":
    """The pool's looks that crashed lately; each is run again once, however often this is asked."""
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType

    crashed = filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=[StateType.CRASHED]))
    ended = filters.FlowRunFilterEndTime.model_validate({"after_": datetime.now(UTC) - LATELY})
    found = client.read_flow_runs(
        flow_filter=filters.FlowFilter(name=filters.FlowFilterName(any_=list(LOOKS))),
        flow_run_filter=filters.FlowRunFilter(state=crashed, end_time=ended),
        work_pool_filter=filters.WorkPoolFilter(name=filters.WorkPoolFilterName(any_=[pool])),
    )
    return [each for each in found if each.deployment_id is not None]


def _dead(client: "SyncPrefectClient", pool: str) -> "list[FlowRun]":
    """The pool's runs that have begun and not ended, and whose process is not there."""
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter, WorkPoolFilterName

    of_pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[pool]))
    found = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=_unended()), work_pool_filter=of_pool)
    return [run for run in found if not _works(run.infrastructure_pid)]


def _children(client: "SyncPrefectClient", run: "FlowRun") -> "list[FlowRun]":
    """The runs in a run's own process that have not ended."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId

    of_it = FlowRunFilterParentFlowRunId(any_=[run.id])
    found = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=_unended(), parent_flow_run_id=of_it))
    return [each for each in found if each.deployment_id is None]  # others work on, in a pool of their own


def _unended() -> "FlowRunFilterState":
    from prefect.client.schemas.filters import FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    begun = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    return FlowRunFilterState(type=FlowRunFilterStateType(any_=begun))


def _works(pid: str | None) -> bool:
    """Whether a run's process lives, here."""
    return pid is not None and pid.isdigit() and lives(int(pid))
