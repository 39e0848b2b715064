"""The three rungs of the gate, the cheapest first: what is measured for each, and where the climb ends."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from flows.admission import Admitted
from flows.folding import Candidate
from flows.scoring import GATE, Bench, Rows, Subject, Task, known_tasks, score, task_of
from flows.steps import step
from flows.telling import bar
from flows.versions import Version, bests
from registry.files import shown
from registry.records import FoldinError, Refusal
from registry.verdicts import Report, TaskScore, Try, Verdict

if TYPE_CHECKING:
    from evaluation.gate import Fold, Rules

Rung = Callable[["Contest", Candidate], tuple[Verdict, Report, Report]]  # verdict, candidate's report, champion's


@dataclass(frozen=True)
class Contest:
    """A champion, an expert folded into it, and all they are held to."""

    bench: Bench
    rules: "Rules"
    parent: Version  # the champion
    expert: Admitted
    before: Mapping[str, Task]  # the new task too; where the champion has a head of its own, with that
    after: Mapping[str, Task]  # the same tasks with the candidate's heads

    @property
    def known(self) -> dict[str, Task]:
        """The tasks that may not get worse."""
        return {name: task for name, task in self.after.items() if name != self.expert.task}

    @property
    def new(self) -> dict[str, Task]:
        """The expert's task."""
        return {self.expert.task: self.after[self.expert.task]}


@dataclass(frozen=True)
class Judged:
    """What the gate said of a candidate, and what was measured to say it."""

    candidate: Candidate
    verdict: Verdict
    report: Report  # of the dearest rung that was asked
    champion: Report
    tries: tuple[Try, ...] = ()  # of a search
    found: str = ""  # what came of the search, in a clause
    seconds: Mapping[str, float] = field(default_factory=dict)  # rung, or "search" -> what it took


def contests(
    bench: Bench, rules: "Rules", parent: Version, experts: Sequence[Admitted], candidate: Candidate
) -> list[Contest]:
    """What a candidate and its champion are held to, expert by expert: to each one's task and all that were known."""
    after = known_tasks(bench.house, bench.settings, candidate.memory, candidate.folder)
    own = {name: task_of(after[name].suite, parent.folder) for name in parent.memory.tasks}
    new = {each.task for each in experts} - own.keys()

    def of(expert: Admitted) -> Contest:
        mine = {name: each for name, each in after.items() if name not in new - {expert.task}}
        return Contest(bench, rules, parent, expert, {**mine, **own}, mine)

    return [of(expert) for expert in experts]


def climb(contests: Sequence[Contest], candidate: Candidate) -> Judged:
    """Ask rung after rung, for every expert, until one refuses the candidate or none is left."""
    from evaluation.gate import together

    seconds, verdicts = dict[str, float](), list[Verdict]()
    for name, ask in RUNGS.items():
        with timed(seconds, name):
            answers, reports, champions = zip(*(ask(at, candidate) for at in contests), strict=True)
        verdicts.append(together(*answers))
        if not verdicts[-1].passed:
            break
    return Judged(candidate, together(*verdicts), _joined(reports), _joined(champions), seconds=seconds)


def _joined(reports: Sequence[Report]) -> Report:
    """The last one, with what all of one model measured."""
    return replace(reports[-1], scores={name: each for report in reports for name, each in report.scores.items()})


@step("free rung")
def free_rung(at: Contest, candidate: Candidate) -> tuple[Verdict, Report, Report]:
    """What the fold itself says of the expert; nothing is measured."""
    from evaluation.gate import free

    empty = Report(candidate.memory.weights_sha256, {}, at.expert.task)
    return free(fold_of(candidate, at.expert), at.rules), empty, Report(at.parent.memory.weights_sha256, {})


@step("canary")
def canary_rung(at: Contest, candidate: Candidate) -> tuple[Verdict, Report, Report]:
    """Whether the expert learnt its task, and a sample of every task that the champion knows."""
    from evaluation.gate import canary

    rows = Rows("canary", int(at.rules.canary_examples))
    report = with_expert(at, Report(candidate.memory.weights_sha256, {}, at.expert.task), GATE)
    report, champion = both(at, served(candidate), report, at.known, rows)
    return canary(report, champion, at.rules), report, champion


@step("full rung")
def full_rung(at: Contest, candidate: Candidate) -> tuple[Verdict, Report, Report]:
    """Every example of every task."""
    from evaluation.gate import gate

    report = with_expert(at, Report(candidate.memory.weights_sha256, {}, at.expert.task), GATE)
    report, champion = both(at, served(candidate), report, at.after, GATE)
    return gate(report, champion, at.rules), report, champion


RUNGS: Mapping[str, Rung] = {"free": free_rung, "canary": canary_rung, "full": full_rung}


def fold_of(candidate: Candidate, expert: Admitted) -> "Fold":
    """What is known of an expert's fold before anything is measured."""
    from evaluation.gate import Fold

    experts = candidate.memory.experts
    place = max(place for place, each in enumerate(experts) if (each.model, each.version) == expert.name)
    *earlier, norm = (each.delta_norm / each.weight for each in experts[: place + 1])
    return Fold(norm, earlier, *candidate.shares[place - len(experts)])


def with_expert(at: Contest, report: Report, rows: Rows) -> Report:
    """The report with the expert and the base alone on the new task in it."""
    alone, base = Subject(at.expert.weights_sha256, at.expert.whole), at.bench.base
    first = Subject(base.memory.weights_sha256, base.weights())
    scores = [score(at.bench, each, at.new, rows)[at.expert.task] for each in (alone, first)]
    return replace(report, expert=scores[0], base=scores[1])


def both(
    at: Contest, candidate: Subject, report: Report, tasks: Mapping[str, Task], rows: Rows
) -> tuple[Report, Report]:
    """The candidate's report with its scores on some tasks, and the champion's."""
    champion = Subject(at.parent.memory.weights_sha256, at.parent.weights())
    with bar(f"{rows.split}: the candidate on {len(tasks)} tasks") as progress:
        ours = score(at.bench, candidate, tasks, rows, progress)
    with bar(f"{rows.split}: the champion on {len(tasks)} tasks") as progress:
        theirs = score(at.bench, champion, {name: at.before[name] for name in tasks}, rows, progress)
    _check_measured(theirs, at.expert.task)
    best = best_before(at.parent, theirs) if rows == GATE else {}
    return replace(report, scores=ours), Report(champion.weights_sha256, theirs, best=best)


def best_before(champion: Version, now: Mapping[str, TaskScore]) -> dict[str, float]:
    """Task -> the best value that the champion or one of its ancestors had on the suite that measures it now."""
    known = bests(champion)
    return {
        name: known[name][0] for name, score in now.items() if name in known and known[name][1] == score.suite_sha256
    }


def _check_measured(champion: Mapping[str, TaskScore], new: str) -> None:
    """Nothing, when the champion was measured on all it knows; what stops that is no expert's fault.

    Raises:
        FoldinError: E_MEASURE with the task. On the new one, whose suite the expert may have brought, the gate decides.
    """
    for name, found in champion.items():
        if found.error and name != new:
            what = "the champion could not be measured"
            remedy = "mend the suite or the machine, or allow more evaluation_seconds, then watch again"
            raise FoldinError(Refusal("E_MEASURE", what, f"task {name}", found=shown(found.error), remedy=remedy))


def served(candidate: Candidate) -> Subject:
    """A candidate's serving weights, to be measured."""
    from registry.weights import Checkpoint

    return Subject(candidate.memory.weights_sha256, Checkpoint.open(candidate.folder, "candidate"))


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Notes what the block takes."""
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 3)
