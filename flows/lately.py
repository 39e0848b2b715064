"""Answers that are remembered for a moment: however many ask at once, one question goes on."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Lately(Generic[T]):
    """What was answered lately. For one event loop."""

    def __init__(self, ask: Callable[[], Awaitable[T]], seconds: float) -> None:
        """Ask with `ask`, which must end, once in so many `seconds` at most."""
        self._ask, self._seconds = ask, seconds
        self._asked: asyncio.Task[T] | None = None
        self._answered = -math.inf

    async def __call__(self) -> T:
        """The answer, at most `seconds` old; raises what `ask` raises."""
        now = asyncio.get_running_loop().time
        if self._asked is None or (self._asked.done() and now() > self._answered + self._seconds):
            self._asked = asyncio.create_task(self._noted())
        return await asyncio.shield(self._asked)  # one who hangs up takes nobody's answer away

    async def _noted(self) -> T:
        try:
            return await self._ask()
        finally:
            self._answered = asyncio.get_running_loop().time()
