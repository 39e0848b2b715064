"""Is everything as it should be? Each finding says what is wrong and what to do; an empty list is health."""

import importlib.metadata
import re
from collections.abc import Iterator

from flows.signing import require_signature
from flows.starting import check_settings
from flows.versions import open_version
from flows.waiting import misplaced
from flows.wiring import House, is_dead
from registry.lineage import open_moves
from registry.records import FoldinError, Refusal

# Prefect 3.8 allows newer releases of both, but its server does not start with the first, and its scheduler fails
# silently with the second.
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
    newest, _ = open_moves(house.ledger.events(line))
    if newest and seen != newest.target:
        what = "the alias champion stands elsewhere than the ledger says"
        expected, found = f"version {newest.target}", f"version {seen}" if seen else "no alias"
        remedy = f"run `foldin watch {line}`; it adopts a person's move and mends its own"
        yield Refusal("E_ALIAS", what, f"line {line}", "", "", expected, found, remedy)
    wrong = misplaced(house, line)
    if wrong:
        stands, belongs = (f"version {each}" if each else "nowhere" for each in wrong)
        what, remedy = (
            "the alias candidate is not on what waits for a person",
            f"run `foldin watch {line}`; it mends it",
        )
        yield Refusal("E_ALIAS", what, f"line {line}", expected=belongs, found=stands, remedy=remedy)
    holder = house.ledger.leases.holder(line).holder
    if holder and is_dead(holder):
        remedy = f"run `foldin watch {line}`; it takes over and goes on where the dead run stopped"
        yield Refusal(
            "E_LEASE", "the process that worked on the line is dead", f"line {line}", found=holder, remedy=remedy
        )
    yield from _check_versions_of(house, line, registered)


def _check_versions_of(house: House, line: str, registered: set[int]) -> Iterator[Refusal]:
    known = {merge.version for merge in house.ledger.merges(line) if merge.version is not None}
    never_promoted = {
        house.mlflow.registered(line, merge.merge_key) for merge in house.ledger.merges(line) if merge.version is None
    }
    for version in sorted(registered - known - never_promoted):
        remedy = "leave it; foldin folds only into versions that it registered"
        yield Refusal(
            "E_VERSION", "MLflow has a version that the ledger does not know", f"{line} v{version}", remedy=remedy
        )
    for version in sorted(known - registered):
        yield Refusal(
            "E_VERSION",
            "the ledger has a version that MLflow lost",
            f"{line} v{version}",
            remedy="restore MLflow's database, or roll back to a version that is there",
        )
    for version in sorted(known & registered):
        try:
            require_signature(house, line, version, open_version(house, line, version).folder)
        except FoldinError as error:
            yield error.refusal
