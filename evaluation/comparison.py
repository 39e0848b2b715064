"""Candidate against champion, task by task: what changed, how sure that is, which rules failed."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from evaluation.comparable import pair
from evaluation.metrics import flips
from evaluation.paired import Pair, change, rise
from evaluation.report import Record
from registry.verdicts import Check, TaskScore

Interval = tuple[float, float]
LOSSES = ("max_task_drop", "max_safety_drop", "max_perplexity_rise", "max_canary_drop", "max_canary_rise")


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
    return [_change(record, record.champion.scores.get(task), task) for task in tasks]


def _change(record: Record, before: TaskScore | None, task: str) -> Change:
    after = record.report.scores.get(task)
    checks = [check for check in (record.verdict.checks if record.verdict else ()) if check.task == task]
    asked = [check for check in checks if record.verdict and check.rung == record.verdict.rung]
    failed = any(not check.passed for check in checks)
    known = Change(task, before, after, failed=failed, new=task == record.report.new_task)
    both = pair(before, after, ("champion", "candidate"), task, before.split if before else "gate")
    if isinstance(both, str):
        return known._replace(problem=both)
    first, second = both[0].value, both[1].value
    value = second / first - 1 if known.is_perplexity else second - first
    wrong, right = flips(*both) if both[0].correct else (None, None)
    interval = _told(asked, value, known.is_perplexity) or _found(both, known.is_perplexity)
    return known._replace(value=value, interval=interval, wrong=wrong, right=right)


def _told(checks: Sequence[Check], value: float, rising: bool) -> Interval | None:
    """The interval that the gate decided by, among the last rung's checks, when one speaks of this very change."""
    for check in checks:
        sign = 1 if rising or check.rule == "min_gain" else -1
        asked = check.rule in LOSSES or check.rule == "min_gain"
        if asked and check.interval and math.isclose(sign * check.value, value, abs_tol=1e-9):
            low, high = sorted(sign * end for end in check.interval)
            return low, high
    return None


def _found(both: Pair, rising: bool) -> Interval:
    """The interval that the gate would find."""
    low, high = change(both).interval
    return (rise(low), rise(high)) if rising else (-high, -low)
