"""Are the versions of a line whole, and does each grow from the one that it says?"""

from collections.abc import Iterator, Mapping

from flows.signing import require_signature
from flows.versions import open_version, with_files
from flows.wiring import House
from registry.files import read_json
from registry.manifests import MANIFEST
from registry.records import FoldinError, Merge, Refusal


def check_versions_of(house: House, line: str, registered: set[int]) -> Iterator[Refusal]:
    """Rows without versions, versions without rows, damaged files, broken chains; `registered` is what MLflow has."""
    rows = house.ledger.merges(line)
    known = {merge.version: merge for merge in rows if merge.version is not None}
    unnamed = {house.mlflow.registered(line, merge.merge_key) for merge in rows if merge.version is None}
    for version in sorted(registered - known.keys() - unnamed):
        remedy = "delete it in MLflow: foldin folds only into versions that it registered"
        yield Refusal(
            "E_VERSION", "MLflow has a version that the ledger does not know", f"{line} v{version}", remedy=remedy
        )
    for version in sorted(known.keys() - registered):
        what, remedy = "the ledger has a version that MLflow lost", "restore MLflow's database, or roll back to another"
        yield Refusal("E_VERSION", what, f"{line} v{version}", remedy=remedy)
    for version in sorted(known.keys() & registered & with_files(house, line)):
        try:
            folder = open_version(house, line, version, whole=True).folder
            require_signature(house, line, version, folder)
        except FoldinError as error:
            yield error.refusal
            continue
        parent = read_json(folder / MANIFEST)["parent"] or {}
        yield from _check_parent(line, known[version], known, parent)
    for version, merge in sorted(known.items()):
        if merge.parent is not None and merge.parent not in known:
            what, remedy = "the version's parent is in no ledger row", "restore the ledger from a backup"
            yield Refusal("E_CHAIN", what, f"{line} v{version}", expected=f"v{merge.parent}", remedy=remedy)


def _check_parent(line: str, merge: Merge, known: Mapping[int, Merge], says: Mapping[str, object]) -> Iterator[Refusal]:
    """Nothing, when the parent that a manifest names is the ledger's, with the manifest that the ledger recorded."""
    before = known.get(merge.parent) if merge.parent is not None else None
    expected = (merge.parent, before.manifest_sha256 if before else None)
    found = (says.get("version"), says.get("manifest_sha256"))
    if merge.parent is not None and before is None:
        return  # told once, as a parent without a row
    if expected != found:
        what = "the version's manifest names another parent than the ledger"
        shown = [f"v{number} with manifest {str(digest)[:12]}" for number, digest in (expected, found)]
        remedy = "restore the ledger from a backup, or roll back to a version before it"
        yield Refusal("E_CHAIN", what, f"{line} v{merge.version}", MANIFEST, "", shown[0], shown[1], remedy)
