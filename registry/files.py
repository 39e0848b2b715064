"""Bytes on disk: regular files only, digests, writes that are whole or absent, JSON in one spelling."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from registry.records import SYSTEM_ERRORS, FoldinError, Refusal

MAX_JSON = 64 * 2**20  # bytes; the largest shard index in the wild is about 10 MB
MAX_BYTES = 2**40  # bytes that one copied folder may hold
CHUNK = 2**20
PLAIN_NAME = re.compile(r"(?!\.{1,2}$)[\w.@+=, ()~-]{1,200}", re.ASCII)  # one path component that is safe everywhere
NOTHING: Mapping[str, str] = MappingProxyType({})
DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO)


class Place(NamedTuple):
    """Where something is wrong: enough to write a refusal that a person can act on."""

    where: str  # "expert demo-experts v3"
    file: str
    remedy: str = "export it again and register the result as a new version"

    def refuse(self, code: str, what: str, expected: str = "", found: str = "", tensor: str = "") -> FoldinError:
        """The error to raise; text that came from a file must have passed `shown` first."""
        return FoldinError(Refusal(code, what, self.where, self.file, tensor, expected, found, self.remedy))


def shown(value: object) -> str:
    """A stranger's text made safe for messages: ASCII, no control or direction characters, at most 160 characters."""
    text = ascii(value)[1:-1] if isinstance(value, str) else ascii(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


@contextmanager
def open_regular(path: Path | str, where: str = "", dir_fd: int | None = None) -> Iterator[BufferedReader]:
    """A regular file, open for reading bytes; `path` may be relative to the open folder `dir_fd`.

    Raises:
        FoldinError: E_FILETYPE for a link, pipe, socket, device or folder; E_UNREACHABLE when it cannot be opened.
        OSError: one of SYSTEM_ERRORS, such as too many open files, as it is.
    """
    place = Place(where, shown(os.path.basename(path)), "give regular files; copy links with their contents")
    try:
        # A pipe without a writer would block here for ever if not for O_NONBLOCK.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in SYSTEM_ERRORS:
            raise
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise place.refuse("E_FILETYPE", "the file is a link or a socket", "a regular file") from error
        raise place.refuse("E_UNREACHABLE", "the file cannot be read", found=error.strerror or "") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise place.refuse("E_FILETYPE", "the file is a folder, a pipe or a device", "a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def walk(folder: Path, where: str = "") -> Iterator[tuple[str, int]]:
    """(relative posix path, descriptor of its folder) of every file below `folder`, in no promised order.

    Raises:
        FoldinError: E_FILETYPE where `folder` is not a folder or a link to a folder stands below it; E_UNREACHABLE
            where a folder below it cannot be opened.
        OSError: as `open_regular`.
    """

    def unread(error: OSError) -> None:
        if error.errno in SYSTEM_ERRORS:
            raise error
        place = Place(where, shown(os.path.basename(error.filename)), "make the folder readable")
        raise place.refuse("E_UNREACHABLE", "the folder cannot be read", found=error.strerror or "") from error

    if folder.is_symlink() or not folder.is_dir():
        raise Place(where, shown(folder.name), "give a folder").refuse("E_FILETYPE", "there is no folder of that name")
    for parent, folders, names, descriptor in os.fwalk(folder, onerror=unread):
        prefix = os.path.relpath(parent, folder)
        for name in folders:
            if stat.S_ISLNK(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode):
                raise Place(where, shown(name)).refuse("E_FILETYPE", "the folder is a link", "a folder")
        for name in names:
            yield (name if prefix == "." else f"{prefix}/{name}"), descriptor


def sha256_file(path: Path) -> str:
    """SHA-256 (64 hex digits) of a regular file, read in pieces; errors as `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tree(folder: Path, known: Mapping[str, str] = NOTHING) -> dict[str, str]:
    """Relative posix path -> SHA-256 of every file below `folder`, sorted; anything but regular files is refused.

    The digests in `known` are believed, and those files not read: for what this process wrote and hashed itself. Of
    what is far the digests are those that it had when it was read whole, under the etag that it still has.
    """
    from registry.far import far_files

    digests = {}
    for name, descriptor in walk(folder):
        if name in known:
            digests[name] = known[name]
            continue
        with open_regular(os.path.basename(name), dir_fd=descriptor) as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    far = far_files(folder)
    for name in far.keys() & digests.keys():
        raise Place("", shown(name), "remove the file").refuse("E_FILETYPE", "the file is here and far at once")
    digests |= {name: each.sha256 for name, each in far.items()}
    return dict(sorted(digests.items()))


def fsync_dir(folder: Path) -> None:
    """Make the names in `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full, limited, read-only or failing disk into FoldinError E_DISK naming `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        place = Place(str(path.parent), path.name, "free space or lift the limit, then run again")
        raise place.refuse("E_DISK", "the file could not be written", found=error.strerror or "") from error


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends well, and disappears when it does not.

    The bytes are on disk before the name is (write, fsync, rename, fsync of the folder); missing folders are made.
    Without `durable` they are only after `sync`: for files that are known by their digest, or not used, after a crash.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with disk_errors(path):
            with open(scratch, "xb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(scratch, path)
            if durable:
                fsync_dir(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file that was written before, and its name, survive a power loss. Raises FoldinError E_DISK."""
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        fsync_dir(path.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` under `path`: readers see the old file or the whole new one. Raises FoldinError E_DISK."""
    with replacing(path) as file:
        file.write(content)


def sweep(folder: Path, age: float = 0.0) -> list[str]:
    """Remove what killed writers left directly in `folder`; the names removed.

    Args:
        folder: where to look.
        age: seconds since the last change, so that what others write there now stays; 0 while nobody writes there.
    """
    latest = time.time() - age
    orphans = sorted(path for path in folder.glob(".*.tmp*") if path.lstat().st_mtime <= latest)
    for orphan in orphans:
        shutil.rmtree(orphan) if orphan.is_dir() else orphan.unlink()
    return [orphan.name for orphan in orphans]


def bytes_here(folder: Path) -> int:
    """Bytes of the files that lie in a folder, at any depth."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def canonical_json(value: object) -> bytes:
    """The one spelling of a JSON value: sorted keys, indent 1, newline at the end, UTF-8."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: object) -> None:
    """Write `value` canonically and atomically. Raises FoldinError E_DISK."""
    write_atomic(path, canonical_json(value))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return entries


def parse_json(text: bytes, place: Place, code: str = "E_FORMAT") -> dict[str, Any]:
    """The JSON object in `text`; broken, repeated-key, too deep or non-object JSON raises FoldinError `code`."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise place.refuse(code, "the JSON is not valid", "a JSON object in UTF-8", shown(str(error))) from error
    if not isinstance(value, dict):
        raise place.refuse(code, "the JSON is not an object", "an object", type(value).__name__)
    return value


def read_json(path: Path, where: str = "") -> dict[str, Any]:
    """The JSON object in a regular file of at most MAX_JSON bytes.

    Raises:
        FoldinError: E_FORMAT, E_TOO_LARGE, or as `open_regular`.
    """
    place = Place(where, shown(path.name))
    with open_regular(path, where) as file:
        text = file.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise place.refuse("E_TOO_LARGE", "the JSON file is too large", f"at most {MAX_JSON} bytes")
    return parse_json(text, place)
