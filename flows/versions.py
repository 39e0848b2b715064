"""A registered version opened for use: verified against its manifest, its tensors lazy."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flows.memory import Memory
from flows.wiring import House
from registry.far import names_in
from registry.files import read_json, sha256_file
from registry.lineage import Extent, ancestry
from registry.lineage import extents as extents_in
from registry.manifests import MANIFEST, verify_manifest
from registry.records import FoldinError, Merge, Refusal
from registry.serving import serving_files

if TYPE_CHECKING:
    from registry.weights import Checkpoint

STATE_FOLDER = "foldin/state"
HEADS = "heads"
REPORT_FILE = "foldin/report.json"
PAGE_FILE = "foldin/report.html"
PLOTS = "foldin/plots"
ANSWERS = "foldin/predictions"


@dataclass(frozen=True)
class Version:
    """One verified version."""

    number: int
    folder: Path
    manifest_sha256: str
    memory: Memory
    thin: bool = False  # its serving weights were given up
    line: str = ""

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
            raise FoldinError(_given_up(self))
        return Checkpoint.open(self.folder, self.where)

    def slots(self) -> "Checkpoint | None":
        """The slots of the fold's state, lazily, as NAME:SLOT -> tensor; None for the base."""
        from registry.weights import Checkpoint

        folder = self.folder / STATE_FOLDER
        return Checkpoint.open(folder, f"state of {self.where}") if folder.exists() else None


class Found(NamedTuple):
    """The files of a version, held against its manifest, and that against the ledger."""

    folder: Path
    manifest_sha256: str
    thin: bool  # its serving weights were given up
    weights: tuple[Refusal, ...]  # what is wrong with the serving weights, which can be made again
    others: tuple[Refusal, ...]  # with any other file

    def checked(self, *, weights: bool = True) -> "Found":
        """The same, when nothing is wrong; of a thin version, and without `weights`, the serving weights do not count.

        Raises:
            FoldinError: E_DIGEST naming the file that differs.
        """
        for wrong in (*self.others, *(self.weights if weights and not self.thin else ())):
            raise FoldinError(wrong)
        return self


def head_of(folder: Path, task: str) -> "Checkpoint | None":
    """The head that a version's folder keeps for a task; None when the task needs none."""
    from registry.weights import Checkpoint

    path = folder / HEADS / f"{task}.safetensors"
    return Checkpoint.open_file(path, f"head of task {task}") if path.exists() else None


def open_version(house: House, line: str, number: int, *, whole: bool = False) -> Version:
    """A version of a line, every file compared with the manifest that the ledger recorded; `whole` as in `look_at`.

    Raises:
        FoldinError: as `verified`, and as `Memory.read` for a version that another foldin made.
    """
    return opened(line, number, look_at(house, line, number, whole=whole).checked())


def opened(line: str, number: int, found: Found) -> Version:
    """The version that was looked at; raises as `Memory.read`."""
    memory = Memory.read(found.folder, f"{line} v{number}")
    return Version(number, found.folder, found.manifest_sha256, memory, found.thin, line)


def verified(house: House, line: str, number: int, *, weights: bool = True) -> tuple[Path, str]:
    """The folder of a version and its manifest's digest, every file compared, as it is stored now.

    Without `weights` the serving weights are not looked at, as those of a thin version never are, and what was brought
    here before is believed: for those who have the weights back afterwards, and look at all of it then.

    Raises:
        FoldinError: as `look_at`; E_DIGEST naming a file that differs.
    """
    found = look_at(house, line, number, whole=weights).checked(weights=weights)
    return found.folder, found.manifest_sha256


def look_at(house: House, line: str, number: int, *, whole: bool) -> Found:
    """The files of a version, each compared with the manifest that the ledger recorded.

    Args:
        house: where the line is.
        line: its name.
        number: of a version that was not retired.
        whole: compare what is stored now, all of it. Else a download that is here already is believed to be what is
            stored; and each tensor that lies in S3 is compared when it is read.

    Raises:
        FoldinError: E_VERSION when foldin never registered it, E_RETIRED, E_SOURCE, E_DIGEST for another manifest.
    """
    merge, extent = find_merge(house, line, number), extents(house, line)[number]
    if extent is Extent.RETIRED:
        what, remedy = "the version was retired, its files are gone", f"choose another of `foldin log {line}`"
        raise FoldinError(Refusal("E_RETIRED", what, f"{line} v{number}", remedy=remedy))
    folder = _folder(house, line, merge, fresh=whole)
    listed = serving_files(folder)
    if extent is Extent.WHOLE and not listed.keys() <= set(names_in(folder)):
        folder = _folder(house, line, merge, fresh=True)  # perhaps it was brought here while it was thin
    if whole:
        house.mlflow.files.look_again(folder)
    wrong = [replace(each, where=f"{line} v{number}") for each in verify_manifest(folder)]
    mine = [each for each in wrong if each.code == "E_DIGEST" and each.file in listed]
    others = tuple(each for each in wrong if each not in mine)
    if merge.parent is not None:
        mine = [replace(each, remedy=f"run `foldin gc {line} --restore {number}`; it makes it again") for each in mine]
    return Found(folder, merge.manifest_sha256, extent is Extent.THIN, tuple(mine), others)


def _folder(house: House, line: str, merge: Merge, *, fresh: bool) -> Path:
    """The folder of a version, with the manifest that was recorded."""
    number = merge.version or 0
    folder = house.mlflow.folder(line, number, fresh=fresh)
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


def extents(house: House, line: str) -> dict[int, Extent]:
    """Version -> what is kept of its files (`foldin gc`), of all that foldin registered, ascending."""
    told = extents_in((event.kind, event.because) for event in house.ledger.events(line))
    return {number: told.get(number, Extent.WHOLE) for number in house.ledger.parents(line)}


def with_files(house: House, line: str) -> set[int]:
    """The versions that were not retired."""
    return {number for number, extent in extents(house, line).items() if extent is not Extent.RETIRED}


def find_merge(house: House, line: str, number: int) -> Merge:
    """What the ledger says about a version.

    Raises:
        FoldinError: E_VERSION when it says nothing.
    """
    merge = house.ledger.registered(line, number)
    if merge is not None:
        return merge
    known = ", ".join(map(str, house.ledger.parents(line)))
    raise FoldinError(
        Refusal(
            code="E_VERSION",
            what="foldin did not register this version",
            where=f"{line} v{number}",
            expected=f"one of {known}" if known else "",
            remedy=f"choose one that `foldin log {line}` shows",
        )
    )


def chain(house: House, line: str, number: int) -> list[int]:
    """A version and its ancestors, newest first; the last one is the base."""
    return ancestry(house.ledger.parents(line), number)


def _given_up(version: Version) -> Refusal:
    what, again = (
        "the serving weights were given up to save room",
        f"foldin gc {version.line} --restore {version.number}",
    )
    return Refusal("E_THIN", what, version.where, remedy=f"run `{again}`")


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
