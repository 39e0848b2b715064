"""The tree of a line's versions, from plain facts. Pure, and flat: a line may be thousands of versions deep."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from registry.records import Event, Expert, Merge


class Extent(StrEnum):
    """How much of a version's files is kept."""

    WHOLE = "whole"
    THIN = "thin"  # all but the serving weights
    RETIRED = "retired"  # nothing


SAYS = {"thinned": Extent.THIN, "restored": Extent.WHOLE, "retired": Extent.RETIRED}  # by kinds of events


@dataclass(frozen=True)
class Node:
    """One registered version with what was folded to get it and what grew from it."""

    version: int
    parent: int | None
    experts: tuple[Expert, ...]  # in the order of folding; () for the base
    children: tuple[int, ...]  # versions, ascending


def ancestry(parents: Mapping[int, int | None], version: int | None) -> list[int]:
    """A version and its ancestors, newest first, given each version's parent (None for the base)."""
    chain: list[int] = []
    while version is not None:
        chain.append(version)
        version = parents[version]
    return chain


def parents_of(merges: Iterable[Merge]) -> dict[int, int | None]:
    """The parent of every registered version."""
    return {merge.version: merge.parent for merge in merges if merge.version is not None}


def tree(merges: Iterable[Merge], experts: Iterable[Expert]) -> tuple[Node, ...]:
    """The versions of a line, ascending, so the base is first; () while nothing is registered."""
    known = {expert.id: expert for expert in experts}
    versions = {merge.version: merge for merge in merges if merge.version is not None}
    children: dict[int | None, list[int]] = {}
    for version in sorted(versions):
        children.setdefault(versions[version].parent, []).append(version)
    return tuple(
        Node(
            version,
            merge.parent,
            tuple(known[each] for each in merge.experts),
            tuple(children.get(version, ())),
        )
        for version, merge in sorted(versions.items())
    )


def extents(events: Iterable[tuple[str, str]]) -> dict[int, Extent]:
    """Version -> what is kept of it, from (kind, because) of a line's events, which say "v3: why".

    Of a version that is not named every file is kept. The last word counts; what was retired never comes back.
    """
    found = dict[int, Extent]()
    for kind, because in events:
        if kind in SAYS:
            version = int(because.partition(":")[0].removeprefix("v"))
            if found.get(version) is not Extent.RETIRED:
                found[version] = SAYS[kind]
    return found


def met(merges: Iterable[Merge], experts: Iterable[Expert]) -> dict[int, int | None]:
    """Expert id -> the version that it met: it was folded into that, or would have been when it was refused.

    An expert that was set aside before it was folded met what the one before it had left. None while none did.
    """
    known = list(merges)
    folded = {expert: merge for merge in known for expert in merge.experts}
    first = next((merge.version for merge in known if merge.parent is None), None)
    found: dict[int, int | None] = {}
    newest = first
    for expert in experts:
        mine = folded.get(expert.id)
        found[expert.id] = mine.parent if mine else newest
        newest = mine.version or newest if mine else newest
    return found


def open_moves(events: Iterable[Event]) -> tuple[Event | None, list[Event]]:
    """The newest move of the champion, and the older ones whose alias was never seen on its target.

    An alias that stands on one of those was moved late by a run that had been overtaken, not by a person.
    """
    moves = [event for event in events if event.target is not None]
    return (moves[-1] if moves else None), [move for move in moves[:-1] if not move.done]


def open_origins(events: Iterable[Event]) -> set[int | None]:
    """Where the alias may still stand because the newest moves were each cut off before it followed."""
    origins: set[int | None] = set()
    for move in reversed([event for event in events if event.target is not None]):
        if move.done:
            break
        origins.add(move.origin)
    return origins
