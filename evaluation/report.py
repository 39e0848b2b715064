"""report.json: a measured model and its verdict as plain JSON, and back without loss.

Answers are kept per example, as text: predictions as numbers between blanks, correctness as a row of 0 and 1. JSON has
no NaN, so numbers that are not finite are written as text ("nan", "inf", "-inf").
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from evaluation.escape import clean
from registry.records import Check, FoldinError, Outcome, Refusal, Report, TaskScore, Verdict

FORMAT = "foldin-report/1"
Json = dict[str, Any]
T = TypeVar("T")


class Record(NamedTuple):
    """What report.json holds."""

    report: Report
    verdict: Verdict | None = None  # None for a base, which no gate judged
    matrix: Sequence[Mapping[str, float]] = ()  # row t: task -> accuracy after t + 1 experts
    summary: Mapping[str, float] = {}  # metric -> value, as evaluation.metrics.summary gives


def as_json(record: Record) -> Json:
    """The record as what json.dumps writes, with allow_nan=False; `from_json` reads it back exactly."""
    return {
        "format": FORMAT,
        "report": _report(record.report),
        "verdict": _verdict(record.verdict) if record.verdict else None,
        "matrix": [_numbers(row) for row in record.matrix],
        "summary": _numbers(record.summary),
    }


def from_json(document: Mapping[str, object], where: str = "report.json") -> Record:
    """The record that `as_json` wrote. Raises FoldinError (E_FORMAT) when the document is not such a record."""
    if document.get("format") != FORMAT:
        raise _refuse("the report has another format", where, FORMAT, repr(document.get("format")))
    try:
        return _read_record(dict(document))
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
    return {
        "task": score.task,
        "suite_sha256": score.suite_sha256,
        "metric": score.metric,
        "value": _number(score.value),
        "error": score.error,
        "predictions": " ".join(map(str, score.predictions)),
        "correct": "".join("01"[right] for right in score.correct),
    }


def _verdict(verdict: Verdict) -> Json:
    return {"outcome": verdict.outcome.value, "checks": [_check(check) for check in verdict.checks]}


def _check(check: Check) -> Json:
    numbers = {"value": _number(check.value), "threshold": _number(check.threshold)}
    return {"rule": check.rule, "task": check.task, **numbers, "passed": check.passed, "text": check.text}


def _read_record(document: Json) -> Record:
    return Record(
        _read_report(document["report"]),
        _optional(_read_verdict, document["verdict"]),
        tuple(_read_numbers(row) for row in document["matrix"]),
        _read_numbers(document["summary"]),
    )


def _read_report(document: Json) -> Report:
    return Report(
        _text(document["weights_sha256"]),
        {task: _read_score(score) for task, score in document["scores"].items()},
        _text(document["new_task"]),
        _optional(_read_score, document["expert"]),
        _optional(_read_score, document["base"]),
    )


def _read_score(document: Json) -> TaskScore:
    return TaskScore(
        task=_text(document["task"]),
        suite_sha256=_text(document["suite_sha256"]),
        metric=_text(document["metric"]),
        value=_read_number(document["value"]),
        predictions=tuple(map(int, document["predictions"].split())),
        correct=tuple(bool("01".index(mark)) for mark in document["correct"]),
        error=_text(document["error"]),
    )


def _read_verdict(document: Json) -> Verdict:
    return Verdict(Outcome(document["outcome"]), tuple(_read_check(check) for check in document["checks"]))


def _read_check(document: Json) -> Check:
    return Check(
        rule=_text(document["rule"]),
        task=_text(document["task"]),
        value=_read_number(document["value"]),
        threshold=_read_number(document["threshold"]),
        passed=_flag(document["passed"]),
        text=_text(document["text"]),
    )


def _optional(read: Callable[[Json], T], document: Json | None) -> T | None:
    return None if document is None else read(document)


def _numbers(values: Mapping[str, float]) -> Json:
    return {name: _number(value) for name, value in values.items()}


def _read_numbers(values: Json) -> dict[str, float]:
    return {name: _read_number(value) for name, value in values.items()}


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _read_number(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if value == "nan":
        return math.nan  # this one object, so that records holding it compare equal
    if value in ("inf", "-inf"):
        return float(str(value))
    raise ValueError(f"{value!r} is not a number")


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"{value!r} is not a text")


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} is not a truth value")


def _refuse(what: str, where: str, expected: str, found: str) -> FoldinError:
    remedy = "score the version again with foldin score"
    return FoldinError(Refusal("E_FORMAT", what, where, expected=expected, found=clean(found), remedy=remedy))
