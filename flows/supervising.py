"""Services that are to be there: started in order, looked at, started again when they end or stop answering."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flows.processes import Kept, Service, kept_in
from flows.telling import say
from registry.records import FoldinError

LOOK = 0.5  # seconds between two looks at the processes
PROBE = 2.0  # seconds between two questions to a service that has answered
UNANSWERED = 3  # questions in a row after which it is started again
LONGEST_PAUSE = 30.0  # seconds before a service that keeps ending is started again
CALM = 60.0  # seconds of life after which earlier ends count no more


class Supervisor:
    """Services on this machine, their logs in one folder."""

    def __init__(self, services: Sequence[Service], logs: Path, noted: Callable[[Sequence[Kept]], None]) -> None:
        """Keep services whose logs go to a folder; `noted` hears whenever one was started."""
        logs.mkdir(parents=True, exist_ok=True)
        self._kept = [kept_in(logs, each) for each in services]
        self._noted = noted

    def start(self, stop: threading.Event) -> None:
        """Start all, each when the ones before it answer; give up when `stop` is set.

        Raises:
            FoldinError: E_SERVER when a port is taken, or a service does not answer.
        """
        for kept in self._kept:
            if kept.service.page.port:
                kept.service.page.check_free()
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
                try:
                    self._look(kept)
                except (FoldinError, OSError) as error:
                    say(f"{kept.service.name}: {error}")  # the next look tries it again

    def end(self) -> None:
        """End all, the last one first."""
        for kept in reversed(self._kept):
            kept.end()

    def _look(self, kept: Kept) -> None:
        """Start a service again when it ended or does not answer; one that keeps ending is given longer pauses."""
        now = time.monotonic()
        if kept.lives and not _is_silent(kept, now):
            return
        if now < kept.since + min(2.0**kept.ends, LONGEST_PAUSE):
            return
        say(f"{kept.service.name} is started again; its words are in {kept.log}")
        kept.end()
        kept.restarts, kept.ends = kept.restarts + 1, kept.ends + 1
        kept.start()
        self.note()


def _is_silent(kept: Kept, now: float) -> bool:
    """Whether a living service has stopped answering, or takes too long to start."""
    if now > kept.since + CALM:
        kept.ends = 0
    if not kept.answered or now > kept.asked + PROBE:
        kept.ask()
    return kept.is_late or (kept.answered and kept.unanswered >= UNANSWERED)
