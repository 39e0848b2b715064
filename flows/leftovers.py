"""What takes room besides versions: copies of experts, downloads, uploads that were never finished."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flows.memory import STATE_FILE, Memory
from flows.versions import with_files
from flows.wiring import House
from registry.far import note_far
from registry.files import bytes_here
from registry.records import DAY, ExpertState, FoldinError

if TYPE_CHECKING:
    from registry.stored import Upload


class Item(NamedTuple):
    """Something that may go."""

    kind: str  # version, weights, copy, download or upload
    name: str
    size: int  # bytes; 0 where it is not known
    why: str
    version: int = 0  # of the kinds version and weights


def leftovers(house: House, line: str) -> list[Item]:
    """What may go besides versions, of a line and of the whole house."""
    return [*_downloads(house, line), *_copies(house), *_uploads(house)]


def _downloads(house: House, line: str) -> Iterator[Item]:
    """Copies of versions that MLflow has; they are fetched again when somebody asks."""
    champion = house.ledger.line(line).champion
    for folder in sorted((house.config.home / "downloads/versions" / line).glob("*")):
        if folder.is_dir() and folder.name != str(champion):
            yield Item("download", str(folder), bytes_here(folder), "MLflow has it")


def _copies(house: House) -> Iterator[Item]:
    """Our own copies of experts that are in no version with files.

    None while an expert waits to be folded, or while a version does not say which ones it holds.
    """
    held = set[str]()
    for line in house.ledger.lines():
        if house.ledger.experts(line.name, ExpertState.PENDING):
            return
        for version in with_files(house, line.name):
            memory = _memory(house, line.name, version)
            if memory is None:
                return
            held |= {each.tree_sha256 for each in memory.experts}
    for folder in sorted(house.experts.glob("[0-9a-f][0-9a-f]/*")):
        if folder.is_dir() and folder.name not in held and _is_old(folder.stat().st_mtime):
            yield Item("copy", str(folder), bytes_here(folder), "no version with files holds it")


def _memory(house: House, line: str, version: int) -> Memory | None:
    """What a version remembers, of which no other file is fetched; None when that is gone, or cannot be read."""
    where = f"{line} v{version}"
    try:
        with house.mlflow.files.scratch() as folder:
            return Memory.read(folder, where) if house.mlflow.files.single(line, version, STATE_FILE, folder) else None
    except FoldinError as error:
        if error.refusal.code not in ("E_FORMAT", "E_TOO_LARGE"):
            raise
        return None


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


def remove(house: House, item: Item) -> None:
    """Remove one of them."""
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
