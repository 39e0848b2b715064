"""MLflow and Prefect that ask for a login: foldin works with the right one, and says in one line that one is wrong."""

import asyncio
import base64
import json
import shutil
import sys
import urllib.request
from contextlib import contextmanager

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from experiments.plain_client import champion, move_alias, register_expert
from flows import processes
from flows.config import load
from flows.environment import using_variables
from flows.processes import HOST, Page, Service, free_port
from flows.serve import temporary_prefect
from flows.stack import LEAN
from flows.waking import make_run
from flows.wiring import house
from registry.records import FoldinError

pytestmark = [pytest.mark.integration, pytest.mark.chaos]
PASSWORDS = {each: f"the password of {each}" for each in ("admin", "foldin", "team")}
PREFECT = "people:the password of all"


@contextmanager
def mlflow_with_logins(config):
    """An MLflow server that keeps users; it hands files out itself, so that they are asked for with a login too."""
    home = config.folder / "mlflow"
    home.mkdir()
    (home / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{home / 'users.db'}\nadmin_username = admin\n"
        "auth_cache_ttl_seconds = 60\n"
    )
    page = Page("MLflow", free_port(), "", "/health")
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{home / 'mlflow.db'}",
        "--artifacts-destination",
        str(home / "files"),
    ]
    command += ["--host", HOST, "--port", str(page.port)]
    variables = {
        "MLFLOW_AUTH_CONFIG_PATH": str(home / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORDS["admin"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "signs the forms of its pages",
    }
    with processes.started(Service(page, lambda: command, {**LEAN, **variables}), config.home) as server:
        server.await_answer()
        yield page.url


def post(url, name, **body):
    """What one account asks of MLflow's API of users and rights."""
    header = base64.b64encode(f"{name}:{PASSWORDS[name]}".encode()).decode()
    headers = {"Authorization": f"Basic {header}", "Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)).close()


def login(name, password=""):
    """An account in MLflow for this process and its children."""
    return using_variables({"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password or PASSWORDS[name]})


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, furnish, prefect, empty):
    """A foldin.toml, and the URL of a Prefect: both servers ask for a login, and MLflow knows three accounts."""
    toml = furnish(tmp_path_factory.mktemp("guarded")) / "foldin.toml"
    config = load(toml)
    (config.home / "prefect").mkdir(parents=True)
    shutil.copyfile(empty, config.home / "prefect/prefect.db")
    locked = {"PREFECT_SERVER_API_AUTH_STRING": PREFECT, "PREFECT_HOME": str(config.home / "prefect")}
    with pytest.MonkeyPatch.context() as patch, mlflow_with_logins(config) as url:
        toml.write_text(toml.read_text().replace("[registry]\n", f'[registry]\ntracking_uri = "{url}"\n'))
        for name in ("foldin", "team"):
            post(f"{url}/api/2.0/mlflow/users/create", "admin", username=name, password=PASSWORDS[name])
        patch.delenv("PREFECT_API_URL")
        with using_variables(locked), temporary_prefect(config) as api:
            yield toml, url, api
    house.cache_clear()


def experiment(uri, name):
    return MlflowClient(uri, uri).get_experiment_by_name(name).experiment_id


@pytest.fixture
def toml(guarded, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", guarded[2])
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", PREFECT)
    return guarded[0]


@pytest.fixture
def run(toml, verbs):
    """A verb in this process, and a check of how it fails: one line, and no password."""

    def checked(*arguments):
        code, out, said = verbs(toml)(*arguments)
        assert "Traceback" not in said
        assert "password of" not in out + said
        return code, said

    return checked


@pytest.fixture
def started(guarded, run, zoo):
    """A line that foldin's account started, with an expert that a team's account registered."""
    with login("foldin"):
        code, said = run("init", "tiny")
        assert code == 0, said
    with login("team"):
        if not MlflowClient(guarded[1], guarded[1]).search_registered_models("name = 'tiny-experts'"):
            register_expert(guarded[1], "tiny-experts", zoo / "expert-1", "task-1")
    return guarded[1]


def test_a_team_registers_experts_and_cannot_move_the_champion(started, toml, zoo):
    with login("team"):
        assert champion(started, "tiny") == 1  # to load it, everybody may
        for refused in (
            lambda: move_alias(started, "tiny", 1),
            lambda: MlflowClient(started, started).set_model_version_tag("tiny", "1", "foldin.verdict", "passed"),
            lambda: register_expert(started, "tiny", zoo / "base", "task-1"),
        ):
            with pytest.raises(MlflowException, match="Permission denied") as error:
                refused()
            assert error.value.error_code == "PERMISSION_DENIED"
        with pytest.raises(FoldinError, match=r"E_MLFLOW MLflow at .*: the account may not do that in MLflow \(403\)"):
            house(str(toml)).mlflow.point_champion("tiny", 1)
    with login("foldin"):
        assert champion(started, "tiny") == 1


@pytest.mark.timeout(900)
def test_what_a_team_registers_is_folded_once_it_grants_that(started, toml, foldin, tmp_path):
    (tmp_path / "password").write_text(PASSWORDS["foldin"] + "\n")
    secrets = {"MLFLOW_TRACKING_USERNAME": "foldin", "MLFLOW_TRACKING_PASSWORD_FILE": str(tmp_path / "password")}
    watched = foldin(toml.parent, "watch", "tiny", timeout=400, **secrets)
    assert (watched.returncode, watched.stdout) == (1, "")
    assert watched.stderr.count("the account may not do that in MLflow (403)") == 1
    assert "Traceback" not in watched.stderr
    with login("team"):
        where = {"resource_type": "experiment", "resource_id": experiment(started, "fine-tuning")}
    grant = f"{started}/api/3.0/mlflow/users/permissions/grant"
    post(grant, "team", username="foldin", permission="EDIT", **where)
    watched = foldin(toml.parent, "watch", "tiny", timeout=400, **secrets)
    assert (watched.returncode, watched.stdout) == (0, "tiny-experts v1: folded as v2\n"), watched.stderr
    with login("team"):
        assert champion(started, "tiny") == 2


def test_webhooks_are_an_administrators(guarded, run):
    with login("foldin"):
        code, said = run("webhook", "remove")
        assert (code, "the account may not do that in MLflow (403)" in said) == (1, True)
    with login("admin"):
        assert run("webhook", "remove") == (0, "0 webhooks removed.\n")


@pytest.mark.parametrize("name", ["foldin", "nobody"])
def test_a_wrong_login_for_mlflow_is_one_line(guarded, run, zoo, name):
    with login(name, "quite another"):
        code, said = run("add", zoo / "expert-2", "--line", "tiny", "--task", "task-2")
    assert code == 1
    assert "does not know the account, or its password is another (401)" in said
    assert "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in said
    assert [line for line in said.splitlines() if "error" in line] == [said.splitlines()[-1]]
    assert "quite another" not in said


@pytest.mark.parametrize("login", [None, "people:quite another"])
def test_a_wrong_login_for_prefect_is_one_line_before_any_work(guarded, run, monkeypatch, login):
    if login:
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", login)
    else:
        monkeypatch.delenv("PREFECT_API_AUTH_STRING")
    code, said = run("watch", "tiny")
    assert code == 1
    assert f"error: E_SERVER {guarded[2]}: the Prefect API lets nobody in without a login, or with another" in said
    assert "Found HTTP Error 401: Unauthorized. Set PREFECT_API_AUTH_STRING" in said
    assert "quite another" not in said


@pytest.mark.parametrize(
    ("login", "told"), [(PREFECT, "no such deployment. Start"), ("people:wrong", "Set PREFECT_API_AUTH_STRING")]
)
def test_what_wakes_a_line_logs_in_to_prefect(guarded, login, told):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    async def wake():
        async with get_client() as client:
            await make_run(client, "tiny", "a test")

    with temporary_settings({PREFECT_API_URL: guarded[2], PREFECT_API_AUTH_STRING: login}):
        with pytest.raises(FoldinError, match=told) as refused:
            asyncio.run(wake())
        assert "wrong" not in str(refused.value)


def test_a_password_file_that_cannot_be_read_is_named(guarded, run, monkeypatch):
    monkeypatch.delenv("PREFECT_API_AUTH_STRING")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING_FILE", "/nowhere/login")
    code, said = run("watch", "tiny")
    assert code == 1
    assert "E_CONFIG /nowhere/login, which PREFECT_API_AUTH_STRING_FILE names: the file cannot be read" in said
