"""`foldin serve` against a real Prefect server: what is scheduled, what runs, and that nothing stays behind."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
import uuid
from datetime import datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from experiments.plain_client import champion, register_expert
from flows.config import load
from flows.processes import free_port
from flows.serve import prefect_server
from flows.wiring import tracking_uri
from tests.flows.patience import marked, wait_until

pytestmark = pytest.mark.integration

LINES = """
[lines.dusk]
base = "{base}"
experts = ["dusk-experts"]
trigger = "nightly"
schedule = "0 2 * * *"
timezone = "Asia/Kolkata"

[lines.still]
base = "{base}"
experts = ["still-experts"]
trigger = "manual"
"""
ROLLBACK = """
import sys
from prefect.deployments import run_deployment
run = run_deployment("rollback/tiny", parameters={"to": 1, "because": "a test"}, timeout=90, poll_interval=1)
print(run.state_name)
"""


def ask(url, question=None):
    """The answer to a GET, or to a POST of JSON."""
    body = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read())


@pytest.fixture
def api(workshop, zoo, own_prefect, monkeypatch):
    """The URL of a real Prefect server with a database of its own; named to every process the test starts."""
    toml = workshop / "foldin.toml"
    toml.write_text(toml.read_text().replace("interval = 3600.0", "interval = 15.0") + LINES.format(base=zoo / "base"))
    monkeypatch.chdir(workshop)  # where a plain MLflow client puts artifacts
    with prefect_server(load(toml), free_port()) as url:
        yield url


@pytest.fixture
def serving(workshop, api, monkeypatch):
    """`foldin serve` as a process of its own, and the mark that it and its children carry."""
    mark = f"FOLDIN_TEST={uuid.uuid4()}"
    monkeypatch.setenv(*mark.split("="))
    with open(workshop / "serve.log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "flows.cli", "serve"], cwd=workshop, stdout=log, stderr=log)
    yield process, mark
    for pid in marked(mark):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def test_what_is_scheduled_runs_and_what_is_asked_for_runs_and_nothing_stays(workshop, zoo, api, serving):
    process, mark = serving
    names = [
        f"{flow}/{line}" for flow in ("watch", "nightly", "rollback", "approval") for line in ("tiny", "dusk", "still")
    ]
    found = wait_until(lambda: deployments(api, names), 90)

    def scheduled(name):
        """The times at which a deployment will run next."""
        question = {
            "deployments": {"id": {"any_": [found[name]["id"]]}},
            "flow_runs": {"state": {"name": {"any_": ["Scheduled"]}}},
        }
        runs = ask(f"{api}/flow_runs/filter", question)
        return sorted(datetime.fromisoformat(run["expected_start_time"].replace("Z", "+00:00")) for run in runs)

    # By module, so that no folder of ours gets onto the path of a run.
    assert {name: each["entrypoint"] for name, each in found.items() if name.endswith("tiny")} == {
        "watch/tiny": "flows.watch.watch",
        "nightly/tiny": "flows.nightly.nightly",
        "rollback/tiny": "flows.rollback.rollback",
        "approval/tiny": "flows.approval.approval",
    }
    # With the wrong SQLAlchemy the scheduler says nothing and schedules nothing.
    nights = wait_until(lambda: scheduled("nightly/dusk"), 90)
    local = [night.astimezone(ZoneInfo("Asia/Kolkata")) for night in nights]
    assert {(night.hour, night.minute) for night in local} == {(2, 0)}
    assert {(night.hour, night.minute) for night in nights} == {(20, 30)}
    assert all((later.date() - earlier.date()).days == 1 for earlier, later in pairwise(local))
    looks = wait_until(lambda: scheduled("watch/tiny"), 90)
    assert {(later - earlier).total_seconds() for earlier, later in pairwise(looks)} == {15.0}
    for name in ("watch/dusk", "watch/still", "nightly/still", "rollback/tiny"):
        assert scheduled(name) == []

    # A plain client registers an expert, and the schedule alone folds it.
    uri = tracking_uri(load(workshop / "foldin.toml"))
    register_expert(uri, "tiny-experts", zoo / "expert-1", "task-1")
    wait_until(lambda: versions_of(uri, "tiny") >= {1, 2}, 90)
    wait_until(lambda: champion(uri, "tiny") == 2, 90)
    wait_until(lambda: in_state(api, found["watch/tiny"], "COMPLETED"), 90)

    # A person rolls back on Prefect's page; the version may be left out there.
    to = found["rollback/tiny"]["parameter_openapi_schema"]["properties"]["to"]
    assert {each["type"] for each in to["anyOf"]} == {"integer", "null"}
    assert "to" not in found["rollback/tiny"]["parameter_openapi_schema"]["required"]
    asked = subprocess.run([sys.executable, "-c", ROLLBACK], capture_output=True, text=True, timeout=120)
    assert asked.stdout.strip() == "Completed", asked.stderr
    assert champion(uri, "tiny") == 1

    # Asked to end in the middle of a run.
    wait_until(lambda: in_state(api, found["watch/tiny"], "RUNNING"), 90)
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    wait_until(lambda: not marked(mark), 1)


def deployments(api, names):
    """The deployments by FLOW/NAME, once all of them are there."""
    flows = {flow["id"]: flow["name"] for flow in ask(f"{api}/flows/filter", {})}
    found = {f"{flows[each['flow_id']]}/{each['name']}": each for each in ask(f"{api}/deployments/filter", {})}
    assert set(found) <= set(names)
    return found if set(found) == set(names) else None


def in_state(api, deployment, state):
    """The runs of a deployment that are in a state."""
    wanted = {"deployments": {"id": {"any_": [deployment["id"]]}}, "flow_runs": {"state": {"type": {"any_": [state]}}}}
    return ask(f"{api}/flow_runs/filter", wanted)


def versions_of(uri, model):
    from mlflow import MlflowClient

    return {int(each.version) for each in MlflowClient(uri, uri).search_model_versions(f"name = '{model}'")}
