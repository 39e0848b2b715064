"""A second chance: other ways to fold an expert, measured on the rows kept for tuning, the best one put to the gate.

The gate decides on rows that no try has seen. What was tried is written down before anything is judged by it, so that
a run which dies and starts again makes the same choice.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from flows.folding import Candidate, read_with
from flows.judging import Contest, Judged, both, climb, served, timed, with_expert
from flows.recipe import Recipe
from flows.scoring import TUNE, Subject, Task
from flows.steps import step
from flows.telling import say
from registry.files import read_json, write_json
from registry.records import FoldinError
from registry.verdicts import Outcome, Report, Try, Verdict

FOUND_FILE = "search.json"  # beside the candidate
Refold = Callable[[Recipe, Path], Candidate]  # recipe, scratch folder -> candidate
Shown = Callable[[Try], None]
EXPERTS_OWN = frozenset({"min_expert_gain"})  # what no other fold can change


@dataclass(frozen=True)
class Way:
    """One way to fold the expert."""

    name: str
    recipe: Recipe
    refolds: bool  # whether the state changes; else only how it is read


def wanted(when: str, judged: Judged) -> bool:
    """Whether to search: after a rejection by what was measured that another fold could change, or always."""
    if judged.verdict.passed:
        return when == "always"
    failed = [check for check in judged.verdict.checks if not check.passed]
    decided = not any(math.isnan(check.value) or check.rule in EXPERTS_OWN for check in failed)
    return when != "never" and judged.verdict.rung != "free" and decided


def ways(at: Contest, configured: Recipe) -> list[Way]:
    """What to try, the configured fold first, then the cheap before the dear; at most as many as the line allows."""
    search = at.bench.settings.search
    read = [configured.stronger(factor) for factor in search.strengths]
    found = [Way("as configured", configured, False)]
    found += [Way(f"strength x {each.factor:g}", each, False) for each in read if each != configured]
    found += [Way(f"weight {weight:g}", configured._replace(weight=weight), True) for weight in search.weights]
    if configured.method == "opcm":
        other = [configured._replace(parameters={**configured.parameters, "energy": each}) for each in search.energies]
        found += [Way(f"energy {each.parameters['energy']:g}", each, True) for each in other]
    found += [Way(f"method {name}", Recipe(name, {}, factor=configured.factor), True) for name in search.methods]
    return found[: int(search.tries)]


class Tried(NamedTuple):
    """One way, measured."""

    way: Try
    mean: float  # over all tasks, the new one included


class Found(NamedTuple):
    """What came of a search."""

    tries: tuple[Try, ...]
    chosen: str  # the name of a way that is to be put to the gate; "" for none
    told: str  # in a clause


@step("search")
def search(at: Contest, judged: Judged, configured: Recipe, scratch: Path, refold: Refold, show: Shown) -> Judged:
    """What is judged after a search: the best way found, if the gate lets it pass; else what was judged before.

    Args:
        at: what the candidates are held to.
        judged: the configured fold.
        configured: how it was folded.
        scratch: its folder; the candidate that is judged last stands there.
        refold: makes the candidate of a recipe in a folder.
        show: hears of every try.
    """
    seconds, possible = dict(judged.seconds), ways(at, configured)
    with timed(seconds, "search"):
        found = _found(at, judged, possible, scratch, refold, show)
    before = replace(judged, tries=found.tries, found=found.told, seconds=seconds)
    if not found.chosen:
        return before
    say(f"{at.expert.name[0]} v{at.expert.name[1]}: {found.told}; the gate decides on other rows")
    again = climb([at], refold(next(way.recipe for way in possible if way.name == found.chosen), scratch))
    seconds.update({name: round(seconds.get(name, 0.0) + took, 3) for name, took in again.seconds.items()})
    if again.verdict.passed:
        return replace(again, tries=found.tries, found=found.told, seconds=seconds)
    told = f"{found.told}; the gate rejected that too: {again.verdict.reason}"
    return replace(before, candidate=refold(configured, scratch), found=told)


def _found(at: Contest, judged: Judged, possible: Sequence[Way], scratch: Path, refold: Refold, show: Shown) -> Found:
    """What a search of this fold found before, or finds now."""
    path = scratch / FOUND_FILE
    if path.exists():
        kept = read_json(path)
        return Found(tuple(Try(**each) for each in kept["tries"]), kept["chosen"], kept["told"])
    inputs = _inputs(at.after)
    problem = _problem(inputs, at.expert.task)
    if problem:
        found = Found((), "", f"no search: {problem}")
    else:
        tasks = {name: each for name, each in at.after.items() if inputs[name].tune}
        tried = list(_tried(at, judged.candidate, possible, tasks, scratch, refold))
        found = _best(tried, judged)
        for each in found.tries:
            show(each)
    write_json(path, {**found._asdict(), "tries": [asdict(each) for each in found.tries]})
    return found


def _tried(
    at: Contest,
    candidate: Candidate,
    possible: Sequence[Way],
    tasks: Mapping[str, Task],
    scratch: Path,
    refold: Refold,
) -> Iterator[Tried]:
    """Each way with its mean over all tasks and the gate's answer, on the rows kept for tuning.

    Ways that need a fold of their own are tried while none passed, and none is begun once the time is over.
    """
    from evaluation.front import means
    from evaluation.gate import gate

    alone = with_expert(at, Report("", {}, at.expert.task), TUNE)
    end, passed = time.monotonic() + at.bench.settings.search.seconds, False
    for number, way in enumerate(possible):
        if number and (time.monotonic() > end or (way.refolds and passed)):
            break
        try:
            with _subject(at, candidate, way, scratch, refold) as subject:
                report, champion = both(at, subject, alone, tasks, TUNE)
        except FoldinError as error:
            if error.refusal.code != "E_FOLD":
                raise
            verdict, report = Verdict(Outcome.REJECTED, ()), alone
            reason = str(error)
        else:
            verdict = gate(report, champion, at.rules, "tune")
            reason = verdict.reason
        passed |= verdict.passed
        old, new, whole = means(report)
        facts = (way.recipe.method, dict(sorted(way.recipe.parameters.items())), way.recipe.weight)
        yield Tried(Try(way.name, *facts, old, new, verdict.passed, reason), whole)


@contextmanager
def _subject(at: Contest, candidate: Candidate, way: Way, scratch: Path, refold: Refold) -> Iterator[Subject]:
    """The model of a way: read from the candidate's state, or folded for as long as the block runs."""
    own = scratch / "tries"
    if way.refolds:
        yield served(refold(way.recipe, own))
        shutil.rmtree(own)
        return
    base, parent = at.bench.base, at.parent
    weights = read_with(candidate, at.bench.settings, way.recipe, base, parent, at.expert)
    facts = json.dumps([candidate.memory.weights_sha256, way.recipe], sort_keys=True)
    yield Subject(hashlib.sha256(facts.encode()).hexdigest(), weights)


