"""What a model is worth on the tasks its line knows. Measured once: (weights, suite, head) names the answer."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from evaluation.answers import answers_bytes, read_answers
from flows.admission import suite_of
from flows.archives import archive_of
from flows.memory import Folded, Memory
from flows.options import LineConfig
from flows.plan import numerics_profile
from flows.restoring import restored
from flows.versions import Version, head_of
from flows.wiring import House
from registry import intake
from registry.files import write_atomic
from registry.records import FoldinError, Refusal
from registry.verdicts import TaskScore

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.suites import Suite

Progress = Callable[[int, int], None]  # tasks done, tasks in all
SCORE_FORMAT = 1  # raised when the same model would answer otherwise


@dataclass(frozen=True)
class Task:
    """One task with everything that is needed to measure any model of the line on it."""

    suite: "Suite"
    head: "Mapping[str, Tensor] | None"  # None: the task needs none
    head_sha256: str


@dataclass(frozen=True)
class Subject:
    """A model to be measured: its weights by the base's names, and their digest."""

    weights_sha256: str
    weights: "Mapping[str, Tensor]"


class Rows(NamedTuple):
    """Which rows of a suite are asked."""

    split: str = "gate"  # gate, tune, or canary: a fixed sample of the gate's
    sample: int = 0  # how many, of the canary


GATE, TUNE = Rows(), Rows("tune")


@dataclass(frozen=True)
class Bench:
    """Where models of a line are measured."""

    house: House
    settings: LineConfig
    base: Version  # whose architecture, tokenizer and prompts are used for all of them

    def path(self, subject: Subject, task: Task, rows: Rows) -> Path:
        """The file that keeps the answers of a model on some rows of a task."""
        suite, base = task.suite, self.base.manifest_sha256
        models = (base, subject.weights_sha256, task.head_sha256, numerics_profile(self.settings.device))
        parts = (SCORE_FORMAT, *models, suite.task, suite.sha256, *rows)
        return self.house.scores / f"{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}.parquet"


def known_tasks(house: House, settings: LineConfig, memory: Memory, folder: Path) -> dict[str, Task]:
    """Every task a version is held to: the line's guards, then what it knows, in order of arrival.

    Args:
        house: where the experts are, who brought the suites.
        settings: the line's, which may name suites of its own.
        memory: of the version.
        folder: of the version, where the heads are.
    """
    taken = sorted(settings.guards.keys() & set(memory.tasks))
    if taken:
        what, remedy = "a guard has the name of a task that the line knows", "give the guard another name"
        raise FoldinError(Refusal("E_CONFIG", what, f"guard {taken[0]}", remedy=remedy))
    tasks = {name: task_of(_guard(settings, name), folder) for name in settings.guards}
    for name in memory.tasks:
        owner = memory.owner(name)
        assert owner is not None
        suite = suite_of(settings, name, copy_of(house, owner), f"suite of task {name}")
        if name not in settings.suites:
            _check_suite(suite, memory.suites[name])
        tasks[name] = task_of(suite, folder)
    return tasks


def own_suites(settings: LineConfig) -> dict[str, str]:
    """Task or guard -> identity, of every suite that the line's configuration names."""
    from evaluation.suites import load_suite

    named = {**settings.suites, **settings.guards}
    return {
        name: load_suite(Path(folder), task=name, where=f"suite {name} of the line", trusted=True).sha256
        for name, folder in named.items()
    }


def score(
    bench: Bench,
    subject: Subject,
    tasks: Mapping[str, Task],
    rows: Rows = GATE,
    progress: Progress = lambda done, total: None,
) -> dict[str, TaskScore]:
    """One model on some tasks; what was measured before is read, not measured again.

    A task that cannot be measured gets a score of NaN with the reason, which no gate lets pass.
    """
    paths = {name: bench.path(subject, task, rows) for name, task in tasks.items()}
    missing = {name: task for name, task in tasks.items() if not paths[name].exists()}
    measured = _measure(bench, subject, missing, progress, rows) if missing else {}
    for name, found in measured.items():
        if not found.error:
            write_atomic(paths[name], answers_bytes(found))
    return {name: measured[name] if name in measured else read_answers(paths[name]) for name in tasks}


