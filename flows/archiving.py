"""Experts kept as what they change, compressed: `foldin archive`. What an archive is and how it is read: `restoring`.

An expert's tensors are packed one at a time, each within the tolerance as measured (`merging.packing`); the archive is
restored once before it counts, so that its record can promise what comes out.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flows.admission import declared_weight
from flows.archives import ARCHIVED, Archive, archive_of, opened
from flows.fitting import fit
from flows.leasing import held
from flows.memory import Folded
from flows.naming import find_expert
from flows.packs import pack_all
from flows.restoring import CHANGES, DIGESTS, FILES, FORMAT, ORIGINAL, RECORD, Record, base_of, write_restored
from flows.scoring import copy_of
from flows.telling import say
from flows.versions import Version, open_version
from flows.wiring import House
from registry import intake
from registry.far import far_files, names_in
from registry.files import Place, bytes_here, hash_tree, write_json
from registry.manifests import SIGNATURE, write_manifest
from registry.records import FoldinError, Lease, Refusal
from registry.store import tree_sha256

ALL = frozenset({"E_FENCED", "E_LEDGER", "E_LOCKED", "E_DISK"})  # no other expert fares better


def archive(house: House, line: str, experts: Sequence[str], tolerance: float, who: str) -> list[dict[str, Any]]:
    """Archive experts of a line's champion, all where none is named; what became of each, with bytes and error.

    What is archived already, whole and no coarser, is left alone, and so are adapters, which are small. Nothing is
    removed anywhere. Where one cannot be archived its row says why (`reason`), and the others are.

    Raises:
        FoldinError: E_EXPERT for an expert that the champion does not hold, E_ARCHIVE where the tolerance is out of its
            range; or what is in the way of every expert.
    """
    house.config.line(line)
    _check_tolerance(tolerance)
    with held(house, line, told=say) as lease:
        champion = open_version(house, line, house.ledger.line(line).champion or 0)
        inside, where = champion.memory.experts, f"{line} v{champion.number}"
        chosen = [find_expert(text, inside, where) for text in experts] or list(inside)
        base = base_of(house, line)
        return [_outcome(house, lease, base, each, tolerance, who) for each in dict.fromkeys(chosen)]


def _check_tolerance(tolerance: float) -> None:
    from merging.packing import LEAST

    if not LEAST <= tolerance < 1:
        what, expected = "the tolerance is out of its range", f"at least {LEAST} and below 1; 0.01 is usual"
        remedy = "give another --tolerance, or none"
        raise FoldinError(Refusal("E_ARCHIVE", what, expected=expected, found=str(tolerance), remedy=remedy))


def _outcome(house: House, lease: Lease, base: Version, expert: Folded, tolerance: float, who: str) -> dict[str, Any]:
    """What became of one expert; one that cannot be archived is not the others' trouble."""
    try:
        return _archived(house, lease, base, expert, tolerance, who)
    except FoldinError as error:
        if error.refusal.code in ALL:
            raise
        return {**_row(_name(expert), "failed", None), "reason": str(error)}


def _archived(house: House, lease: Lease, base: Version, expert: Folded, tolerance: float, who: str) -> dict[str, Any]:
    """One expert archived, found archived, or left as it is."""
    name = _name(expert)
    known, enough = _known(house, lease.line, expert, tolerance)
    if known and enough:
        return _row(name, "already archived", known)
    source = _original(house, expert, known)
    if source is None:
        return _row(name, "archived before, its original is gone", known)
    if source.is_adapter:
        say(f"{name}: an adapter is small already; it is not archived, so keep its version in MLflow")
        return _row(name, "an adapter, kept as it is", None)
    scratch = house.work(lease.line)
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch, prefix="archive-") as folder:
        made = _make(Path(folder), house, base, expert, source, tolerance)
        house.ledger.leases.check(lease)
        run = house.mlflow.archives.keep(lease.line, Path(folder) / "archive", made.manifest_sha256)
    made = made._replace(line=lease.line, run=run)
    house.ledger.remark(lease, ARCHIVED, made.said, who)
    say(f"{name}: {made.before:,} -> {made.after:,} bytes, error {made.error:.4g}")
    return _row(name, "archived", made)


