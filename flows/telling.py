"""What a person hears while foldin works: lines and bars on stderr, the same lines in the Prefect run's log."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

logger = logging.getLogger("foldin")  # named in PREFECT_LOGGING_EXTRA_LOGGERS, so that Prefect keeps its lines
logger.setLevel(logging.INFO)


class _Voice:
    """Whether anything is said aloud, and the spinner that turns until the next line."""

    loud = False
    spinner: "Status | None" = None


def speak(loud: bool) -> None:
    """Whether lines and bars go to stderr as well as to the log."""
    _Voice.loud = loud


def say(text: str) -> None:
    """One line for people."""
    logger.info(text)
    hush()
    if _Voice.loud:
        _console().print(text, markup=False)


def busy(text: str) -> None:
    """A spinner, on a terminal, until the next line or bar: for what takes seconds and has no steps."""
    if _Voice.loud and sys.stderr.isatty():
        hush()
        _Voice.spinner = _console().status(text)
        _Voice.spinner.start()


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, told (done, total). Elsewhere silent: `say` marks the steps."""
    hush()
    if not (_Voice.loud and sys.stderr.isatty()):
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
