"""The flow that folds one expert: admit, fold, score, gate, register, promote. It reads as that sentence."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow

from flows import showing
from flows.about import about, learn
from flows.admission import Admitted, admit, declared_task
from flows.approval import hold
from flows.champion import follow, reconcile
from flows.emitting import emitted
from flows.folding import Candidate, fold
from flows.judging import Judged, climb, contests
from flows.leasing import held
from flows.notifying import notify
from flows.observing import observed
from flows.options import LineConfig
from flows.placing import placed
from flows.publishing import show_try
from flows.recipe import Recipe, recipe_of
from flows.recording import recorded, registered
from flows.scoring import Bench
from flows.search import search, wanted
from flows.settings import check_settings
from flows.sparing import sparing
from flows.steps import step
from flows.telling import bar, say
from flows.waiting import stands_still
from flows.wiring import House, house
from flows.work import Work, work_on
from registry.files import sweep
from registry.records import DAY, Expert, ExpertState, ExpertVersion, FoldinError, Lease, Merge, Refusal
from registry.verdicts import Outcome

if TYPE_CHECKING:
    from evaluation.report import Record

MAX_ATTEMPTS = 3  # an expert that ended so many runs without a word is set aside, so that the next one can go on

TAG_PATIENCE = 10.0  # seconds between creating a version and tagging it that a client may take


@flow(name="merge-expert", flow_run_name="{line}: next expert", persist_result=False)
def merge_expert(line: str, config_file: str = "foldin.toml", fallback: str = "") -> dict[str, Any] | None:
    """Fold the first expert that waits in a line; what became of it, or None when none can be folded now.

    A repeated run finds what an earlier one finished; a run that was overtaken can write nothing. `fallback` says why
    the line's work pool does not fold it.
    """
    at = house(config_file)
    settings, fallback = placed(at.config.line(line), fallback)
    at.ledger.line(line)
    check_settings(settings, line)
    with held(at, line, told=say) as lease:
        waiting = at.ledger.experts(line, ExpertState.PENDING)
        if not waiting or not reconcile(at, lease, say) or stands_still(at, line):
            return None
        note_fallback(at, lease, waiting[:1], fallback)
        with sparing(at, lease, waiting[:1]):
            outcome = fold_expert(at, settings, lease, waiting[0])
    if outcome is not None:
        notify(settings, line, outcome)
    return outcome


def note_fallback(at: House, lease: Lease, experts: Sequence[Expert], because: str) -> None:
    """Let the line's history say why experts are folded on the CPU, once for each."""
    for expert in experts if because else ():
        told = f"{expert.name}: {because}"
        if not any(event.kind == "fallback" and event.because == told for event in at.ledger.events(lease.line)):
            at.ledger.remark(lease, "fallback", told, "foldin")


def fold_expert(at: House, settings: LineConfig, lease: Lease, expert: Expert) -> dict[str, Any] | None:
    """One expert, from the registry's version to its end: folded, rejected, quarantined or withdrawn."""
    with about(line=lease.line, expert=expert.name):
        work = begun(at, settings, lease, expert)
        if not isinstance(work, Work):
            return work
        say(f"{expert.name} (task {work.expert.task or '?'}): folding into {lease.line} v{work.parent.number}")
    return observed(work, partial(emitted, fold=fold_admitted))


def begun(at: House, settings: LineConfig, lease: Lease, expert: Expert) -> Work | dict[str, Any] | None:
    """What folding an expert works with; what became of it when it ends here; None when it is not complete yet."""
    found = at.mlflow.expert(expert.model, expert.version)
    if found is None:
        return settle(at, lease, expert, ExpertState.WITHDRAWN, "withdrawn", "the version was deleted in MLflow")
    if unfinished(settings, found):
        say(f"{expert.name}: not complete yet (status {found.status}); it and those after it wait")
        return None
    expert = replace(expert, task=declared_task(found))
    if at.ledger.begin(lease, expert, expert.task) > MAX_ATTEMPTS:
        reason = f"{MAX_ATTEMPTS} runs ended at this expert without a word; it may have killed the worker"
        return settle(at, lease, expert, ExpertState.QUARANTINED, "Q_CRASH", reason)
    return work_on(at, settings, lease, expert, found)


def fold_admitted(work: Work) -> dict[str, Any]:
    """One expert into the champion, if it may be admitted."""
    admitted = admit_expert(work)
    return set_aside(work, admitted) if isinstance(admitted, Refusal) else fold_one(work, admitted)


def fold_one(work: Work, admitted: Admitted) -> dict[str, Any]:
    """One admitted expert into the champion, if it may be: folded, judged, and what came of it."""
    learn(merge_key=work.key(admitted))
    recipe = recipe_of(work.settings, work.parent.memory)
    candidate = fold_tensors(work, admitted, recipe)
    if isinstance(candidate, Refusal):
        return set_aside(work, candidate)
    return conclude(work, admitted, judge(work, admitted, candidate, recipe))


def set_aside(work: Work, refusal: Refusal) -> dict[str, Any]:
    """End an expert that was refused before the gate."""
    return settle(work.house, work.lease, work.expert, ExpertState.QUARANTINED, refusal.code, str(refusal))


