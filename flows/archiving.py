"""Experts kept as what they change, compressed: `foldin archive`. What an archive is and how it is read: `restoring`.

An expert's tensors are packed one at a time, each within the tolerance as measured (`merging.packing`); the archive is
restored once before it counts, so that its record can promise what comes out.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evaluation.escape import clean
from flows.fitting import fit
from flows.leasing import held
from flows.memory import Folded
from flows.naming import find_expert
from flows.packs import pack_all
from flows.restoring import (
    ARCHIVED,
    CHANGES,
    FILES,
    FORMAT,
    RECORD,
    Archive,
    Record,
    archive_of,
    base_of,
    write_restored,
)
from flows.scoring import copy_of
from flows.telling import say
from flows.versions import Version, open_version
from flows.wiring import House
from registry import intake
from registry.far import far_files, names_in
from registry.files import SIGNATURE, Place, hash_tree, write_json, write_manifest
from registry.records import FoldinError, Lease, Refusal
from registry.store import tree_sha256

TAGS = ("foldin.task", "foldin.weight")  # what of a version decides how it is folded


def archive(house: House, line: str, experts: Sequence[str], tolerance: float, who: str) -> list[dict[str, Any]]:
    """Archive experts of a line's champion, all where none is named; what became of each, with bytes and error.

    What is archived already is left alone, and so are adapters, which are small. Nothing is removed anywhere.

    Raises:
        FoldinError: E_EXPERT for an expert that the champion does not hold, E_ARCHIVE where the tolerance is out of its
            range or an archive does not give back what it should; E_DIGEST or E_SOURCE when the expert was changed or
            is gone.
    """
    house.config.line(line)
    _check_tolerance(tolerance)
    with held(house, line, told=say) as lease:
        champion = open_version(house, line, house.ledger.line(line).champion or 0)
        inside, where = champion.memory.experts, f"{line} v{champion.number}"
        chosen = [find_expert(text, inside, where) for text in experts] or list(inside)
        base = base_of(house, line)
        return [_archived(house, lease, base, each, tolerance, who) for each in dict.fromkeys(chosen)]


def _check_tolerance(tolerance: float) -> None:
    from merging.packing import LEAST

    if not LEAST <= tolerance < 1:
        what, expected = "the tolerance is out of its range", f"at least {LEAST} and below 1; 0.01 is usual"
        raise FoldinError(Refusal("E_ARCHIVE", what, expected=expected, found=str(tolerance)))


def _archived(house: House, lease: Lease, base: Version, expert: Folded, tolerance: float, who: str) -> dict[str, Any]:
    """One expert archived, found archived, or left as it is."""
    name = f"{expert.model} v{expert.version}"
    known = archive_of(house, expert.tree_sha256)
    if known:
        return _row(name, "already archived", known)
    source = _original(house, expert)
    if source.is_adapter:
        say(f"{name}: an adapter is small already; it is not archived, so keep its version in MLflow")
        return _row(name, "an adapter, kept as it is", None)
    scratch = house.work(lease.line)
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch, prefix="archive-") as folder:
        made = _make(Path(folder), house, base, expert, source, tolerance)
        house.ledger.leases.check(lease)
        house.mlflow.archives.keep(lease.line, Path(folder) / "archive", made.manifest_sha256)
    made = made._replace(line=lease.line)
    house.ledger.remark(lease, ARCHIVED, made.said, who)
    say(f"{name}: {made.before:,} -> {made.after:,} bytes, error {made.error:.4g}")
    return _row(name, "archived", made)


def _row(name: str, state: str, found: Archive | None) -> dict[str, Any]:
    row: dict[str, Any] = {"expert": name, "state": state, "before": None, "after": None, "ratio": None, "error": None}
    if found:
        row |= {"before": found.before, "after": found.after, "ratio": round(found.before / found.after, 2)}
        row |= {"error": found.error, "line": found.line, "archive": found.manifest_sha256}
    return row


def _original(house: House, expert: Folded) -> intake.Admitted:
    """The content store's copy of an expert, every file looked at."""
    folder = copy_of(house, expert)
    files = hash_tree(folder)
    found = tree_sha256(files)
    if found != expert.tree_sha256:
        place = Place(f"expert {expert.model} v{expert.version}", "", f"remove {folder}, then run again")
        what = "the stored copy was changed after it was stored"
        raise place.refuse("E_DIGEST", what, expert.tree_sha256[:12], found[:12])
    return intake.Admitted(folder, files, found, ())


