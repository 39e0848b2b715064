"""The content-addressed store of folders: what is hashed and checked is our own copy, named by its digest."""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from registry.far import Far, far_files, kept_at, note_far
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
    keep: str = "",  # URI below which far files are copied by their store; "" leaves them where they are
    check: Callable[[Path], None] = lambda folder: None,  # may raise FoldinError; sees the copy before it has its name
    max_bytes: int = MAX_BYTES,
    where: str = "",
) -> tuple[Path, str, dict[str, str]]:
    """Copy a folder into a content-addressed store: (store/<d[:2]>/<d>, d, {path: SHA-256}), d the SHA-256 of that map.

    What is hashed and checked is the copy, so that a source which changes meanwhile changes nothing. A copy that is
    there already is compared file by file and reused. Far files stay far: known by their digests, they can be read as
    what they were, or not at all.

    Raises:
        FoldinError: E_FILETYPE, E_PATH, E_TOO_LARGE, E_DISK, E_DIGEST (a damaged copy in the store), or from `check`.
    """
    scratch = store / f".{secrets.token_hex(8)}.tmp"
    with disk_errors(scratch):
        scratch.mkdir(parents=True)
        try:
            far = _keep_far(source, wanted, max_bytes, where, keep)
            room = max_bytes - sum(each.size for each in far.values())
            files = _copy_files(source, scratch, wanted, room, where)
            note_far(scratch, far)
            check(scratch)
            files = dict(sorted({**files, **{name: each.sha256 for name, each in far.items()}}.items()))
            digest = tree_sha256(files)
            return _settle(scratch, store / digest[:2] / digest, files, far), digest, files
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            note_far(scratch, {})


def tree_sha256(files: Mapping[str, str]) -> str:  # path -> SHA-256
    """The digest of a folder, which names its copy; `files` as `files.hash_tree` gives them."""
    return hashlib.sha256(canonical_json(dict(files))).hexdigest()


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


def _keep_far(source: Path, wanted: Callable[[str], bool], budget: int, where: str, keep: str) -> dict[str, Far]:
    """The wanted far files, copied by their store to a name of their own where one is given."""
    found = {name: each for name, each in far_files(source).items() if wanted(name)}
    for name, each in found.items():
        place = Place(where, shown(name), "rename the file")
        if not all(PLAIN_NAME.fullmatch(part) for part in name.split("/")):
            raise place.refuse("E_PATH", "the file name is not plain", "letters, digits and . _ - + = @ ( ) space")
        budget -= each.size
        if budget < 0:
            raise place.refuse("E_TOO_LARGE", "the folder is larger than allowed")
    return {name: kept_at(each, keep) if keep else each for name, each in found.items()}


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


def _settle(scratch: Path, home: Path, files: Mapping[str, str], far: Mapping[str, Far]) -> Path:
    """Give the finished copy its name, or keep the equal one that has it."""
    for folder in {scratch, *((scratch / name).parent for name in files if name not in far)}:
        fsync_dir(folder)
    home.parent.mkdir(exist_ok=True)
    if not home.exists():  # the list of one that is there is its own
        note_far(home, far)
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
