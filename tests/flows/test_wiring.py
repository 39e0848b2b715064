"""Where configuration becomes places, environment and names; nothing slow is started here."""

import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from flows import alive, wiring
from flows.config import load
from flows.environment import (
    LOGINS,
    child_environment,
    prefect_api_url,
    prefect_authorization,
    prepare_environment,
    using_prefect,
    variables_file,
)
from flows.options import LineConfig, SearchConfig
from tests.flows.patience import wait_until

SETTINGS = LineConfig(base="base", experts=("demo-experts",), suites={"city": "suites/city"})
KEY = ("demo", "manifest", "tree", "city", {"city": "suite"}, SETTINGS)


@pytest.fixture
def environment(monkeypatch):
    """The process's environment without anything that a person or another test set for Prefect and MLflow."""
    before = dict(os.environ)
    for key in before:
        if key.startswith(("PREFECT_", "MLFLOW_", "HF_", "DO_NOT")):
            monkeypatch.delenv(key)
    yield os.environ
    for key in set(os.environ) - set(before):
        del os.environ[key]


def configured(folder, registry=""):
    (folder / "foldin.toml").write_text(f"[registry]\n{registry}\n")
    return load(folder / "foldin.toml")


def test_everything_is_embedded_below_home_by_default(tmp_path):
    config = configured(tmp_path)
    home = tmp_path / ".foldin"
    assert wiring.ledger_url(config) == f"sqlite:///{home}/ledger.db"
    assert wiring.tracking_uri(config) == f"sqlite:///{home}/mlflow.db"
    assert wiring.artifact_root(config) == (home / "artifacts").as_uri()
    assert home.is_dir(), "SQLite makes files, not folders"


def test_an_mlflow_server_chooses_where_artifacts_go_unless_told(tmp_path):
    server = configured(tmp_path, 'tracking_uri = "http://mlflow:5000"')
    assert wiring.tracking_uri(server) == "http://mlflow:5000"
    assert wiring.artifact_root(server) == ""
    told = configured(tmp_path, 'tracking_uri = "http://mlflow:5000"\nartifact_root = "s3://bucket/x"')
    assert wiring.artifact_root(told) == "s3://bucket/x"


def test_the_folders_of_a_house_lie_below_home_one_scratch_a_line(tmp_path):
    house = wiring.House(configured(tmp_path, 'home = "kept"'), None)
    folders = {house.experts, house.scores, house.work("a"), house.work("b")}
    assert len(folders) == 4
    assert all(folder.is_relative_to(tmp_path / "kept") for folder in folders)


