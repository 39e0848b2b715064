"""What keeps running: the deployments of every line, and the pages to look at."""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from flows import wiring
from flows.config import Config
from flows.telling import say
from registry.records import FoldinError, Refusal


def deployments(config: Config, config_file: str) -> list[Any]:
    """Of every line: `watch` on its interval or `nightly` on its cron, the other one and `rollback` on demand."""
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType

    from flows.rollback import rollback
    from flows.watch import nightly, watch

    found = []
    for line, settings in config.lines.items():
        common: dict[str, Any] = {"tags": ["foldin", line], "entrypoint_type": EntrypointType.MODULE_PATH}
        parameters = {"line": line, "config_file": config_file}
        interval = timedelta(seconds=settings.interval) if settings.trigger == "on-register" else None
        cron = Cron(settings.schedule, timezone=settings.timezone) if settings.trigger != "manual" else None
        found += [
            watch.to_deployment(line, parameters=parameters, interval=interval, **common),
            nightly.to_deployment(line, parameters=parameters, schedule=cron, **common),
            rollback.to_deployment(line, parameters={**parameters, "because": "asked for in Prefect"}, **common),
        ]
    return found


def serve(config: Config, config_file: str, limit: int) -> None:
    """Keep the deployments of every line running until interrupted; `limit` flow runs at a time."""
    import prefect

    with prefect_server(config):
        prefect.serve(*deployments(config, config_file), limit=limit)


@contextmanager
def prefect_server(config: Config, port: int = 4200) -> Iterator[str]:
    """The URL of the Prefect API: the one that PREFECT_API_URL names, else a server of our own while the block runs."""
    named = wiring.prefect_api_url()
    if named:
        yield named
        return
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/api"
    try:
        wiring.use_prefect_api(url)
        _wait_for(url, server)
        say(f"Prefect: http://127.0.0.1:{port}")
        yield url
    finally:
        server.terminate()
        server.wait()


@contextmanager
def mlflow_server(config: Config, port: int = 5000) -> Iterator[str]:
    """The URL of MLflow's pages: the configured server's, else one of our own on the embedded database."""
    uri = wiring.tracking_uri(config)
    if uri.startswith("http"):
        yield uri
        return
    root = wiring.artifact_root(config)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", str(port)]
    command += ["--default-artifact-root", root] if root else []
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://127.0.0.1:{port}", server)
        say(f"MLflow:  http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _wait_for(url: str, server: "subprocess.Popen[bytes]", seconds: float = 120.0) -> None:
    """Until something answers at the URL.

    Raises:
        FoldinError: E_SERVER when the server ended or stayed silent.
    """
    health = f"{url}/health"
    patience = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < patience:
        try:
            with urllib.request.urlopen(health, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    found = f"exit status {server.returncode}" if server.poll() is not None else f"no answer in {seconds:.0f} s"
    raise FoldinError(
        Refusal("E_SERVER", "the server did not start", url, found=found, remedy="see whether the port is free")
    )
