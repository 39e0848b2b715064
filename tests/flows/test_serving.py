"""The servers that foldin starts: they answer, they say what is in their way, and they end with who started them."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from experiments.plain_client import register_expert
from flows.config import load
from flows.processes import free_port
from flows.serve import mlflow_server, prefect_server, temporary_prefect
from flows.wiring import tracking_uri
from registry.records import FoldinError
from tests.flows.patience import marked, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def mark(workshop, own_prefect, monkeypatch):
    """What every process that this test starts carries in its environment, children of children included."""
    monkeypatch.chdir(workshop)  # where a plain MLflow client puts artifacts
    mark = f"FOLDIN_TEST={uuid.uuid4()}"
    monkeypatch.setenv(*mark.split("="))
    yield mark
    for pid in marked(mark):
        os.kill(pid, signal.SIGKILL)


def ask(url, question=None):
    """The answer to a GET, or to a POST of JSON."""
    body = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        text = answer.read().decode()
    return json.loads(text) if "json" in answer.headers["Content-Type"] else text


def answers(url):
    try:
        return bool(ask(url))
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.fixture
def config(workshop):
    return load(workshop / "foldin.toml")


@pytest.mark.chaos
def test_the_pages_show_what_an_earlier_watch_did_and_end_with_the_verb(workshop, config, zoo, foldin, mark):
    register_expert(tracking_uri(config), "tiny-experts", zoo / "expert-1", "task-1")
    watched = foldin(workshop, "watch", "tiny")
    assert watched.returncode == 0, watched.stderr
    assert marked(mark) == []
    ports = prefect, mlflow = free_port(), free_port()
    command = [sys.executable, "-m", "flows.cli", "ui", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow)]
    with subprocess.Popen(command, cwd=workshop, stderr=subprocess.PIPE, text=True) as pages:
        said = [pages.stderr.readline() for _ in range(3)]
        assert said == [
            f"Prefect: http://127.0.0.1:{prefect}\n",
            f"MLflow:  http://127.0.0.1:{mlflow}\n",
            "Ctrl-C ends both.\n",
        ]
        check_pages(prefect, mlflow)
        pages.send_signal(signal.SIGINT)
        _, rest = pages.communicate(timeout=30)
    assert (pages.returncode, rest.strip()) == (130, "error: interrupted")
    assert marked(mark) == []
    assert not any(answers(f"http://127.0.0.1:{port}/") for port in ports)


def check_pages(prefect, mlflow):
    """What the two servers say about one expert that was folded before they started."""
    runs = ask(f"http://127.0.0.1:{prefect}/api/flow_runs/filter", {"sort": "START_TIME_ASC"})
    ended = [(run["name"], run["state_type"]) for run in runs]
    assert ended == [("watch tiny", "COMPLETED"), ("tiny: next expert", "COMPLETED")]
    tasks = ask(f"http://127.0.0.1:{prefect}/api/task_runs/filter", {})
    names = {task["name"].partition("-")[0] for task in tasks}
    assert names >= {"admit", "fold", "free rung", "canary", "full rung", "register"}
    assert {task["state_type"] for task in tasks} == {"COMPLETED"}
    kinds = {each["type"] for each in ask(f"http://127.0.0.1:{prefect}/api/artifacts/filter", {})}
    assert kinds >= {"table", "image", "progress"}
    alias = ask(f"http://127.0.0.1:{mlflow}/api/2.0/mlflow/registered-models/alias?name=tiny&alias=champion")
    assert alias["model_version"]["version"] == "2"
    for port in (prefect, mlflow):
        assert "<html" in ask(f"http://127.0.0.1:{port}/")


KILLED = """
import os, signal, sys
from pathlib import Path
from flows import serve
from flows.config import load
with getattr(serve, sys.argv[1])(load(Path("foldin.toml")), *map(int, sys.argv[2:])) as url:
    print(url, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("server", ["temporary_prefect", "mlflow_server"])
def test_a_server_ends_with_a_process_that_is_killed(workshop, mark, server):
    command = [sys.executable, "-c", KILLED, server, *([str(free_port())] if server == "mlflow_server" else [])]
    died = subprocess.run(
        command, cwd=workshop, capture_output=True, text=True, timeout=120
    )  # ends: no pipe stays open
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert died.stdout.startswith("http://127.0.0.1:")
    wait_until(lambda: not marked(mark), 20)
    assert not answers(died.stdout.strip())


def test_a_killed_watch_leaves_no_process(workshop, config, zoo, mark):
    register_expert(tracking_uri(config), "tiny-experts", zoo / "expert-1", "task-1")
    command = [sys.executable, "-m", "flows.cli", "watch", "tiny"]
    with subprocess.Popen(command, cwd=workshop, stderr=subprocess.PIPE, text=True) as watching:
        next(line for line in watching.stderr if "folding into tiny v1" in line)
        assert len(marked(mark)) == 3, "the watch, one Prefect server and what ends it"
        watching.kill()
    wait_until(lambda: not marked(mark), 20)


@pytest.mark.parametrize(
    ("server", "name", "option"),
    [(prefect_server, "Prefect", "--prefect-port"), (mlflow_server, "MLflow", "--mlflow-port")],
)
def test_a_port_that_is_taken_is_named_with_the_option_that_chooses_another(config, server, name, option, mark):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(FoldinError) as refused, server(config, port):
            pass
    assert refused.value.refusal.code == "E_SERVER"
    assert f"{name} at 127.0.0.1:{port}: the port is taken. Expected a free port." in str(refused.value)
    assert f"Choose another port with {option}" in str(refused.value)
    assert marked(mark) == []


def test_a_server_that_does_not_start_says_where_its_words_are(config, monkeypatch, mark):
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "nosuch://database")
    with (
        pytest.raises(
            FoldinError, match=r"E_SERVER .*did not start\. Found exit status \d+; its words are in"
        ) as refused,
        temporary_prefect(config),
    ):
        pass
    log = config.home / "prefect-server.log"
    assert str(log) in str(refused.value)
    assert "nosuch" in log.read_text()
    assert marked(mark) == []


