"""Processes that are to be there: started in order, looked at, started again when they end or stop answering."""

import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flows.processes import PATIENCE, Page, check_free, tethered
from flows.telling import say
from registry.records import FoldinError, Refusal

LOOK = 0.5  # seconds between two looks at the processes
PROBE = 2.0  # seconds between two questions to a service
UNANSWERED = 3  # questions in a row after which it is started again
LONGEST_PAUSE = 30.0  # seconds before a service that keeps ending is started again
CALM = 60.0  # seconds of life after which earlier ends count no more


@dataclass(frozen=True)
class Service:
    """One process."""

    page: Page  # with port 0 and no path of health when it serves nothing
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
        if not self.page.health:
            return True
        try:
            with urllib.request.urlopen(f"{self.page.url}{self.page.health}", timeout=5):
                return True
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False


@dataclass
class Kept:
    """A service and what became of it."""

    service: Service
    log: Path
    process: "subprocess.Popen[bytes] | None" = None
    restarts: int = 0
    ends: int = 0  # lately, in a row
    unanswered: int = 0
    since: float = 0.0  # when it was started, on the monotonic clock
    asked: float = 0.0

    @property
    def lives(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start the process; it is not waited for."""
        self.process = tethered(self.service.command(), self.service.environment, self.log)
        self.since = self.asked = time.monotonic()
        self.unanswered = 0

    def end(self) -> None:
        """End the process and what it started."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()

    def await_answer(self, stop: threading.Event) -> None:
        """Until the service answers and is prepared, or is to stop.

        Raises:
            FoldinError: E_SERVER when it ended or stayed silent.
        """
        while not stop.is_set():
            if self.lives and self.service.is_well():
                self.service.prepare()
                return
            if not self.lives or time.monotonic() > self.since + PATIENCE:
                raise FoldinError(self._silent())
            stop.wait(0.1)

    def _silent(self) -> Refusal:
        silence = f"no answer in {PATIENCE:.0f} s"
        found = silence if self.lives or self.process is None else f"exit status {self.process.returncode}"
        what, remedy = "the service did not start", "read the log, mend it, then start it again"
        return Refusal("E_SERVER", what, self.service.name, "", "", "", f"{found}; its words are in {self.log}", remedy)


class Supervisor:
    """Services on this machine, their logs in one folder."""

    def __init__(self, services: Sequence[Service], logs: Path, noted: Callable[[Sequence[Kept]], None]) -> None:
        """Keep services whose logs go to a folder; `noted` hears whenever one was started."""
        logs.mkdir(parents=True, exist_ok=True)
        self._kept = [Kept(each, logs / f"{each.name}-server.log") for each in services]
        self._noted = noted

    def start(self, stop: threading.Event) -> None:
        """Start all, each when the ones before it answer; give up when `stop` is set.

        Raises:
            FoldinError: E_SERVER when a port is taken, or a service does not answer.
        """
        for kept in self._kept:
            if kept.service.page.port:
                check_free(kept.service.page)
        for kept in self._kept:
            kept.start()
            kept.await_answer(stop)
            if stop.is_set():
                return
            self.note()

    def note(self) -> None:
        """Tell who listens what runs."""
        self._noted(self._kept)

    def keep(self, stop: threading.Event) -> None:
        """Look after them until `stop` is set."""
        while not stop.wait(LOOK):
            for kept in self._kept:
                self._look(kept)

    def end(self) -> None:
        """End all, the last one first."""
        for kept in reversed(self._kept):
            kept.end()

    def _look(self, kept: Kept) -> None:
        """Start a service again when it ended or does not answer; one that keeps ending is given longer pauses."""
        now = time.monotonic()
        if kept.lives and not self._is_silent(kept, now):
            return
        if now < kept.since + min(2.0**kept.ends, LONGEST_PAUSE):
            return
        say(f"{kept.service.name} is started again; its words are in {kept.log}")
        kept.end()
        kept.restarts, kept.ends = kept.restarts + 1, kept.ends + 1
        kept.start()
        self.note()
        threading.Thread(target=_prepare, args=(kept,), daemon=True).start()

    def _is_silent(self, kept: Kept, now: float) -> bool:
        """Whether a living service has not answered several questions in a row."""
        if now > kept.since + CALM:
            kept.ends = 0
        if now < kept.asked + PROBE:
            return kept.unanswered >= UNANSWERED
        kept.asked = now
        kept.unanswered = 0 if kept.service.is_well() else kept.unanswered + 1
        return kept.unanswered >= UNANSWERED


def _prepare(kept: Kept) -> None:
    """What must be done once a service that was started again answers, while the others are looked at."""
    try:
        kept.await_answer(threading.Event())
    except (FoldinError, OSError) as error:
        say(str(error))  # the next look starts it again
