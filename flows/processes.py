"""Servers as processes of this machine that end with the one that started them."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from flows.config import Config
from flows.environment import child_environment
from registry.records import FoldinError, Refusal

HOST = "127.0.0.1"
PATIENCE = 120.0  # seconds a server may take to start; migrating an empty database on a busy machine takes 30


class Page(NamedTuple):
    """One server that is to run."""

    name: str  # "Prefect"
    port: int
    option: str  # of the command line, that chooses another port; "" when the port is any free one
    health: str  # path that answers once the server is up

    @property
    def url(self) -> str:
        """Where it will answer."""
        return f"http://{HOST}:{self.port}"


@contextmanager
def server_process(
    config: Config, page: Page, command: list[str], environment: Mapping[str, str]
) -> "Iterator[subprocess.Popen[bytes]]":
    """A server that is starting; it ends with the block, or with this process, however that ends."""
    check_free(page)
    config.home.mkdir(parents=True, exist_ok=True)
    server = tethered(command, environment, log_of(config, page))
    assert server.stdin is not None
    try:
        yield server
    finally:
        server.stdin.close()
        server.wait()


def tethered(command: Sequence[str], environment: Mapping[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """A process that has started and ends when its standard input is closed, or with this process."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.tether", *command],
            env=child_environment(environment),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,  # who kills our process group must not kill the one that ends the server
        )


def log_of(config: Config, page: Page) -> Path:
    """What a server says."""
    return config.home / f"{page.name.split()[0].lower()}-server.log"


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def check_free(page: Page) -> None:
    """Nothing, when the port is free. Whoever else listens there would be taken for the new server."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, page.port))
        except OSError as error:
            raise FoldinError(_refused(page, "the port is taken", "a free port", error.strerror or "")) from error


def wait_for(page: Page, server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the server answers, or E_SERVER when it ended or stayed silent."""
    patience = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < patience:
        try:
            with urllib.request.urlopen(f"{page.url}{page.health}", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.1)
    ended = f"exit status {server.returncode}" if server.poll() is not None else f"no answer in {PATIENCE:.0f} s"
    raise FoldinError(_refused(page, "the server did not start", "", f"{ended}; its words are in {log}"))


def _refused(page: Page, what: str, expected: str, found: str) -> Refusal:
    where = f"{page.name} at {HOST}:{page.port}"
    remedy = f"choose another port with {page.option}" if page.option else "read the log, then run again"
    if page.name == "Prefect":
        remedy += f", or use the server that runs there: PREFECT_API_URL=http://{HOST}:{page.port}/api"
    return Refusal("E_SERVER", what, where, "", "", expected, found, remedy)