def test_what_fails_while_a_server_starts_ends_it(config, mark):
    with pytest.raises(ZeroDivisionError), temporary_prefect(config, lambda: 1 / 0):
        pass
    assert marked(mark) == []
    assert "PREFECT_API_URL" not in os.environ


@pytest.fixture
def elsewhere():
    """The API of a Prefect that is somebody else's: it says that it is well, and no more."""

    class Well(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/api/health" else 404)
            self.end_headers()

        def log_message(self, *words):
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Well) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()
        thread.join()


def test_a_named_prefect_is_used_and_none_is_started(config, monkeypatch, mark, elsewhere):
    monkeypatch.setenv("PREFECT_API_URL", elsewhere)
    with prefect_server(config) as url, temporary_prefect(config) as other:
        assert url == other == elsewhere
        assert marked(mark) == []
    assert os.environ["PREFECT_API_URL"] == elsewhere


def test_a_named_prefect_that_does_not_answer_is_an_error_and_none_is_started(config, monkeypatch, mark):
    url = f"http://127.0.0.1:{free_port()}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    with pytest.raises(FoldinError, match=f"E_SERVER {url}: the Prefect API does not answer.*unset PREFECT_API_URL"):
        temporary_prefect(config).__enter__()
    assert marked(mark) == []


def test_a_named_mlflow_is_used_and_none_is_started(workshop, mark):
    toml = workshop / "foldin.toml"
    toml.write_text(toml.read_text().replace("[registry]\n", '[registry]\ntracking_uri = "http://mlflow.example"\n'))
    with mlflow_server(load(toml)) as url:
        assert url == "http://mlflow.example"
        assert marked(mark) == []


def tethered(*command):
    return subprocess.Popen([sys.executable, "-m", "flows.tether", *command], stdin=subprocess.PIPE)


def test_a_tether_passes_the_exit_status_on():
    with tethered(sys.executable, "-c", "raise SystemExit(7)") as tether:
        assert tether.wait(20) == 7


@pytest.mark.parametrize(("let_go", "stubborn"), [("close", "signal.SIG_IGN"), ("terminate", "signal.SIG_DFL")])
def test_a_tether_ends_the_command_and_what_it_started(mark, let_go, stubborn):
    child = f"import signal, time; signal.signal(signal.SIGTERM, {stubborn}); time.sleep(600)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    with tethered(sys.executable, "-c", parent) as tether:
        wait_until(lambda: len(marked(mark)) == 3, 20)
        time.sleep(0.5)  # until the child has set its signal handler
        tether.stdin.close() if let_go == "close" else tether.terminate()
        tether.wait(20)
    assert marked(mark) == []


RUN = """
import signal, sys, time
from pathlib import Path
def end(*_):
    time.sleep(1)
    Path(sys.argv[1]).write_text("done")
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""
WORKER = """
import signal, subprocess, sys
run = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: (run.kill(), sys.exit(3)))
run.wait()
signal.pause()
"""


def test_a_tether_lets_what_leads_its_own_session_end_first(tmp_path, mark):
    words = tmp_path / "words"
    command = [sys.executable, "-m", "flows.tether", sys.executable, "-c", WORKER, RUN, str(words)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tether:
        assert tether.stdout.readline() == b"ready\n"
        tether.stdin.close()
        assert tether.wait(20) == 3
    assert words.read_text() == "done"
    assert marked(mark) == []