def _make(
    scratch: Path, house: House, base: Version, expert: Folded, source: intake.Admitted, tolerance: float
) -> Archive:
    """An archive in `scratch`/archive, restored once, its manifest written last."""
    from registry.weights import Checkpoint

    folder, where = scratch / "archive", f"archive of expert {expert.model} v{expert.version}"
    _copy_files(source.folder, folder / FILES)
    weights = Checkpoint.open(source.folder, where)
    kept, error = pack_all(folder / CHANGES, base, weights, tolerance, where)
    record = Record(
        expert=f"{expert.model} v{expert.version}",
        tags=_tags(house, expert),
        base_sha256=base.memory.base_sha256,
        weights_sha256=expert.weights_sha256,
        tree_sha256=expert.tree_sha256,
        restored_weights_sha256="",
        restored_tree_sha256="",
        tolerance=tolerance,
        error=error,
        bytes_before=_bytes(source.folder),
        bytes_after=_bytes(folder),
        layout=weights.layout,
        tensors=kept,
    )
    record = _promised(scratch, record, base, where)
    rows = {name: each._asdict() for name, each in kept.items()}
    write_json(folder / RECORD, {"format": FORMAT, **asdict(record), "tensors": rows})
    manifest = write_manifest(folder, {"archive_of": record.tree_sha256, "restored": record.restored_tree_sha256})
    digests = (record.tree_sha256, record.restored_tree_sha256, manifest)
    return Archive("", record.expert, record.bytes_before, _bytes(folder), error, *digests)


def _promised(scratch: Path, record: Record, base: Version, where: str) -> Record:
    """The record with the digests of what its archive gives back, which is looked at as an expert is."""
    write_restored(scratch / "archive", record, base, scratch / "restored", where)
    files = intake.admit(scratch / "restored", scratch / "store", where)
    found = files if isinstance(files, Refusal) else fit(base, files, True, where)
    if isinstance(files, Refusal) or isinstance(found, Refusal):
        assert isinstance(found, Refusal)
        raise FoldinError(replace(found, code="E_ARCHIVE", remedy="archive it with a smaller tolerance, or keep it"))
    return replace(record, restored_weights_sha256=found.sha256, restored_tree_sha256=files.tree_sha256)


def _tags(house: House, expert: Folded) -> dict[str, str]:
    """The tags that decide how the expert is folded; when its version is gone, as it was folded."""
    found = house.mlflow.expert(expert.model, expert.version)
    if found:
        return {key: found.tags[key] for key in TAGS if key in found.tags}
    return {"foldin.task": expert.task, "foldin.weight": f"{expert.weight:.9f}"}


def _copy_files(source: Path, target: Path) -> None:
    """Every file that is no weights; not a signature either, which what comes back would not fit."""
    target.mkdir(parents=True)
    for name in names_in(source):
        weights = "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))
        if not weights and name != SIGNATURE:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _bytes(folder: Path) -> int:
    """Of a folder's files, here and far."""
    here = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return here + sum(each.size for each in far_files(folder).values())


def print_archives(rows: Sequence[Mapping[str, Any]]) -> None:
    """The facts for people, a row for each expert."""
    from rich.table import Table
    from rich.text import Text

    from flows.printing import console

    table = Table("expert", "", "bytes before", "bytes after", "ratio", "error", box=None, pad_edge=False)
    for row in rows:
        known = row["after"] is not None
        sizes = (f"{row['before']:,}", f"{row['after']:,}", f"{row['ratio']:.1f}", f"{row['error']:.4f}")
        table.add_row(Text(clean(row["expert"])), row["state"], *(sizes if known else ("", "", "", "")))
    console().print(table)
