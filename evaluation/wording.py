"""Numbers as people read them: shares as per cent, changes in points with their sign, times in seconds or minutes."""

import math

from evaluation.escape import clean
from registry.verdicts import Check, Outcome, TaskScore, Verdict

Interval = tuple[float, float]
MINUS = "\N{MINUS SIGN}"
UNKNOWN = "n/a"
RUNGS = {"free": "free rung", "canary": "canary", "full": "full rung"}


def number(value: float) -> str:
    """Three decimals below 1000, none above; "n/a" when it is not finite.

    >>> number(-0.05), number(12_345.6)
    ('−0.050', '12346')
    """
    if not math.isfinite(value):
        return UNKNOWN
    return f"{value:.3f}".replace("-", MINUS) if abs(value) < 1000 else f"{value:.0f}".replace("-", MINUS)


def percent(share: float) -> str:
    """A share in [0, 1] as per cent without the sign: 0.825 is '82.5'."""
    return f"{100 * share:.1f}".replace("-", MINUS) if math.isfinite(share) else UNKNOWN


def signed(change: float) -> str:
    """A change of a share in points, or of a perplexity in per cent: '+3.1', '−12.0', '0.0'.

    >>> signed(-0.12), signed(0.0004)
    ('−12.0', '0.0')
    """
    if not math.isfinite(change):
        return UNKNOWN
    text = f"{100 * change:+.1f}".replace("-", MINUS)
    return "0.0" if text[1:] == "0.0" else text


def between(interval: Interval | None) -> str:
    """A change's interval; '' when there is none."""
    return f"{signed(interval[0])} to {signed(interval[1])}" if interval else ""


def measured(score: TaskScore | None) -> str:
    """A score in its own unit: per cent, or perplexity as it is."""
    if score is None or score.error or not math.isfinite(score.value):
        return UNKNOWN
    return f"{score.value:.2f}" if score.metric == "perplexity" else percent(score.value)


def duration(seconds: float) -> str:
    """What something took.

    >>> duration(0.04), duration(12.34), duration(200)
    ('0.04 s', '12.3 s', '3 min 20 s')
    """
    if not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def decided(verdict: Verdict | None) -> str:
    """The verdict in words: 'Rejected at the canary'."""
    if verdict is None:
        return "Not judged by the gate"
    told = {Outcome.PASSED: "Passed", Outcome.REJECTED: "Rejected", Outcome.WAITING: "Needs approval"}
    word = told.get(verdict.outcome, clean(str(verdict.outcome), 40))
    place = RUNGS.get(verdict.rung, clean(verdict.rung, 40))
    return f"{word} at the {place}" if place and verdict.outcome is not Outcome.PASSED else word


def answer(check: Check) -> str:
    """A rule's answer in one word or two."""
    if check.passed:
        return "✓ passed"
    return "✕ failed, hard" if check.hard else "✕ failed"
