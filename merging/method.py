"""What a merge method is: three pure functions over explicit state, and the numbers they share.

>>> Stats(count=2.0, norm_sum=10.0, total_norm=4.0).norm_sum
10.0
>>> Role().projected
False
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
"""The float32 slots of one parameter, each with the parameter's shape; every method keeps the slot "total"."""


class MergeError(ValueError):
    """What cannot be merged, where, what was expected and found, and what to do."""


class Role(NamedTuple):
    """How one tensor takes part in a fold."""

    projected: bool = False  # matrices that the method may project; all other tensors are folded entry by entry
    noise: float = 0.0  # spectral norm of the storage rounding inside the total, same unit as its singular values, >= 0
    stacked: bool = False  # one matrix per index of the first axis; else one matrix, (first axis, all others)


class Stats(NamedTuple):
    """What the experts folded so far add up to, over the whole model. All three are finite and >= 0."""

    count: float = 0.0  # type: ignore[assignment]  # experts folded; hides tuple.count
    norm_sum: float = 0.0  # sum over the experts of the Frobenius norm of expert - base
    total_norm: float = 0.0  # Frobenius norm of the slot "total" over all tensors


class Method(NamedTuple):
    """One merge rule for one parameter. Arguments are never changed.

    A tensor that is not projected is folded entry by entry, so that a large one may be given piece by piece.
    """

    init: Callable[[Tensor], State]  # base, any shape -> the state before the first expert, all zeros
    fold: Callable[[State, Tensor, Role], State]  # state, expert - base in float32, role -> next state
    read: Callable[[State, Stats], Tensor]  # state, stats after the fold -> what to add to the base, float32
    entrywise: bool = False  # `read` too works entry by entry
    # The only slot is "total", and `fold` adds delta to it, for projected matrices less a part that turns with the
    # basis: fold(U A V, U D V) == U fold(A, D) V for orthonormal U and V. So low ranks can be folded by their factors.
    additive: bool = False
    # Every tensor is folded entry by entry, whatever its role, and `read` looks at no statistic but the count, so that
    # state and serving weights can be made in one pass.
    one_pass: bool = False


def zero_total(base: Tensor) -> State:
    """The state of a method that remembers one tensor: {"total": zeros}, float32, shape and device of base."""
    return {"total": torch.zeros(base.shape, dtype=torch.float32, device=base.device)}


def positive(name: str, value: float) -> float:
    """`value`, if it is a finite number above 0.

    Raises:
        MergeError: it is not.
    """
    if not (math.isfinite(value) and value > 0):
        raise MergeError(f"{name} is {value}, expected a finite number above 0; a usual value is between 0.1 and 2")
    return float(value)
