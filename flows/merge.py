"""The flow that folds one expert: admit, fold, score, gate, register, promote. It reads as that sentence."""

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.exceptions import TerminationSignal

from flows import showing
from flows.about import learn
from flows.admission import Admitted, admit, declared_task
from flows.approval import hold
from flows.champion import follow, reconcile
from flows.emitting import emitted
from flows.faults import is_out_of_memory, refused_by_system
from flows.folding import Candidate, fold
from flows.judging import Judged, climb, contest
from flows.leasing import held
from flows.notifying import notify
from flows.observing import observed
from flows.options import LineConfig
from flows.publishing import show_try
from flows.recipe import Recipe, recipe_of
from flows.recording import recorded, registered
from flows.scoring import Bench
from flows.search import search, wanted
from flows.settings import check_settings
from flows.steps import step
from flows.telling import bar, say
from flows.waiting import stands_still
from flows.wiring import House, house
from flows.work import Work, work_on
from registry.files import shown, sweep
from registry.records import DAY, Expert, ExpertState, ExpertVersion, FoldinError, Lease, Merge, Refusal
from registry.verdicts import Outcome

if TYPE_CHECKING:
    from evaluation.report import Record

MAX_ATTEMPTS = 3  # an expert that ended so many runs without a word is set aside, so that the next one can go on

TAG_PATIENCE = 10.0  # seconds between creating a version and tagging it that a client may take


@flow(name="merge-expert", flow_run_name="{line}: next expert", persist_result=False)
def merge_expert(line: str, config_file: str = "foldin.toml") -> dict[str, Any] | None:
    """Fold the first expert that waits in a line; what became of it, or None when none can be folded now.

    A repeated run finds what an earlier one finished; a run that was overtaken can write nothing.
    """
    at = house(config_file)
    settings = at.config.line(line)
    at.ledger.line(line)
    check_settings(settings, line)
    with held(at, line, told=say) as lease:
        waiting = at.ledger.experts(line, ExpertState.PENDING)
        if not waiting or not reconcile(at, lease, say) or stands_still(at, line):
            return None
        try:
            with surroundings():
                outcome = fold_expert(at, settings, lease, waiting[0])
        except FoldinError as error:
            # What is the expert's fault is a refusal by now; this is not, so it does not count against the expert.
            if error.refusal.code != "E_FENCED":
                at.ledger.clear_attempts(lease, waiting[0])
            raise FoldinError(of_line(line, error.refusal)) from error
        except (KeyboardInterrupt, TerminationSignal):
            at.ledger.clear_attempts(lease, waiting[0])  # a person or the platform ended the run, not the expert
            raise
    if outcome is not None:
        notify(settings, line, outcome)
    return outcome


def of_line(line: str, refusal: Refusal) -> Refusal:
    """The same, with the line's name in it."""
    named = line in re.split(r"[\s,]+", refusal.where)
    return refusal if named else replace(refusal, where=", ".join(filter(None, (f"line {line}", refusal.where))))


@contextmanager
def surroundings() -> Iterator[None]:
    """Turn what the machine does to a run (disk, memory, network) into a typed error, which is no expert's fault."""
    from httpx import HTTPError

    try:
        yield
    except (OSError, HTTPError) as error:
        raise FoldinError(refused_by_system(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what, remedy = "there is not enough memory", "free some, or set device to one that has more"
        raise FoldinError(Refusal("E_MEMORY", what, found=shown(str(error)), remedy=remedy)) from error


def fold_expert(at: House, settings: LineConfig, lease: Lease, expert: Expert) -> dict[str, Any] | None:
    """One expert, from the registry's version to its end: folded, rejected, quarantined or withdrawn."""
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
    work = work_on(at, settings, lease, expert, found)
    say(f"{expert.name} (task {expert.task or '?'}): folding into {lease.line} v{work.parent.number}")
    return observed(work, partial(emitted, fold=fold_admitted))


def fold_admitted(work: Work) -> dict[str, Any]:
    """One expert into the champion, if it may be: folded, judged, and what came of it."""
    at, settings, lease, expert = work.house, work.settings, work.lease, work.expert
    admitted = admit_expert(work)
    if isinstance(admitted, Refusal):
        return settle(at, lease, expert, ExpertState.QUARANTINED, admitted.code, str(admitted))
    learn(merge_key=work.key(admitted))
    recipe = recipe_of(settings, work.parent.memory)
    candidate = fold_tensors(work, admitted, recipe)
    if isinstance(candidate, Refusal):
        return settle(at, lease, expert, ExpertState.QUARANTINED, candidate.code, str(candidate))
    return conclude(work, admitted, judge(work, admitted, candidate, recipe))


def unfinished(settings: LineConfig, found: ExpertVersion) -> bool:
    """Whether a version may still be on its way: files being uploaded, or the tag not set yet."""
    age = time.time() - found.created
    if "PENDING" in found.status:
        return age < settings.upload_patience
    return not declared_task(found) and age < TAG_PATIENCE


def settle(at: House, lease: Lease, expert: Expert, state: ExpertState, code: str, reason: str) -> dict[str, Any]:
    """End an expert without a fold and say so."""
    at.ledger.settle(lease, expert, state, code, reason)
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
    """The candidate, folded tensor by tensor, or why that cannot be; what earlier merges left behind is removed."""
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
        return replace(error.refusal, where=f"expert {work.expert.name}")


def refold(work: Work, admitted: Admitted, recipe: Recipe, scratch: Path) -> Candidate:
    """The candidate of a recipe in a folder; what is there of it already is used."""
    work.house.ledger.leases.check(work.lease)  # the folder is the holder's alone
    with bar(f"folding {work.expert.name}") as progress:
        return fold(scratch, work.settings, recipe, work.base, work.parent, [admitted], progress)


def judge(work: Work, admitted: Admitted, candidate: Candidate, recipe: Recipe) -> Judged:
    """What the gate says of the candidate, or of a better way to fold the expert."""
    from evaluation.approval import under_approval
    from evaluation.gate import rules_from

    bench = Bench(work.house, work.settings, work.base)
    rules = rules_from(work.settings.gate, f"[lines.{work.lease.line}.gate]")
    at = contest(bench, rules, work.parent, admitted, candidate)
    judged = climb(at, candidate)
    if wanted(work.settings.search.when, judged):
        say(f"{work.expert.name}: {judged.verdict.outcome}; searching for a better way to fold it")
        run, refolded = work.run(admitted), partial(refold, work, admitted)
        judged = search(at, judged, recipe, work.scratch(admitted), refolded, partial(show_try, work.house, run))
        say(f"{work.expert.name}: {judged.found}")
    say(f"{work.expert.name}: judged in {took(judged.seconds)}")
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
    at, line, expert = work.house, work.lease.line, work.expert
    done = registered(work, merge, candidate, record)
    follow(at, work.lease, at.ledger.commit(work.lease, done))
    say(f"{expert.name}: folded; {line} v{done.version} is champion")
    return {"expert": expert.name, "state": str(ExpertState.FOLDED), "reason": "", "version": done.version}
