"""Waking lines: a flow run of a line's `watch`, at once for the first hint, once for all that come shortly after."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID

from registry.records import FoldinError, Refusal

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

AFTER = 3.0  # seconds between two looks at what became of a run
QUIET = 2.0  # seconds between two runs of a line; a burst of a thousand registrations is no thousand runs

Rest = Coroutine[Any, Any, None]


class Waker:
    """What makes runs, at most one a line at a time. For one event loop."""

    def __init__(self, make_run: Callable[[str, str], Awaitable[Rest | None]], quiet: float = QUIET) -> None:
        """Make runs with `make_run(line, name of the event)`, `quiet` seconds apart.

        What that returns is done in the background, until the line is woken again.
        """
        self._make_run, self._quiet = make_run, quiet
        self._next: dict[str, asyncio.Task[None]] = {}
        self._last: dict[str, float] = {}
        self._rests: dict[str, asyncio.Task[None]] = {}

    async def wake(self, line: str, event: str) -> None:
        """Return once a run of the line was made after this call; raises what `make_run` raises."""
        if line not in self._next:
            self._next[line] = asyncio.create_task(self._make(line, event))
        await asyncio.shield(self._next[line])  # one who hangs up does not cancel the others' run

    async def _make(self, line: str, event: str) -> None:
        now = asyncio.get_running_loop().time
        await asyncio.sleep(max(0.0, self._last.get(line, -math.inf) + self._quiet - now()))
        del self._next[line]  # who comes from now on may have seen what this run does not
        self._last[line] = now()
        try:
            rest = await self._make_run(line, event)
        except FoldinError:
            self._go_on(line, self._try_again(line, event))
            raise
        if rest is not None:
            self._go_on(line, rest)

    async def _try_again(self, line: str, event: str) -> None:
        """Wake a line that could not be woken; who told of the event may not do so for as long as Prefect is away."""
        await asyncio.sleep(AFTER)
        with suppress(FoldinError):
            await self.wake(line, event)

    def _go_on(self, line: str, rest: Rest) -> None:
        """Do what is left to do about a line, instead of what was left before."""
        if line in self._rests:
            self._rests[line].cancel()
        self._rests[line] = asyncio.create_task(rest)


async def make_run(client: "PrefectClient", line: str, event: str) -> Rest:
    """A run of the line's `watch` in Prefect, one for each event, whoever else was told of it.

    What comes back sees to it that a run begins after the event.

    Raises:
        FoldinError: E_SERVER when Prefect does not answer, or has no such deployment.
    """
    from httpx import HTTPError, HTTPStatusError
    from prefect.exceptions import ObjectNotFound

    name, key = f"watch/{line}", f"foldin {line}: {event}"
    try:
        deployment = await client.read_deployment_by_name(name)
        tags = ["foldin", line, "woken"]
        run = await client.create_flow_run_from_deployment(deployment.id, idempotency_key=key, tags=tags)
    except ObjectNotFound as error:
        what, remedy = "Prefect has no such deployment", "start `foldin serve`"
        raise FoldinError(Refusal("E_SERVER", what, f"deployment {name}", remedy=remedy)) from error
    except HTTPError as error:
        what, found = "Prefect does not answer", f"{type(error).__name__}: {error}"
        shut = isinstance(error, HTTPStatusError) and error.response.status_code in (401, 403)
        remedy = "set PREFECT_API_AUTH_STRING to the server's USER:PASSWORD" if shut else ""
        raise FoldinError(Refusal("E_SERVER", what, f"deployment {name}", found=found, remedy=remedy)) from error
    return _see_one_begin(client, deployment.id, run.id, key, tags)


async def _see_one_begin(client: "PrefectClient", deployment: UUID, run: UUID, key: str, tags: list[str]) -> None:
    """Make a run again that Prefect dropped, when the one that it gave way to is over: that may have looked before."""
    from httpx import HTTPError
    from prefect.exceptions import ObjectNotFound

    while True:
        await asyncio.sleep(AFTER)
        with suppress(HTTPError):  # Prefect is away: ask again
            try:
                state = (await client.read_flow_run(run)).state
                if state is None or state.is_scheduled() or state.is_pending():
                    continue
                if not state.is_cancelled() or "concurrency limit" not in (state.message or ""):
                    return
                if not await _at_work(client, deployment):
                    once = f"{key}, after {run}"
                    run = (await client.create_flow_run_from_deployment(deployment, idempotency_key=once, tags=tags)).id
            except ObjectNotFound:  # somebody removed the run, or the deployment
                return


async def _at_work(client: "PrefectClient", deployment: UUID) -> bool:
    """Whether a run of a deployment has begun and not ended."""
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType

    begun = filters.FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    found = await client.read_flow_runs(
        flow_run_filter=filters.FlowRunFilter(state=filters.FlowRunFilterState(type=begun)),
        deployment_filter=filters.DeploymentFilter(id=filters.DeploymentFilterId(any_=[deployment])),
        limit=1,
    )
    return bool(found)
