"""What is measured and what the gate says of it: the values that evaluation, ledger and flows share.

Standard library only, so that importing them costs nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True)
class TaskScore:
    """One model measured on one task's suite."""

    task: str
    suite_sha256: str
    metric: str  # "accuracy", "score" or "perplexity"
    value: float  # accuracy and score in [0, 1], more is better; perplexity from 1, less is better; NaN: not measured
    predictions: tuple[int, ...] = ()  # per example, the index of the predicted label; () where the metric has none
    correct: tuple[bool, ...] = ()  # per example; accuracy only
    error: str = ""  # why it could not be measured
    split: str = "gate"  # the rows it was measured on: gate, canary (a fixed sample of them) or tune
    points: tuple[float, ...] = ()  # per example, more is better: its score, or its log-likelihood in nats a token
    weights: tuple[float, ...] = ()  # per example, what it counts: its tokens for perplexity; () for one each
    safety: bool = False  # the task may not get worse at all
    seconds: float = field(default=0.0, compare=False)  # what measuring took

    @property
    def examples(self) -> int:
        """How many examples were scored."""
        return len(self.points or self.correct)


@dataclass(frozen=True)
class Report:
    """One model measured on every task its line knows."""

    weights_sha256: str
    scores: Mapping[str, TaskScore]  # task -> score
    new_task: str = ""  # the task of the expert that was just folded; "" for the base
    expert: TaskScore | None = None  # that expert alone on its own task
    base: TaskScore | None = None  # the base on that task
    best: Mapping[str, float] = field(default_factory=dict)  # task -> the best accuracy or score of any version so far


@dataclass(frozen=True)
class Check:
    """One gate rule's answer."""

    rule: str  # the name of the field of Rules it comes from
    task: str  # "" for rules over all tasks
    value: float
    threshold: float
    passed: bool
    text: str  # one sentence with the numbers, for people
    rung: str = "full"  # when it was asked: free, canary or full
    interval: tuple[float, float] | None = None  # of the value, at 95 % confidence; None where it is no estimate
    hard: bool = False  # failed, it cannot be waved through: a safety suite, or what could not be decided


class Outcome(StrEnum):
    """The gate's answers."""

    PASSED = "passed"
    REJECTED = "rejected"
    WAITING = "needs-approval"  # a person decides


@dataclass(frozen=True)
class Verdict:
    """The gate's answer with all its reasons."""

    outcome: Outcome
    checks: tuple[Check, ...] = ()
    weights_sha256: str = ""  # of the candidate that was judged; "" for a base, which nobody judged

    @property
    def passed(self) -> bool:
        """Whether the candidate may become champion."""
        return self.outcome is Outcome.PASSED

    @property
    def reason(self) -> str:
        """The failed checks in one line; '' when there are none."""
        return "; ".join(check.text for check in self.checks if not check.passed)

    @property
    def rung(self) -> str:
        """The dearest rung that was asked: free, canary or full; "" for a base, which nobody judged."""
        return self.checks[-1].rung if self.checks else ""


@dataclass(frozen=True)
class Try:
    """One way to fold an expert that the search measured, on the rows kept for tuning."""

    name: str  # "strength 0.7", "as configured"
    method: str
    parameters: Mapping[str, Any]  # of the method
    weight: float  # of the expert's change
    old: float  # mean over the tasks known before, in [0, 1]; NaN where it could not be measured
    new: float  # the new task, in [0, 1]
    passed: bool  # by the gate's rules, on these rows
    reason: str = ""  # why not
    chosen: bool = False
    best: bool = False  # on the Pareto front: no other try is better on one side and as good on the other


@dataclass(frozen=True)
class Flip:
    """One example whose answer turned from champion to candidate."""

    task: str
    example: str  # the text, or "example 17"
    wanted: str  # the right label
    before: str  # the champion's answer
    after: str  # the candidate's
