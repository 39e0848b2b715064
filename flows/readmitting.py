"""An expert that was folded before, as it is now: the original where it still is, else what its archive gives back."""

from typing import NamedTuple

from flows.admission import Admitted, admit
from flows.archives import Archive, archive_of, opened
from flows.memory import Folded
from flows.options import LineConfig
from flows.restoring import original_of, restored
from flows.signing import accepted_of, check_expert
from flows.telling import say
from flows.wiring import House
from flows.work import Work, work_on
from registry.files import Place
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
    found = at.mlflow.expert(expert.model, expert.version)
    archive = archive_of(at, folded.tree_sha256, lease.line)
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
    _check_signed(at, settings, archive)
    files, record = restored(at, archive)
    found = ExpertVersion(expert.model, expert.version, record.tags)
    work = work_on(at, settings, lease, expert, found, into)
    admitted = admit(at, work.settings, work.base, expert, found, files)
    if isinstance(admitted, Refusal):
        raise FoldinError(admitted)
    if admitted.weights_sha256 != record.restored_weights_sha256:
        place = Place(archive.where, "", "leave the expert out")
        expected, given = record.restored_weights_sha256[:12], admitted.weights_sha256[:12]
        raise place.refuse("E_ARCHIVE", "the restored weights are not those of its record", expected, given)
    _check_same(expert, admitted, folded, archive)
    return Again(work, admitted, archive)


def _check_signed(at: House, settings: LineConfig, archive: Archive) -> None:
    """Nothing, when the expert that was archived is signed as the line asks for now."""
    accepts = accepted_of(settings, archive.line, "experts")
    if not accepts:
        return
    with opened(at, archive) as folder:
        wrong = check_expert(accepts, original_of(folder, archive), archive.where, archived=True)
    if wrong:
        raise FoldinError(wrong)


def _check_same(expert: Expert, admitted: Admitted, folded: Folded, archive: Archive | None) -> None:
    """Nothing, when an expert is still what was folded: files with its suite, weights, task, its own weight.

    What an archive gives back stands for the original that its record names, and the original for it.
    """
    place = Place(f"expert {expert.name}", "", "restore it, or leave the expert out")
    if folded.task != admitted.task:
        raise place.refuse("E_DIGEST", "it has another task", folded.task, admitted.task)
    if folded.declared not in (None, admitted.weight):
        tag = place._replace(remedy="set the tag foldin.weight back, or leave the expert out")
        then, now = f"{folded.declared:.9g}", f"{admitted.weight:.9g}"
        raise tag.refuse("E_DIGEST", "the expert's weight is not the one with which it was folded", then, now)
    twins = {archive.tree_sha256, archive.restored_sha256} if archive else set()
    if {folded.tree_sha256, admitted.tree_sha256} <= twins:
        return
    weights = "weights", folded.weights_sha256, admitted.weights_sha256
    files = "files", folded.tree_sha256, admitted.tree_sha256  # the weights are among them
    for named, then, now in (weights, files):
        if then != now:
            raise place.refuse("E_DIGEST", f"the expert's {named} are not those that were folded", then[:12], now[:12])
