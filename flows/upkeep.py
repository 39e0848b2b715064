"""`foldin up` and `foldin down`: everything that a deployment on one machine needs, kept running."""

import fcntl
import json
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows import alive, wiring
from flows.config import Config, load
from flows.environment import offer_variables, store_variables, using_variables, variables_file
from flows.hints import subscribe
from flows.options import RegistryConfig
from flows.pooling import CONTROL, FOLDS
from flows.processes import HOST, Kept, Page, Service, python
from flows.settings import check_schedule
from flows.stack import (
    MOTO,
    calls_here,
    check_packages,
    kept_secret,
    postgresql,
    prefect,
    registry_of,
    stacked_mlflow,
    store,
)
from flows.supervising import Supervisor
from flows.telling import busy, say
from registry.files import write_atomic, write_json
from registry.records import FoldinError, Refusal

POOLS = {"worker": CONTROL, "gpu-worker": FOLDS}
STATE = "state.json"
ENDING = 150.0  # seconds that all services may take to end, and what folds


def up(config_file: Path, config: Config) -> None:
    """Start every service, say where each is, and keep them until interrupted.

    Raises:
        FoldinError: E_SERVER when it runs already, a package or port is not there, or a service does not start;
            E_CONFIG when the file names another registry.
    """
    check_packages()
    folder = config.home / "stack"
    stop, ready = threading.Event(), threading.Event()
    with _alone(config, folder), using_variables(_variables(config, folder)) as variables, _stopped_by_signals(stop):
        _check_registry(config_file, config)
        for line, settings in config.lines.items():
            check_schedule(settings, line)  # else the worker would end whenever it is started
        services = _services(config_file, config, folder)
        supervisor = Supervisor(services, folder / "logs", lambda kept: _note(folder, kept, ready=ready.is_set()))
        try:
            busy("starting the services")
            supervisor.start(stop)
            if stop.is_set():
                return
            refusal = subscribe(load(config_file))
            if refusal:
                say(f"warning: {refusal}")
            offer_variables(config, variables)
            ready.set()
            supervisor.note()
            for each in services:
                say(f"{each.page.name + ':':<12} {each.page.url if each.page.port else 'runs'}")
            say(f"Logs are in {folder / 'logs'}. Ctrl-C or `foldin down` ends all.")
            supervisor.keep(stop)
        finally:
            variables_file(config).unlink(missing_ok=True)
            supervisor.end()
            (folder / STATE).unlink(missing_ok=True)


def detach(config_file: Path, config: Config) -> None:
    """`up` in the background; returns once everything answers."""
    folder = config.home / "stack"
    _check_none_runs(config)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    log = folder / "logs" / "up.log"
    command = python("flows.cli", "--config", str(config_file), "up")
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    busy("starting the services")
    while process.poll() is None:
        found = state(config)
        if found and found["ready"]:
            for each in found["services"]:
                say(f"{each['title'] + ':':<12} {each['url'] or 'runs'}")
            say(f"Logs are in {log.parent}. `foldin down` ends all.")
            return
        time.sleep(0.2)
    what, remedy = "the services did not start", f"mend it, then run it again; {log} holds all that was said"
    last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
    raise FoldinError(Refusal("E_SERVER", what, found=last.rstrip("."), remedy=remedy))


def down(config: Config) -> bool:
    """End what `up` started; False when nothing runs.

    Raises:
        FoldinError: E_SERVER when it does not end.
    """
    found = state(config)
    if not found:
        return False
    holder = str(found["holder"])
    os.kill(int(holder.split(":")[1]), signal.SIGTERM)
    busy("ending the services")
    patience = time.monotonic() + ENDING
    while not alive.is_dead(holder):
        if time.monotonic() > patience:
            what, remedy = "the services do not end", "look at the process"
            raise FoldinError(Refusal("E_SERVER", what, found=f"process {holder}", remedy=remedy))
        time.sleep(0.1)
    return True


