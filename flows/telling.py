"""What a person hears while foldin works: lines and bars on stderr, the same lines in the Prefect run's log.

With FOLDIN_LOG=json every line on stderr is one JSON object that names what it is about, and there are no bars.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING

from flows.about import facts
from flows.environment import log_as_json
from flows.hiding import conceal_logs, hidden

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

logger = logging.getLogger("foldin")  # named in PREFECT_LOGGING_EXTRA_LOGGERS, so that Prefect keeps its lines
logger.setLevel(logging.INFO)
conceal_logs()


class _Voice:
    """Whether anything is said aloud, and the spinner that turns until the next line."""

    loud: bool | None = None  # None in a worker's process, where nobody was asked
    spinner: "Status | None" = None


def speak(loud: bool) -> None:
    """Whether lines and bars go to stderr as well as to the log."""
    _Voice.loud = loud


def say(text: str) -> None:
    """One line for people."""
    logger.info(text)
    hush()
    if _Voice.loud and not log_as_json():
        _console().print(hidden(text), markup=False)


class _Lines(logging.Handler):
    """The log as JSON on stderr, where the environment asks for that; errors also when nothing else is to be said."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        if log_as_json() and (_Voice.loud is not False or record.levelno >= logging.ERROR):
            sys.stderr.write(f"{line_of(record)}\n")
            sys.stderr.flush()


logger.addHandler(_Lines())


def line_of(record: logging.LogRecord) -> str:
    """A line of the log as one JSON object: time (UTC), level, message, and what the work at hand is about."""
    said = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "message": record.getMessage(),
        **facts(),
    }
    if record.exc_info:
        said["error"] = record.exc_text or logging.Formatter().formatException(record.exc_info)
    return json.dumps(said, ensure_ascii=False)


def complain(text: str) -> None:
    """One line about what ended the work, said whatever else is not."""
    hush()
    if log_as_json():
        logger.error(text)
    else:
        sys.stderr.write(f"error: {hidden(text)}\n")


def _terminal() -> bool:
    """Whether somebody watches who can be shown what moves."""
    return bool(_Voice.loud) and sys.stderr.isatty() and not log_as_json()


def busy(text: str) -> None:
    """A spinner, on a terminal, until the next line or bar: for what takes seconds and has no steps."""
    if _terminal():
        hush()
        _Voice.spinner = _console().status(text)
        _Voice.spinner.start()


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, told (done, total). Elsewhere silent: `say` marks the steps."""
    hush()
    if not _terminal():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console(), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def hush() -> None:
    """Stop the spinner, which else would keep the terminal's cursor hidden."""
    if _Voice.spinner is not None:
        _Voice.spinner.stop()
        _Voice.spinner = None


@cache
def _console() -> "Console":
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)