def test_the_environment_is_set_and_what_the_user_set_stays(tmp_path, environment, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "9")
    monkeypatch.setenv("PREFECT_HOME", "mine")
    prepare_environment(configured(tmp_path))
    assert (environment["MLFLOW_HTTP_REQUEST_MAX_RETRIES"], environment["PREFECT_HOME"]) == ("9", "mine")
    assert environment["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] == "CRITICAL"
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_what_up_offers_is_believed_while_it_lives(tmp_path, environment, monkeypatch):
    config = configured(tmp_path)
    code = "import sys; from pathlib import Path; from flows.config import load\n"
    code += "from flows.environment import offer_variables\n"
    code += "offer_variables(load(Path(sys.argv[1])), {'MLFLOW_TRACKING_URI': 'http://127.0.0.1:9'}); input()"
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "foldin.toml")], stdin=subprocess.PIPE)
    wait_until(variables_file(config).exists)
    assert variables_file(config).stat().st_mode & 0o777 == 0o600
    prepare_environment(config)
    assert environment["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:9"
    assert "FOLDIN_UP" not in environment
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    child.kill()
    child.communicate()
    prepare_environment(config)
    assert "MLFLOW_TRACKING_URI" not in environment, "the services ended with it"


def test_an_mlflow_that_is_away_is_given_up_within_seconds(tmp_path, environment):
    prepare_environment(configured(tmp_path), verbose=True)
    retries = int(environment["MLFLOW_HTTP_REQUEST_MAX_RETRIES"])
    waits = [0, *(2 * 2**number for number in range(1, retries))]  # MLflow's backoff factor is 2
    assert sum(waits) + retries < 15, "with a second of jitter each"
    assert environment["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] == "INFO"


def test_the_prefect_api_is_named_to_this_process_and_its_children_while_the_block_runs(environment):
    from prefect.settings import PREFECT_API_URL

    assert prefect_api_url() == ""
    before = PREFECT_API_URL.value()
    with using_prefect("http://127.0.0.1:4200/api", watched=True):
        assert prefect_api_url() == child_environment({})["PREFECT_API_URL"]
        # prefect was imported before, and read its settings then
        assert prefect_api_url() == PREFECT_API_URL.value() == "http://127.0.0.1:4200/api"
    assert prefect_api_url() == ""
    assert PREFECT_API_URL.value() == before


def test_this_process_is_alive_and_one_that_ended_is_dead():
    assert not alive.is_dead(alive.holder())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = alive._started(child.pid)
    name = f"{socket.gethostname()}:{child.pid}:{started}"
    assert not alive.is_dead(name)
    child.communicate()
    assert alive.is_dead(name)
    assert alive.is_dead(f"{socket.gethostname()}:{os.getpid()}:1"), "another process had this number before"


@pytest.mark.parametrize("name", ["", "elsewhere:1:1", f"{socket.gethostname()}:x:1", "no colons"])
def test_when_in_doubt_a_holder_is_alive(name):
    assert not alive.is_dead(name)


def test_the_same_merge_has_the_same_name_in_every_process():
    assert wiring.merge_key(*KEY) == wiring.merge_key(*KEY)
    assert wiring.merge_key(*KEY) == wiring.merge_key(*KEY[:-1], replace(SETTINGS, interval=5.0, schedule="@daily"))
    assert len(wiring.merge_key(*KEY)) == 64


@pytest.mark.parametrize(
    "other",
    [
        ("other", *KEY[1:]),
        ("demo", "other", *KEY[2:]),
        ("demo", "manifest", "other", *KEY[3:]),
        (*KEY[:3], "other", *KEY[4:]),
        (*KEY[:4], {"city": "other"}, SETTINGS),
        (*KEY[:4], {"city": "suite", "guard": "suite"}, SETTINGS),
        (*KEY, 0.5),
        (*KEY[:-1], replace(SETTINGS, evaluation_seconds=1.0)),
        (*KEY[:-1], replace(SETTINGS, search=SearchConfig(when="never"))),
        (*KEY[:-1], replace(SETTINGS, approval="always")),
        (*KEY[:-1], replace(SETTINGS, method="average")),
        (*KEY[:-1], replace(SETTINGS, parameters={"energy": 0.4})),
        (*KEY[:-1], replace(SETTINGS, plain=("pooler.*",))),
        (*KEY[:-1], replace(SETTINGS, gate={"min_gain": 0.1})),
    ],
)
def test_whatever_changes_the_result_changes_the_name(other):
    assert wiring.merge_key(*other) != wiring.merge_key(*KEY)


def test_a_password_may_be_in_a_file_and_one_that_is_set_stays(environment, monkeypatch, tmp_path):
    (tmp_path / "password").write_text("from the file\n")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "set")
    for key in LOGINS:
        monkeypatch.setenv(f"{key}_FILE", str(tmp_path / "password"))
    prepare_environment(load(tmp_path / "foldin.toml", new=True))
    assert [os.environ[key] for key in LOGINS] == ["from the file", "set", "from the file"]


def test_the_login_of_a_prefect_that_is_started_here_is_sent_to_no_other(environment, monkeypatch, tmp_path):
    config = load(tmp_path / "foldin.toml", new=True)
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "us:secret")
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere.example/api")
    prepare_environment(config)
    assert prefect_authorization() == {}
    monkeypatch.delenv("PREFECT_API_URL")
    prepare_environment(config)
    assert prefect_authorization() == {"Authorization": "Basic dXM6c2VjcmV0"}
