"""What a version remembers besides its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from registry.files import read_json, shown
from registry.records import FoldinError, Refusal

STATE_FILE = "foldin/state.json"
STATE_FORMAT = 3  # of the memory and the slots; raised when what they say means something else


class Folded(NamedTuple):
    """One expert as a version remembers it."""

    model: str
    version: int
    task: str
    weights_sha256: str  # content digest of its weights
    tree_sha256: str  # digest of its files, their name in the content store
    delta_norm: float  # Frobenius norm of what was folded, weight * (expert - base), over the whole model
    weight: float = 1.0
    declared: float | None = None  # of the weight what the expert itself declared; None where an older foldin folded it


@dataclass(frozen=True)
class Memory:
    """foldin/state.json: what a version remembers besides the slots, enough to fold the next expert or to replay."""

    method: str
    parameters: Mapping[str, Any]  # all of the method's, with what a search chose
    base_sha256: str
    weights_sha256: str  # content digest of the serving weights
    stats: tuple[float, float, float] = (0.0, 0.0, 0.0)  # count, norm_sum, total_norm
    projected: tuple[str, ...] = ()
    experts: tuple[Folded, ...] = ()  # in the order of folding
    suites: Mapping[str, str] = field(default_factory=dict)  # task -> digest of the suite it is measured by
    profile: Mapping[str, str] = field(default_factory=dict)  # the numerics profile: same profile, same bytes
    stored: Mapping[str, str] = field(default_factory=dict)  # tensor -> the experts' coarsest dtype, if not the base's
    factor: float = 1.0  # of the configured strength, chosen by a search; the next fold goes on with it
    cast_loss: float = 0.0  # norm of what the casts to the base's dtypes took away, over the norm of what was added

    @classmethod
    def read(cls, folder: Path, where: str = "") -> "Memory":
        """The memory of a version's folder; `where` names the version in messages.

        Raises:
            FoldinError: E_FORMAT when another foldin wrote it, which meant something else by it.
        """
        table = read_json(folder / STATE_FILE, where)
        found = table.pop("format", None)
        if found != STATE_FORMAT:
            raise FoldinError(_other_format(where, found))
        return cls(
            **{
                **table,
                "stats": tuple(table["stats"]),
                "projected": tuple(table["projected"]),
                "experts": tuple(Folded(*row) for row in table["experts"]),
            }
        )

    def owner(self, task: str) -> Folded | None:
        """The first expert folded for a task: its suite measures the task, its head (the last one's) serves it."""
        return next((expert for expert in self.experts if expert.task == task), None)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks the version knows, in order of arrival."""
        return tuple(dict.fromkeys(expert.task for expert in self.experts))


def _other_format(where: str, found: object) -> Refusal:
    return Refusal(
        code="E_FORMAT",
        what="another foldin wrote the version's memory, and meant something else by it",
        where=where,
        file=STATE_FILE,
        expected=f"format {STATE_FORMAT}",
        found=f"format {shown(found)}",
        remedy="start a new line and register its experts there; the versions of this one can still be loaded",
    )