def _name(expert: Folded) -> str:
    return f"{expert.model} v{expert.version}"


def _known(house: House, line: str, expert: Folded, tolerance: float) -> tuple[Archive | None, bool]:
    """The line's archive of an expert, if it is whole, and whether it is all that is asked for."""
    found = archive_of(house, expert.tree_sha256, line)
    if found is None:
        return None, False
    try:
        with opened(house, found) as folder:
            record, signable = Record.read(folder, found.where), (folder / ORIGINAL / DIGESTS).exists()
    except FoldinError as error:
        if error.refusal.code in {"E_MLFLOW", "E_S3"}:
            raise
        say(f"{_name(expert)}: its archive is not as it was, so it is made again: {error}")
        return None, False
    itself = expert.tree_sha256 == found.restored_sha256  # what was folded is what the archive gives back
    return found, itself or (signable and record.tolerance <= tolerance)


def _row(name: str, state: str, found: Archive | None) -> dict[str, Any]:
    row: dict[str, Any] = {"expert": name, "state": state, "before": None, "after": None, "ratio": None, "error": None}
    row["reason"] = ""
    if found:
        row |= {"before": found.before, "after": found.after, "ratio": round(found.before / found.after, 2)}
        row |= {"error": found.error, "line": found.line, "archive": found.manifest_sha256}
    return row


def _original(house: House, expert: Folded, known: Archive | None) -> intake.Admitted | None:
    """The content store's copy of an expert, every file looked at; None where only a known archive is left of it."""
    folder = copy_of(house, expert)
    place = Place(f"expert {_name(expert)}", "", f"remove {folder}, then run again")
    if folder.name != expert.tree_sha256 and known:
        return None
    if folder.name != expert.tree_sha256:
        gone = place._replace(remedy="restore the expert's version in MLflow")
        raise gone.refuse("E_SOURCE", "the original is gone, and only another line has an archive of it")
    files = hash_tree(folder)
    found = tree_sha256(files)
    if found != expert.tree_sha256:
        what = "the stored copy was changed after it was stored"
        raise place.refuse("E_DIGEST", what, expert.tree_sha256[:12], found[:12])
    return intake.Admitted(folder, files, found, ())


def _make(
    scratch: Path, house: House, base: Version, expert: Folded, source: intake.Admitted, tolerance: float
) -> Archive:
    """An archive in `scratch`/archive, restored once, its manifest written last."""
    from registry.weights import Checkpoint

    folder, where = scratch / "archive", f"archive of expert {_name(expert)}"
    _copy_files(source.folder, folder / FILES)
    _keep_signed(source, folder / ORIGINAL)
    weights = Checkpoint.open(source.folder, where)
    kept, error = pack_all(folder / CHANGES, base, weights, tolerance, where)
    record = Record(
        expert=_name(expert),
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
    if isinstance(files, Refusal):
        raise _not_given_back(files)
    found = fit(base, files, True, where)
    if isinstance(found, Refusal):
        raise _not_given_back(found)
    return replace(record, restored_weights_sha256=found.sha256, restored_tree_sha256=files.tree_sha256)


def _not_given_back(found: Refusal) -> FoldinError:
    remedy = "archive it with a smaller tolerance, or keep its version in MLflow"
    return FoldinError(replace(found, code="E_ARCHIVE", remedy=remedy))


def _tags(house: House, expert: Folded) -> dict[str, str]:
    """The tags that decide how the expert is folded, as it was folded."""
    own = expert.declared
    if own is None:  # an older foldin folded it, and noted only the product of this and the line's weight
        found = house.mlflow.expert(expert.model, expert.version)
        own = declared_weight(found) if found else math.nan
        own = expert.weight if math.isnan(own) else own
    task = {"foldin.task": expert.task}
    return task if own == 1 else {**task, "foldin.weight": f"{Decimal(repr(own)):f}"}


def _keep_signed(source: intake.Admitted, folder: Path) -> None:
    """The digests of the expert's files, and the signature of those where there is one."""
    write_json(folder / DIGESTS, {"files": source.files_sha256})
    if SIGNATURE in source.files_sha256:
        shutil.copyfile(source.folder / SIGNATURE, folder / SIGNATURE)


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
    return bytes_here(folder) + sum(each.size for each in far_files(folder).values())
