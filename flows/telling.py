"""What a person hears while foldin works: lines and bars on stderr, the same lines in the Prefect run's log."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("foldin")  # named in PREFECT_LOGGING_EXTRA_LOGGERS, so that Prefect keeps its lines
_loud = False


def speak(loud: bool) -> None:
    """Whether lines and bars go to stderr as well as to the log."""
    global _loud
    _loud = loud


def say(text: str) -> None:
    """One line for people."""
    logger.info(text)
    if _loud:
        from rich.console import Console

        Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; told (done, total). Elsewhere silent: `say` marks the steps."""
    if not (_loud and sys.stderr.isatty()):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
