"""An expert that was folded before, as it is now: the original where it still is, else what its archive gives back."""

from typing import NamedTuple

from flows.admission import Admitted, admit
from flows.config import LineConfig
from flows.memory import Folded
from flows.restoring import Archive, archive_of, restored
from flows.telling import say
from flows.wiring import House
from flows.work import Work, work_on
from registry.records import Expert, ExpertVersion, FoldinError, Lease, Refusal


class Again(NamedTuple):
    """An expert that may be folded again, and where it came from."""

    work: Work
    admitted: Admitted
    archive: Archive | None  # None: it is the original


def readmit(at: House, settings: LineConfig, lease: Lease, expert: Expert, folded: Folded, into: int) -> Again:
    """The expert, as it was when it was folded, to be folded into a version.

    Raises:
        FoldinError: E_SOURCE when neither original nor archive is there; E_DIGEST when it is not what was folded; as
            `restored`; or why it may not be folded any more.
    """
    found, archive = at.mlflow.expert(expert.model, expert.version), archive_of(at, folded.tree_sha256)
    if found:
        work = work_on(at, settings, lease, expert, found, into)
        admitted = admit(at, work.settings, work.base, expert, found)
        if isinstance(admitted, Admitted):
            _check_same(expert, admitted, folded, archive)
            return Again(work, admitted, None)
        if admitted.code != "E_SOURCE":
            raise FoldinError(admitted)
        gone = admitted
    else:
        what, remedy = "the expert was deleted in MLflow", "leave it out of the replay too, with --without"
        gone = Refusal("E_SOURCE", what, f"expert {expert.name}", remedy=remedy)
    if archive is None:
        raise FoldinError(gone)
    say(f"{expert.name}: its original is gone; from its archive, which differs by {archive.error:.2%} of its change")
    return _from_archive(at, settings, lease, expert, folded, into, archive)


def _from_archive(
    at: House, settings: LineConfig, lease: Lease, expert: Expert, folded: Folded, into: int, archive: Archive
) -> Again:
    files, record = restored(at, archive)
    found = ExpertVersion(expert.model, expert.version, record.tags)
    work = work_on(at, settings, lease, expert, found, into)
    admitted = admit(at, work.settings, work.base, expert, found, files)
    if isinstance(admitted, Refusal):
        raise FoldinError(admitted)
    if admitted.weights_sha256 != record.restored_weights_sha256:
        what, where = "the restored weights are not those of its record", f"archive of expert {expert.name}"
        expected, given = record.restored_weights_sha256[:12], admitted.weights_sha256[:12]
        raise FoldinError(Refusal("E_ARCHIVE", what, where, "", "", expected, given, "leave the expert out"))
    _check_same(expert, admitted, folded, archive)
    return Again(work, admitted, archive)


def _check_same(expert: Expert, admitted: Admitted, folded: Folded, archive: Archive | None) -> None:
    """Nothing, when an expert is still what was folded: files with its suite, weights, task.

    What an archive gives back stands for the original that its record names, and the original for it.
    """
    where, remedy = f"expert {expert.name}", "restore it, or leave the expert out"
    checks = [("task", folded.task, admitted.task)]
    twins = {archive.tree_sha256, archive.restored_sha256} if archive else set()
    if not {folded.tree_sha256, admitted.tree_sha256} <= twins:  # the files hold the weights
        checks.append(("weights", folded.weights_sha256, admitted.weights_sha256))
        checks.append(("files", folded.tree_sha256, admitted.tree_sha256))
    for named, then, now in checks:
        if then != now:
            what = f"the expert's {named} are not those that were folded" if named != "task" else "it has another task"
            raise FoldinError(Refusal("E_DIGEST", what, where, "", "", then[:12], now[:12], remedy))
