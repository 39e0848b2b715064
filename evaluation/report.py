"""report.json: a measured model, what it was judged against, and why, as plain JSON.

The single answers are not in it; they lie beside it as Parquet (`evaluation.answers`). JSON has no NaN, so numbers that
are not finite are written as text ("nan", "inf", "-inf").
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from evaluation.escape import clean
from registry.records import FoldinError, Refusal
from registry.verdicts import Flip, Report, TaskScore, Try, Verdict

FORMAT = "foldin-report/2"
Json = dict[str, Any]
Rows = Sequence[Mapping[str, float]]  # row t: task -> value after t + 1 experts


class Record(NamedTuple):
    """What report.json and report.html say."""

    report: Report
    verdict: Verdict | None = None  # None for a base, which no gate judged
    matrix: Rows = ()  # accuracies and scores in [0, 1]
    summary: Mapping[str, float] = {}  # metric -> value, as evaluation.metrics.summary gives
    champion: Report | None = None  # what the report was compared with
    perplexities: Rows = ()  # of the tasks that are measured by it
    overlap: Mapping[str, Mapping[str, float]] = {}  # layer -> delta_norm, total_norm, cosine, removed
    tries: Sequence[Try] = ()  # of the search, in the order in which they were made
    flips: Sequence[Flip] = ()  # a few answers that turned wrong
    lineage: Mapping[str, str] = {}  # what people ask first: "line", "parent", "expert", "method", ...
    seconds: Mapping[str, float] = {}  # rung or "search" -> what it took
    best: Mapping[str, tuple[float, str]] = {}  # task -> the best accuracy or score so far, and the suite it is of


def as_json(record: Record) -> Json:
    """The record as what json.dumps writes with allow_nan=False."""
    document: Json = _finite(
        {
            "format": FORMAT,
            "report": _report(record.report),
            "champion": _report(record.champion) if record.champion else None,
            "verdict": asdict(record.verdict) if record.verdict else None,
            **{name: getattr(record, name) for name in ("matrix", "perplexities", "summary", "overlap", "best")},
            "tries": [asdict(each) for each in record.tries],
            "flips": [asdict(each) for each in record.flips],
            "lineage": record.lineage,
            "seconds": record.seconds,
        }
    )
    return document


def rows_in(document: Mapping[str, object], name: str, where: str) -> list[dict[str, float]]:
    """`matrix` or `perplexities` of what `as_json` wrote, row by row.

    Raises FoldinError (E_FORMAT) when the document is of another format or malformed.
    """
    if document.get("format") != FORMAT:
        raise _refuse("the report has another format", where, FORMAT, repr(document.get("format")))
    try:
        return [{task: float(value) for task, value in row.items()} for row in document[name]]  # type: ignore[attr-defined]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _refuse("the report is malformed", where, "the keys that as_json writes", repr(error)) from None


def _report(report: Report) -> Json:
    return {
        "weights_sha256": report.weights_sha256,
        "new_task": report.new_task,
        "scores": {task: _score(score) for task, score in report.scores.items()},
        "expert": _score(report.expert) if report.expert else None,
        "base": _score(report.base) if report.base else None,
    }


def _score(score: TaskScore) -> Json:
    names = ("task", "suite_sha256", "metric", "value", "error", "split", "safety", "examples")
    return {name: getattr(score, name) for name in names}


def _finite(value: Any) -> Any:  # noqa: ANN401 - JSON
    """The value with lists for sequences, and text for numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _refuse(what: str, where: str, expected: str, found: str) -> FoldinError:
    remedy = "score the version again with foldin score"
    return FoldinError(Refusal("E_FORMAT", what, where, expected=expected, found=clean(found), remedy=remedy))
