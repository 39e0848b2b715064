"""Two models on the same examples: how far apart they are, how sure that is, and whether chance explains it.

Everything here is a function of the two lists of answers, and monotone: an answer of the second model that improves
never makes it look worse.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from evaluation.metrics import sign_test
from registry.records import TaskScore

DRAWS = 10_000  # of the bootstrap; p values go down to 1 / (DRAWS + 1)
AT_ONCE = 1 << 20  # entries drawn together
NORMAL = 1.959964  # quantile of 95 %, two-sided

Pair = tuple[TaskScore, TaskScore]  # (before, after), both usable and on the same examples


class Change(NamedTuple):
    """How the second model differs from the first."""

    loss: float  # first - second: in the metric, or for perplexity the rise as a share of the first's
    interval: tuple[float, float]  # of the loss, at 95 % confidence
    p: float  # one-sided: how likely such a loss is when both are equally good
    least: float  # the smallest p that these examples could give
    losses: int  # examples that got worse
    wins: int  # examples that got better


def change(both: Pair) -> Change:
    """What turned worse from the first score to the second: McNemar's exact test for accuracy, else a paired bootstrap.

    The interval of an accuracy is Agresti and Min's (Statistics in Medicine 24, 2005); all others are percentiles of
    the bootstrap (Efron 1979) with a fixed seed.
    """
    before, after = both
    losses, wins = turned(both)
    if before.metric == "accuracy":
        p, interval = sign_test(losses, wins), _adjusted(losses, wins, before.examples)
        return Change(before.value - after.value, interval, p, 0.5**before.examples, losses, wins)
    mean, draws = _resampled(both)
    p = (1 + int((draws <= 0).sum())) / (DRAWS + 1) if losses else 1.0
    low, high = np.quantile(draws, (0.025, 0.975)).tolist()
    scale = math.expm1 if before.metric == "perplexity" else float
    return Change(scale(mean), (scale(low), scale(high)), p, max(1 / (DRAWS + 1), 0.5**before.examples), losses, wins)


def turned(both: Pair) -> tuple[int, int]:
    """How many examples got worse and how many better, by whatever the metric gives each."""
    first, second = (score.points or score.correct for score in both)
    pairs = list(zip(first, second, strict=True))
    return sum(one > other for one, other in pairs), sum(one < other for one, other in pairs)


def gained(both: Pair) -> float:
    """How much better the second is: in the metric, or for perplexity the fall of its logarithm, in nats a token."""
    before, after = both
    if before.metric == "perplexity":
        return math.log(before.value) - math.log(after.value)
    return after.value - before.value


def _adjusted(losses: int, wins: int, count: int) -> tuple[float, float]:
    """The interval of (losses - wins) / count, with half an example added to each of the four cells."""
    difference, size = losses - wins, count + 2
    edge = NORMAL * math.sqrt(losses + wins + 1 - difference**2 / size) / size
    return max(-1.0, difference / size - edge), min(1.0, difference / size + edge)


def _resampled(both: Pair) -> tuple[float, "np.ndarray[Any, np.dtype[np.float64]]"]:
    """The weighted mean of first - second over the examples, and the same of each bootstrap sample, (DRAWS,)."""
    before, after = both
    loss = np.subtract(before.points, after.points)
    weights = np.asarray(before.weights or np.ones(len(loss)))
    random, size, draws = np.random.default_rng(len(loss)), len(loss), []
    for start in range(0, DRAWS, max(1, AT_ONCE // size)):
        rows = min(max(1, AT_ONCE // size), DRAWS - start)
        places = random.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
        counts = np.bincount(places.ravel(), minlength=rows * size).reshape(rows, size)
        draws.append((counts @ (weights * loss)) / (counts @ weights))
    return float(weights @ loss / weights.sum()), np.concatenate(draws)
