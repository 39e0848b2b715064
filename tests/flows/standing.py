"""All services of a folder as `foldin up` starts them, and what tests ask of them."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from mlflow import MlflowClient

from experiments.plain_client import champion
from flows.config import load
from flows.processes import free_port
from flows.upkeep import state


def foldin(toml, *arguments):
    """The command line, as a person who has set nothing runs it."""
    command = [sys.executable, "-m", "flows.cli", "--config", str(toml), *arguments]
    bare = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "MLFLOW", "AWS"))}
    return subprocess.run(command, env=bare, capture_output=True, text=True, timeout=280)


@contextmanager
def standing(toml, stack=""):
    """The same file, with more in its table [stack], while the services run on ports of their own."""
    ports = "\n".join(f"{key} = {free_port()}" for key in ("mlflow_port", "prefect_port", "s3_port"))
    toml.write_text(f"{toml.read_text()}\n[stack]\n{ports}\n{stack}\n\n[receiver]\nport = {free_port()}\n")
    started = foldin(toml, "up", "--detach")
    try:
        assert started.returncode == 0, started.stderr
        yield toml
    finally:
        ended = foldin(toml, "down")
        assert ended.returncode == 0, ended.stderr


def variables(toml):
    """What `foldin up` leaves for clients."""
    lines = (toml.parent / ".foldin/stack/variables.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def served(uri, line="tiny"):
    """The version of a line that users load; None while there is none."""
    models = MlflowClient(uri, uri).search_registered_models(f"name = '{line}'")
    return champion(uri, line) if models and "champion" in models[0].aliases else None


def is_folding(at):
    """Whether an expert of the line `tiny` was begun and has not ended, as its ledger says."""
    return any(each.attempts and each.state == "pending" for each in at.ledger.experts("tiny"))


def pids(toml, name):
    """What a service is made of, without what keeps it."""
    if name == "postgresql":
        return [int((toml.parent / ".foldin/stack/postgresql/data/postmaster.pid").read_text().split()[0])]
    (tether,) = (each["pid"] for each in state(load(toml))["services"] if each["name"] == name)
    return descendants(tether)


def left(toml):
    """The command lines of processes that name the folder of the file."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with suppress(OSError):
                words = (folder / "cmdline").read_bytes().decode(errors="replace")
                told = (folder / "environ").read_bytes().decode(errors="replace")
                if str(toml.parent) in words + told.replace(f"PWD={toml.parent}", ""):
                    found.append(words.replace("\0", " "))
    return found


def kill(toml, name):
    """SIGKILL to all of a service."""
    for pid in pids(toml, name):
        os.kill(pid, signal.SIGKILL)


def descendants(pid):
    """The children of a process, theirs, and so on."""
    children = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [each for child in children for each in (child, *descendants(child))]
