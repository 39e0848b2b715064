"""Waking lines: a flow run of a line's `watch`, at once for the first hint, once for all that come shortly after."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from registry.records import FoldinError, Refusal

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

QUIET = 2.0  # seconds between two runs of a line; a burst of a thousand registrations is no thousand runs


class Waker:
    """What makes runs, at most one a line at a time. For one event loop."""

    def __init__(self, make_run: Callable[[str, str], Awaitable[None]], quiet: float = QUIET) -> None:
        """Make runs with `make_run(line, name of the event)`, `quiet` seconds apart."""
        self._make_run, self._quiet = make_run, quiet
        self._next: dict[str, asyncio.Task[None]] = {}
        self._last: dict[str, float] = {}

    async def wake(self, line: str, event: str) -> None:
        """Return once a run of the line was made after this call; raises what `make_run` raises."""
        if line not in self._next:
            self._next[line] = asyncio.create_task(self._make(line, event))
        await asyncio.shield(self._next[line])  # one who hangs up does not cancel the others' run

    async def _make(self, line: str, event: str) -> None:
        now = asyncio.get_running_loop().time
        await asyncio.sleep(max(0.0, self._last.get(line, 0.0) + self._quiet - now()))
        del self._next[line]  # who comes from now on may have seen what this run does not
        self._last[line] = now()
        await self._make_run(line, event)


async def make_run(client: "PrefectClient", line: str, event: str) -> None:
    """A run of the line's `watch` in Prefect, one for each event, whoever else was told of it.

    Raises:
        FoldinError: E_SERVER when Prefect does not answer, or has no such deployment.
    """
    from httpx import HTTPError, HTTPStatusError
    from prefect.exceptions import ObjectNotFound

    name, key = f"watch/{line}", f"foldin {line}: {event}"
    try:
        deployment = await client.read_deployment_by_name(name)
        await client.create_flow_run_from_deployment(deployment.id, idempotency_key=key, tags=["foldin", line, "woken"])
    except ObjectNotFound as error:
        what, remedy = "Prefect has no such deployment", "start `foldin serve`"
        raise FoldinError(Refusal("E_SERVER", what, f"deployment {name}", remedy=remedy)) from error
    except HTTPError as error:
        what, found = "Prefect does not answer", f"{type(error).__name__}: {error}"
        shut = isinstance(error, HTTPStatusError) and error.response.status_code in (401, 403)
        remedy = "set PREFECT_API_AUTH_STRING to the server's USER:PASSWORD" if shut else ""
        raise FoldinError(Refusal("E_SERVER", what, f"deployment {name}", found=found, remedy=remedy)) from error
