"""The manifest of a folder: the SHA-256 of each of its files, written last, which alone proves the folder whole."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

from registry.files import NOTHING, Place, canonical_json, hash_tree, read_json, shown, write_atomic
from registry.records import FoldinError, Refusal

MANIFEST = "foldin/manifest.json"
SIGNATURE = "model.sig"  # beside the files of a version or an expert; no manifest lists it, for it is made afterwards
OUTSIDE = frozenset({MANIFEST, SIGNATURE})  # what a manifest does not list


def write_manifest(folder: Path, facts: Mapping[str, object], known: Mapping[str, str] = NOTHING) -> str:
    """Write foldin/manifest.json, {**facts, "files": {path: SHA-256}}, after everything else; its SHA-256.

    `known` as in `hash_tree`.
    """
    files = {name: digest for name, digest in hash_tree(folder, known).items() if name not in OUTSIDE}
    content = canonical_json({**facts, "files": files})
    write_atomic(folder / MANIFEST, content)
    return hashlib.sha256(content).hexdigest()


def verify_manifest(folder: Path, without: Collection[str] = ()) -> list[Refusal]:
    """Every file that is missing, extra or different from the folder's manifest; [] when the folder is whole.

    The files named in `without` are not looked at: they may be missing, or half there.
    """
    try:
        listed = read_json(folder / MANIFEST).get("files")
        found = hash_tree(folder)
    except FoldinError as error:
        return [error.refusal]
    if not isinstance(listed, dict):
        return [Place(str(folder), MANIFEST).refuse("E_DIGEST", "the manifest lists no files").refusal]
    found = {name: digest for name, digest in found.items() if name not in OUTSIDE}
    names = sorted(name for name in {*listed, *found}.difference(without) if listed.get(name) != found.get(name))
    return [_differs(folder, name, listed.get(name), found.get(name)) for name in names]


def _differs(folder: Path, name: str, listed: object, found: str | None) -> Refusal:
    place = Place(str(folder), shown(name), "restore the version from its artifacts, or roll back to another one")
    what = "the file is not the one that the manifest lists"
    return place.refuse("E_DIGEST", what, shown(listed or "no such file"), found or "no such file").refusal
