"""A registration at a real MLflow server makes a run in a real Prefect, through `foldin receive` as a process."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from cryptography.fernet import Fernet
from mlflow import MlflowClient

from experiments.plain_client import move_alias, register_expert
from flows.config import load
from flows.deliveries import ID, SIGNATURE, STAMP, sign
from flows.processes import free_port
from flows.serve import mlflow_server
from flows.waking import AFTER
from flows.wiring import house
from tests.flows.patience import wait_until

pytestmark = pytest.mark.integration
SECRET = "a secret for these tests alone"
ALLOWED = {  # what docs/operations.md asks of an MLflow that may call an address on its own machine
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
    "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    "MLFLOW_WEBHOOK_CACHE_TTL": "1",
}


@pytest.fixture(scope="module")
def toml(tmp_path_factory, furnish):
    path = furnish(tmp_path_factory.mktemp("hooked")) / "foldin.toml"
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**ALLOWED, "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode()}.items():
            patch.setenv(key, value)
        with mlflow_server(load(path), free_port()) as url:
            named = f'[registry]\ntracking_uri = "{url}"\n'
            text = path.read_text().replace("[registry]\n", named).replace('trigger = "manual"\n', "")
            path.write_text(f"{text}\n[receiver]\nport = {free_port()}\n")
            yield path
    house.cache_clear()


@pytest.fixture
def run(toml, verbs, monkeypatch):
    """A function: a verb in this process, with the tests' secret -> exit code, stdout, stderr."""
    monkeypatch.setenv("FOLDIN_WEBHOOK_SECRET", SECRET)
    return verbs(toml)


@contextmanager
def receiving(toml, url):
    """The receiver as a process."""
    command = [sys.executable, "-m", "flows.cli", "--config", str(toml), "receive"]
    environment = {**os.environ, "FOLDIN_WEBHOOK_SECRET": SECRET, "PREFECT_API_URL": url}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.stderr.readline()
            assert said == f"Webhooks: {load(toml).receiver.address}\n", said + process.stderr.read()
            wait_until(lambda: healthy(toml), 20)
            yield process
        finally:
            process.terminate()
            process.wait(20)


def healthy(toml):
    try:
        with urllib.request.urlopen(load(toml).receiver.address.replace("/mlflow", "/healthz"), timeout=5) as answer:
            return answer.status == 200
    except urllib.error.URLError:
        return False


def woken(url):
    """The runs that the receiver made, oldest first."""
    question = json.dumps({"flow_runs": {"tags": {"all_": ["woken"]}}, "sort": "START_TIME_ASC"}).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/flow_runs/filter", question, headers)) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def deployed(toml, prefect):
    """The deployments of the line in Prefect, as `foldin serve` makes them, without anything that runs them."""
    from flows.serve import deployments

    for each in deployments(load(toml), str(toml)):
        each.apply()
    return prefect


def test_a_registration_and_a_moved_alias_make_a_run_each(toml, deployed, zoo, run):
    url, hooked = load(toml).registry.tracking_uri, load(toml).receiver.address
    with receiving(toml, deployed):
        code, out, err = run("webhook", "install")
        assert (code, err.count("A trial delivery arrived")) == (0, 1), err
        assert out == f"{hooked}: model_version.created, model_version_alias.created\n"
        before = len(woken(deployed))
        version = register_expert(url, "tiny-experts", zoo / "expert-1", "words")
        registered = time.monotonic()
        wait_until(lambda: len(woken(deployed)) == before + 1, 10)
        print(f"from registration to the run: {time.monotonic() - registered:.2f} s")
        register_expert(url, "tiny", zoo / "base", "")  # the line's own model, which nobody watches for experts
        move_alias(url, "tiny", 1)
        wait_until(lambda: len(woken(deployed)) == before + 2, 10)
        time.sleep(2.5)  # whatever else would come
        runs = woken(deployed)
        assert len(runs) == before + 2
        assert runs[before]["idempotency_key"] == f"foldin tiny: tiny-experts v{version}"
        assert {run["parameters"]["line"] for run in runs} == {"tiny"}


