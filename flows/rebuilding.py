"""A lost ledger from what MLflow keeps: the history of each line, held against the versions themselves."""

import json
from dataclasses import replace

from flows.telling import say
from flows.wiring import House
from registry.files import read_json, sha256_file
from registry.history import read
from registry.lineage import Extent, ancestry, extents
from registry.manifests import MANIFEST
from registry.records import FoldinError, Refusal


def rebuild(house: House) -> list[str]:
    """The configured lines that the ledger did not know and knows now.

    Raises:
        FoldinError: E_HISTORY when there is no history of a line, or it and the versions contradict each other;
            E_SOURCE when one that the champion grew from is gone. Lines that were put back before stay.
    """
    known = {line.name for line in house.ledger.lines()}
    lost = [line for line in sorted(house.config.lines) if line not in known and house.mlflow.versions(line)]
    for line in lost:
        document = read(house.mlflow.runs.history(line), line)
        versions = {row["version"]: row for row in document["merges"] if row["version"] is not None}
        told = extents((row["kind"], row["because"]) for row in document["events"])
        there = set(house.mlflow.versions(line))
        served = set(ancestry({each: row["parent"] for each, row in versions.items()}, document["line"]["champion"]))
        for version in sorted(each for each in versions if told.get(each) is not Extent.RETIRED):
            if version in there or version in served:
                _check(house, line, version, versions)
            else:
                say(f"{line} v{version} was deleted in MLflow; the champion did not grow from it, so its row stays")
        house.ledger.restore(document)
        say(f"line {line}: {len(versions)} versions and {len(document['experts'])} experts put back from MLflow")
    return lost


def _check(house: House, line: str, version: int, versions: dict[int, dict[str, object]]) -> None:
    """A version is what the history says: its manifest, and in it its parent and its merge."""
    row, where = versions[version], f"{line} v{version}"
    try:
        folder = house.mlflow.folder(line, version)
        found = sha256_file(folder / MANIFEST)
        manifest = read_json(folder / MANIFEST, where)
    except FoldinError as error:
        raise FoldinError(replace(error.refusal, where=where)) from error
    parent = manifest["parent"] or {"version": None, "manifest_sha256": None}
    before = versions.get(parent["version"], {}).get("manifest_sha256")
    verdict = json.loads(str(row["verdict"]))["outcome"]
    says = (row["manifest_sha256"], row["merge_key"], verdict, row["parent"], before)
    is_ = (found, manifest["merge_key"], manifest["verdict"], parent["version"], parent["manifest_sha256"])
    names = ("manifest", "merge key", "verdict", "parent", "parent's manifest")
    for name, expected, got in zip(names, says, is_, strict=True):
        if expected != got:
            what, remedy = f"the version has another {name} than the history says", "restore the ledger from a backup"
            raise FoldinError(
                Refusal("E_HISTORY", what, where, MANIFEST, "", str(expected)[:12], str(got)[:12], remedy)
            )
