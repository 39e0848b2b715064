"""Whether two scores may be compared: both measured, by the same suite, on the same rows, and true to their answers."""

import math

from evaluation.escape import clean
from evaluation.paired import Pair
from registry.verdicts import TaskScore


def pair(
    before: TaskScore | None,
    after: TaskScore | None,
    who: tuple[str, str],  # names the two: ("champion", "candidate")
    task: str,
    split: str = "gate",  # gate or canary: the rows that both must have been measured on
) -> Pair | str:
    """The two scores when they can be compared example by example, else why not, as a clause."""
    alone = problem_with(before, who[0], task, split) or problem_with(after, who[1], task, split)
    if alone or before is None or after is None:
        return alone
    if not before.suite_sha256 or before.suite_sha256 != after.suite_sha256:
        found = f"{before.suite_sha256[:12] or 'none'} and {after.suite_sha256[:12] or 'none'}"
        return f"the {who[0]} and the {who[1]} were measured on different suites ({found})"
    if before.metric != after.metric:
        return f"the {who[0]} and the {who[1]} were measured by different metrics"
    if before.examples != after.examples:
        return f"the {who[0]} answered {before.examples} examples and the {who[1]} {after.examples}"
    if before.weights != after.weights:
        return f"the examples count otherwise for the {who[0]} than for the {who[1]}"
    return before, after


def problem_with(score: TaskScore | None, who: str, task: str, split: str = "gate") -> str:
    """Why a score cannot be used, as a clause; '' when it can."""
    if score is None:
        return f"the {who} was not scored"
    if score.error:
        return f"the {who} could not be measured: {clean(score.error, 300)}"
    if score.task != task:
        return f"the {who}'s score belongs to task {clean(score.task, 60) or '(no name)'}"
    if score.split != split:
        return f"the {who} was measured on the rows {clean(score.split, 20)!r}, not on {split!r}"
    if score.metric not in METRICS:
        return f"the {who}'s metric {clean(score.metric, 40)!r} is unknown"
    try:
        return METRICS[score.metric](score, who)
    except OverflowError:
        return f"the {who}'s answers are beyond any number"


def _accuracy(score: TaskScore, who: str) -> str:
    if not _within(score.value, 0.0, 1.0):
        return f"the {who}'s accuracy is {score.value}, not a number from 0 to 1"
    labels = len(score.predictions) or len(score.correct)  # some metrics say what is right and not what was answered
    if not score.correct or len(score.correct) != labels or score.points or score.weights:
        return f"the {who}'s answers are missing"
    return _contradiction(score.value, sum(score.correct) / len(score.correct), who)


def _score(score: TaskScore, who: str) -> str:
    if not _within(score.value, 0.0, 1.0) or not all(_within(point, 0.0, 1.0) for point in score.points):
        return f"the {who}'s score is {score.value}, or one of its examples' is, not a number from 0 to 1"
    if not score.points or score.weights:
        return f"the {who}'s answers are missing"
    return _contradiction(score.value, math.fsum(score.points) / len(score.points), who)


def _perplexity(score: TaskScore, who: str) -> str:
    if not _within(score.value, 1.0, math.inf) or not all(_within(point, -math.inf, 0.0) for point in score.points):
        return f"the {who}'s perplexity is {score.value}, or one of its examples' is, not a finite number from 1"
    if not score.points or len(score.weights) != len(score.points) or not all(w > 0 for w in score.weights):
        return f"the {who}'s answers are missing"
    whole = math.fsum(w * point for w, point in zip(score.weights, score.points, strict=True))
    return _contradiction(math.log(score.value), -whole / math.fsum(score.weights), who)


METRICS = {"accuracy": _accuracy, "score": _score, "perplexity": _perplexity}


def _within(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and least <= value <= most


def _contradiction(told: float, found: float, who: str) -> str:
    return "" if abs(told - found) <= 1e-6 else f"the {who}'s value {told:.3f} contradicts its answers ({found:.3f})"
