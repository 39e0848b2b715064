"""Archived experts, and how each comes back: the base, the change that was kept, and every other file as it was.

An archive is a folder: archive.json (`Record`), changes/*.safetensors with the packed changes of the tensors, files/
with everything that is no weights, original/ with the digests of the expert's files and the signature of those, and a
manifest, written last. Where archives lie: `flows.archives`.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.archives import LOST, Archive, opened
from flows.versions import Version, chain, open_version
from flows.wiring import House
from registry import intake
from registry.files import Place, hash_tree, read_json, shown
from registry.records import FoldinError, Refusal, TensorSpec
from registry.store import tree_sha256

if TYPE_CHECKING:
    from torch import Tensor

    from registry.weights import Checkpoint

RECORD = "archive.json"
FORMAT = "foldin-archive/1"  # raised when what it says means something else
CHANGES, FILES = "changes", "files"
ORIGINAL, DIGESTS = "original", "files.json"  # what a signature is checked against, and the signature


class Kept(NamedTuple):
    """How one tensor of the expert is kept."""

    form: str  # as `merging.packing`, or "copy" of another tensor of the expert
    of: str  # the base's tensor that changed, or the expert's that it is a copy of; "" where there is none
    dtype: str
    shape: tuple[int, ...]
    file: str = ""  # of `changes`
    parts: tuple[str, ...] = ()  # there, as NAME:part
    bytes: int = 0
    error: float = 0.0  # relative to the tensor's change, as measured


@dataclass(frozen=True)
class Record:
    """archive.json."""

    expert: str
    tags: Mapping[str, str]  # of its version in MLflow that decide how it is folded
    base_sha256: str  # content digest of the weights that changed
    weights_sha256: str  # content digest of the expert's weights
    tree_sha256: str  # digest of its files
    restored_weights_sha256: str
    restored_tree_sha256: str
    tolerance: float
    error: float  # of the whole model's change
    bytes_before: int  # of all files
    bytes_after: int  # of all files but this one and the manifest
    layout: Mapping[str, tuple[str, ...]]  # weight file -> its tensors, in file order
    tensors: Mapping[str, Kept]

    @classmethod
    def read(cls, folder: Path, where: str) -> "Record":
        """The record of an archive that was verified.

        Raises:
            FoldinError: E_ARCHIVE when another foldin wrote it, which meant something else by it.
        """
        table = read_json(folder / RECORD, where)
        found = table.pop("format", None)
        if found != FORMAT or table.keys() != {each.name for each in fields(cls)}:
            place = Place(where, RECORD, "use the foldin that wrote it")
            raise place.refuse("E_ARCHIVE", "another foldin wrote the archive", FORMAT, shown(found))
        layout = {file: tuple(names) for file, names in table["layout"].items()}
        tensors = {name: _kept(row) for name, row in table["tensors"].items()}
        return cls(**{**table, "layout": layout, "tensors": tensors})

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The expert's tensors."""
        return {name: TensorSpec(each.dtype, each.shape) for name, each in self.tensors.items()}


def _kept(row: Mapping[str, Any]) -> Kept:
    return Kept(**{**row, "shape": tuple(row["shape"]), "parts": tuple(row["parts"])})


def restored(house: House, archive: Archive) -> tuple[intake.Admitted, Record]:
    """An archived expert as a copy in the content store, and the archive's record.

    Raises:
        FoldinError: E_DIGEST naming the file of the archive that is not the one that was recorded; E_ARCHIVE where the
            base, or what comes out, is another one than the record says; E_SOURCE where the archive is gone.
    """
    where = archive.where
    with opened(house, archive) as folder:
        record = Record.read(folder, where)
        home = house.experts / archive.restored_sha256[:2] / archive.restored_sha256
        if home.is_dir() and tree_sha256(files := hash_tree(home)) == archive.restored_sha256:
            return intake.Admitted(home, files, archive.restored_sha256, ()), record
        base = base_of(house, archive.line)
        house.experts.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=house.experts, prefix=".", suffix=".tmp") as scratch:
            write_restored(folder, record, base, Path(scratch) / "expert", where)
            copy = intake.admit(Path(scratch) / "expert", house.experts, where)
    if isinstance(copy, Refusal):
        raise FoldinError(copy)
    if copy.tree_sha256 != archive.restored_sha256:
        what, expected, found = "what was restored has another digest", archive.restored_sha256, copy.tree_sha256
        raise Place(where, "", LOST).refuse("E_ARCHIVE", what, expected[:12], found[:12])
    return copy, record


def original_of(folder: Path, archive: Archive) -> intake.Admitted:
    """What is kept of an archived expert's own files: their digests, and the signature of those where there is one.

    Raises:
        FoldinError: E_SIGNATURE where an older foldin kept neither; E_DIGEST where the digests are another expert's.
    """
    if not (folder / ORIGINAL / DIGESTS).exists():
        place = Place(archive.where, "", LOST)
        raise place.refuse("E_SIGNATURE", "the line asks for a signature, and none was kept with the archive")
    files = read_json(folder / ORIGINAL / DIGESTS, archive.where)["files"]
    found = tree_sha256(files)
    if found != archive.tree_sha256:
        place = Place(archive.where, f"{ORIGINAL}/{DIGESTS}", LOST)
        what = "the digests are not those of the expert that was archived"
        raise place.refuse("E_DIGEST", what, archive.tree_sha256[:12], found[:12])
    return intake.Admitted(folder / ORIGINAL, files, found, ())


def base_of(house: House, line: str) -> Version:
    """The version that holds a line's base."""
    return open_version(house, line, chain(house, line, house.ledger.line(line).champion or 0)[-1])


def write_restored(folder: Path, record: Record, base: Version, target: Path, where: str) -> None:
    """Write the expert that an archive's folder holds, one tensor in memory at a time.

    Raises:
        FoldinError: E_ARCHIVE where the base is another one, or a change cannot be read.
    """
    from registry.writer import write_checkpoint

    if base.memory.base_sha256 != record.base_sha256:
        expected, found = record.base_sha256[:12], base.memory.base_sha256[:12]
        raise Place(where, RECORD, LOST).refuse("E_ARCHIVE", "the archive is of another base", expected, found)
    shutil.copytree(folder / FILES, target)
    tensors = reader(folder, record, base.weights(), where)
    write_checkpoint(target, record.specs, tensors, layout=record.layout)


def reader(folder: Path, record: Record, base: "Checkpoint", where: str) -> Callable[[str], "Tensor"]:
    """A function that restores one tensor of an archived expert by its name."""
    from merging import MergeError
    from merging.packing import unpack
    from registry.weights import DTYPES, Checkpoint

    @cache
    def opened(file: str) -> Checkpoint:
        return Checkpoint.open_file(folder / CHANGES / file, where)

    def tensor(name: str) -> "Tensor":
        kept = record.tensors[name]
        if kept.form == "copy":
            return tensor(kept.of)
        parts = {part: opened(kept.file)[f"{name}:{part}"] for part in kept.parts}
        if not kept.of:
            return parts["exact"]
        try:
            return unpack(kept.form, parts, base[kept.of], DTYPES[kept.dtype])
        except MergeError as error:
            place = Place(where, f"{CHANGES}/{kept.file}", LOST)
            raise place.refuse("E_ARCHIVE", "a change cannot be read", found=str(error), tensor=name) from error

    return tensor
