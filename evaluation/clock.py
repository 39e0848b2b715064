"""A time budget: what takes longer is given up, and counts as not measured."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")


class Clock(NamedTuple):
    """A budget that runs since `start`."""

    seconds: float  # inf for no limit
    start: float  # of time.monotonic

    def taken(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def check(self) -> None:
        """Nothing while there is time left; raises TimeoutError when there is none."""
        if self.taken() >= self.seconds:
            raise TimeoutError(f"timed out after {self.seconds:g} s (evaluation_seconds)")


def started(seconds: float) -> Clock:
    """A budget that starts now."""
    return Clock(seconds, time.monotonic())


def within(clock: Clock, function: Callable[[], Result]) -> Result:
    """What `function` returns or raises; TimeoutError when the time is over first.

    For code that nobody can ask to stop. It runs in a thread of its own, and no thread can be ended from outside: after
    the budget it is abandoned, goes on with its memory until it ends by itself, and dies with the process.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - raised again where it was asked for
            errors.append(error)

    clock.check()
    thread = threading.Thread(target=run, name="suite", daemon=True)
    thread.start()
    thread.join(min(clock.seconds - clock.taken(), threading.TIMEOUT_MAX))
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"timed out after {clock.seconds:g} s (evaluation_seconds)")
    return results[0]
