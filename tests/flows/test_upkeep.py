"""`foldin up`: one command, and an expert that a plain client registers over HTTP is folded by a worker."""

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experiments.plain_client import move_alias, register_expert
from flows.config import load
from flows.processes import started
from flows.stack import postgresql
from flows.upkeep import state
from flows.wiring import house
from tests.flows.patience import wait_until
from tests.flows.standing import foldin, is_folding, left, pids, served, standing, variables

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:.*psycopg.Connection:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*BaseConnection.__del__:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def toml(tmp_path_factory, furnish):
    """A line in a folder where everything runs, the store as one that somebody chose."""
    chosen = ["env", "KEPT_IN={folder}", sys.executable, "-m", "moto.server", "--port", "{port}"]
    with standing(furnish(tmp_path_factory.mktemp("up")) / "foldin.toml", f"s3_command = {chosen}") as found:
        yield found


@pytest.fixture(autouse=True)
def named(toml, monkeypatch):
    """What `foldin up` leaves for clients, in this process's environment."""
    for key, value in variables(toml).items():
        monkeypatch.setenv(key, value)


def test_an_expert_is_folded_through_the_webhook_and_a_moved_alias_adopted(toml, zoo):
    uri = load(toml).registry.tracking_uri
    register_expert(uri, "tiny-experts", zoo / "expert-1", "words")
    wait_until(lambda: served(uri) == 2, 120)  # the line's interval is an hour
    move_alias(uri, "tiny", 1)
    wait_until(lambda: "adopt" in foldin(toml, "log", "tiny").stdout, 120)
    assert foldin(toml, "doctor").returncode == 0


def test_the_workers_log_says_what_its_runs_do(toml):
    rows = (toml.parent / ".foldin/stack/logs/worker-server.log").read_text().splitlines()
    told = [json.loads(each) for each in rows if each.startswith("{")]
    (fold,) = (each for each in told if "is champion" in each["message"])
    assert (fold["line"], fold["version"], fold["expert"]) == ("tiny", 2, "tiny-experts v1")
    assert all(each["line"] == "tiny" for each in told)


def test_what_runs_is_told_and_started_twice_is_an_error(toml):
    names = [each["name"] for each in state(load(toml))["services"]]
    assert names == ["postgresql", "s3", "mlflow", "prefect", "worker", "gpu-worker", "receiver"]
    again = foldin(toml, "up")
    assert again.returncode == 1
    assert "the services of this folder run already" in again.stderr
    (toml.parent / ".foldin/stack/state.json").rename(toml.parent / "state.json")  # as before the first is noted
    early = foldin(toml, "up")
    (toml.parent / "state.json").rename(toml.parent / ".foldin/stack/state.json")
    assert (early.returncode, "another `foldin up` is starting here" in early.stderr) == (1, True)
    (store,) = pids(toml, "s3")
    told = Path(f"/proc/{store}/environ").read_text().split("\0")
    assert f"KEPT_IN={toml.parent / '.foldin/stack/s3'}" in told


def test_a_schedule_that_is_none_is_refused_before_anything_starts(furnish, tmp_path):
    toml = furnish(tmp_path) / "foldin.toml"
    toml.write_text(toml.read_text().replace("interval = 3600.0", 'schedule = "0 2 * *"'))
    found = foldin(toml, "up", "--detach")
    assert found.returncode == 1
    assert "E_CONFIG [lines.tiny] of foldin.toml: the schedule is not a cron" in found.stderr
    assert left(toml) == []


def test_only_the_owner_may_read_the_secrets(toml):
    for name in ("webhook.secret", "mlflow.key"):
        assert (toml.parent / ".foldin/stack" / name).stat().st_mode & 0o077 == 0
    for log in (toml.parent / ".foldin/stack/logs").iterdir():
        for name in ("webhook.secret", "mlflow.key"):
            assert (toml.parent / ".foldin/stack" / name).read_text() not in log.read_text(errors="replace")


def test_down_during_a_fold_leaves_no_process_and_no_lease(toml, zoo):
    ledger = house(str(toml)).ledger
    register_expert(load(toml).registry.tracking_uri, "tiny-experts", zoo / "expert-2", "words")
    wait_until(lambda: is_folding(house(str(toml))), 120)
    forked = [each for each in pids(toml, "worker") if b"flows.forking" in Path(f"/proc/{each}/cmdline").read_bytes()]
    assert len(forked) == 2, "what is forked from, and the run"
    os.kill(forked[1], signal.SIGSTOP)  # so that the fold lasts until it is asked to end
    with ThreadPoolExecutor() as pool:
        ending = pool.submit(foldin, toml, "down")
        wait_until(lambda: is_asked_to_end(forked[1]), 60)
        os.kill(forked[1], signal.SIGCONT)
        ended = ending.result()
    assert (ended.returncode, ended.stderr) == (0, "All services ended.\n")
    assert left(toml) == []
    with started(postgresql(toml.parent / ".foldin/stack/postgresql"), toml.parent) as database:
        database.await_answer()
        assert ledger.leases.holder("tiny").holder == ""
        last = ledger.experts("tiny")[-1]
        assert (last.state, last.attempts) == ("pending", 0), "who is interrupted did not fail"
        ledger.close()
    assert foldin(toml, "down").stderr == "Nothing runs.\n"


def is_asked_to_end(pid):
    """Whether a SIGTERM waits for a process that stands still."""
    (waits,) = (row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith("ShdPnd"))
    return bool(int(waits.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
