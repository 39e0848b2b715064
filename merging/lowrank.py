"""Matrices of low rank folded by their factors: an adapter costs what its rank costs, not what its matrix does.

total = Q core(total) P.T and delta = Q core(delta) P.T with orthonormal Q and P that span the columns and the rows of
both. A method that commutes with such changes of basis (`Method.additive`) gives the same result on the small cores.

>>> from merging.arithmetic import average
>>> column = torch.tensor([[1.0], [0.0], [0.0]])
>>> total, found = fold_factors(average(), None, Factors(column, 3 * column), Role())
>>> found.delta_norm, float(dense(total)[0, 0])
(3.0, 3.0)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from merging.fold import check_norms
from merging.measure import Measure, measure
from merging.method import Method, Role, State


class Factors(NamedTuple):
    """The matrix left @ right.T."""

    left: Tensor  # (out, rank), float32
    right: Tensor  # (in, rank), float32


def dense(factors: Factors) -> Tensor:  # -> (out, in), float32
    """The matrix itself."""
    return factors.left @ factors.right.mT


def dense_state(state: State | Factors | None) -> State | None:
    """A state with its total as a matrix, in whichever of the two forms it is kept."""
    return {"total": dense(state)} if isinstance(state, Factors) else state


def fits(rank: int, shape: tuple[int, ...]) -> bool:
    """Whether a total of this rank is worth keeping as factors; above half the short side it is kept as a matrix."""
    return 2 * rank <= min(shape)


def fold_factors(
    method: Method,  # additive
    total: Factors | None,  # None: no expert has moved this tensor yet
    delta: Factors,  # of expert - base
    role: Role,
) -> tuple[Factors, Measure]:
    """The total after this expert, of the sum of both ranks, and what the fold did; computed in float64.

    Raises:
        MergeError: the result is not finite.
    """
    earlier = Factors(*(side[:, :0] for side in delta)) if total is None else total
    left, columns = _joined(earlier.left, delta.left)
    right, rows = _joined(earlier.right, delta.right)
    rank = earlier.left.shape[1]
    before = {"total": columns[:, :rank] @ rows[:, :rank].mT}
    update = columns[:, rank:] @ rows[:, rank:].mT
    after = method.fold(before, update, role)
    found = measure(before, update, after)
    check_norms(found)
    return Factors((left @ after["total"].double()).float(), right.float()), found


def _joined(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:  # (n, r), (n, s) -> (n, k), (k, r + s); float64
    """An orthonormal basis of the columns of both, and both in it."""
    basis, parts = torch.linalg.qr(torch.cat([first, second], dim=1).double())
    return basis, parts
