"""Merged models that are a scaled sum of the task vectors: the average and task arithmetic.

>>> import torch
>>> from merging.method import Stats
>>> rule = average()
>>> state = rule.init(torch.zeros(2))
>>> for delta in (torch.tensor([1.0, 0.0]), torch.tensor([3.0, 2.0])):
...     state = rule.fold(state, delta, Role())
>>> rule.read(state, Stats(count=2.0))
tensor([2., 1.])
"""

from collections.abc import Callable

from torch import Tensor

from merging.method import Method, Role, State, Stats, positive, zero_total


def average() -> Method:
    """The running mean of the experts, total / count; independent of their order.

    One expert alone gives that expert. Before the first expert the mean is defined as zero.
    Source: stochastic weight averaging, arXiv 1803.05407, and model soups, arXiv 2203.05482.
    """
    return scaled_sum(lambda stats: 1.0 / stats.count if stats.count else 0.0)


def task_arithmetic(scale: float = 0.3) -> Method:  # share of each task vector that is added, > 0
    """The base plus `scale` times the sum of all task vectors, scale * total; independent of the experts' order.

    Published scales are 0.3 for 8 tasks and 0.1 for 14 and more.
    Source: Editing Models with Task Arithmetic, arXiv 2212.04089.

    Raises:
        MergeError: scale is not a finite number above 0.
    """
    scale = positive("task_arithmetic: scale", scale)
    return scaled_sum(lambda stats: scale)


def scaled_sum(scale: Callable[[Stats], float]) -> Method:
    """The method that adds `scale(stats)` times the sum of all task vectors."""
    return Method(
        zero_total,
        _add,
        lambda state, stats: state["total"] * scale(stats),
        entrywise=True,
        additive=True,
        one_pass=True,
    )


def _add(state: State, delta: Tensor, role: Role) -> State:
    return {"total": state["total"] + delta}
