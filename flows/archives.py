"""Which archived experts a line's history names, where each lies, and whether it is as it was.

An archive lies in MLflow beside the line's history, under the digest of its manifest, which the line's history in the
ledger names: nothing else is believed. What is in it: `flows.restoring`.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from flows.versions import open_version
from flows.wiring import House
from registry.files import Place, sha256_file
from registry.manifests import MANIFEST, verify_manifest
from registry.records import FoldinError, Refusal

ARCHIVED = "archived"  # the kind of the event
LOST = (
    "run `foldin archive` again while the original is there, restore the archive from a backup, or leave the expert out"
)
SAID = re.compile(
    r"(.+): ([\d,]+) -> ([\d,]+) bytes, error (\S+); files ([0-9a-f]{64}), restored ([0-9a-f]{64}),"
    r" archive ([0-9a-f]{64})(?: in run (\w+))?"
)


class Archive(NamedTuple):
    """One archived expert, as the history of a line names it."""

    line: str
    expert: str
    before: int  # bytes of the expert's files
    after: int  # bytes of the archive's
    error: float  # ||restored - expert|| / ||expert - base||, over the whole model
    tree_sha256: str  # digest of the expert's files
    restored_sha256: str  # digest of the restored expert's files
    manifest_sha256: str  # of the archive, its name in MLflow
    run: str = ""  # id of the run that has it; "" for the one that keeps the line's history

    @property
    def where(self) -> str:
        """Names the archive in messages."""
        return f"archive of expert {self.expert}"

    @property
    def said(self) -> str:
        """The event's text; `SAID` reads it."""
        sizes = f"{self.before:,} -> {self.after:,} bytes, error {self.error:.4g}"
        digests = f"files {self.tree_sha256}, restored {self.restored_sha256}, archive {self.manifest_sha256}"
        return f"{self.expert}: {sizes}; {digests}{f' in run {self.run}' if self.run else ''}"


def archives(house: House, line: str = "") -> list[Archive]:
    """Every archive that a line's history names, oldest first; of all lines when it is ""."""
    found = []
    for name in [line] if line else [each.name for each in house.ledger.lines()]:
        for event in house.ledger.events(name):
            match = SAID.fullmatch(event.because) if event.kind == ARCHIVED else None
            if match:
                expert, before, after, error, tree, again, manifest, run = match.groups()
                sizes = int(before.replace(",", "")), int(after.replace(",", ""))
                found.append(Archive(name, expert, *sizes, float(error), tree, again, manifest, run or ""))
    return found


def archive_of(house: House, tree_sha256: str, line: str = "") -> Archive | None:
    """The newest archive of an expert's files, or of what an archive gives back of them; None when there is none.

    Of any line when it is "": for a suite, which is the same whoever kept it.
    """
    mine = (each for each in archives(house, line) if tree_sha256 in (each.tree_sha256, each.restored_sha256))
    return next(reversed(list(mine)), None)


@contextmanager
def opened(house: House, archive: Archive) -> Iterator[Path]:
    """The local folder of an archive while the block runs, every file compared with what was recorded.

    Raises:
        FoldinError: E_SOURCE where it is gone, E_DIGEST as `check_archive`.
    """
    with ExitStack() as stack:
        try:
            kept = house.mlflow.archives.opened(archive.line, archive.manifest_sha256, archive.run)
            folder = stack.enter_context(kept)
        except FoldinError as error:
            if error.refusal.code != "E_SOURCE":
                raise
            gone = replace(error.refusal, what="the archive is gone", where=archive.where, remedy=LOST)
            raise FoldinError(gone) from error
        check_archive(folder, archive.manifest_sha256, archive.where)
        yield folder


def check_archives(house: House, line: str) -> Iterator[Refusal]:
    """What is wrong with the archives of a line that a replay may ask for."""
    for archive in _asked_for(house, line):
        try:
            with opened(house, archive):
                pass
        except FoldinError as error:
            yield error.refusal


def _asked_for(house: House, line: str) -> list[Archive]:
    """The newest archive of each expert, and those that the champion was folded from."""
    mine, champion = archives(house, line), house.ledger.line(line).champion or 0
    newest = {each.tree_sha256: each for each in mine}
    try:
        folded = {each.tree_sha256 for each in open_version(house, line, champion).memory.experts}
    except FoldinError:  # said where versions are looked at
        return mine
    return [each for each in mine if newest[each.tree_sha256] is each or each.restored_sha256 in folded]


def check_archive(folder: Path, manifest_sha256: str, where: str) -> None:
    """Nothing, when every file of an archive is the one that was recorded; else raises FoldinError E_DIGEST."""
    found = sha256_file(folder / MANIFEST) if (folder / MANIFEST).exists() else ""
    if found != manifest_sha256:
        what = "the archive's manifest is not the one that was recorded"
        raise Place(where, MANIFEST, LOST).refuse("E_DIGEST", what, manifest_sha256[:12], found[:12] or "no manifest")
    for wrong in verify_manifest(folder):
        raise Place(where, wrong.file, LOST).refuse("E_DIGEST", wrong.what, wrong.expected[:12], wrong.found[:12])
