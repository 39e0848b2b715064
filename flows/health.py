"""Whether the receiver can do its work: the ledger answers, Prefect does, and the deployments are there to be woken."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from flows.lately import Lately
from registry.records import FoldinError

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

    from flows.config import Config
    from registry.ledger import Ledger
    from registry.measures import LineFacts

T = TypeVar("T")
REMEMBERED = 2.0  # seconds for which a look at the ledger serves all who ask
PATIENCE = 1.5  # seconds for one check
PAGE = 100  # deployments that are asked for at once; Prefect names 200 at most
SILENT = f"no answer within {PATIENCE:g} s"
Check = Callable[[], Awaitable[str]]  # "" when all is well, else what is not: no address, no message of a library


async def troubles(checks: Mapping[str, Check]) -> dict[str, str]:
    """Name -> what is wrong with it, of those where something is."""
    found = await asyncio.gather(*map(_found, checks.values()))
    return {name: wrong for name, wrong in zip(checks, found, strict=True) if wrong}


async def _found(check: Check) -> str:
    try:
        async with asyncio.timeout(PATIENCE):
            return await check()
    except TimeoutError:
        return SILENT


class Threads:
    """A few threads for questions to the ledger, beside those that deliveries use: it may keep them waiting."""

    def __init__(self, most: int) -> None:
        """Run so many at once."""
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="looking")

    async def run(self, ask: Callable[[], T]) -> T:
        """The answer; who gives up waiting leaves the thread behind, not the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, ask)


async def ledger_trouble(threads: Threads, answers: Callable[[], None]) -> str:
    """What is wrong with the ledger."""
    try:
        await threads.run(answers)
    except FoldinError as error:
        return f"{error.refusal.code}: {error.refusal.what}"
    return ""


async def prefect_trouble(client: "PrefectClient") -> str:
    """What is wrong with Prefect."""
    error = await client.api_healthcheck()
    return f"it does not answer ({type(error).__name__})" if error else ""


async def deployment_trouble(client: "PrefectClient", lines: Iterable[str]) -> str:
    """Which lines cannot be woken, for want of the deployment that does it."""
    from httpx import HTTPError

    wanted = sorted(lines)
    try:
        there = [
            await _watched(client, some) for some in (wanted[at : at + PAGE] for at in range(0, len(wanted), PAGE))
        ]
    except HTTPError as error:
        return f"Prefect does not answer ({type(error).__name__})"
    missing = sorted(set(wanted).difference(*there))
    return f"missing: {', '.join(f'watch/{line}' for line in missing)}" if missing else ""


async def _watched(client: "PrefectClient", lines: Sequence[str]) -> set[str]:
    """Those of some lines that have a deployment of `watch`."""
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName, FlowFilter, FlowFilterName

    flow, named = FlowFilterName(any_=["watch"]), DeploymentFilterName(any_=list(lines))
    found = await client.read_deployments(
        flow_filter=FlowFilter(name=flow), deployment_filter=DeploymentFilter(name=named)
    )
    return {each.name for each in found}


def watched(
    config: "Config", ledger: "Ledger", client: "PrefectClient"
) -> "tuple[Lately[Sequence[LineFacts] | None], Lately[dict[str, str]]]":
    """How every line stands, None when the ledger does not say, and what keeps the receiver from its work."""
    threads = Threads(2)
    woken = [line for line, settings in config.lines.items() if settings.trigger == "on-register"]
    checks: dict[str, Check] = {
        "ledger": lambda: ledger_trouble(threads, ledger.measures.answers),
        "prefect": lambda: prefect_trouble(client),
        "deployments": lambda: deployment_trouble(client, woken),
    }

    async def look() -> "Sequence[LineFacts] | None":
        try:
            async with asyncio.timeout(PATIENCE):
                return await threads.run(ledger.measures.look)
        except (TimeoutError, FoldinError):
            return None

    return Lately(look, REMEMBERED), Lately(partial(troubles, checks), 1.0)
