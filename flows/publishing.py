"""From a judged candidate to what people see: report and pictures, the MLflow run, the registered version."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.config import LineConfig
from flows.folding import Candidate
from flows.judging import Judged
from flows.scoring import known_tasks
from flows.versions import REPORT_FILE, Memory, Version
from flows.wiring import CODE_FORMAT, House
from registry.files import MANIFEST, read_json, sha256_file, verify_manifest, write_atomic, write_json, write_manifest
from registry.records import Expert, Flip, FoldinError, Refusal, Try, Verdict

if TYPE_CHECKING:
    from evaluation.report import Record

PLOTS = "foldin/plots"
ANSWERS = "foldin/predictions"
FLIPS = 3  # examples shown of each task
PAGE_FILE = "foldin/report.html"


def write_report(house: House, settings: LineConfig, parent: Version, line: str, judged: Judged) -> "Record":
    """Write report.json, report.html, the pictures and the single answers into a candidate's folder."""
    from evaluation.answers import answers_bytes
    from evaluation.page import as_html, write_plots
    from evaluation.report import as_json

    record, folder = record_of(house, settings, parent, line, judged), judged.candidate.folder
    write_json(folder / REPORT_FILE, as_json(record))
    write_plots(record, folder / PLOTS)
    write_atomic(folder / PAGE_FILE, as_html(record, f"{line}: {judged.candidate.memory.experts[-1].task}").encode())
    for task, score in record.report.scores.items():
        if not score.error:
            write_atomic(folder / ANSWERS / f"{task}.parquet", answers_bytes(score))
    return record


def record_of(house: House, settings: LineConfig, parent: Version, line: str, judged: Judged) -> "Record":
    """All that people are told of a judged candidate."""
    from evaluation.metrics import summary
    from evaluation.report import Record

    matrix, perplexities = history_of(parent, judged)
    memory, last = judged.candidate.memory, judged.verdict.rung == "full"
    rows = {task: row for task, row in arrivals(memory).items() if matrix and task in matrix[-1]}
    return Record(
        judged.report,
        judged.verdict,
        matrix,
        {**summary(matrix, rows), **flip_rates(judged)} if last else {},
        judged.champion,
        perplexities,
        judged.candidate.overlap,
        judged.tries,
        flips_of(house, settings, judged) if last else (),
        lineage_of(line, parent, judged),
        judged.seconds,
    )


def history_of(parent: Version, judged: Judged) -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    """Row by row the accuracies, and the perplexities, up to a candidate; its own row once every rung was asked."""
    from evaluation.report import rows_in

    document = read_json(parent.folder / REPORT_FILE, parent.where)
    both: list[list[Mapping[str, float]]] = [
        list(rows_in(document, name, f"report of {parent.where}")) for name in ("matrix", "perplexities")
    ]
    if judged.verdict.rung == "full":
        for rows, perplexity in zip(both, (False, True), strict=True):
            scores = judged.report.scores.items()
            rows.append({task: each.value for task, each in scores if (each.metric == "perplexity") is perplexity})
    return both[0], both[1]


def arrivals(memory: Memory) -> dict[str, int]:
    """Task -> the row of the accuracy matrix in which it arrived."""
    first: dict[str, int] = {}
    for row, expert in enumerate(memory.experts):
        first.setdefault(expert.task, row)
    return first


def flip_rates(judged: Judged) -> dict[str, float]:
    """Per task that has right and wrong answers: the share of the champion's examples that turned wrong."""
    from evaluation.metrics import negative_flip_rate

    after = judged.report.scores
    return {
        f"negative_flips.{task}": negative_flip_rate(before, after[task])
        for task, before in judged.champion.scores.items()
        if task in after and before.metric == "accuracy" and not (before.error or after[task].error)
    }


def flips_of(house: House, settings: LineConfig, judged: Judged) -> list[Flip]:
    """A few answers that turned wrong, with their examples: what users would meet first."""
    from evaluation.suites import read_examples

    memory, found = judged.candidate.memory, list[Flip]()
    tasks = known_tasks(house, settings, memory, judged.candidate.folder)
    for task, before in judged.champion.scores.items():
        suite, after = tasks[task].suite, judged.report.scores[task]
        if not suite.labels or not before.correct or not after.correct:
            continue
        turned = [
            row for row, pair in enumerate(zip(before.correct, after.correct, strict=True)) if pair == (True, False)
        ]
        inputs, labels = read_examples(suite)[:2] if turned else ((), ())
        for row in turned[:FLIPS]:
            example = inputs[row] if isinstance(inputs[row], str) else f"example {row}"
            answers = (labels[row], before.predictions[row], after.predictions[row])
            found.append(Flip(task, str(example), *(suite.labels[each] for each in answers)))
    return found


def lineage_of(line: str, parent: Version, judged: Judged) -> dict[str, str]:
    """What people ask first of a version."""
    memory = judged.candidate.memory
    last = memory.experts[-1]
    parameters = ", ".join(f"{key} = {value}" for key, value in memory.parameters.items())
    return {
        "line": line,
        "parent": f"v{parent.number}",
        "expert": f"{last.model} v{last.version}",
        "task": last.task,
        "experts": str(len(memory.experts)),
        "method": f"{memory.method} ({parameters})" if parameters else memory.method,
        **({"weight": f"{last.weight:g}"} if last.weight != 1 else {}),
        **({"search": judged.found} if judged.found else {}),
        "weights": memory.weights_sha256,
        "expert's weights": last.weights_sha256,
        "base": memory.base_sha256,
        "parent's manifest": parent.manifest_sha256,
    }


def metrics_of(record: "Record") -> dict[str, float]:
    """What MLflow shows as metrics: every task's, the sequence's summary, and what the gate took."""
    scores = record.report.scores.items()
    return {
        **{f"{score.metric}.{task}": score.value for task, score in scores if score.split == "gate"},
        **dict(record.summary),
        **{f"seconds.{name}": value for name, value in record.seconds.items()},
    }


def show(
    house: House, line: str, run_id: str, expert: Expert, candidate: Candidate, record: "Record", inputs: Sequence[str]
) -> None:
    """Put a judged merge on its MLflow run: whether it passed or not, and why."""
    verdict, folder, memory = record.verdict, candidate.folder, candidate.memory
    assert verdict is not None
    kept = [(path, path.parent.name) for name in (PLOTS, ANSWERS) for path in sorted((folder / name).glob("*"))]
    facts = {"line": line, "expert": expert.name, "task": expert.task, "method": memory.method}
    house.mlflow.show(
        run_id,
        params={**facts, "weight": memory.experts[-1].weight, **memory.parameters},
        metrics=metrics_of(record),
        tags={
            "foldin.verdict": verdict.outcome,
            "foldin.rung": verdict.rung,
            "foldin.reason": verdict.reason,
            "foldin.search": record.lineage.get("search", ""),
            "foldin.expert": expert.name,
        },
        artifacts=[(folder / REPORT_FILE, ""), (folder / PAGE_FILE, ""), *kept],
        inputs=inputs,
    )


def show_try(house: House, run_id: str, tried: Try) -> None:
    """One try of a search as a child of the merge's MLflow run."""
    house.mlflow.show_child(
        run_id,
        tried.name,
        params={"method": tried.method, "weight": tried.weight, **tried.parameters},
        metrics={
            "tune.old": tried.old,
            "tune.new": tried.new,
            "chosen": float(tried.chosen),
            "front": float(tried.best),
        },
        tags={"foldin.passed": str(tried.passed).lower(), "foldin.reason": tried.reason, "foldin.split": "tune"},
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
        "foldin.verdict": "passed",
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
