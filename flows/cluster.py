"""The parts of a fold on a Dask cluster, as Prefect tasks. The workers must see the same folders as this process."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import PrefectException
from prefect.futures import wait

from flows.first_pass import Folded, Measures, fold_part
from flows.parts import state_parts
from flows.plan import Plan
from registry.files import shown
from registry.records import FoldinError, Refusal


def _may_help(task: object, run: object, state: State[Any]) -> bool:
    """Whether a part may succeed when it is tried again; what foldin refused once it refuses again."""
    return not isinstance(state.result(raise_on_failure=False), FoldinError)


@task(
    name="fold part",
    task_run_name="{file}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=1,
    retry_condition_fn=_may_help,
)
def fold_part_task(file: str, work: Callable[[], Folded]) -> list[Measures]:
    """One part; repeated, it finds what was finished."""
    import torch

    torch.set_num_threads(1)  # for good, unlike in `pool`: the tasks of one worker overlap, and the setting is shared
    return work().measures


def fold_on_cluster(scheduler: str, folder: Path, records: Path, plan: Plan, device: str) -> None:
    """Make every part of the state that is not there yet; `passes.fold_state` then finds them all.

    Raises:
        FoldinError: as `passes.fold_state`, E_PROFILE where a worker would give other bytes than this process, and
            E_SERVER where the cluster cannot be reached or does not see the folders.
        RuntimeError: a part took its workers down, as it would have taken this process down; it counts as an attempt.
    """
    from distributed import KilledWorker
    from prefect_dask.task_runners import DaskTaskRunner

    @flow(
        name="fold on Dask",
        task_runner=cast("Any", DaskTaskRunner(address=scheduler)),
        persist_result=False,
        validate_parameters=False,
    )
    def fold_parts() -> None:
        # Bound to the function, for Prefect and Dask would look through a plan among the arguments, tensor by tensor.
        futures = [
            fold_part_task.submit(part.file, partial(fold_part, folder, records, plan, part, device))
            for part in state_parts(plan)
        ]
        wait(futures)  # before the first error is raised, so that no worker writes where the next run does
        for future in futures:
            future.result()

    try:
        fold_parts()
    except KilledWorker as error:
        raise RuntimeError(f"workers of the Dask cluster {scheduler} died: {error}") from error
    except (OSError, PrefectException) as error:
        what = "the Dask cluster that the line's key workers names cannot fold"
        remedy = "start it with workers that see these folders, or set workers to a number, then run again"
        found = f"{type(error).__name__}: {error}"
        raise FoldinError(Refusal("E_SERVER", what, scheduler, found=shown(found), remedy=remedy)) from error
