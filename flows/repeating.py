"""Flow runs that died with their worker: Prefect is told, and those that look for experts are run again."""

from typing import TYPE_CHECKING

from flows.alive import is_dead, lives

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.filters import FlowRunFilterState
    from prefect.client.schemas.objects import FlowRun

LOOKS = ("watch", "nightly")  # run again, they do what is still to be done


def repeat_dead(client: "SyncPrefectClient", pool: str) -> int:
    """Call the runs crashed that died with an earlier worker of the pool, run again what only looks; how many died.

    Nobody else tells: each run would keep its line's place for five minutes, and every look meanwhile be dropped.
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
        if run.deployment_id and client.read_flow(run.flow_id).name in LOOKS:
            client.create_flow_run_from_deployment(
                run.deployment_id, parameters=run.parameters, tags=run.tags, idempotency_key=f"again {run.id}"
            )
    return len(dead)


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
