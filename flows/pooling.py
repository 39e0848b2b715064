"""`python -m flows.pooling FOLDIN_TOML POOL`: a worker of a work pool; first the lines' deployments are made."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from flows.config import load
from flows.environment import prepare_environment
from flows.serve import deployments


def main(config_file: Path, pool: str) -> None:
    """Make the pool and the deployments that are not there, then become Prefect's worker."""
    config = load(config_file)
    prepare_environment(config)
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    for each in deployments(config, str(config_file)):
        each.apply(work_pool_name=pool)
    worker = ["prefect", "worker", "start", "--pool", pool, "--type", "process"]
    os.execv(sys.executable, [sys.executable, "-m", *worker])


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2])
