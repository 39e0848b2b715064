"""`python -m flows.pooling FOLDIN_TOML POOL`: a worker of a work pool; first the lines' deployments are made."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from flows.config import load
from flows.environment import prepare_environment
from flows.repeating import repeat_dead
from flows.serve import deployments
from flows.wiring import holder

CONTROL = "foldin-control"  # where lines are watched
FOLDS = "foldin-gpu"  # where those fold that name it as [lines.NAME.runner] pool


def main(config_file: Path, pool: str) -> None:
    """Make the pool and the deployments that are not there, then become Prefect's worker."""
    config = load(config_file)
    prepare_environment(config)
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    with get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        for each in deployments(config, str(config_file)) if pool == CONTROL else ():
            each.apply(work_pool_name=pool)
        repeat_dead(client, pool)
    worker = ["prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", holder()]
    os.execv(sys.executable, [sys.executable, "-m", *worker])


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2])
