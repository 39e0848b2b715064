"""What takes room and nobody needs: old versions' files, copies, downloads, uploads that were never finished.

A version is never deleted, only its files: it is retired, stays in MLflow and in the history, and cannot be champion.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from flows.champion import agree
from flows.leasing import held
from flows.telling import say
from flows.versions import STATE_FILE, Memory, chain, retired
from flows.waiting import waiting
from flows.wiring import House
from registry.far import note_far
from registry.records import ExpertState, FoldinError, Refusal

if TYPE_CHECKING:
    from registry.stored import Upload

DOCTOR = "`foldin doctor` says what is left of it"
DAY = 86400.0  # seconds; what is younger may be somebody's work


class Item(NamedTuple):
    """Something that may go."""

    kind: str  # version, copy, download or upload
    name: str
    size: int  # bytes; 0 where it is not known
    why: str
    version: int = 0  # of the kind version


def sizes(house: House, line: str) -> dict[int, int]:
    """Version -> bytes of its files, wherever they are; versions that were retired have none."""
    gone = retired(house, line)
    return {
        each: house.mlflow.files.size(line, each) if each not in gone else 0 for each in sorted(_numbers(house, line))
    }


def collectable(house: House, line: str, keep: int, stored: Mapping[int, int]) -> list[Item]:
    """What may go of a line, the versions first; `stored` as `sizes` gives."""
    return [*_old_versions(house, line, keep, stored), *_rest(house, line)]


def collect(house: House, line: str, keep: int, because: str, who: str) -> list[Item]:
    """What was removed; the line's history says which versions were retired. Each step is repeatable."""
    with held(house, line, told=say) as lease:
        agree(house, lease, say, "collect")
        versions = _old_versions(house, line, keep, sizes(house, line))
        for item in versions:
            if item.version not in retired(house, line):
                house.ledger.remark(lease, "retired", f"v{item.version}: {because}", who)
            house.ledger.leases.check(lease)
            house.mlflow.retire(line, item.version)
        rest = _rest(house, line)  # only now: retiring takes long
        for item in rest:
            house.ledger.leases.check(lease)
            _remove(house, item)
    return [*versions, *rest]


def needed(house: House, line: str, keep: int) -> set[int]:
    """The versions whose files stay: the base, the champion and its nearest ancestors, the newest, what waits."""
    champion = house.ledger.line(line).champion
    ancestors = chain(house, line, champion) if champion else []
    numbers = sorted(_numbers(house, line))
    current = waiting(house, line)
    newest = numbers[-keep:] if keep else []
    kept = {*ancestors[: keep + 1], *numbers[:1], *newest, *house.mlflow.aliased(line)}
    return kept | ({current.version} if current and current.version else set())


def _old_versions(house: House, line: str, keep: int, stored: Mapping[int, int]) -> list[Item]:
    """The versions that nobody needs and that have files; one that was retired has, when that was cut off."""
    kept, gone = needed(house, line, keep), retired(house, line)
    old = (
        version for version in stored.keys() - kept if version not in gone or house.mlflow.files.there(line, version)
    )
    why = f"no champion within {keep} folds, and not among the newest"
    return [Item("version", f"{line} v{version}", stored[version], why, version) for version in sorted(old)]


def _rest(house: House, line: str) -> list[Item]:
    return [*_downloads(house, line), *_copies(house), *_uploads(house)]


def _downloads(house: House, line: str) -> Iterator[Item]:
    """Copies of versions that MLflow has; they are fetched again when somebody asks."""
    champion = house.ledger.line(line).champion
    for folder in sorted((house.config.home / "downloads/versions" / line).glob("*")):
        if folder.is_dir() and folder.name != str(champion):
            yield Item("download", str(folder), _bytes(folder), "MLflow has it")


def _copies(house: House) -> Iterator[Item]:
    """Our own copies of experts that are in no version with files; none while an expert waits to be folded."""
    held = set[str]()
    for line in house.ledger.lines():
        if house.ledger.experts(line.name, ExpertState.PENDING):
            return
        for version in _numbers(house, line.name) - retired(house, line.name):
            held |= {each.tree_sha256 for each in _memory(house, line.name, version).experts}
    for folder in sorted(house.experts.glob("[0-9a-f][0-9a-f]/*")):
        if folder.is_dir() and folder.name not in held and _is_old(folder.stat().st_mtime):
            yield Item("copy", str(folder), _bytes(folder), "no version with files holds it")


def _memory(house: House, line: str, version: int) -> Memory:
    """What a version remembers, of which no other file is fetched."""
    with TemporaryDirectory(dir=house.config.home) as folder:
        where = f"{line} v{version}"
        if not house.mlflow.files.single(line, version, STATE_FILE, Path(folder)):
            raise FoldinError(Refusal("E_SOURCE", "the version's memory is gone", where, STATE_FILE, remedy=DOCTOR))
        return Memory.read(Path(folder), where)


def _uploads(house: House) -> Iterator[Item]:
    return (Item("upload", left.uri, 0, "begun a day ago and never finished") for left in abandoned(house))


def abandoned(house: House) -> "list[Upload]":
    """The uploads to the line's store that were begun long ago and never finished; younger ones may be somebody's."""
    root = house.config.registry.artifact_root
    if not root.startswith("s3://"):
        return []
    from registry.far import store

    return [left for left in store().unfinished(root) if _is_old(left.begun)]


def _is_old(seconds: float) -> bool:
    return seconds < time.time() - DAY


def _remove(house: House, item: Item) -> None:
    if item.kind == "upload":
        from registry.far import store

        for left in (each for each in abandoned(house) if each.uri == item.name):
            store().abort(left)
        return
    folder = Path(item.name)
    scratch = folder.with_name(f".{folder.name}.tmp")  # gone at once, whoever dies in here; `sweep` knows such names
    shutil.rmtree(scratch, ignore_errors=True)
    folder.rename(scratch)
    shutil.rmtree(scratch, ignore_errors=True)
    note_far(folder, {})


def _numbers(house: House, line: str) -> set[int]:
    return {merge.version for merge in house.ledger.merges(line) if merge.version is not None}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