def unfinished(settings: LineConfig, found: ExpertVersion) -> bool:
    """Whether a version may still be on its way: files being uploaded, or the tag not set yet."""
    age = time.time() - found.created
    if "PENDING" in found.status:
        return age < settings.upload_patience
    return not declared_task(found) and age < TAG_PATIENCE


def settle(at: House, lease: Lease, expert: Expert, state: ExpertState, code: str, reason: str) -> dict[str, Any]:
    """End an expert without a fold and say so."""
    at.ledger.settle(lease, expert, state, code, reason)
    with about(line=lease.line, expert=expert.name):
        say(f"{expert.name}: {state}: {reason}")
    showing.refused(lease.line, expert, state, reason)
    return {"expert": expert.name, "state": str(state), "reason": reason, "version": None}


@step("admit")
def admit_expert(work: Work) -> Admitted | Refusal:
    """The expert's own copy with every file and tensor looked at, or why it may not be folded."""
    admitted = admit(work.house, work.settings, work.base, work.expert, work.found)
    if isinstance(admitted, Refusal):
        return admitted
    earlier = work.house.ledger.note_digest(work.lease, work.expert, admitted.weights_sha256)
    if earlier is None:
        return admitted
    return Refusal(
        code="E_DUPLICATE",
        what=f"the same weights were registered before, as {earlier.name}, which is {earlier.state}",
        where=f"expert {work.expert.name}",
        found=f"weights {admitted.weights_sha256[:12]}",
        remedy="register other weights; each expert is folded once",
    )


@step("fold")
def fold_tensors(work: Work, admitted: Admitted, recipe: Recipe) -> Candidate | Refusal:
    """The candidate, folded tensor by tensor, or why that cannot be; what earlier merges left behind is removed.

    `admitted` is the last of the experts that are folded in this pass.
    """
    scratch = work.scratch(admitted)
    work.house.ledger.leases.check(work.lease)
    sweep(work.house.experts, age=DAY)
    for folder in scratch.parent.glob("*"):
        if folder != scratch:
            shutil.rmtree(folder)
    try:
        return refold(work, admitted, recipe, scratch)
    except FoldinError as error:
        if error.refusal.code != "E_FOLD":
            raise
        return replace(error.refusal, where=f"expert {work.name}")


def refold(work: Work, admitted: Admitted, recipe: Recipe, scratch: Path) -> Candidate:
    """The candidate of a recipe in a folder; what is there of it already is used."""
    work.house.ledger.leases.check(work.lease)  # the folder is the holder's alone
    experts = [*(each.admitted for each in work.others), admitted]
    with bar(f"folding {work.name}") as progress:
        return fold(scratch, work.settings, recipe, work.base, work.parent, experts, progress)


def judge(work: Work, admitted: Admitted, candidate: Candidate, recipe: Recipe) -> Judged:
    """What the gate says of the candidate, or of a better way to fold the expert; several are folded as configured."""
    from evaluation.approval import under_approval
    from evaluation.gate import rules_from

    bench = Bench(work.house, work.settings, work.base)
    rules = rules_from(work.settings.gate, f"[lines.{work.lease.line}.gate]")
    experts = [*(each.admitted for each in work.others), admitted]
    asked = contests(bench, rules, work.parent, experts, candidate)
    judged = climb(asked, candidate)
    if not work.others and wanted(work.settings.search.when, judged):
        say(f"{work.expert.name}: {judged.verdict.outcome}; searching for a better way to fold it")
        run, refolded = work.run(admitted), partial(refold, work, admitted)
        shown = partial(show_try, work.house, run)
        judged = search(asked[0], judged, recipe, work.scratch(admitted), refolded, shown)
        say(f"{work.expert.name}: {judged.found}")
    say(f"{work.name}: judged in {took(judged.seconds)}")
    verdict = under_approval(judged.verdict, work.settings.approval)
    return replace(judged, verdict=replace(verdict, weights_sha256=judged.candidate.memory.weights_sha256))


def took(seconds: Mapping[str, float]) -> str:
    """What judging took, in all and rung by rung."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return f"{sum(seconds.values()):.1f} s ({parts})"


@step("register")
def conclude(work: Work, admitted: Admitted, judged: Judged) -> dict[str, Any]:
    """Record the verdict; register and promote what passed, show and drop what did not."""
    at, lease, expert, candidate = work.house, work.lease, work.expert, judged.candidate
    merge, record = recorded(work, admitted, judged)
    if merge.verdict.passed:
        outcome = promote(work, merge, candidate, record)
    elif merge.verdict.outcome is Outcome.WAITING:
        outcome = hold(work, merge, candidate, record)
    else:
        outcome = settle(at, lease, expert, ExpertState.REJECTED, "E_GATE", merge.verdict.reason)
        say(f"why, in full: foldin report {lease.line} --expert '{expert.name}'")
    shutil.rmtree(candidate.folder.parent, ignore_errors=True)
    return outcome


def promote(work: Work, merge: Merge, candidate: Candidate, record: "Record") -> dict[str, Any]:
    """Register a version that passed, commit it to the ledger, move the alias: in this order, each step repeatable."""
    at, line = work.house, work.lease.line
    done = registered(work, merge, candidate, record)
    follow(at, work.lease, at.ledger.commit(work.lease, done))
    say(f"{work.name}: folded; {line} v{done.version} is champion")
    return {"expert": work.name, "state": str(ExpertState.FOLDED), "reason": "", "version": done.version}
