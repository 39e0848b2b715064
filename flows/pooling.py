"""`python -m flows.pooling FOLDIN_TOML POOL`: a worker of a work pool; first the lines' deployments are made."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

from flows.alive import holder
from flows.config import load
from flows.environment import child_environment, prepare_environment
from flows.processes import python
from flows.repeating import repeat_dead
from flows.serve import deployments, make_pool, offer_folds

CONTROL = "foldin-control"  # where lines are watched
FOLDS = "foldin-gpu"  # where those fold that name it as [lines.NAME.runner] pool
ERRAND = "python -m flows.errand"  # what a worker of CONTROL starts for a run


def main(config_file: Path, pool: str) -> None:
    """Make the pool and, for the control pool, the deployments that are not there; then become Prefect's worker."""
    config = load(config_file)
    prepare_environment(config)
    make_pool(pool)
    if pool == CONTROL:
        for each in deployments(config, str(config_file)):
            each.job_variables["command"] = ERRAND
            each.apply(work_pool_name=pool)
        offer_folds(config, str(config_file))
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        repeat_dead(client, pool)
    # A fold takes all that a machine has; one after the other, lines that wait take turns.
    limit = ["--limit", "1"] if pool == FOLDS else []
    starter = _starter() if pool == CONTROL else {}
    worker = ["worker", "start", "--pool", pool, "--type", "process", "--name", holder(), *limit]
    path = os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])  # its runs are this Python's
    os.execve(sys.executable, python("prefect", *worker), child_environment({"PATH": path, **starter}))


def _starter() -> dict[str, str]:
    """Start what flow runs are forked from, which ends with this process; the variable that names it to errands."""
    if sys.platform != "linux":  # elsewhere a fork of what has imported frameworks may hang
        return {}
    name = f"foldin-{uuid4()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        command = python("flows.forking", str(listener.fileno()))
        lives, held = os.pipe()
        subprocess.Popen(command, stdin=lives, pass_fds=[listener.fileno()], start_new_session=True)
    os.close(lives)
    os.set_inheritable(held, True)  # the worker holds it, and nobody else
    return {"FOLDIN_STARTER": name}


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2])
