"""What people are told of a judged candidate: the record behind report.json, report.html, pictures and answers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flows.card import CARD_FILE, card
from flows.judging import Judged
from flows.memory import Folded, Memory
from flows.options import LineConfig
from flows.scoring import known_tasks
from flows.versions import ANSWERS, PAGE_FILE, PLOTS, REPORT_FILE, Version, bests, history
from flows.wiring import House
from registry.files import write_atomic, write_json
from registry.verdicts import Flip

if TYPE_CHECKING:
    from evaluation.report import Record

FLIPS = 3  # examples shown of each task


def write_report(house: House, settings: LineConfig, parent: Version, line: str, judged: Judged) -> "Record":
    """Write report.json, report.html, the pictures and the single answers into a candidate's folder.

    The version's files are the same however long judging took; the page that the MLflow run shows, beside the
    candidate's folder, tells that too.
    """
    from evaluation.answers import answers_bytes
    from evaluation.page import as_html, pictures
    from evaluation.pictures import write_plots
    from evaluation.report import as_json

    record, folder = record_of(house, settings, parent, line, judged), judged.candidate.folder
    tasks = ", ".join(each.task for each in _added(parent, judged))
    title, timeless = f"{line}: {tasks}", record._replace(seconds={})
    write_json(folder / REPORT_FILE, as_json(timeless))
    write_plots(timeless, folder / PLOTS)
    write_atomic(folder / CARD_FILE, card(line, parent, judged.candidate.memory, timeless).encode())
    drawn = pictures(record)
    write_atomic(folder / PAGE_FILE, as_html(timeless, title, drawn).encode())
    write_atomic(folder.parent / Path(PAGE_FILE).name, as_html(record, title, drawn).encode())
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
    rows = arrivals(memory, matrix)
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
        best_of(parent, judged) if last else bests(parent),
    )


def history_of(parent: Version, judged: Judged) -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    """Row by row the accuracies, and the perplexities, up to a candidate; its own row once every rung was asked."""
    both: list[list[Mapping[str, float]]] = [list(history(parent, name)) for name in ("matrix", "perplexities")]
    if judged.verdict.rung == "full":
        for rows, perplexity in zip(both, (False, True), strict=True):
            scores = judged.report.scores.items()
            rows.append({task: each.value for task, each in scores if (each.metric == "perplexity") is perplexity})
    return both[0], both[1]


def best_of(parent: Version, judged: Judged) -> dict[str, tuple[float, str]]:
    """The best of each task up to a candidate; where another suite measures it now, what was before counts no more."""
    found = bests(parent)
    for task, score in judged.report.scores.items():
        if score.metric != "perplexity" and math.isfinite(score.value):
            value, suite = found.get(task, (score.value, ""))
            found[task] = (max(value, score.value) if suite == score.suite_sha256 else score.value, score.suite_sha256)
    return found


def arrivals(memory: Memory, matrix: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """Task -> the first row of the accuracy matrix that holds it; guards are no tasks that arrive."""
    first = {task: next((row for row, each in enumerate(matrix) if task in each), -1) for task in memory.tasks}
    return {task: row for task, row in first.items() if row >= 0}


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


def _added(parent: Version, judged: Judged) -> tuple[Folded, ...]:
    """The experts that were folded into the parent to get the candidate."""
    return judged.candidate.memory.experts[len(parent.memory.experts) :]


def lineage_of(line: str, parent: Version, judged: Judged) -> dict[str, str]:
    """What people ask first of a version."""
    memory, added = judged.candidate.memory, _added(parent, judged)
    weights = [f"{each.weight:g}" for each in added]
    parameters = ", ".join(f"{key} = {value}" for key, value in memory.parameters.items())
    return {
        "line": line,
        "parent": f"v{parent.number}",
        "expert": ", ".join(f"{each.model} v{each.version}" for each in added),
        "task": ", ".join(each.task for each in added),
        "experts": str(len(memory.experts)),
        "method": f"{memory.method} ({parameters})" if parameters else memory.method,
        **({"weight": ", ".join(weights)} if set(weights) != {"1"} else {}),
        **({"search": judged.found} if judged.found else {}),
        "weights": memory.weights_sha256,
        "expert's weights": ", ".join(each.weights_sha256 for each in added),
        "base": memory.base_sha256,
        "parent's manifest": parent.manifest_sha256,
    }
