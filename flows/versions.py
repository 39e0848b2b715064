"""A registered version opened for use: verified against its manifest, its tensors lazy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.wiring import House
from registry.far import names_in
from registry.files import MANIFEST, read_json, sha256_file, shown, verify_manifest
from registry.lineage import ancestry, parents_of, thinned
from registry.lineage import retired as retired_in
from registry.records import FoldinError, Merge, Refusal
from registry.serving import serving_files

if TYPE_CHECKING:
    from registry.weights import Checkpoint

STATE_FILE = "foldin/state.json"
STATE_FORMAT = 3  # of the memory and the slots; raised when what they say means something else
STATE_FOLDER = "foldin/state"
HEADS = "heads"
REPORT_FILE = "foldin/report.json"
PAGE_FILE = "foldin/report.html"
PLOTS = "foldin/plots"
ANSWERS = "foldin/predictions"


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
    parameters: Mapping[str, Any]  # as used, with what a search chose
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


@dataclass(frozen=True)
class Version:
    """One verified version."""

    number: int
    folder: Path
    manifest_sha256: str
    memory: Memory
    thin: bool = False  # its serving weights were given up

    @property
    def where(self) -> str:
        """Names the version in messages."""
        return f"version {self.number}"

    def weights(self) -> "Checkpoint":
        """The serving weights, lazily.

        Raises:
            FoldinError: E_THIN when they were given up; or as `Checkpoint.open`.
        """
        from registry.weights import Checkpoint

        if self.thin:
            raise FoldinError(_given_up(self.number))
        return Checkpoint.open(self.folder, self.where)

    def slots(self) -> "Checkpoint | None":
        """The slots of the fold's state, lazily, as NAME:SLOT -> tensor; None for the base."""
        from registry.weights import Checkpoint

        folder = self.folder / STATE_FOLDER
        return Checkpoint.open(folder, f"state of {self.where}") if folder.exists() else None


def head_of(folder: Path, task: str) -> "Checkpoint | None":
    """The head that a version's folder keeps for a task; None when the task needs none."""
    from registry.weights import Checkpoint

    path = folder / HEADS / f"{task}.safetensors"
    return Checkpoint.open_file(path, f"head of task {task}") if path.exists() else None


def open_version(house: House, line: str, number: int, *, whole: bool = False) -> Version:
    """A version of a line, every file compared with the manifest that the ledger recorded; `whole` as in `verified`.

    Raises:
        FoldinError: as `verified`, and as `Memory.read` for a version that another foldin made.
    """
    folder, manifest = verified(house, line, number, whole=whole)
    memory = Memory.read(folder, f"{line} v{number}")
    return Version(number, folder, manifest, memory, number in thin(house, line))


def verified(house: House, line: str, number: int, *, whole: bool = True) -> tuple[Path, str]:
    """The folder of a version and its manifest's digest, every file compared with what the ledger recorded.

    Weights that lie in S3 are read for that only when asked for as a `whole`; else each tensor is compared when it is
    read. The serving weights of a thin version are not looked at.

    Raises:
        FoldinError: E_DIGEST naming the file that differs, or E_VERSION when foldin never registered it.
    """
    merge = find_merge(house, line, number)
    if number in retired(house, line):
        what, remedy = "the version was retired, its files are gone", f"choose another of `foldin log {line}`"
        raise FoldinError(Refusal("E_RETIRED", what, f"{line} v{number}", remedy=remedy))
    is_thin = number in thin(house, line)
    folder = _folder(house, line, merge)
    if not is_thin and not serving_files(folder).keys() <= set(names_in(folder)):
        house.mlflow.files.forget(line, number)  # brought here while it was thin
        folder = _folder(house, line, merge)
    if whole:
        house.mlflow.files.look_again(folder)
    wrong = verify_manifest(folder, serving_files(folder) if is_thin else ())
    if wrong:
        raise FoldinError(wrong[0])
    return folder, merge.manifest_sha256


def _folder(house: House, line: str, merge: Merge) -> Path:
    """The folder of a version, with the manifest that was recorded."""
    number = merge.version or 0
    folder = house.mlflow.folder(line, number)
    manifest = sha256_file(folder / MANIFEST) if (folder / MANIFEST).exists() else ""
    if manifest != merge.manifest_sha256:
        raise FoldinError(_other_manifest(f"{line} v{number}", merge, manifest))
    return folder


def history(version: Version, name: str) -> list[dict[str, float]]:
    """`matrix` or `perplexities` of a version's report: a row for it and each of its ancestors, task -> value."""
    from evaluation.report import rows_in

    return rows_in(read_json(version.folder / REPORT_FILE, version.where), name, f"report of {version.where}")


def bests(version: Version) -> dict[str, tuple[float, str]]:
    """Task -> the best accuracy or score of a version and its ancestors, and the identity of the suite it is of."""
    found = read_json(version.folder / REPORT_FILE, version.where).get("best", {})
    return {name: (float(value), str(suite)) for name, (value, suite) in found.items()}


def retired(house: House, line: str) -> set[int]:
    """The versions whose files were given up (`foldin gc`)."""
    return retired_in((event.kind, event.because) for event in house.ledger.events(line))


def thin(house: House, line: str) -> set[int]:
    """The versions whose serving weights were given up, and can be made again (`flows.thinning`)."""
    return thinned((event.kind, event.because) for event in house.ledger.events(line))


def find_merge(house: House, line: str, number: int) -> Merge:
    """What the ledger says about a version.

    Raises:
        FoldinError: E_VERSION when it says nothing.
    """
    merges = house.ledger.merges(line)
    for merge in merges:
        if merge.version == number:
            return merge
    known = ", ".join(str(merge.version) for merge in merges if merge.version is not None)
    raise FoldinError(
        Refusal(
            code="E_VERSION",
            what="foldin did not register this version",
            where=f"{line} v{number}",
            expected=f"one of {known}" if known else "",
            remedy=f"choose one that `foldin log {line}` shows",
        )
    )


def numbers_of(house: House, line: str) -> set[int]:
    """The versions that foldin registered."""
    return {merge.version for merge in house.ledger.merges(line) if merge.version is not None}


def chain(house: House, line: str, number: int) -> list[int]:
    """A version and its ancestors, newest first; the last one is the base."""
    return ancestry(parents_of(house.ledger.merges(line)), number)


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


def _given_up(number: int) -> Refusal:
    what, remedy = "the serving weights were given up to save room", f"foldin gc LINE --restore {number}"
    return Refusal("E_THIN", what, f"version {number}", remedy=remedy)


def _other_manifest(where: str, merge: Merge, found: str) -> Refusal:
    return Refusal(
        code="E_DIGEST",
        what="the version's manifest is not the one that was registered",
        where=where,
        file=MANIFEST,
        expected=merge.manifest_sha256[:12],
        found=found[:12] or "no manifest",
        remedy="restore the version's artifacts, or roll back to another version",
    )
