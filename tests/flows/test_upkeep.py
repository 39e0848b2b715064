"""`foldin up`: one command, and an expert that a plain client registers over HTTP is folded by a worker."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from experiments.plain_client import champion, move_alias, register_expert
from flows.config import load
from flows.processes import free_port
from flows.upkeep import state

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:.*psycopg.Connection:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*BaseConnection.__del__:pytest.PytestUnraisableExceptionWarning"),
]


def foldin(toml, *arguments):
    command = [sys.executable, "-m", "flows.cli", "--config", str(toml), *arguments]
    return subprocess.run(command, env=bare(), capture_output=True, text=True, timeout=280)


def bare():
    """The environment of a person who has set nothing."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "MLFLOW", "AWS"))}


def wait_until(true, seconds):
    patience = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < patience, f"not after {seconds} s"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def toml(tmp_path_factory, furnish):
    """A line in a folder where everything runs."""
    path = furnish(tmp_path_factory.mktemp("up")) / "foldin.toml"
    ports = "\n".join(f"{key} = {free_port()}" for key in ("mlflow_port", "prefect_port", "s3_port"))
    path.write_text(f"{path.read_text()}\n[stack]\n{ports}\n\n[receiver]\nport = {free_port()}\n")
    started = foldin(path, "up", "--detach")
    try:
        assert started.returncode == 0, started.stderr
        yield path
    finally:
        ended = foldin(path, "down")
        assert ended.stderr == "All services ended.\n", ended.stderr


@pytest.fixture
def variables(toml, monkeypatch):
    """What `foldin up` leaves for clients, in this process's environment."""
    for line in (toml.parent / ".foldin/stack/variables.env").read_text().splitlines():
        monkeypatch.setenv(*line.split("=", 1))


def test_an_expert_is_folded_through_the_webhook_and_a_moved_alias_adopted(toml, variables, zoo):
    uri = load(toml).registry.tracking_uri
    register_expert(uri, "tiny-experts", zoo / "expert-1", "words")
    wait_until(lambda: served(uri) == 2, 120)  # the line's interval is an hour
    move_alias(uri, "tiny", 1)
    wait_until(lambda: "adopt" in foldin(toml, "log", "tiny").stdout, 120)
    assert foldin(toml, "doctor").returncode == 0


def served(uri):
    models = MlflowClient(uri, uri).search_registered_models("name = 'tiny'")
    return champion(uri, "tiny") if models and "champion" in models[0].aliases else None


def test_what_runs_is_told_and_started_twice_is_an_error(toml):
    names = [each["name"] for each in state(load(toml))["services"]]
    assert names == ["postgresql", "s3", "mlflow", "prefect", "worker", "receiver"]
    again = foldin(toml, "up")
    assert again.returncode == 1
    assert "the services of this folder run already" in again.stderr


def test_only_the_owner_may_read_the_secrets(toml):
    for name in ("webhook.secret", "mlflow.key"):
        assert (toml.parent / ".foldin/stack" / name).stat().st_mode & 0o077 == 0
    for log in (toml.parent / ".foldin/stack/logs").iterdir():
        for name in ("webhook.secret", "mlflow.key"):
            assert (toml.parent / ".foldin/stack" / name).read_text() not in log.read_text(errors="replace")


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["worker", "prefect", "mlflow", "postgresql"])
def test_a_service_that_is_killed_during_a_fold_costs_no_expert(toml, variables, expert_maker, name):
    uri = load(toml).registry.tracking_uri
    before = served(uri) or 1
    for turn in range(5):
        seed = abs(hash((name, turn))) % 10**6
        register_expert(uri, "tiny-experts", expert_maker(seed), "words")
        time.sleep(1.5 * turn)  # somewhere between its registration and its end
        kill(toml, name)
    wait_until(lambda: (served(uri) or 0) >= before + 5, 600)
    assert foldin(toml, "doctor").returncode == 0


def kill(toml, name):
    """SIGKILL to what a service is made of."""
    (tether,) = (each["pid"] for each in state(load(toml))["services"] if each["name"] == name)
    if name == "postgresql":
        pids = [int((toml.parent / ".foldin/stack/postgresql/data/postmaster.pid").read_text().split()[0])]
    else:
        pids = descendants(tether)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def descendants(pid):
    children = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [each for child in children for each in (child, *descendants(child))]
