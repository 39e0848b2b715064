"""Which of several ways to fold an expert is best: old tasks against the new one. Pure."""

import math
from collections.abc import Sequence
from dataclasses import replace

from registry.verdicts import Report, Try


def means(report: Report) -> tuple[float, float, float]:
    """(mean over the known tasks, the new task, mean over all), in [0, 1]; NaN where there is none.

    A perplexity counts as its inverse, the (geometric) mean probability of a token.
    """
    shares = {
        task: 1 / each.value if each.metric == "perplexity" else each.value for task, each in report.scores.items()
    }
    old = [value for task, value in shares.items() if task != report.new_task]
    return _mean(old), shares.get(report.new_task, math.nan), _mean(list(shares.values()))


def marked(tries: Sequence[Try], chosen: str = "") -> tuple[Try, ...]:
    """The tries with the Pareto front marked, and the one called `chosen`.

    >>> [each.best for each in marked([Try("a", "opcm", {}, 1, .5, .9, True), Try("b", "opcm", {}, 1, .4, .9, True)])]
    [True, False]
    """
    return tuple(replace(each, best=_is_best(each, tries), chosen=each.name == chosen) for each in tries)


def _is_best(one: Try, tries: Sequence[Try]) -> bool:
    if math.isnan(one.old) and math.isnan(one.new):
        return False
    return not any(_beats(other, one) for other in tries)


def _beats(one: Try, other: Try) -> bool:
    """Whether a try is as good on both sides and better on one; a side that neither knows is a draw."""
    sides = [(_known(one.old), _known(other.old)), (_known(one.new), _known(other.new))]
    return all(left >= right for left, right in sides) and any(left > right for left, right in sides)


def _known(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
