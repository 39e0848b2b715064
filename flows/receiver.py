"""The receiver of MLflow's webhooks: it checks who speaks, and wakes the lines that the event may be about.

It decides nothing: a woken line asks MLflow itself. What is lost on the way, the next look on the interval finds.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flows.about import about
from flows.config import Config
from flows.deliveries import Deliveries
from flows.health import watched
from flows.hints import lines_for
from flows.metrics import Told, exposition
from flows.options import RECEIVER_PATH
from flows.telling import logger, say
from flows.waking import Waker, make_run
from registry.records import FoldinError

if TYPE_CHECKING:
    from registry.ledger import Ledger

PATH = RECEIVER_PATH
MOST_BYTES = 2**16  # of a delivery; MLflow's are below 2 KB unless a description is long
MOST_AT_ONCE = 200  # connections; more are told to come again
PATIENCE = 10.0  # seconds for a delivery's bytes to come
ANSWERS = {  # what a delivery is answered, and the status that says so
    "accepted": 200,  # acted on, or nothing to do
    "repeated": 200,  # acted on before
    "refused": 401,  # not believed
    "too-slow": 408,
    "broken-off": 400,
    "too-large": 413,
    "unreadable": 400,  # genuine, and no event
    "failed": 503,  # to come again
}


class Receiver:
    """The answers to deliveries."""

    def __init__(
        self, config: Config, deliveries: Deliveries, waker: Waker, champion: Callable[[str], int | None]
    ) -> None:
        """Wake the lines of `config` through `waker`, for what `deliveries` believes; `champion` is the ledger's."""
        self._config, self._deliveries, self._waker, self._champion = config, deliveries, waker, champion
        self._answers, self._woken = Counter(dict.fromkeys(ANSWERS, 0)), Counter(dict.fromkeys(config.lines, 0))
        self.told = Told(self._answers, self._woken)

    async def deliver(self, request: Request) -> Response:
        """A status and not a word more."""
        answer = await self._answer(request)
        self._answers[answer] += 1
        return Response(status_code=ANSWERS[answer])

    async def _answer(self, request: Request) -> str:
        try:
            async with asyncio.timeout(PATIENCE):
                body = await _read(request)
        except TimeoutError:
            return "too-slow"
        except ClientDisconnect:
            return "broken-off"
        if body is None:
            return "too-large"
        identity = self._deliveries.identity(request.headers, body)
        if identity is None:
            return "refused"
        return await self._act(identity, body) if self._deliveries.is_new(identity) else "repeated"

    async def _act(self, identity: str, body: bytes) -> str:
        try:
            found = await asyncio.to_thread(lines_for, body, self._config.lines, self._champion)
        except ValueError:
            return "unreadable"
        try:
            await asyncio.gather(*(self._waker.wake(line, event) for line, event in found.items()))
        except FoldinError as error:
            say(str(error))
            return "failed"
        self._deliveries.note(identity)
        for line, event in found.items():
            self._woken[line] += 1
            with about(line=line):
                logger.info("line %s was woken by %s", line, ascii(event))
        return "accepted"


async def _read(request: Request) -> bytes | None:
    """The body; None when it is too large, of which no more is read than that takes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            return None
    return bytes(body)


def application(config: Config, deliveries: Deliveries, ledger: "Ledger") -> Starlette:
    """The receiver as an ASGI application that speaks with the Prefect API of the environment."""

    def champion(line: str) -> int | None:
        try:
            return ledger.line(line).champion
        except FoldinError:
            return None  # not started yet, or the ledger is away: let the line look

    from prefect.client.orchestration import get_client

    @asynccontextmanager
    async def alive(app: Starlette) -> AsyncIterator[None]:
        async with get_client() as client:
            app.state.receiver = Receiver(config, deliveries, Waker(partial(make_run, client)), champion)
            app.state.lines, app.state.troubles = watched(config, ledger, client)
            yield

    routes = [Route(PATH, _deliver, methods=["POST"])]
    routes += [Route("/healthz", _healthz), Route("/readyz", _readyz), Route("/metrics", _metrics)]
    return Starlette(routes=routes, lifespan=alive)


async def _deliver(request: Request) -> Response:
    receiver: Receiver = request.app.state.receiver
    return await receiver.deliver(request)


async def _healthz(request: Request) -> Response:
    return Response("ok")


async def _readyz(request: Request) -> Response:
    found: dict[str, str] = await request.app.state.troubles()
    return JSONResponse({"ready": not found, "troubles": found}, 503 if found else 200)


async def _metrics(request: Request) -> Response:
    receiver: Receiver = request.app.state.receiver
    lines = await request.app.state.lines()
    content, kind = exposition(lines, receiver.told, request.headers.get("Accept", ""))
    return Response(content, headers={"Content-Type": kind})


def receive(config: Config, secrets: tuple[bytes, ...]) -> None:
    """Receive until interrupted."""
    import uvicorn

    from flows.wiring import ledger_url
    from registry.ledger import Ledger

    host, port = config.receiver.host, int(config.receiver.port)
    app = application(config, Deliveries(secrets), Ledger(ledger_url(config)))
    say(f"Webhooks: http://{host}:{port}{PATH}")
    # Who sends nothing, or does not stop, holds one of so many places for seconds, not the process.
    quiet: dict[str, Any] = {"log_level": "error", "access_log": False, "server_header": False}
    uvicorn.run(app, host=host, port=port, limit_concurrency=MOST_AT_ONCE, **quiet)
