"""The parts of a fold on a Dask cluster, as Prefect tasks. The workers must see the same folders as this process."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.passes import Measures, fold_part, state_parts
from flows.plan import Plan

if TYPE_CHECKING:
    from flows.passes import Part


@task(name="fold part", task_run_name="{part.file}", cache_policy=NO_CACHE, persist_result=False, retries=1)
def fold_part_task(folder: Path, records: Path, plan: Plan, part: "Part", device: str) -> list[Measures]:
    """One part; repeated, it finds what was finished."""
    return fold_part(folder, records, plan, part, device).measures


def fold_on_cluster(scheduler: str, folder: Path, records: Path, plan: Plan, device: str) -> None:
    """Make every part of the state that is not there yet; `passes.fold_state` then finds them all.

    Raises:
        FoldinError: as `passes.fold_state`, and E_PROFILE where a worker would give other bytes than this process.
    """
    from prefect_dask.task_runners import DaskTaskRunner

    @flow(
        name="fold on Dask",
        task_runner=cast("Any", DaskTaskRunner(address=scheduler)),
        persist_result=False,
        validate_parameters=False,
    )
    def fold_parts() -> None:
        futures = [fold_part_task.submit(folder, records, plan, part, device) for part in state_parts(plan)]
        for future in futures:
            future.result()

    fold_parts()
