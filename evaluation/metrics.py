"""What a history of accuracies says: how good the running model is, what it forgot, which answers it flipped.

A matrix holds one row per fold: row t maps each task to its accuracy after t + 1 experts. `arrivals` maps
each task to the row in which it was folded (0 for the first expert). Accuracies are shares in [0, 1].
"""

import math
from collections.abc import Mapping, Sequence

from registry.records import FoldinError, Refusal
from registry.verdicts import TaskScore

Matrix = Sequence[Mapping[str, float]]


def average_accuracy(matrix: Matrix, arrivals: Mapping[str, int]) -> float:
    """ACC = (1/T) Σ_i a_i(T), in [0, 1]: the mean of the last row over the T arrived tasks.

    >>> average_accuracy([{"a": 0.9}, {"a": 0.7, "b": 0.8}], {"a": 0, "b": 1})
    0.75
    """
    return _mean([_at(matrix, -1, task) for task in arrivals])


def backward_transfer(matrix: Matrix, arrivals: Mapping[str, int]) -> float:
    """BWT = (1/(T−1)) Σ_{i<T} [a_i(T) − a_i(i)], in [−1, 1]; 0 while there is one task.

    The mean runs over the tasks that arrived before the last row (the definition of MINGLE, arXiv 2505.11883).
    """
    return _mean([_change(matrix, arrivals, task) for task in _earlier(matrix, arrivals)])


def backward_transfer_all(matrix: Matrix, arrivals: Mapping[str, int]) -> float:
    """BWT' = (1/T) Σ_{i≤T} [a_i(T) − a_i(i)], in [−1, 1]: the last task's zero counts (FusionBench's denominator)."""
    return _mean([_change(matrix, arrivals, task) for task in arrivals])


def forgetting(matrix: Matrix, arrivals: Mapping[str, int]) -> float:
    """(1/(T−1)) Σ_{i<T} [max_{i≤t<T} a_i(t) − a_i(T)], in [−1, 1]: the fall from each earlier task's best row.

    Rows before a task's arrival do not count, since what was not learnt cannot be forgotten. 0 while there is one task.
    """
    return _mean([_fall(matrix, arrivals[task], task) for task in _earlier(matrix, arrivals)])


def summary(matrix: Matrix, arrivals: Mapping[str, int]) -> dict[str, float]:
    """The four metrics of this module under their names, ready to be logged."""
    metrics = (average_accuracy, backward_transfer, backward_transfer_all, forgetting)
    return {metric.__name__: metric(matrix, arrivals) for metric in metrics}


def negative_flip_rate(before: TaskScore, after: TaskScore) -> float:
    """NFR in [0, 1]: the share of examples that `before` got right and `after` gets wrong (MUSCLE, arXiv 2407.09435).

    Raises FoldinError when the two were not measured on the same examples.
    """
    return flips(before, after)[0] / before.examples


def sign_test(losses: int, wins: int) -> float:
    """P(X ≥ losses) for X ~ Binomial(losses + wins, ½): how likely so many losses are when both sides are equally good.

    One-sided and exact (McNemar 1947, with the binomial in place of χ²); 1.0 when nothing flipped.

    >>> sign_test(5, 0)
    0.03125
    """
    return at_least(losses, losses + wins, 0.5)


def at_least(count: int, of: int, share: float) -> float:
    """P(X ≥ count) for X ~ Binomial(of, share)."""
    from scipy.special import bdtrc  # lazily: half a second, and most commands judge nothing

    return float(bdtrc(count - 1, of, share))


def flips(before: TaskScore, after: TaskScore) -> tuple[int, int]:
    """How many examples went from right to wrong, and from wrong to right.

    Raises FoldinError (E_SUITE) when the two scores come from different suites, E_GATE when examples are missing.
    """
    if before.suite_sha256 != after.suite_sha256:
        raise _incomparable(
            "E_SUITE",
            before,
            "the two scores come from different suites",
            f"suite {before.suite_sha256[:12]}",
            f"{after.suite_sha256[:12]}",
        )
    if len(before.correct) != len(after.correct) or not before.correct:
        raise _incomparable(
            "E_GATE",
            before,
            "the two scores do not hold the same examples",
            f"{len(before.correct)} answers, at least one",
            str(len(after.correct)),
        )
    pairs = list(zip(before.correct, after.correct, strict=True))
    return pairs.count((True, False)), pairs.count((False, True))


def _incomparable(code: str, before: TaskScore, what: str, expected: str, found: str) -> FoldinError:
    remedy = "measure both models on the same suite"
    return FoldinError(Refusal(code, what, f"task {before.task}", expected=expected, found=found, remedy=remedy))


def _earlier(matrix: Matrix, arrivals: Mapping[str, int]) -> list[str]:
    return [task for task, row in arrivals.items() if row < len(matrix) - 1]


def _change(matrix: Matrix, arrivals: Mapping[str, int], task: str) -> float:
    return _at(matrix, -1, task) - _at(matrix, arrivals[task], task)


def _fall(matrix: Matrix, arrival: int, task: str) -> float:
    best = max(_at(matrix, row, task) for row in range(arrival, len(matrix) - 1))
    return best - _at(matrix, -1, task)


def _at(matrix: Matrix, row: int, task: str) -> float:
    try:
        return matrix[row][task]
    except (IndexError, KeyError):
        what = "the accuracy matrix has no value where one is needed"
        place = f"row {row if row >= 0 else len(matrix) + row} of {len(matrix)}"
        raise FoldinError(
            Refusal("E_GATE", what, f"task {task}", expected=place, remedy="score every arrived task in every row")
        ) from None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
