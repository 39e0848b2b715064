"""Which expert a person means, and how several are named."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from registry.records import FoldinError, Refusal


class Named(Protocol):
    """An expert, as the ledger or a version remembers it."""

    @property
    def model(self) -> str:
        """Registered model that it is a version of."""
        ...

    @property
    def version(self) -> int:
        """Its number there."""
        ...

    @property
    def task(self) -> str:
        """What it was trained for."""
        ...


Some = TypeVar("Some", bound=Named)


def find_expert(text: str, experts: Iterable[Some], where: str) -> Some:
    """The one expert that a text names: "MODEL v3", "MODEL:3", "v3" or "3" where one model is watched, or its task.

    Raises:
        FoldinError: E_EXPERT when none or several are meant.
    """
    known = list({(each.model, each.version): each for each in experts}.values())  # of a requeued one the last row
    found = [each for each in known if text.strip() in _names(each)]
    if len(found) == 1:
        return found[0]
    what = "several experts are called so" if found else "there is no such expert"
    names = ", ".join(f"{each.model} v{each.version} ({each.task})" for each in found or known) or "none"
    remedy = "name one as MODEL vN"
    raise FoldinError(Refusal("E_EXPERT", what, where, expected=f"one of {names}", found=text, remedy=remedy))


def listed(names: Sequence[str], limit: int = 160) -> str:
    """Names with commas between, those that fit; then how many more there are."""
    told = ", ".join(names)
    if len(told) <= limit:
        return told
    fit = max(1, next(many for many in range(len(names), -1, -1) if len(", ".join(names[:many])) <= limit))
    return f"{', '.join(names[:fit])[:limit]} and {len(names) - fit} more"


def _names(expert: Named) -> set[str]:
    number = str(expert.version)
    return {f"{expert.model} v{number}", f"{expert.model}:{number}", f"v{number}", number, expert.task}
