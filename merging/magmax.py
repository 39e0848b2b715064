"""The entry-wise strongest change of any expert.

>>> from merging.method import Stats
>>> rule = magmax(scale=0.5)
>>> state = rule.init(torch.zeros(2))
>>> for delta in (torch.tensor([1.0, -4.0]), torch.tensor([-2.0, 3.0])):
...     state = rule.fold(state, delta, Role())
>>> rule.read(state, Stats(count=2.0))
tensor([-1., -2.])
"""

import torch
from torch import Tensor

from merging.method import Method, Role, State, positive, zero_total


def magmax(scale: float = 0.5) -> Method:  # share of the strongest change that is added, > 0
    """The base plus `scale` times, per entry, the task vector's entry of largest absolute value so far.

    The slot "total" keeps that entry unscaled, so that it can be compared with the next expert's. On a tie the later
    expert wins; apart from ties the order does not matter.
    Source: MagMax, arXiv 2407.06322; 0.5 is the published scale.

    Raises:
        MergeError: scale is not a finite number above 0.
    """
    scale = positive("magmax: scale", scale)
    return Method(zero_total, _keep_larger, lambda state, stats: state["total"] * scale, entrywise=True, one_pass=True)


def _keep_larger(state: State, delta: Tensor, role: Role) -> State:
    total = state["total"]
    return {"total": torch.where(delta.abs() >= total.abs(), delta, total)}