def _best(tried: Sequence[Tried], judged: Judged) -> Found:
    """The way with the best mean among those that passed; the configured one is not put to the gate twice."""
    from evaluation.front import marked

    configured = tried[0].way.name
    passing = [each for each in tried if each.way.passed and (judged.verdict.passed or each.way.name != configured)]
    name = max(passing, key=lambda each: each.mean).way.name if passing else ""
    told = f"of {len(tried)} ways to fold it " + (f"{name} is best" if name else "none passed")
    tries = marked([each.way for each in tried], name)
    return Found(tries, "" if name == configured else name, f"{told} on the rows kept for tuning")


class Inputs(NamedTuple):
    """The digests of a suite's inputs by split."""

    tune: frozenset[bytes]
    gate: frozenset[bytes]


def _inputs(tasks: Mapping[str, Task]) -> dict[str, Inputs]:
    from evaluation.suites import input_digests

    return {
        name: Inputs(*(input_digests(each.suite, split) for split in Inputs._fields)) for name, each in tasks.items()
    }


def _problem(inputs: Mapping[str, Inputs], new: str) -> str:
    """Why nothing can be searched, as a clause; "" when it can. What tunes may not be among what decides."""
    if not inputs[new].tune:
        return f"the suite of task {new} has no rows of the split tune"
    for name, mine in inputs.items():
        for other, theirs in inputs.items():
            if shared := mine.tune & theirs.gate:
                return f"{len(shared)} tune rows of task {name} are among the gate rows of task {other}"
    return ""
