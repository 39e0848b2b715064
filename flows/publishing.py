"""From a judged candidate to what people see: report and pictures, the MLflow run, the registered version."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.config import LineConfig
from flows.folding import Candidate
from flows.versions import REPORT_FILE, Memory, Version
from flows.wiring import CODE_FORMAT, House
from registry.files import MANIFEST, read_json, sha256_file, verify_manifest, write_atomic, write_json, write_manifest
from registry.records import Expert, FoldinError, Refusal, Report, Verdict

if TYPE_CHECKING:
    from evaluation.report import Record

PLOTS = "foldin/plots"
PAGE_FILE = "foldin/report.html"


def write_report(candidate: Candidate, parent: Version, report: Report, champion: Report, verdict: Verdict) -> "Record":
    """Write report.json, report.html and the pictures into a candidate's folder.

    Args:
        candidate: where they go, with its memory and the overlap per layer.
        parent: the version it was folded into, whose report holds the accuracy matrix so far.
        report: the candidate's.
        champion: the champion's, for the bars beside the candidate's.
        verdict: the gate's.
    """
    from evaluation.metrics import negative_flip_rate, summary
    from evaluation.page import as_html
    from evaluation.report import Record, as_json

    matrix = [*matrix_of(parent), {task: score.value for task, score in report.scores.items()}]
    flips = {
        f"negative_flips.{task}": negative_flip_rate(before, report.scores[task])
        for task, before in champion.scores.items()
        if task in report.scores and not (before.error or report.scores[task].error)
    }
    record = Record(report, verdict, matrix, {**summary(matrix, arrivals(candidate.memory)), **flips})
    folder = candidate.folder
    write_json(folder / REPORT_FILE, {**as_json(record), "overlap": candidate.overlap})
    plots = draw(folder / PLOTS, candidate.memory, matrix, report, champion)
    title = f"+ {candidate.memory.experts[-1].task}: {verdict.outcome}"
    page = as_html(record, title, [f"plots/{path.name}" for path in plots])
    write_atomic(folder / PAGE_FILE, page.encode())
    return record


def arrivals(memory: Memory) -> dict[str, int]:
    """Task -> the row of the accuracy matrix in which it arrived."""
    first: dict[str, int] = {}
    for row, expert in enumerate(memory.experts):
        first.setdefault(expert.task, row)
    return first


def matrix_of(version: Version) -> list[Mapping[str, float]]:
    """The accuracy matrix up to a version: row t holds the accuracies after t + 1 experts; empty for the base."""
    from evaluation.report import rows_in

    return list(rows_in(read_json(version.folder / REPORT_FILE), "matrix", f"report of version {version.number}"))


def draw(
    folder: Path, memory: Memory, matrix: Sequence[Mapping[str, float]], report: Report, champion: Report
) -> list[Path]:
    """The heat map of the accuracy matrix and the bars per task, as PNG files."""
    from evaluation.pictures import bar_chart, heat_map

    folder.mkdir(parents=True, exist_ok=True)
    tasks = list(memory.tasks)
    rows = [f"{number}: + {expert.task}" for number, expert in enumerate(memory.experts, 1)]
    nan = float("nan")
    values = [[row.get(task, nan) for task in tasks] for row in matrix]
    heat_map(rows, tasks, values, folder / "accuracy_matrix.png")
    series = {"champion": champion, "candidate": report}
    bars = {name: [_value(each, task) for task in tasks] for name, each in series.items()}
    bar_chart(tasks, bars, folder / "tasks.png")
    return [folder / "accuracy_matrix.png", folder / "tasks.png"]


def metrics_of(record: "Record") -> dict[str, float]:
    """What MLflow shows as metrics: the accuracy of every task, and the sequence's summary."""
    return {
        **{f"accuracy.{task}": score.value for task, score in record.report.scores.items()},
        **dict(record.summary),
    }


def show(
    house: House,
    line: str,
    settings: LineConfig,
    run_id: str,
    expert: Expert,
    folder: Path,
    record: "Record",
    inputs: Sequence[str],
) -> None:
    """Put a judged merge on its MLflow run: whether it passed or not, and why."""
    verdict = record.verdict
    assert verdict is not None
    plots = sorted((folder / PLOTS).glob("*.png"))
    house.mlflow.show(
        run_id,
        params={
            "line": line,
            "expert": expert.name,
            "task": expert.task,
            "method": settings.method,
            **settings.parameters,
        },
        metrics=metrics_of(record),
        tags={"foldin.verdict": verdict.outcome, "foldin.reason": verdict.reason, "foldin.expert": expert.name},
        artifacts=[(folder / REPORT_FILE, ""), (folder / PAGE_FILE, ""), *((path, "plots") for path in plots)],
        inputs=inputs,
    )


def write_version_manifest(
    folder: Path,
    line: str,
    merge_key: str,
    parent: Version | None,
    verdict: Verdict,
    known: Mapping[str, str],  # as in `hash_tree`
) -> str:
    """Write the manifest, after everything else; its digest. Nothing in it depends on when or where it was made."""
    memory = Memory.read(folder)
    return write_manifest(
        folder,
        {
            "line": line,
            "merge_key": merge_key,
            "parent": {"version": parent.number, "manifest_sha256": parent.manifest_sha256} if parent else None,
            "base_sha256": memory.base_sha256,
            "weights_sha256": memory.weights_sha256,
            "experts": [list(expert) for expert in memory.experts],
            "method": memory.method,
            "parameters": dict(memory.parameters),
            "suites": dict(memory.suites),
            "verdict": verdict.outcome,
            "profile": dict(memory.profile),
            "code": {"format": CODE_FORMAT, "version": importlib.metadata.version("foldin")},
        },
        known,
    )


def register(
    house: House, line: str, merge_key: str, run_id: str, folder: Path, metrics: Mapping[str, float], expert: str
) -> tuple[int, str]:
    """The registered version of a finished folder and its manifest's digest; found again when a run got that far.

    What is found may have been made under another numerics profile, so it is judged by its own manifest.

    Raises:
        FoldinError: E_DIGEST when the version that carries this merge key is damaged or another merge's.
    """
    memory = Memory.read(folder)
    tags = {
        "foldin.manifest_sha256": sha256_file(folder / MANIFEST),
        "foldin.weights_sha256": memory.weights_sha256,
        "foldin.base_sha256": memory.base_sha256,
        "foldin.experts": str(len(memory.experts)),
        "foldin.expert": expert,
        "foldin.method": memory.method,
        "foldin.verdict": read_json(folder / MANIFEST)["verdict"],
    }
    last = memory.experts[-1] if memory.experts else None
    told = (
        f"adds {last.task} ({last.model} v{last.version}); {len(memory.experts)} experts in all" if last else "the base"
    )
    version = house.mlflow.publish(line, merge_key, run_id, folder, description=told, metrics=metrics, tags=tags)
    stored = house.mlflow.folder(line, version)
    wrong = verify_manifest(stored)
    if not wrong and read_json(stored / MANIFEST)["merge_key"] != merge_key:
        wrong = [Refusal("E_DIGEST", "the version that carries this merge key is another merge's", file=MANIFEST)]
    if wrong:
        remedy = f"delete the tag foldin.merge_key of {line} v{version}; foldin then registers the merge again"
        raise FoldinError(replace(wrong[0], where=f"{line} v{version}", remedy=remedy))
    return version, sha256_file(stored / MANIFEST)


def _value(report: Report, task: str) -> float:
    score = report.scores.get(task)
    return score.value if score else float("nan")
