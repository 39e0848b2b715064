"""What single answers add up to. A measure holds both; in place of one stands the reason why there is none."""

import math
from collections.abc import Sequence
from typing import NamedTuple

NOT_FINITE = "the model's outputs are not finite"
LARGEST = 700.0  # nats a token whose exponential is still a float


class Measure(NamedTuple):
    """The fields of a TaskScore that a model's answers fill."""

    value: float
    predictions: tuple[int, ...] = ()
    correct: tuple[bool, ...] = ()
    points: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> Measure:
    """The share of predictions that are right, in [0, 1]."""
    correct = tuple(guess == label for guess, label in zip(predictions, labels, strict=True))
    return Measure(sum(correct) / len(correct), tuple(predictions), correct)


def perplexity(likelihoods: Sequence[float], tokens: Sequence[int]) -> Measure | str:
    """exp of the mean negative log-likelihood a token, from 1; `likelihoods` are nats, one sum an example.

    Points are the mean log-likelihood a token of each example, at most 0; weights its predicted tokens.
    """
    # A probability of 1 can come out a rounding above it.
    points = [min(total / count, 0.0) for total, count in zip(likelihoods, tokens, strict=True)]
    mean = -math.fsum(point * count for point, count in zip(points, tokens, strict=True)) / sum(tokens)
    if not mean <= LARGEST:
        return NOT_FINITE
    return Measure(math.exp(mean), points=tuple(points), weights=tuple(map(float, tokens)))


def mean_score(points: Sequence[float], whose: str) -> Measure | str:
    """The mean of numbers in [0, 1]; `whose` names their source in the reason why they are none."""
    for example, point in enumerate(points):
        if not 0.0 <= point <= 1.0:
            return f"{whose} gave {point} for example {example}, not a number from 0 to 1"
    if not points:
        return f"{whose} gave no number"
    return Measure(math.fsum(points) / len(points), points=tuple(points))
