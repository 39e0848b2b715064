"""What of the production files can run without containers: the database's script, prefect.yaml, health of a worker."""

import base64
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import mkdtemp
from zoneinfo import ZoneInfo

import pytest

from flows.config import load
from flows.processes import free_port
from flows.serve import prefect_server
from tests.flows.patience import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*psycopg.Connection:ResourceWarning")]
INFRA = Path(__file__).resolve().parents[2] / "infra"
SQL = "SELECT count(*) FROM pg_extension WHERE extname = 'pg_trgm'"


@pytest.fixture(scope="module")
def postgres(secrets):
    """The port of a PostgreSQL that `infra/postgres/init.sh` has prepared; None where there is none."""
    if not shutil.which("initdb") or not shutil.which("pg_ctl", path=programs()):
        yield None
        return
    folder, port = Path(mkdtemp(dir="/tmp")), free_port()
    try:
        shutil.copytree(secrets, folder / "secrets")
        shutil.copy(INFRA / "postgres/init.sh", folder)
        if os.getuid() == 0:
            subprocess.run(["chown", "-R", "postgres", str(folder)], check=True)
        password = f"--pwfile={folder}/secrets/postgres_database_password"
        person(
            folder,
            "initdb",
            "-D",
            "data",
            "-U",
            "postgres",
            "--auth-local=trust",
            "--auth-host=scram-sha-256",
            password,
        )
        options = f"-c listen_addresses=127.0.0.1 -c fsync=off -p {port} -k {folder}"
        person(folder, "pg_ctl", "-D", "data", "-w", "-l", "log", "-o", options, "start")
        try:
            where = [f"PGHOST={folder}", f"PGPORT={port}", f"SECRETS={folder}/secrets"]
            person(folder, "env", *where, "bash", "init.sh")
            yield port
        finally:
            person(folder, "pg_ctl", "-D", "data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def programs():
    """Where PostgreSQL's programs are: beside the real `initdb`."""
    return f"{Path(os.path.realpath(shutil.which('initdb'))).parent}:{os.environ['PATH']}"


def person(folder, *command):
    """Run as somebody who is not root, which PostgreSQL wants."""
    who = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"] if os.getuid() == 0 else []
    environment = {"PATH": programs(), "LC_ALL": "C"}
    subprocess.run([*who, *command], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=60)


def url_of(secrets, postgres, name, database):
    password = (secrets / f"{name}_database_password").read_text()
    return f"postgresql://{name}:{password}@127.0.0.1:{postgres}/{database}"


def test_everybody_gets_a_database_and_nobody_another_one(postgres, secrets):
    if postgres is None:
        pytest.skip("no PostgreSQL is installed whose server could be started")
    import psycopg

    names = ("foldin", "mlflow", "prefect")
    for name in names:
        with psycopg.connect(url_of(secrets, postgres, name, name), connect_timeout=10) as connection:
            assert connection.execute(SQL).fetchone() == (int(name == "prefect"),)
            connection.execute("CREATE TABLE mine (id int)")
        for database in set(names) - {name}:
            with pytest.raises(psycopg.OperationalError, match="permission denied"):
                psycopg.connect(url_of(secrets, postgres, name, database), connect_timeout=10)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(f"postgresql://foldin:guess@127.0.0.1:{postgres}/foldin", connect_timeout=10)


@pytest.fixture
def api(postgres, secrets, tmp_path, monkeypatch):
    """A Prefect server as in compose.yaml: with a login, and on PostgreSQL where there is one."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    login = (secrets / "prefect_auth").read_text()
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", login)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", login)
    if postgres is not None:
        url = "postgresql+asyncpg://prefect@127.0.0.1:{}/prefect"
        monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", url.format(postgres))
        monkeypatch.setenv("PGPASSWORD", (secrets / "prefect_database_password").read_text())
    (tmp_path / "foldin.toml").write_text("")
    with prefect_server(load(tmp_path / "foldin.toml"), free_port()) as url:
        yield url


def ask(api, path, question):
    login = base64.b64encode(os.environ["PREFECT_API_AUTH_STRING"].encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {login}"}
    request = urllib.request.Request(f"{api}{path}", json.dumps(question).encode(), headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read())


@contextmanager
def worker(api, tmp_path, pool):
    command = ["prefect", "worker", "start", "--pool", pool, "--type", "process"]
    template = ["--base-job-template", str(INFRA / "pools/process.json")]
    with open(tmp_path / f"{pool}.log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-m", *command, *template], stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def is_alive(pool):
    command = [sys.executable, str(INFRA / "worker_alive.py"), pool]
    return subprocess.run(command, capture_output=True, timeout=20).returncode == 0


@pytest.mark.chaos
def test_prefect_takes_the_deployments_and_schedules_the_nights(api, tmp_path, monkeypatch):
    assert not is_alive("foldin-gpu")  # there is no such pool
    with worker(api, tmp_path, "foldin-gpu"):
        for kind, pool in (("process", "foldin-control"), ("docker", "on-docker"), ("kubernetes", "on-kubernetes")):
            template = json.loads((INFRA / "pools" / f"{kind}.json").read_text())
            ask(api, "/work_pools/", {"name": pool, "type": kind, "base_job_template": template})
        wait_until(lambda: is_alive("foldin-gpu"), 60)
        assert not is_alive("foldin-control")  # nobody works there
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        file = ["--prefect-file", str(INFRA / "prefect.yaml")]
        deployed = subprocess.run([*command, *file], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    found = {each["entrypoint"]: each for each in ask(api, "/deployments/filter", {})}
    assert {each["work_pool_name"] for each in found.values()} == {"foldin-control", "foldin-gpu"}
    folds = {entrypoint for entrypoint, each in found.items() if each["work_pool_name"] == "foldin-gpu"}
    assert folds == {"flows.merge.merge_expert", "flows.batching.merge_batch"}
    assert found["flows.watch.watch"]["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    assert len(found) == 6

    def nights():
        """When the scheduled runs of all deployments are to start."""
        runs = ask(api, "/flow_runs/filter", {"flow_runs": {"state": {"name": {"any_": ["Scheduled"]}}}})
        assert {run["deployment_id"] for run in runs} <= {found["flows.nightly.nightly"]["id"]}
        return [run["expected_start_time"] for run in runs]

    local = [datetime.fromisoformat(each).astimezone(ZoneInfo("Europe/Berlin")) for each in wait_until(nights, 60)]
    assert {(night.hour, night.minute) for night in local} == {(2, 0)}

    # Who is refused, or hears nothing, does not know; the last word of the worker is still fresh.
    assert is_alive("foldin-gpu")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "foldin:guess")
    assert not is_alive("foldin-gpu")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert not is_alive("foldin-gpu")
