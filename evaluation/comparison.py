"""Candidate against champion, task by task: what changed, how sure that is, how many answers flipped. Pure Python."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from evaluation.metrics import flips
from evaluation.report import Record
from registry.records import Check, FoldinError, TaskScore

Interval = tuple[float, float]
Z = 1.959964  # of a normal distribution, two-sided at 95 %
OF_THE_CHANGE = {"max_task_drop": -1, "min_gain": 1}  # rules whose value is the change, and its sign in them


class Change(NamedTuple):
    """One task under both models."""

    task: str
    before: TaskScore | None  # the champion's
    after: TaskScore | None  # the candidate's
    value: float = math.nan  # after - before in [-1, 1]; of perplexities after / before - 1, less is better
    interval: Interval | None = None  # of the value, at 95 % confidence
    wrong: int | None = None  # answers that were right and are wrong; None where that is unknown
    right: int | None = None  # answers that were wrong and are right
    failed: bool = False  # one of the gate's rules failed on it
    new: bool = False  # the task of the expert that was folded
    problem: str = ""  # why there is no value

    @property
    def is_perplexity(self) -> bool:
        """Whether less is better."""
        return "perplexity" in {score.metric for score in (self.before, self.after) if score}

    @property
    def safety(self) -> bool:
        """Whether the task may not get worse at all."""
        return any(score.safety for score in (self.before, self.after) if score)

    @property
    def examples(self) -> int:
        """How many examples both answered."""
        return min((score.examples for score in (self.before, self.after) if score), default=0)


def changes(record: Record) -> list[Change]:
    """Every task that the champion or the candidate was measured on; empty when one of them was not measured at all."""
    if record.champion is None or not record.report.scores:
        return []
    tasks = dict.fromkeys((*record.champion.scores, *record.report.scores))
    return [_change(record, task) for task in tasks]


def _change(record: Record, task: str) -> Change:
    before = record.champion.scores.get(task) if record.champion else None
    after = record.report.scores.get(task)
    checks = [check for check in (record.verdict.checks if record.verdict else ()) if check.task == task]
    failed = any(not check.passed for check in checks)
    change = Change(task, before, after, failed=failed, new=task == record.report.new_task)
    problem = _problem(before, "champion") or _problem(after, "candidate")
    if problem or before is None or after is None:
        return change._replace(problem=problem)
    if (before.suite_sha256, before.metric, before.split) != (after.suite_sha256, after.metric, after.split):
        return change._replace(problem="the two were measured on different suites")
    value = after.value / max(1.0, before.value) - 1 if change.is_perplexity else after.value - before.value
    wrong, right = _flips(before, after)
    interval = _told(checks, value) or paired_interval(before, after)
    return change._replace(value=value, interval=interval, wrong=wrong, right=right)


def paired_interval(before: TaskScore, after: TaskScore) -> Interval | None:
    """The change's 95 % interval from the answers to the same examples; None when there are too few, or no answers.

    Of right and wrong answers: a difference of paired shares after one flip of either kind is added (Bonett and Price
    2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data"). Of
    points: the weighted mean of the differences and its standard error; of perplexities their ratio, less 1.
    """
    wrong, right = _flips(before, after)
    if wrong is not None and right is not None:
        return _of_flips(wrong, right, before.examples)
    count = len(before.points)
    if count < 2 or len(after.points) != count or before.weights != after.weights:
        return None
    middle, error = _mean_of(
        [b - a for a, b in zip(before.points, after.points, strict=True)], before.weights or (1.0,) * count
    )
    if not math.isfinite(middle + error) or abs(middle) + Z * error > 100:
        return None
    low, high = middle - Z * error, middle + Z * error
    # Points of a perplexity are log-likelihoods: more of them is less of it.
    return (math.expm1(-high), math.expm1(-low)) if before.metric == "perplexity" else (low, high)


def _of_flips(wrong: int, right: int, examples: int) -> Interval:
    count = examples + 2
    middle = (right - wrong) / count
    error = math.sqrt(((wrong + right + 2) / count - middle**2) / count)
    return max(-1.0, middle - Z * error), min(1.0, middle + Z * error)


def _mean_of(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The weighted mean and its standard error; NaN when nothing has weight."""
    whole = math.fsum(weights)
    if not whole > 0:
        return math.nan, math.nan
    mean = math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / whole
    spread = math.fsum((weight * (value - mean)) ** 2 for value, weight in zip(values, weights, strict=True))
    return mean, math.sqrt(spread * len(values) / (len(values) - 1)) / whole


def _told(checks: Sequence[Check], value: float) -> Interval | None:
    """The interval that the gate decided by, when it speaks of this very change."""
    for check in checks:
        sign = OF_THE_CHANGE.get(check.rule, 0)
        if sign and check.interval and math.isclose(sign * check.value, value, abs_tol=1e-9):
            low, high = sorted(sign * end for end in check.interval)
            return low, high
    return None


def _flips(before: TaskScore, after: TaskScore) -> tuple[int, int] | tuple[None, None]:
    try:
        return flips(before, after)
    except FoldinError:
        return None, None


def _problem(score: TaskScore | None, who: str) -> str:
    if score is None:
        return f"the {who} was not measured"
    if score.error or not math.isfinite(score.value):
        return f"the {who} could not be measured: {score.error or 'its value is no number'}"
    return ""
