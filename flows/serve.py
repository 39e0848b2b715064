"""What keeps running: the deployments of every line, and the pages to look at."""

import logging
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from flows import wiring
from flows.config import Config
from flows.environment import prefect_api_url, prefect_authorization, using_prefect
from flows.processes import HOST, Page, Service, free_port, python, started
from flows.stack import TALKING, mlflow, prefect
from flows.telling import say
from registry.records import FoldinError, Refusal

TEMPORARY = {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1", "PREFECT_UI_ENABLED": "0"}

LOGIN = "set PREFECT_API_AUTH_STRING to the server's USER:PASSWORD, or PREFECT_API_AUTH_STRING_FILE to a file of it"


def deployments(config: Config, config_file: str) -> list[Any]:
    """Of every line `watch`, `nightly`, `rollback` and `approval`, the form for a version that waits for a person.

    `watch` runs on its interval when the trigger is on-register, `nightly` on its cron unless the trigger is manual;
    whatever is not scheduled runs when asked.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType

    from flows.approval import approval
    from flows.nightly import nightly
    from flows.rollback import rollback
    from flows.watch import watch

    # A look that comes while the last one still folds would only wait: it is dropped, the next one finds the same.
    once = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    found = []
    for line, settings in config.lines.items():
        common: dict[str, Any] = {"tags": ["foldin", line], "entrypoint_type": EntrypointType.MODULE_PATH}
        parameters = {"line": line, "config_file": config_file}
        interval = timedelta(seconds=settings.interval) if settings.trigger == "on-register" else None
        cron = Cron(settings.schedule, timezone=settings.timezone) if settings.trigger != "manual" else None
        found += [
            watch.to_deployment(line, parameters=parameters, interval=interval, concurrency_limit=once, **common),
            nightly.to_deployment(line, parameters=parameters, schedule=cron, **common),
            rollback.to_deployment(line, parameters={**parameters, "because": "asked for in Prefect"}, **common),
            approval.to_deployment(line, parameters=parameters, **common),
        ]
    return found


def offer_folds(config: Config, config_file: str) -> None:
    """Make the deployments of lines whose folds run in a work pool, and the pools that are not there, as processes."""
    from prefect.types.entrypoint import EntrypointType

    from flows.batching import merge_batch
    from flows.merge import merge_expert

    for line, settings in config.lines.items():
        if settings.runner.pool:
            make_pool(settings.runner.pool)
            for merge in (merge_expert, merge_batch):
                offered: Any = merge.to_deployment(
                    line,
                    parameters={"line": line, "config_file": config_file},
                    tags=["foldin", line],
                    entrypoint_type=EntrypointType.MODULE_PATH,
                )
                offered.apply(work_pool_name=settings.runner.pool)


def make_pool(name: str) -> None:
    """A work pool of processes, unless there is one of the name, of whatever kind."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))


def serve(config: Config, config_file: str, limit: int) -> None:
    """Keep the deployments of every line running until interrupted; `limit` flow runs at a time."""
    import prefect

    with prefect_server(config):
        offer_folds(config, config_file)
        prefect.serve(*deployments(config, config_file), limit=limit)


@contextmanager
def prefect_server(config: Config, port: int = 4200) -> Iterator[str]:
    """The URL of the Prefect API: the one that PREFECT_API_URL names, else a server of our own while the block runs.

    Raises:
        FoldinError: E_SERVER when the port is taken or the server does not start.
    """
    with _prefect(config, prefect(port, "--prefect-port"), watched=True) as url:
        say(f"Prefect: {url.removesuffix('/api')}")
        yield url


@contextmanager
def temporary_prefect(config: Config, meanwhile: Callable[[], object] = lambda: None) -> Iterator[str]:
    """As `prefect_server`, without pages and schedules: for the flow runs of this process, on any free port.

    It is what Prefect starts when no API is named, but ends with this process even when that is killed.

    Args:
        config: where the server's database and log go.
        meanwhile: what this process can do while the server starts, such as importing what it will need.
    """
    page = Page("Prefect (temporary)", free_port(), "", "/api/health")
    app = ["--factory", "prefect.server.api.server:create_app", "--lifespan", "on", "--log-level", "error"]
    command = python("uvicorn", *app, "--host", HOST, "--port", str(page.port))
    service = Service(page, lambda: command, {**TALKING, **TEMPORARY})
    with _prefect(config, service, meanwhile, watched=False) as url:
        yield url


@contextmanager
def mlflow_server(config: Config, port: int = 5000) -> Iterator[str]:
    """The URL of MLflow's pages: the configured server's, else one of our own on the embedded database.

    Raises:
        FoldinError: E_SERVER when the port is taken or the server does not start.
    """
    uri = wiring.tracking_uri(config)
    if uri.startswith("http"):
        yield uri
        return
    service = mlflow(port, lambda: uri, wiring.artifact_root(config), "--mlflow-port")
    with started(service, config.home) as server:
        server.await_answer()
        say(f"MLflow:  {service.page.url}")
        yield service.page.url


@contextmanager
def _prefect(
    config: Config, service: Service, meanwhile: Callable[[], object] = lambda: None, *, watched: bool
) -> Iterator[str]:
    """The API that PREFECT_API_URL names, or that of a new server, named there while the block runs."""
    named = prefect_api_url()
    if named:
        _check_answers(named)
        meanwhile()
        yield named
        return
    url = f"{service.page.url}/api"
    with started(service, config.home) as server, using_prefect(url, watched=watched):
        meanwhile()
        server.await_answer()
        try:
            yield url
        finally:
            # Prefect sends log lines from a thread of its own; those still on their way would find no server.
            for handler in logging.getLogger("prefect.flow_runs").handlers:
                handler.flush()


def named_prefect() -> str:
    """The URL of the Prefect API that the environment names.

    Raises:
        FoldinError: E_SERVER when none is named, it does not answer, or it does not let us in.
    """
    url = prefect_api_url()
    if not url:
        what, remedy = "no Prefect server is named", "set PREFECT_API_URL, such as to http://127.0.0.1:4200/api"
        raise FoldinError(Refusal("E_SERVER", what, "the environment", expected="PREFECT_API_URL", remedy=remedy))
    _check_answers(url)
    return url


def _check_answers(url: str) -> None:
    """Nothing, when the Prefect API that the environment names answers, and lets us in."""
    try:
        for path in ("health", "hello"):  # the first is open to all
            question = urllib.request.Request(f"{url.rstrip('/')}/{path}", headers=prefect_authorization())
            with urllib.request.urlopen(question, timeout=10):
                pass
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            what, remedy = "the Prefect API lets nobody in without a login, or with another", LOGIN
            raise FoldinError(Refusal("E_SERVER", what, url, found=str(error), remedy=remedy)) from error
        if path == "health":
            raise FoldinError(_silent(url, error)) from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
        raise FoldinError(_silent(url, error)) from error


def _silent(url: str, error: Exception) -> Refusal:
    what, remedy = (
        "the Prefect API does not answer",
        "start that server, such as with `foldin up`, or unset PREFECT_API_URL",
    )
    return Refusal("E_SERVER", what, url, found=str(error), remedy=remedy)
