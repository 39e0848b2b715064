"""The tree of a line's versions, from plain facts. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from registry.records import Event, Expert, Merge


@dataclass(frozen=True)
class Node:
    """One registered version with what was folded to get it and what grew from it."""

    version: int
    parent: int | None
    expert: Expert | None  # None: the base
    children: tuple["Node", ...]


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


def tree(merges: Iterable[Merge], experts: Iterable[Expert]) -> Node | None:
    """The versions of a line as a tree from its base; None while nothing is registered."""
    known = {expert.id: expert for expert in experts}
    versions = {merge.version: merge for merge in merges if merge.version is not None}
    root = next((version for version, merge in versions.items() if merge.parent is None), None)

    def node(version: int) -> Node:
        merge = versions[version]
        grown = tuple(node(other) for other in sorted(versions) if versions[other].parent == version)
        expert = known[merge.expert_id] if merge.expert_id is not None else None
        return Node(version, merge.parent, expert, grown)

    return None if root is None else node(root)


def open_moves(events: Iterable[Event]) -> tuple[Event | None, list[Event]]:
    """The newest move of the champion, and the older ones whose alias was never seen on its target.

    An alias that stands on one of those was moved late by a run that had been overtaken, not by a person.
    """
    moves = [event for event in events if event.target is not None]
    return (moves[-1] if moves else None), [move for move in moves[:-1] if not move.done]