def state(config: Config) -> dict[str, Any] | None:
    """What `up` last noted about its services; None when it does not run."""
    try:
        found: dict[str, Any] = json.loads((config.home / "stack" / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    holder = str(found["holder"])
    if holder.partition(":")[0] != alive.holder().partition(":")[0] and not alive.is_dead(holder):
        what, remedy = "the services run on another machine", f"end them there, or remove {STATE} when they run no more"
        raise FoldinError(Refusal("E_SERVER", what, str(config.home / "stack"), found=holder, remedy=remedy))
    return None if alive.is_dead(holder) else found


def _services(config_file: Path, config: Config, folder: Path) -> tuple[Service, ...]:
    """All, in the order in which they need each other."""
    ports, databases = config.stack, folder / "postgresql"
    registry = stacked_mlflow(int(ports.mlflow_port), databases, "mlflow_port of [stack]", calls_here(folder))

    def name_registry() -> None:
        _write_registry(config_file, registry_of(databases, registry.page.url))

    receives = Page("receiver", int(config.receiver.port), "port of [receiver]", "/healthz")
    receiver = python("flows.cli", "--config", str(config_file), "receive")
    return (
        postgresql(databases),
        store(int(ports.s3_port), folder / "s3", ports.s3_command or MOTO, "s3_port of [stack]"),
        replace(registry, prepare=name_registry),
        prefect(int(ports.prefect_port), "prefect_port of [stack]"),
        *(_worker(title, config_file, pool) for title, pool in POOLS.items()),
        Service(receives, lambda: receiver),
    )


def _worker(title: str, config_file: Path, pool: str) -> Service:
    """What runs the flow runs of a work pool."""
    command = python("flows.pooling", str(config_file), pool)
    told = {"FOLDIN_LOG": "json", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR"}  # what its runs do, and why not
    return Service(Page(title, 0, "", ""), lambda: command, {"PREFECT_WORKER_QUERY_SECONDS": "1", **told})


def _variables(config: Config, folder: Path) -> dict[str, str]:
    """What every process that works with these services has in its environment."""
    secret = folder / "webhook.secret"
    kept_secret(secret, lambda: secrets.token_hex(32))
    store_url = f"http://{HOST}:{config.stack.s3_port:.0f}"
    return {
        "PREFECT_API_URL": f"http://{HOST}:{config.stack.prefect_port:.0f}/api",
        "MLFLOW_TRACKING_URI": f"http://{HOST}:{config.stack.mlflow_port:.0f}",
        "FOLDIN_WEBHOOK_SECRET_FILE": str(secret),
        **store_variables(store_url),
    }


@contextmanager
def _alone(config: Config, folder: Path) -> Iterator[None]:
    """One `up` in a folder; the kernel lets go of the lock however this process ends."""
    _check_none_runs(config)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "up.lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            refusal = Refusal("E_SERVER", "another `foldin up` is starting here", str(folder), remedy="wait for it")
            raise FoldinError(refusal) from error
        yield


def _check_none_runs(config: Config) -> None:
    found = state(config)
    if found:
        what, remedy = "the services of this folder run already", "use them, or end them with `foldin down`"
        raise FoldinError(Refusal("E_SERVER", what, found=f"process {found['holder']}", remedy=remedy))


def _check_registry(config_file: Path, config: Config) -> None:
    """Nothing, when the file names no registry, or the one that is started here."""
    named, here = config.registry.tracking_uri, f"http://{HOST}:{config.stack.mlflow_port:.0f}"
    lines = not named and wiring.has_lines(config)
    if named not in {"", here} or (not named and lines):
        what = "the file names another registry" if named else "the lines of this folder are in an embedded registry"
        remedy = "write a foldin.toml with the line into a folder of its own, and start them there; they begin the line"
        raise FoldinError(Refusal("E_CONFIG", what, str(config_file), "", "", here, named or "ledger.db", remedy))


def _write_registry(config_file: Path, registry: RegistryConfig) -> None:
    """Name the services in foldin.toml; what is there already stays as it is."""
    import tomlkit

    document = tomlkit.parse(config_file.read_text(encoding="utf-8"))
    table = document.setdefault("registry", tomlkit.table())
    wanted = {key: getattr(registry, key) for key in ("tracking_uri", "artifact_root", "ledger_url")}
    if any(table.get(key) != value for key, value in wanted.items()):
        table.update(wanted)
        write_atomic(config_file, tomlkit.dumps(document).encode())
        say(f"{config_file.name}: [registry] names these services")


def _note(folder: Path, kept: Sequence[Kept], *, ready: bool) -> None:
    """Let others know what runs."""
    rows = [
        {
            "name": each.service.name,
            "title": each.service.page.name,
            "url": each.service.page.url if each.service.page.port else "",
            "pid": each.process.pid if each.process else None,
            "restarts": each.restarts,
            "log": str(each.log),
        }
        for each in kept
    ]
    write_json(folder / STATE, {"holder": alive.holder(), "ready": ready, "services": rows})


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set `stop`, so that everything ends in order."""
    before = {each: signal.signal(each, lambda number, frame: stop.set()) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
