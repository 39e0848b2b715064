"""The content-addressed store of folders: what is hashed and checked is our own copy, named by its digest."""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from registry.files import (
    CHUNK,
    MAX_BYTES,
    PLAIN_NAME,
    Place,
    canonical_json,
    disk_errors,
    fsync_dir,
    hash_tree,
    open_regular,
    shown,
    walk,
)


def copy_in(
    source: Path,
    store: Path,
    *,
    wanted: Callable[[str], bool] = lambda name: True,  # relative posix path -> copy it?
    check: Callable[[Path], None] = lambda folder: None,  # may raise FoldinError; sees the copy before it has its name
    max_bytes: int = MAX_BYTES,
    where: str = "",
) -> tuple[Path, str, dict[str, str]]:
    """Copy a folder into a content-addressed store: (store/<d[:2]>/<d>, d, {path: SHA-256}), d the SHA-256 of that map.

    What is hashed and checked is the copy, so that a source which changes meanwhile changes nothing. A copy that is
    there already is compared file by file and reused.

    Raises:
        FoldinError: E_FILETYPE, E_PATH, E_TOO_LARGE, E_DISK, E_DIGEST (a damaged copy in the store), or from `check`.
    """
    scratch = store / f".{secrets.token_hex(8)}.tmp"
    with disk_errors(scratch):
        scratch.mkdir(parents=True)
        try:
            files = _copy_files(source, scratch, wanted, max_bytes, where)
            check(scratch)
            digest = hashlib.sha256(canonical_json(files)).hexdigest()
            return _settle(scratch, store / digest[:2] / digest, files), digest, files
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _copy_files(source: Path, target: Path, wanted: Callable[[str], bool], budget: int, where: str) -> dict[str, str]:
    files = {}
    for name, descriptor in walk(source, where):
        if not wanted(name):
            continue
        place = Place(where, shown(name), "rename the file")
        if not all(PLAIN_NAME.fullmatch(part) for part in name.split("/")):
            raise place.refuse("E_PATH", "the file name is not plain", "letters, digits and . _ - + = @ ( ) space")
        files[name], size = _copy_file(descriptor, target / name, budget, place)
        budget -= size
    return dict(sorted(files.items()))


def _copy_file(descriptor: int, target: Path, budget: int, place: Place) -> tuple[str, int]:
    """(SHA-256, bytes) of what was copied; counted while it is read, since a size asked for beforehand may be a lie."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with open_regular(target.name, place.where, descriptor) as source, open(target, "xb") as copy:
        while piece := source.read(CHUNK):
            size += len(piece)
            if size > budget:
                raise place.refuse("E_TOO_LARGE", "the folder is larger than allowed", f"{budget} bytes left for it")
            digest.update(piece)
            copy.write(piece)
        copy.flush()
        os.fsync(copy.fileno())
    return digest.hexdigest(), size


def _settle(scratch: Path, home: Path, files: Mapping[str, str]) -> Path:
    """Give the finished copy its name, or keep the equal one that has it."""
    for folder in {scratch, *((scratch / name).parent for name in files)}:
        fsync_dir(folder)
    home.parent.mkdir(exist_ok=True)
    try:
        os.rename(scratch, home)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if hash_tree(home) != files:
            place = Place(str(home.parent), home.name, "remove this folder from the store, then run again")
            raise place.refuse("E_DIGEST", "the stored copy was changed after it was stored") from error
    fsync_dir(home.parent)
    return home
