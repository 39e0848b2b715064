"""What takes room and nobody needs: old versions' files, copies, downloads, uploads that were never finished.

A version is never deleted, only its files: it is retired, stays in MLflow and in the history, and cannot be champion.
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flows.champion import reconcile
from flows.leasing import held
from flows.telling import say
from flows.versions import Memory, chain, retired
from flows.waiting import waiting
from flows.wiring import House
from registry.far import far_files
from registry.records import ExpertState, FoldinError, Refusal

DAY = 86400.0  # seconds; what is younger may be somebody's work
KEEP = 5  # ancestors of the champion, and newest versions, whose files stay


class Item(NamedTuple):
    """Something that may go."""

    kind: str  # version, copy, download or upload
    name: str
    size: int  # bytes; 0 where it is not known
    why: str


def sizes(house: House, line: str) -> dict[int, int]:
    """Version -> bytes of its files, wherever they are; versions that were retired have none."""
    gone = retired(house, line)
    numbers = [merge.version for merge in house.ledger.merges(line) if merge.version is not None]
    return {number: _size_of(house, line, number) if number not in gone else 0 for number in numbers}


def _size_of(house: House, line: str, version: int) -> int:
    try:
        return _bytes(house.mlflow.folder(line, version))
    except FoldinError as error:
        if error.refusal.code != "E_SOURCE":
            raise
        return 0  # somebody removed it; the doctor says so


def collectable(house: House, line: str, keep: int = KEEP) -> list[Item]:
    """What may go of a line, the versions first."""
    return [*_versions(house, line, keep), *_downloads(house, line), *_copies(house), *_uploads(house)]


def collect(house: House, line: str, keep: int, because: str, who: str) -> list[Item]:
    """Remove what may go, and say in the line's history which versions were retired; each step is repeatable."""
    with held(house, line, told=say) as lease:
        if not reconcile(house, lease, say):
            what, remedy = house.ledger.line(line).blocked, "move the alias champion to a version that passed first"
            raise FoldinError(Refusal("E_BLOCKED", what, f"line {line}", remedy=remedy))
        items = collectable(house, line, keep)
        for item in items:
            if item.kind == "version":
                number = int(item.name.rpartition(" v")[2])
                if number not in retired(house, line):
                    house.ledger.remark(lease, "retired", f"v{number}: {because}", who)
                house.ledger.leases.check(lease)
                house.mlflow.retire(line, number)
        for item in [*_downloads(house, line), *_copies(house)]:  # again: retiring takes long
            house.ledger.leases.check(lease)
            _remove(Path(item.name))
        if any(item.kind == "upload" for item in items):
            _abort(house)
    return items


def needed(house: House, line: str, keep: int) -> set[int]:
    """The versions whose files stay: the base, the champion and its nearest ancestors, the newest, what waits."""
    champion = house.ledger.line(line).champion
    ancestors = chain(house, line, champion) if champion else []
    numbers = sorted(merge.version for merge in house.ledger.merges(line) if merge.version is not None)
    current = waiting(house, line)
    newest = numbers[-keep:] if keep > 0 else []
    kept = {*ancestors[: max(keep, 0) + 1], *numbers[:1], *newest, *house.mlflow.aliased(line)}
    return kept | ({current.version} if current and current.version else set())


def _versions(house: House, line: str, keep: int) -> Iterator[Item]:
    kept, gone = needed(house, line, keep), retired(house, line)
    for merge in house.ledger.merges(line):
        version = merge.version
        if version is None or version in kept:
            continue
        if version in gone and not house.mlflow.files.there(line, version):
            continue
        why = f"no champion within {keep} folds, and not among the newest"
        yield Item("version", f"{line} v{version}", _size_of(house, line, version), why)


def _downloads(house: House, line: str) -> Iterator[Item]:
    """Copies of versions that MLflow has; they are fetched again when somebody asks."""
    champion = house.ledger.line(line).champion
    for folder in sorted((house.config.home / "downloads/versions" / line).glob("*")):
        if folder.is_dir() and folder.name != str(champion):
            yield Item("download", str(folder), _bytes(folder, here=True), "MLflow has it")


def _copies(house: House) -> Iterator[Item]:
    """Our own copies of experts that no line has to fold any more and whose suites nobody asks for."""
    wanted = set[str]()
    for line in house.ledger.lines():
        if any(each.state is ExpertState.PENDING for each in house.ledger.experts(line.name)):
            return
        for version in needed(house, line.name, KEEP) - retired(house, line.name):
            wanted |= {each.tree_sha256 for each in Memory.read(house.mlflow.folder(line.name, version)).experts}
    for folder in sorted(house.experts.glob("[0-9a-f][0-9a-f]/*")):
        if folder.is_dir() and folder.name not in wanted and _old(folder.stat().st_mtime):
            yield Item("copy", str(folder), _bytes(folder, here=True), "no champion holds it; MLflow has the expert")


def _uploads(house: House) -> Iterator[Item]:
    root = house.config.registry.artifact_root
    if root.startswith("s3://"):
        from registry.far import store

        for left in store().unfinished(root):
            if not _old(left.begun):  # somebody may be at it
                continue
            yield Item("upload", left.uri, 0, "begun and never finished")


def _abort(house: House) -> None:
    from registry.far import store

    for left in store().unfinished(house.config.registry.artifact_root):
        if _old(left.begun):
            store().abort(left)


def _old(seconds: float) -> bool:
    return seconds < time.time() - DAY


def _remove(folder: Path) -> None:
    from registry.far import note_far

    scratch = folder.with_name(f".{folder.name}.tmp")  # gone at once, whoever dies in here; `sweep` knows such names
    shutil.rmtree(scratch, ignore_errors=True)
    folder.rename(scratch)
    shutil.rmtree(scratch, ignore_errors=True)
    note_far(folder, {})


def _bytes(folder: Path, *, here: bool = False) -> int:
    """Bytes of a folder's files; `here` leaves out what is far."""
    near = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return near if here else near + sum(each.size for each in far_files(folder).values())
