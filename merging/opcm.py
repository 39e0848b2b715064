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
from typing import NamedTuple

import torch
from torch import Tensor

from merging.method import MergeError, Method, Role, State, Stats, positive, zero_total
from merging.spectrum import Directions, cross_gram, directions, gram, row_blocks, split_rank

LARGE = 256  # directions from which on float32 products save time
MAX_SPREAD = 1e4  # of the kept singular values, up to which float32 products are good to 1e-5


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
        if not role.projected:
            return {"total": total + delta}
        after = torch.empty_like(total, memory_format=torch.contiguous_format)
        for old, new, out in zip(*(_matrices(each, role.stacked) for each in (total, delta, after)), strict=True):
            project(old, new, energy, role.noise, variant, onto=old, out=out)
        return {"total": after}

    def read(state: State, stats: Stats) -> Tensor:
        return state["total"] * (strength * _mean_norm(stats) / stats.total_norm if stats.total_norm else 0.0)

    return Method(zero_total, fold, read, entrywise=True, additive=True)


def project(
    total: Tensor,  # (out, in), any float dtype, finite
    delta: Tensor,  # (out, in)
    energy: float,  # in [0, 1)
    noise: float = 0.0,  # singular values of total up to here are storage rounding, >= 0
    variant: str = "fusionbench",
    *,
    onto: Tensor | None = None,  # (out, in), what the result is added to; None: nothing
    out: Tensor | None = None,  # (out, in), where the result goes; None: a new tensor
) -> Tensor:
    """What is left of delta when its part along the total is removed, (out, in).

    With left, sigma, right the singular triplets of the total above the noise, and r the split rank at `energy`, the
    entries (i, j) of left.T @ delta @ right that a variant removes are listed in VARIANTS. Numerically null directions
    of the total are arbitrary, so they are left alone: a zero total removes nothing. No left basis is formed: since it
    is total @ right / sigma, what is removed is total @ along + delta @ across with two small matrices (in, in).

    The singular directions are found in float64, and so are the products with them, unless the matrix is large and its
    kept directions are not too unlike in strength (`_work_dtype`): then float32 moves the result by less than 1e-5.
    """
    out = torch.empty(delta.shape, dtype=_wide(total, delta), device=delta.device) if out is None else out
    if total.shape[0] < total.shape[1]:  # the variants are the same for the transposed matrices
        turned = {"onto": None if onto is None else onto.mT, "out": out.mT}
        project(total.mT, delta.mT, energy, noise, variant, **turned)
        return out
    removal = _removal(total, delta, energy, noise, variant) if total.any() and delta.any() else None
    for rows in row_blocks(*delta.shape):
        kept = removal.kept(total[rows], delta[rows]) if removal else delta[rows]
        out[rows] = kept if onto is None else kept + onto[rows]
    return out


class Removal(NamedTuple):
    """What is taken out of delta: total @ along + delta @ across."""

    along: Tensor  # (in, in)
    across: Tensor | None = None  # (in, in); None: zeros

    def kept(self, total: Tensor, delta: Tensor) -> Tensor:  # rows of both, (rows, in)
        """What is left of these rows of delta."""
        total, delta = total.to(self.along.dtype), delta.to(self.along.dtype)
        left = torch.addmm(delta, total, self.along, alpha=-1)
        return left if self.across is None else left.addmm_(delta, self.across, alpha=-1)


def _removal(total: Tensor, delta: Tensor, energy: float, noise: float, variant: str) -> Removal:
    exact = directions(gram(total), noise)
    rank, dtype = split_rank(exact.sigma, energy), _work_dtype(exact.sigma, _wide(total, delta))
    found = Directions(exact.sigma.to(dtype), exact.right.to(dtype))
    return VARIANTS[variant](cross_gram(total, delta, dtype), found, rank)


def _work_dtype(sigma: Tensor, stored: torch.dtype) -> torch.dtype:
    """float64, except for large float32 matrices whose weakest kept direction float32 can still tell well enough.

    A direction of singular value s is known to about eps32 * strongest / s, by the total's own storage.
    """
    steep = len(sigma) > 0 and float(sigma[0]) > MAX_SPREAD * float(sigma[-1])
    return torch.float64 if steep or len(sigma) < LARGE else stored


def _wide(total: Tensor, delta: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(total.dtype, delta.dtype), torch.float32)


def _block(cross: Tensor, found: Directions, rank: int) -> Removal:  # cross: total.T @ delta, (in, in)
    leading = found.right[:, :rank] / found.sigma[:rank]
    inner = leading.mT @ cross @ found.right[:, :rank]
    return Removal(leading @ inner @ found.right[:, :rank].mT)


def _block_and_diagonal(cross: Tensor, found: Directions, rank: int) -> Removal:
    right, scaled = found.right, found.right / found.sigma  # total @ scaled is the left basis
    turned = cross @ right
    columns = scaled * (scaled * turned).sum(0)
    columns[:, :rank] = scaled[:, :rank] @ (scaled[:, :rank].mT @ turned[:, :rank])
    return Removal(columns @ right.mT)


def _cross_and_diagonal(cross: Tensor, found: Directions, rank: int) -> Removal:
    right, scaled = found.right, found.right / found.sigma
    rows = scaled[:, :rank] @ (scaled[:, :rank].mT @ cross)
    across = right[:, :rank] @ right[:, :rank].mT
    diagonal = (scaled * (scaled * (cross @ right)).sum(0))[:, rank:] @ right[:, rank:].mT
    return Removal(rows - rows @ across + diagonal, across)


def _matrices(tensor: Tensor, stacked: bool) -> Tensor:  # (matrices, rows, columns), a view where possible
    return tensor if stacked else tensor.reshape(1, tensor.shape[0], -1)


def _mean_norm(stats: Stats) -> float:
    return stats.norm_sum / stats.count if stats.count else 0.0


VARIANTS: dict[str, Callable[[Tensor, Directions, int], Removal]] = {
    # i < r and j < r, and the diagonal i == j
    "fusionbench": _block_and_diagonal,
    # i < r and j < r
    "released": _block,
    # i < r or j < r, and the diagonal i == j
    "paper": _cross_and_diagonal,
}
