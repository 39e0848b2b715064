"""Two models on the same examples: how far apart they are, how sure that is, and whether chance explains it.

Everything here is a function of the two lists of answers, and monotone: an answer of the second model that improves
never makes it look worse.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics import sign_test
from registry.verdicts import TaskScore

DRAWS = 10_000  # of the bootstrap and of random halves; p values go down to 1 / (DRAWS + 1)
EPSILON = 1e-12  # sums of differences that should be 0 are not, in binary
AT_ONCE = 1 << 20  # entries drawn together
NORMAL = 1.959964  # quantile of 95 %, two-sided

Pair = tuple[TaskScore, TaskScore]  # (before, after), both usable and on the same examples
Floats = NDArray[np.float64]


class Change(NamedTuple):
    """How the second model differs from the first. Losses are in the metric, or for perplexity in nats a token."""

    loss: float  # first - second; of perplexities the rise of the logarithm
    interval: tuple[float, float]  # of the loss, at 95 % confidence
    p: float  # one-sided: how likely such a loss is when both are equally good
    least: float  # the smallest p that these examples could give
    losses: int  # examples that got worse
    wins: int  # examples that got better


@lru_cache(maxsize=256)  # the mean over the tasks and the report ask for the same again
def change(both: Pair) -> Change:
    """What turned worse from the first score to the second, and whether chance explains it.

    The test is `by_chance`. The interval of an accuracy is Agresti
    and Min's (Statistics in Medicine 24, 2005); all others are percentiles of the paired bootstrap (Efron 1979).
    """
    before, after = both
    losses, wins = turned(both)
    p, least = by_chance([both]), 0.5**before.examples
    if before.metric == "accuracy":
        interval = _adjusted(losses, wins, before.examples)
        return Change(before.value - after.value, interval, p, least, losses, wins)
    mean, interval = _resampled(both)
    return Change(mean, interval, max(p, least), max(least, 1 / (DRAWS + 1)), losses, wins)


def by_chance(pairs: Sequence[Pair]) -> float:
    """The one-sided p value of "the mean over these tasks fell", each task counting the same.

    A sign-flip test (Fisher 1935): were both models equally good, each example's difference could as well have had the
    other sign. The p value is how often the differences of a random half of the examples add up to no loss; flipping
    that half then gives a loss at least as large. Monotone in every answer, and exact but for the DRAWS (fixed seed);
    of one accuracy it is McNemar's exact test, which needs none.
    """
    if len(pairs) == 1 and pairs[0][0].metric == "accuracy":
        return sign_test(*turned(pairs[0]))
    loss = np.concatenate([_shares(both) for both in pairs])
    loss = loss[loss != 0]
    if not (loss > 0).any():
        return 1.0
    random, hits = np.random.default_rng(len(loss)), 0
    step = max(1, AT_ONCE // len(loss))
    for start in range(0, DRAWS, step):
        halves = random.random((min(step, DRAWS - start), len(loss)), dtype=np.float32) < 0.5
        hits += int((halves @ loss <= EPSILON).sum())
    return (1 + hits) / (DRAWS + 1)


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


def rise(nats: float) -> float:
    """A rise of a perplexity's logarithm as a share of the perplexity; beyond any float it is the largest."""
    return math.expm1(min(nats, 700.0))


def _adjusted(losses: int, wins: int, count: int) -> tuple[float, float]:
    """The interval of (losses - wins) / count, with half an example added to each of the four cells."""
    difference, size = losses - wins, count + 2
    edge = NORMAL * math.sqrt(losses + wins + 1 - difference**2 / size) / size
    return max(-1.0, difference / size - edge), min(1.0, difference / size + edge)


def _shares(both: Pair) -> Floats:
    """What each example adds to the loss of its task, (examples,)."""
    first, second = (np.asarray(score.points or score.correct, dtype=np.float64) for score in both)
    weights = np.asarray(both[0].weights or np.ones(len(first)))
    found: Floats = weights * (first - second) / weights.sum()
    return found


def _resampled(both: Pair) -> tuple[float, tuple[float, float]]:
    """The loss, and the interval of what the bootstrap's samples give in its place."""
    loss, weights = _shares(both), np.asarray(both[0].weights or np.ones(both[0].examples))
    share, size = weights / weights.sum(), len(loss)
    random, draws, step = np.random.default_rng(size), [], max(1, AT_ONCE // size)
    for start in range(0, DRAWS, step):
        rows = min(step, DRAWS - start)
        places = random.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
        counts = np.bincount(places.ravel(), minlength=rows * size).reshape(rows, size)
        draws.append((counts @ loss) / (counts @ share))
    low, high = np.quantile(np.concatenate(draws), (0.025, 0.975)).tolist()
    return float(loss.sum()), (low, high)