@pytest.mark.chaos
def test_a_run_that_gave_way_to_one_at_work_is_made_again(toml, deployed, zoo, run):
    from prefect.client.orchestration import get_client
    from prefect.states import Completed, Pending

    with receiving(toml, deployed), get_client(sync_client=True) as client:
        assert run("webhook", "install")[0] == 0
        at_work = client.create_flow_run_from_deployment(client.read_deployment_by_name("watch/tiny").id)
        assert client.set_flow_run_state(at_work.id, Pending()).state.is_pending()
        before = len(woken(deployed))
        register_expert(load(toml).registry.tracking_uri, "tiny-experts", zoo / "expert-2", "words")
        wait_until(lambda: len(woken(deployed)) == before + 1)
        dropped = client.set_flow_run_state(woken(deployed)[-1]["id"], Pending()).state
        assert (dropped.is_cancelled(), dropped.message) == (True, "Deployment concurrency limit reached.")
        time.sleep(AFTER + 1)
        assert len(woken(deployed)) == before + 1, "not while another is at work"
        client.set_flow_run_state(at_work.id, Completed())
        wait_until(lambda: len(woken(deployed)) == before + 2)
        assert run("webhook", "remove")[0] == 0


def test_installing_again_changes_what_is_there_and_removing_leaves_others_alone(toml, deployed, run):
    client = MlflowClient(*2 * [load(toml).registry.tracking_uri])
    other = client.create_webhook("other", "https://example.com/hook", ["model_version.created"])
    with receiving(toml, deployed):
        assert run("webhook", "install")[0] == 0
        assert run("webhook", "install")[0] == 0
    mine = [each for each in client.list_webhooks() if each.url == load(toml).receiver.address]
    assert len(mine) == 1
    assert run("webhook", "remove") == (0, "", "1 webhook removed.\n")
    assert [each.webhook_id for each in client.list_webhooks()] == [other.webhook_id]
    client.delete_webhook(other.webhook_id)


def test_a_receiver_that_is_not_there_is_told_by_install(run):
    code, _, err = run("webhook", "install")
    assert code == 1
    assert "E_WEBHOOK" in err
    assert "Start `foldin receive` with the same secret" in err
    assert run("webhook", "remove")[0] == 0


def test_another_secret_is_told_by_install(toml, deployed, run, monkeypatch):
    with receiving(toml, deployed):
        monkeypatch.setenv("FOLDIN_WEBHOOK_SECRET", "quite another secret")
        code, _, err = run("webhook", "install")
    assert code == 1
    assert "Expected status 200. Found status 401" in err
    assert run("webhook", "remove")[0] == 0


def test_without_a_deployment_the_delivery_is_to_come_again(toml, prefect):
    body = json.dumps(
        {"entity": "model_version", "action": "created", "data": {"name": "lonely-experts", "version": "1"}}
    ).encode()
    lonely = toml.with_name("lonely.toml")
    lonely.write_text(
        toml.read_text().replace("[lines.tiny", "[lines.lonely").replace("tiny-experts", "lonely-experts")
    )
    with receiving(lonely, prefect) as process:
        stamp = str(int(time.time()))
        headers = {ID: "1", STAMP: stamp, SIGNATURE: sign(SECRET.encode(), "1", stamp, body)}
        with pytest.raises(urllib.error.HTTPError) as answer:
            urllib.request.urlopen(urllib.request.Request(load(lonely).receiver.address, body, headers))
        assert (answer.value.code, answer.value.read()) == (503, b"")
        said = process.stderr.readline()
    assert "deployment watch/lonely: Prefect has no such deployment. Start `foldin serve`" in said


@pytest.mark.parametrize("secret", ["", "short"])
def test_a_receiver_does_not_start_without_a_good_secret(run, monkeypatch, secret):
    monkeypatch.setenv("FOLDIN_WEBHOOK_SECRET", secret)
    code, _, err = run("receive")
    assert code == 1
    assert "E_CONFIG" in err
    assert "openssl rand" in err


def test_a_receiver_does_not_start_without_a_prefect(run, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL")
    code, _, err = run("receive")
    assert code == 1
    assert "E_SERVER the environment: no Prefect server is named" in err


def test_a_database_sends_no_webhooks(workshop, verbs, monkeypatch):
    monkeypatch.setenv("FOLDIN_WEBHOOK_SECRET", SECRET)
    code, _, err = verbs(workshop / "foldin.toml")("webhook", "install")
    assert code == 1
    assert "E_WEBHOOK" in err
    assert "MLflow sends webhooks only from a server" in err
