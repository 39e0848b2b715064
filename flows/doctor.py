"""Is everything as it should be? Each finding says what is wrong and what to do; an empty list is health."""

import importlib.metadata
import re
import time
from collections.abc import Iterator
from hashlib import sha256

from flows.chains import check_versions_of
from flows.champion import check_target
from flows.starting import check_settings
from flows.waiting import misplaced
from flows.wiring import House, is_dead
from registry.lineage import open_moves
from registry.records import FoldinError, Refusal

# Prefect 3.8 allows newer releases of both, but its server does not start with the first, and its scheduler fails
# silently with the second.
DAY = 86400.0  # seconds
CEILINGS = {"fastapi": (0, 151), "sqlalchemy": (2, 1)}


def examine(house: House) -> list[Refusal]:
    """Everything that is wrong with the installation and with every line."""
    return [*check_versions(), *(found for line in sorted(house.config.lines) for found in check_line(house, line))]


def check_versions() -> Iterator[Refusal]:
    """Installed versions that Prefect's own metadata allows and that break it."""
    for package, ceiling in CEILINGS.items():
        installed = importlib.metadata.version(package)
        if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) >= ceiling:  # "0.151rc1" too
            wanted = ".".join(map(str, ceiling))
            remedy = "install with constraints.txt; with this version cron schedules never fire or the server is dead"
            yield Refusal(
                "E_VERSION", "an installed package breaks Prefect", package, "", "", f"< {wanted}", installed, remedy
            )


def check_line(house: House, line: str) -> Iterator[Refusal]:
    """What is wrong with one line: settings, alias, files; rows without versions and versions without rows."""
    try:
        check_settings(house.config.line(line), line)
    except FoldinError as error:
        yield error.refusal
    try:
        facts = house.ledger.line(line)
        seen = house.mlflow.champion(line)
        registered = set(house.mlflow.versions(line))
    except FoldinError as error:
        yield error.refusal
        return
    if facts.blocked:
        yield Refusal("E_BLOCKED", facts.blocked, f"line {line}", remedy="move the alias to a version that passed")
    yield from _check_champion(house, line, seen)
    yield from _check_candidate(house, line)
    holder = house.ledger.leases.holder(line).holder
    if holder and is_dead(holder):
        what, remedy = (
            "the process that worked on the line is dead",
            "it takes over and goes on where the dead run stopped",
        )
        yield Refusal("E_LEASE", what, f"line {line}", found=holder, remedy=f"run `foldin watch {line}`; {remedy}")
    elif not holder:
        yield from _check_history(house, line)
        yield from _check_uploads(house, line)
    yield from check_versions_of(house, line, registered)


def _check_champion(house: House, line: str, seen: int | None) -> Iterator[Refusal]:
    """The alias stands where the ledger says, and what it stands on may serve."""
    newest, _ = open_moves(house.ledger.events(line))
    if newest is None or seen == newest.target:
        return
    what, found = "the alias champion stands elsewhere than the ledger says", f"version {seen}" if seen else "no alias"
    remedy = f"run `foldin watch {line}`; it adopts a person's move and mends its own"
    try:
        if seen is not None:
            check_target(house, line, seen)
    except FoldinError as error:
        what, found = "the alias champion stands on a version that may not be champion", str(error)
        remedy = f"move it to version {newest.target}, or to another that `foldin log {line}` shows as passed"
    yield Refusal("E_ALIAS", what, f"line {line}", "", "", f"version {newest.target}", found, remedy)


def _check_candidate(house: House, line: str) -> Iterator[Refusal]:
    wrong = misplaced(house, line)
    if wrong:
        stands, belongs = (f"version {each}" if each else "nowhere" for each in wrong)
        what, remedy = (
            "the alias candidate is not on what waits for a person",
            f"run `foldin watch {line}`; it mends it",
        )
        yield Refusal("E_ALIAS", what, f"line {line}", expected=belongs, found=stands, remedy=remedy)


def _check_uploads(house: House, line: str) -> Iterator[Refusal]:
    """While nobody works on the line, no upload to its store is open; what a killed run left costs money there."""
    root = house.config.registry.artifact_root
    if not root.startswith("s3://"):
        return
    from registry.far import store

    for left in (each for each in store().unfinished(root) if each.begun < time.time() - DAY):  # else somebody's work
        what, remedy = "a multipart upload was begun and never finished", "end it with `foldin gc --yes`"
        yield Refusal(
            "E_UPLOAD", what, f"line {line}", left.uri.rpartition("/")[2], found=left.upload_id[:12], remedy=remedy
        )


def _check_history(house: House, line: str) -> Iterator[Refusal]:
    """MLflow keeps what the ledger says, so that the ledger may be lost."""
    kept, is_ = house.mlflow.runs.history_sha256(line), sha256(house.ledger.export(line)).hexdigest()
    if kept != is_:
        what, remedy = "MLflow keeps another history of the line", f"run `foldin watch {line}`; it writes it anew"
        yield Refusal("E_HISTORY", what, f"line {line}", "", "", is_[:12], kept[:12] or "none", remedy)
