"""Orthogonal-projection continual merging: each expert enters without what would overwrite the total.

>>> import torch
>>> rule = opcm(energy=0.5)
>>> state = rule.fold(rule.init(torch.zeros(2, 2)), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), Role(projected=True))
>>> state = rule.fold(state, torch.tensor([[5.0, 1.0], [1.0, 5.0]]), Role(projected=True))
>>> state["total"]  # the diagonal, which is along the total, was removed
tensor([[2., 1.],
        [1., 1.]])
"""

from collections.abc import Callable

from torch import Tensor

from merging.method import MergeError, Method, Role, State, Stats, positive, zero_total
from merging.spectrum import Spectrum, split_rank, triplets


def opcm(
    energy: float = 0.5,  # share of the sum of the total's singular values that is protected, in [0, 1)
    strength: float = 1.0,  # 1 is the published rule: the merged model lies at the experts' mean distance; > 0
    variant: str = "fusionbench",
) -> Method:
    """The running sum of projected task vectors, read at `strength` times the experts' mean norm.

    fold: total + project(total, delta) for projected matrices, total + delta for all other tensors.
    read: total * strength * norm_sum / (count * total_norm), and zeros where total_norm is 0.
    This needs no memory of the published factor lambda = total_norm * count / norm_sum. Variants, named for where each
    is found: "fusionbench" (the maintained code, <total, project(total, delta)> = 0), "released" (the authors' first
    release, which keeps the diagonal) and "paper" (the two-sided formula).
    Source: Merging Models on the Fly Without Retraining, arXiv 2501.09522, and its public implementations.

    Raises:
        MergeError: a parameter is out of its range.
    """
    if not 0 <= energy < 1:
        raise MergeError(f"opcm: energy is {energy}, expected 0 <= energy < 1; 0.4 to 0.6 is usual")
    if variant not in VARIANTS:
        raise MergeError(f"opcm: variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
    strength = positive("opcm: strength", strength)

    def fold(state: State, delta: Tensor, role: Role) -> State:
        total = state["total"]
        kept = project(total, delta, energy, role.noise, variant) if role.projected else delta
        return {"total": (total + kept).float()}

    def read(state: State, stats: Stats) -> Tensor:
        return state["total"] * (strength * _mean_norm(stats) / stats.total_norm if stats.total_norm else 0.0)

    return Method(zero_total, fold, read)


def project(
    total: Tensor,  # (out, in), any float dtype, finite
    delta: Tensor,  # (out, in)
    energy: float,  # in [0, 1)
    noise: float = 0.0,  # singular values of total up to here are storage rounding, >= 0
    variant: str = "fusionbench",
) -> Tensor:
    """What is left of delta when its part along the total is removed, (out, in); float64 where anything was removed.

    With left, sigma, right the triplets of the total above the noise, and r the split rank at `energy`, the entries
    (i, j) of left.T @ delta @ right that a variant removes are listed in VARIANTS. Numerically null directions of the
    total are arbitrary, so they are left alone: a zero total removes nothing.
    """
    if not (total.any() and delta.any()):
        return delta
    spectrum = triplets(total, noise)
    wide = delta.double()
    return wide - VARIANTS[variant](wide, spectrum, split_rank(spectrum.sigma, energy))


def _block(delta: Tensor, spectrum: Spectrum, rank: int) -> Tensor:
    left, right = spectrum.left[:, :rank], spectrum.right[:, :rank]
    return left @ (left.mT @ delta @ right) @ right.mT


def _diagonal(delta: Tensor, spectrum: Spectrum, rank: int) -> Tensor:
    left, right = spectrum.left[:, rank:], spectrum.right[:, rank:]
    return (left * (left * (delta @ right)).sum(0)) @ right.mT


def _cross(delta: Tensor, spectrum: Spectrum, rank: int) -> Tensor:
    left, right = spectrum.left[:, :rank], spectrum.right[:, :rank]
    rows = left @ (left.mT @ delta)
    return rows + ((delta - rows) @ right) @ right.mT


def _mean_norm(stats: Stats) -> float:
    return stats.norm_sum / stats.count if stats.count else 0.0


VARIANTS: dict[str, Callable[[Tensor, Spectrum, int], Tensor]] = {
    # i < r and j < r, and the diagonal i == j
    "fusionbench": lambda delta, spectrum, rank: _block(delta, spectrum, rank) + _diagonal(delta, spectrum, rank),
    # i < r and j < r
    "released": _block,
    # i < r or j < r, and the diagonal i == j
    "paper": lambda delta, spectrum, rank: _cross(delta, spectrum, rank) + _diagonal(delta, spectrum, rank),
}
