"""Services as processes of this machine, which end with the one that started them."""

import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from flows.environment import child_environment
from registry.records import FoldinError, Refusal

HOST = "127.0.0.1"
PATIENCE = 120.0  # seconds a service may take to start; migrating an empty database on a busy machine takes 30


class Page(NamedTuple):
    """Where a service is to answer."""

    name: str  # "Prefect"
    port: int  # 0 when it serves nothing
    option: str  # that chooses another port; "" when the port is any free one
    health: str  # path that answers once the service is up; "" when none does

    @property
    def url(self) -> str:
        """Where it will answer."""
        return f"http://{HOST}:{self.port}"

    def answers(self) -> bool:
        """Whether it answers now."""
        try:
            with urllib.request.urlopen(f"{self.url}{self.health}", timeout=10):
                return True
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def check_free(self) -> None:
        """Nothing, when the port is free. Whoever else listens there would be taken for the new service."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, self.port))
            except OSError as error:
                raise FoldinError(self._taken(error.strerror or "")) from error

    def _taken(self, found: str) -> Refusal:
        remedy = f"choose another port with {self.option}" if self.option else "run again"
        if self.name == "Prefect":
            remedy += f", or use the server that runs there: PREFECT_API_URL=http://{HOST}:{self.port}/api"
        where = f"{self.name} at {HOST}:{self.port}"
        return Refusal("E_SERVER", "the port is taken", where, "", "", "a free port", found, remedy)


@dataclass(frozen=True)
class Service:
    """One process, as it is started and asked."""

    page: Page
    command: Callable[[], Sequence[str]]  # asked when it is started: it may name what an earlier service made
    environment: Mapping[str, str] = field(default_factory=dict)
    answers: Callable[[], bool] | None = None  # asks it, quickly; None: at its path of health, if it has one
    prepare: Callable[[], None] = lambda: None  # what must be done each time it was started and answers

    @property
    def name(self) -> str:
        """In lower case, as its log is called."""
        return self.page.name.split()[0].lower()

    def is_well(self) -> bool:
        """Whether it answers."""
        if self.answers is not None:
            return self.answers()
        return self.page.answers() if self.page.health else True


@dataclass
class Kept:
    """A service and what became of it."""

    service: Service
    log: Path
    process: "subprocess.Popen[bytes] | None" = None
    since: float = 0.0  # when it was started, on the monotonic clock
    answered: bool = False  # once since then, and it was prepared
    asked: float = 0.0
    unanswered: int = 0  # questions in a row
    restarts: int = 0
    ends: int = 0  # lately, in a row

    @property
    def lives(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start the process; it is not waited for."""
        self.process = tethered(self.service.command(), self.service.environment, self.log)
        self.since = self.asked = time.monotonic()
        self.answered, self.unanswered = False, 0

    def end(self) -> None:
        """End the process and what it started."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()

    def ask(self) -> None:
        """See whether it answers, and prepare it when that is its first answer."""
        self.asked = time.monotonic()
        well = self.service.is_well() and self.lives
        if well and not self.answered:
            self.service.prepare()
            self.answered = True
        self.unanswered = 0 if well else self.unanswered + 1

    def await_answer(self, stop: threading.Event | None = None) -> None:
        """Until the service answers and is prepared, or is to stop.

        Raises:
            FoldinError: E_SERVER when it ended or stayed silent.
        """
        stop = stop or threading.Event()
        while not stop.is_set():
            self.ask()
            if self.answered:
                return
            if not self.lives or self.is_late:
                raise FoldinError(self._silent())
            stop.wait(0.1)

    @property
    def is_late(self) -> bool:
        """Whether it should have answered by now, and never has."""
        return not self.answered and time.monotonic() > self.since + PATIENCE

    def _silent(self) -> Refusal:
        silence = f"no answer in {PATIENCE:.0f} s"
        found = silence if self.lives or self.process is None else f"exit status {self.process.returncode}"
        found, remedy = f"{found}; its words are in {self.log}", "read the log, then run again"
        return Refusal("E_SERVER", "the service did not start", self.service.page.name, "", "", "", found, remedy)


@contextmanager
def started(service: Service, folder: Path) -> Iterator[Kept]:
    """A service that is starting, its log in a folder; it ends with the block, or with this process, however that ends.

    Raises:
        FoldinError: E_SERVER when its port is taken.
    """
    service.page.check_free()
    folder.mkdir(parents=True, exist_ok=True)
    kept = kept_in(folder, service)
    kept.start()
    try:
        yield kept
    finally:
        kept.end()


def kept_in(folder: Path, service: Service) -> Kept:
    """A service that is to be started, its log in a folder."""
    return Kept(service, folder / f"{service.name}-server.log")


def tethered(command: Sequence[str], environment: Mapping[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """A process that has started and ends when its standard input is closed, or with this process."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            python("flows.tether", *command),
            env=child_environment(environment),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,  # who kills our process group must not kill the one that ends the server
        )


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module as this Python does."""
    return [sys.executable, "-m", module, *arguments]


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
