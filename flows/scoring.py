"""What a model is worth on the tasks its line knows. Measured once: (weights, suite, head) names the answer."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from flows.admission import Admitted, suite_of
from flows.config import LineConfig
from flows.versions import Folded, Memory, Version, head_of
from flows.wiring import CODE_FORMAT, House
from registry import intake
from registry.files import read_json, write_json
from registry.records import FoldinError, Refusal, Report, TaskScore, plain

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.suites import Suite

Progress = Callable[[int, int], None]  # tasks done, tasks in all


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


def known_tasks(house: House, settings: LineConfig, memory: Memory, folder: Path) -> dict[str, Task]:
    """Every task a version knows, in order of arrival; its suites come from the experts that brought them.

    Args:
        house: where the experts are.
        settings: the line's, which may name suites of its own.
        memory: of the version.
        folder: of the version, where the heads are.
    """
    tasks = {}
    for name in memory.tasks:
        owner = memory.owner(name)
        assert owner is not None
        suite = suite_of(settings, name, _copy_of(house, owner), f"suite of task {name}")
        if name not in settings.suites:
            _check_suite(suite, memory.suites[name])
        tasks[name] = _task(suite, folder)
    return tasks


def score(
    house: House, settings: LineConfig, base: Version, subject: Subject, tasks: Mapping[str, Task], progress: Progress
) -> dict[str, TaskScore]:
    """One model on some tasks; what was measured before is read, not measured again.

    A task that cannot be measured gets a score of NaN with the reason, which no gate lets pass.
    """
    paths = {name: house.scores / f"{_key(base, subject, task)}.json" for name, task in tasks.items()}
    missing = {name: task for name, task in tasks.items() if not paths[name].exists()}
    measured = _measure(settings, base, subject, missing, progress) if missing else {}
    for name, found in measured.items():
        if not found.error:
            write_json(paths[name], plain(found))
    return {name: measured[name] if name in measured else score_from(read_json(paths[name])) for name in tasks}


def report_on(
    house: House,
    settings: LineConfig,
    base: Version,
    expert: Admitted,
    candidate: Subject,
    tasks: Mapping[str, Task],
    progress: Progress,
) -> Report:
    """The candidate on every task, with the expert and the base on the new one beside it."""
    new = {expert.task: tasks[expert.task]}
    alone = Subject(expert.weights_sha256, expert.whole)
    first = Subject(base.memory.weights_sha256, base.weights())
    return Report(
        weights_sha256=candidate.weights_sha256,
        scores=score(house, settings, base, candidate, tasks, progress),
        new_task=expert.task,
        expert=score(house, settings, base, alone, new, progress)[expert.task],
        base=score(house, settings, base, first, new, progress)[expert.task],
    )


def score_from(table: Mapping[str, object]) -> TaskScore:
    """A score as `plain` wrote it."""
    values = dict(table)
    values["predictions"] = tuple(values["predictions"])  # type: ignore[arg-type]
    values["correct"] = tuple(values["correct"])  # type: ignore[arg-type]
    return TaskScore(**values)  # type: ignore[arg-type]


def _measure(
    settings: LineConfig, base: Version, subject: Subject, tasks: Mapping[str, Task], progress: Progress
) -> dict[str, TaskScore]:
    from evaluation.score import score_all

    suites = {name: task.suite for name, task in tasks.items()}
    frozen = {
        name: _anchors(base.folder, suite, settings.device)
        for name, suite in suites.items()
        if suite.kind == "zero-shot-text"
    }
    heads = {name: task.head for name, task in tasks.items() if task.head is not None}
    return score_all(
        base.folder,
        subject.weights,
        suites,
        anchors=frozen,
        heads=heads,
        device=settings.device,
        progress=progress,
    )


@lru_cache(maxsize=256)
def _anchors(base: Path, suite: "Suite", device: str) -> "Tensor":
    """The base's prompt embeddings of one suite: the same for every model of the line, so computed once a process."""
    from evaluation.score import anchors
    from registry.weights import Checkpoint

    return anchors(base, Checkpoint.open(base, "base"), suite, device)


def _task(suite: "Suite", folder: Path) -> Task:
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


def _key(base: Version, subject: Subject, task: Task) -> str:
    parts = (
        str(CODE_FORMAT),
        task.suite.task,
        base.manifest_sha256,
        subject.weights_sha256,
        task.suite.sha256,
        task.head_sha256,
    )
    return hashlib.sha256(":".join(parts).encode()).hexdigest()


def _copy_of(house: House, owner: Folded) -> Path:
    """The content store's copy of an expert that was folded before; fetched and checked again when it is gone."""
    path = house.experts / owner.tree_sha256[:2] / owner.tree_sha256
    if path.exists():
        return path
    where = f"expert {owner.model} v{owner.version}"
    found = house.mlflow.expert(owner.model, owner.version)
    copy = intake.admit(house.mlflow.fetch(found), house.experts, where) if found else None
    if isinstance(copy, Refusal):
        raise FoldinError(copy)
    if copy is None or copy.tree_sha256 != owner.tree_sha256:
        raise FoldinError(
            Refusal(
                code="E_DIGEST",
                what="an expert that the version contains is gone or was changed, and its suite with it",
                where=where,
                expected=f"files {owner.tree_sha256[:12]}",
                found=f"files {copy.tree_sha256[:12]}" if copy else "no such version",
                remedy="restore the expert's artifacts, or name the task's suite in the line's [suites]",
            )
        )
    return copy.folder
