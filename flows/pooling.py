"""`python -m flows.pooling FOLDIN_TOML POOL`: a worker of a work pool; first the lines' deployments are made."""

import os
import sys
from pathlib import Path

from flows.config import load
from flows.environment import prepare_environment
from flows.repeating import repeat_dead
from flows.serve import deployments, make_pool, offer_folds
from flows.wiring import holder

CONTROL = "foldin-control"  # where lines are watched
FOLDS = "foldin-gpu"  # where those fold that name it as [lines.NAME.runner] pool


def main(config_file: Path, pool: str) -> None:
    """Make the pool and, for the control pool, the deployments that are not there; then become Prefect's worker."""
    config = load(config_file)
    prepare_environment(config)
    make_pool(pool)
    if pool == CONTROL:
        for each in deployments(config, str(config_file)):
            each.apply(work_pool_name=pool)
        offer_folds(config, str(config_file))
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        repeat_dead(client, pool)
    # A fold takes all that a machine has; one after the other, lines that wait take turns.
    limit = ["--limit", "1"] if pool == FOLDS else []
    worker = ["prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", holder(), *limit]
    os.execv(sys.executable, [sys.executable, "-m", *worker])


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2])
