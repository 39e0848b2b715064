"""The end of a judged merge, whatever becomes of it: the verdict recorded and shown, the version registered."""

from dataclasses import replace
from typing import TYPE_CHECKING

from flows import showing
from flows.about import learn
from flows.admission import Admitted
from flows.card import CARD_FILE
from flows.folding import Candidate
from flows.judging import Judged
from flows.publishing import metrics_of, register, scores_of, show, write_version_manifest
from flows.reporting import write_report
from flows.thinning import restore
from flows.work import Work
from registry.records import Merge

if TYPE_CHECKING:
    from evaluation.report import Record


def recorded(work: Work, admitted: Admitted, judged: Judged) -> tuple[Merge, "Record"]:
    """The merge with the verdict that stands: in the ledger, in files, on its run in MLflow; each step repeatable."""
    at, lease, expert, key = work.house, work.lease, work.expert, work.key(admitted)
    run, candidate = work.run(admitted), judged.candidate
    also = tuple(each.expert.id for each in work.others)
    merge = Merge(key, lease.line, expert.id, work.parent.number, judged.verdict, run, also=also)
    published = at.mlflow.published(lease.line, key)
    scores = scores_of(judged.report)
    verdict = at.ledger.record_verdict(lease, merge, published=published, scores=scores).verdict  # the first stands
    record = write_report(at, work.settings, work.parent, lease.line, replace(judged, verdict=verdict))
    if verdict.weights_sha256 == candidate.memory.weights_sha256:  # else an earlier run published another choice
        found = [*(each.found for each in work.others), work.found]
        inputs = [at.mlflow.model_id(lease.line, work.parent.number), *(each.model_id for each in found)]
        show(at, lease.line, run, work.experts, candidate, record, inputs)
        showing.judged(lease.line, work.name, record, candidate.folder)
    return replace(merge, verdict=verdict), record


def registered(work: Work, merge: Merge, candidate: Candidate, record: "Record") -> Merge:
    """The merge with the version that its candidate was registered as, manifest last."""
    at, line, key = work.house, work.lease.line, merge.merge_key
    known = {name: digest for name, digest in candidate.files.items() if name != CARD_FILE}  # it was the base's
    earlier = at.ledger.merge(key)
    if earlier is not None and earlier.version is not None:
        restore(at, work.lease, earlier.version, f"{work.name} was folded into it again", "foldin")
    write_version_manifest(candidate.folder, line, key, work.parent, merge.verdict, known, far=bool(at.far))
    many = len(work.experts)
    version, manifest = register(at, line, key, merge.run_id, candidate.folder, metrics_of(record), many)
    learn(version=version)
    return replace(merge, version=version, manifest_sha256=manifest)
