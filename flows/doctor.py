"""Is everything as it should be? Each finding says what is wrong and what to do; an empty list is health."""

import importlib.metadata
import re
from collections.abc import Iterator
from hashlib import sha256

from flows.access import check_alias
from flows.alive import is_dead
from flows.archives import check_archives
from flows.chains import check_versions_of
from flows.champion import blocked, check_target
from flows.leftovers import abandoned
from flows.settings import check_settings
from flows.versions import extents
from flows.waiting import misplaced
from flows.wiring import House
from registry.lineage import Extent, open_moves
from registry.records import FoldinError, Refusal

# Prefect 3.8 allows newer releases of both, but its server does not start with the first, and its scheduler fails
# silently with the second.
CEILINGS = {"fastapi": (0, 151), "sqlalchemy": (2, 1)}


def examine(house: House) -> list[Refusal]:
    """Everything that is wrong with the installation, with the store and with every line."""
    lines = (found for line in sorted(house.config.lines) for found in check_line(house, line))
    return [*check_versions(), *check_uploads(house), *lines]


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
        house.ledger.line(line)
        seen = house.mlflow.champion(line)
        registered = set(house.mlflow.versions(line))
    except FoldinError as error:
        yield _lost(house, line) if error.refusal.code == "E_LINE" else error.refusal
        return
    yield from filter(None, [blocked(house, line)])
    yield from _check_champion(house, line, seen)
    yield from _check_candidate(house, line)
    yield from _check_aliases(house, line, seen)
    holder = house.ledger.leases.holder(line).holder
    if holder and is_dead(holder):
        what = "the process that worked on the line is dead"
        remedy = f"run `foldin watch {line}`; it takes over and goes on where the dead run stopped"
        yield Refusal("E_LEASE", what, f"line {line}", found=holder, remedy=remedy)
    elif not holder:
        yield from _check_history(house, line)
    yield from check_versions_of(house, line, registered)
    yield from check_archives(house, line)


def _lost(house: House, line: str) -> Refusal:
    """Of a line that the ledger does not know: never started, or known to MLflow alone."""
    try:
        versions = house.mlflow.versions(line)
    except FoldinError as error:
        return error.refusal
    if not versions:
        what, remedy = "the line has not been started", f"start it with `foldin init {line}`"
        return Refusal("E_LINE", what, f"line {line}", remedy=remedy)
    what, remedy = "MLflow has the line and the ledger does not", "put it back with `foldin doctor --rebuild`"
    found = f"versions {versions[0]} to {versions[-1]} in MLflow"
    return Refusal("E_LINE", what, f"line {line}", found=found, remedy=remedy)


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
            check_alias(house.config.line(line), line, seen)
    except FoldinError as error:
        what, found = "the alias champion stands on a version that may not be champion", str(error)
        remedy = f"move it to version {newest.target}, or to another that `foldin log {line}` shows as passed"
        if error.refusal.code == "E_ACCESS":
            what, found, remedy = error.refusal.what, f"version {seen}", error.refusal.remedy
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


def _check_aliases(house: House, line: str, champion: int | None) -> Iterator[Refusal]:
    """Users load what an alias names, and a thin version cannot be loaded; the champion's is told already."""
    slim = {version for version, extent in extents(house, line).items() if extent is Extent.THIN} - {champion}
    for version in sorted(slim & house.mlflow.aliased(line)) if slim else ():
        what, remedy = "an alias names a version without serving weights", f"foldin gc {line} --restore {version}"
        yield Refusal("E_THIN", what, f"{line} v{version}", remedy=remedy)


def check_uploads(house: House) -> Iterator[Refusal]:
    """What a killed run left half uploaded costs room in the store."""
    for left in abandoned(house):
        what, remedy = "a multipart upload was begun and never finished", "end it with `foldin gc LINE --yes`"
        name = left.uri.rpartition("/")[2]
        yield Refusal("E_UPLOAD", what, left.uri, name, found=f"upload {left.upload_id[:12]}", remedy=remedy)


def _check_history(house: House, line: str) -> Iterator[Refusal]:
    """MLflow keeps what the ledger says, so that the ledger may be lost."""
    kept, is_ = house.mlflow.runs.history_sha256(line), sha256(house.ledger.export(line)).hexdigest()
    if kept != is_:
        what, remedy = "MLflow keeps another history of the line", f"run `foldin watch {line}`; it writes it anew"
        yield Refusal("E_HISTORY", what, f"line {line}", "", "", is_[:12], kept[:12] or "none", remedy)
