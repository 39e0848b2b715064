"""What takes room and nobody needs: old versions' files, and what else lies about.

A version is never deleted, only files of it. An old one loses its serving weights, which can be had back
(`flows.thinning`); a very old one all: it is retired, stays in MLflow and in the history, and cannot be champion.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flows.champion import UNFIT, agree
from flows.leasing import held, remember
from flows.leftovers import Item, leftovers, remove
from flows.telling import say
from flows.thinning import check_unnamed, restore, thin_out
from flows.versions import chain, extents, open_version, with_files
from flows.waiting import waiting
from flows.wiring import House
from registry.lineage import Extent
from registry.records import FoldinError, Lease
from registry.serving import is_serving


class Keep(NamedTuple):
    """How many versions before the champion stay, and as many of the newest."""

    whole: int
    thin: int  # at least without their serving weights


Stored = Mapping[int, Mapping[str, int]]  # version -> path -> bytes; {} for one that was retired


def stored_of(house: House, line: str) -> Stored:
    """The files of every version of a line, wherever they are, by their listings; versions that were retired have none.

    Nothing is read.
    """
    return {
        number: house.mlflow.files.sizes(line, number) if extent is not Extent.RETIRED else {}
        for number, extent in extents(house, line).items()
    }


def garbage(house: House, line: str, keep: Keep, because: str, who: str, *, yes: bool) -> dict[str, Any]:
    """The facts for people: bytes and files of every version, what may go, or with `yes` went, what stays and why."""
    if yes:
        items, left = collect(house, line, keep, because, who)
        stored = stored_of(house, line)
    else:
        stored = stored_of(house, line)
        items, left = collectable(house, line, keep, stored), {}
    kept = extents(house, line)
    versions = {each: {"bytes": sum(sizes.values()), "files": kept[each]} for each, sizes in stored.items()}
    return {"line": line, "versions": versions, "items": [each._asdict() for each in items], "left": left, "done": yes}


def had_again(house: House, line: str, version: int, because: str, who: str) -> None:
    """Give a thin version its serving weights back, because a person asks; raises as `restore`."""
    with held(house, line, told=say) as lease:
        restore(house, lease, version, because, who)


def collectable(house: House, line: str, keep: Keep, stored: Stored) -> list[Item]:
    """What may go of a line, the versions first; `stored` as `stored_of` gives."""
    return [
        *_old_versions(house, line, keep, stored),
        *_old_weights(house, line, keep, stored),
        *leftovers(house, line),
    ]


def collect(house: House, line: str, keep: Keep, because: str, who: str) -> tuple[list[Item], dict[int, str]]:
    """What was removed, and the versions that had to stay whole: why. Each step is repeatable.

    The line's history says which versions were retired and which are thin.
    """
    with held(house, line, told=say) as lease:
        agree(house, lease, say, "collect")
        stored = stored_of(house, line)
        versions = _old_versions(house, line, keep, stored)
        left = _retire(house, lease, [each.version for each in versions], because, who)
        weights = _old_weights(house, line, keep, stored)
        left |= _thin_out(house, lease, [each.version for each in weights], because, who)
        rest = leftovers(house, line)  # only now: the others take long
        for item in rest:
            house.ledger.leases.check(lease)
            remove(house, item)
    return [*(each for each in (*versions, *weights) if each.version not in left), *rest], left


def _retire(house: House, lease: Lease, versions: Sequence[int], because: str, who: str) -> dict[int, str]:
    """Give up all files of versions; those that an alias names by now: why.

    Nothing brings them back, so MLflow keeps the history that says so before the files go: a ledger that is lost
    meanwhile can then be made again.
    """
    left, kept = dict[int, str](), extents(house, lease.line)
    for version in (each for each in versions if kept[each] is not Extent.RETIRED):
        try:
            check_unnamed(house, lease.line, version)
            house.ledger.remark(lease, "retired", f"v{version}: {because}", who)
        except FoldinError as error:
            left[version] = _about_a_version(error)
    if versions:
        remember(house, lease)
    for version in (each for each in versions if each not in left):
        house.ledger.leases.check(lease)
        house.mlflow.retire(lease.line, version)
    return left


def _thin_out(house: House, lease: Lease, versions: Sequence[int], because: str, who: str) -> dict[int, str]:
    """Thin versions; those for which that cannot be: why. None is while the base is not as it was."""
    left = dict[int, str]()
    if not versions:
        return left
    try:
        base = open_version(house, lease.line, min(house.ledger.parents(lease.line)), whole=True)
    except FoldinError as error:
        return dict.fromkeys(versions, f"nothing gives its weights back: {_about_a_version(error)}")
    for version in versions:
        try:
            thin_out(house, lease, base, version, because, who)
        except FoldinError as error:
            left[version] = _about_a_version(error)
    return left


def _about_a_version(error: FoldinError) -> str:
    """What an error says, when it is about a version; else it is raised: the machine, the store, the lease."""
    if error.refusal.code not in UNFIT | {"E_ALIAS"}:
        raise error
    return str(error)


def needed(house: House, line: str, keep: int) -> set[int]:
    """The versions that stay when so many are kept: the base, the champion, its nearest ancestors, the newest.

    And what waits for a person, and what an alias names.
    """
    champion = house.ledger.line(line).champion
    ancestors = chain(house, line, champion) if champion else []
    numbers = list(house.ledger.parents(line))
    current = waiting(house, line)
    newest = numbers[-keep:] if keep else []
    kept = {*ancestors[: keep + 1], *numbers[:1], *newest, *house.mlflow.aliased(line)}
    return kept | ({current.version} if current and current.version else set())


def _old_versions(house: House, line: str, keep: Keep, stored: Stored) -> list[Item]:
    """The versions that nobody needs and that have files; one that was retired has, when that was cut off."""
    many, there = max(keep), with_files(house, line)
    old = (
        version
        for version in stored.keys() - needed(house, line, many)
        if version in there or house.mlflow.files.there(line, version)
    )
    why = _too_old(many)
    return [
        Item("version", f"{line} v{version}", sum(stored[version].values()), why, version) for version in sorted(old)
    ]


def _old_weights(house: House, line: str, keep: Keep, stored: Stored) -> list[Item]:
    """The serving weights, where they are there, of versions that stay and that nobody needs whole."""
    old = (needed(house, line, max(keep)) - needed(house, line, keep.whole)) & with_files(house, line)
    sizes = {
        version: sum(size for name, size in stored[version].items() if is_serving(name))
        for version in sorted(old & stored.keys())
    }
    why = _too_old(keep.whole)
    return [Item("weights", f"{line} v{version}", size, why, version) for version, size in sizes.items() if size]


def _too_old(many: int) -> str:
    return f"no champion within {many} folds, and not among the newest"