def _measure(
    bench: Bench, subject: Subject, tasks: Mapping[str, Task], progress: Progress, rows: Rows
) -> dict[str, TaskScore]:
    from evaluation.score import score_all

    settings, folder = bench.settings, bench.base.folder
    suites = {name: task.suite for name, task in tasks.items()}
    frozen = {
        name: _anchors(folder, suite, settings.device)
        for name, suite in suites.items()
        if suite.kind == "zero-shot-text"
    }
    heads = {name: task.head for name, task in tasks.items() if task.head is not None}
    return score_all(
        folder,
        subject.weights,
        suites,
        anchors=frozen,
        heads=heads,
        device=settings.device,
        progress=progress,
        seconds=settings.evaluation_seconds,
        split=rows.split,
        sample=rows.sample,
    )


def _guard(settings: LineConfig, name: str) -> "Suite":
    """A suite that the line is always held to."""
    from evaluation.suites import load_suite

    return load_suite(Path(settings.guards[name]), task=name, where=f"guard {name}", trusted=True)


@lru_cache(maxsize=256)
def _anchors(base: Path, suite: "Suite", device: str) -> "Tensor":
    """The base's prompt embeddings of one suite: the same for every model of the line, so computed once a process."""
    from evaluation.score import anchors
    from registry.weights import Checkpoint

    return anchors(base, Checkpoint.open(base, "base"), suite, device)


def task_of(suite: "Suite", folder: Path) -> Task:
    """A suite with the head that a version's folder keeps for its task."""
    from registry.weights import content_sha256

    head = head_of(folder, suite.task)
    return Task(suite, head, content_sha256(head)[0] if head is not None else "")


def _check_suite(suite: "Suite", recorded: str) -> None:
    """Nothing, when a task is still measured by the suite that its version was judged by."""
    if suite.sha256 != recorded:
        raise FoldinError(
            Refusal(
                code="E_DIGEST",
                what="the task's suite is not the one that the version was judged by",
                where=f"suite of task {suite.task}",
                expected=recorded[:12],
                found=suite.sha256[:12],
                remedy="restore it, or name the suite that shall measure the task in the line's [suites]",
            )
        )


def copy_of(house: House, owner: Folded) -> Path:
    """The content store's copy of an expert that was folded before; when it is gone, fetched or restored again.

    The expert's original is asked for first, then its archive, which holds its suite as it was.
    """
    path = house.experts / owner.tree_sha256[:2] / owner.tree_sha256
    if path.exists():
        return path
    where, gone = f"expert {owner.model} v{owner.version}", "no such version"
    found = house.mlflow.expert(owner.model, owner.version)
    try:
        copy = intake.admit(house.mlflow.fetch(found), house.experts, where, keep=house.far) if found else None
    except FoldinError as error:
        if error.refusal.code != "E_SOURCE":
            raise
        copy = error.refusal
    if isinstance(copy, intake.Admitted):
        if copy.tree_sha256 == owner.tree_sha256:
            return copy.folder
        gone = f"files {copy.tree_sha256[:12]}"
    archive = archive_of(house, owner.tree_sha256)
    if archive:
        path = house.experts / archive.restored_sha256[:2] / archive.restored_sha256
        return path if path.exists() else restored(house, archive)[0].folder
    if isinstance(copy, Refusal):
        raise FoldinError(copy)
    raise FoldinError(
        Refusal(
            code="E_DIGEST",
            what="an expert that the version contains is gone or was changed, and its suite with it",
            where=where,
            expected=f"files {owner.tree_sha256[:12]}",
            found=gone,
            remedy="restore the expert's artifacts, or name the task's suite in the line's [suites]",
        )
    )
