"""The published OPCM recursion in float64, with its factor lambda and its full bases: the oracle of the parity tests.

Written from the description of arXiv 2501.09522 and of its public code; slow and plain on purpose. Nothing is shared
with the package under test.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy

Arrays = dict[str, numpy.ndarray]


class Step(NamedTuple):
    """What is known after one expert."""

    merged: Arrays
    lambda_t: float
    mean_norm: float


def fold_all(
    base: Arrays, experts: list[Arrays], projected: set[str], energy: float, emulate: tuple[str, ...] = ()
) -> Iterator[Step]:
    """The merged model after each expert. `emulate`: names that the public code rescales but never adds to."""
    merged_delta: Arrays = {}
    lambda_t, mean_norm = 1.0, 0.0
    for t, expert in enumerate(experts, start=1):
        delta = {name: expert[name].astype(float) - base[name].astype(float) for name in base}
        mean_norm = (t - 1) / t * mean_norm + norm(delta) / t
        if t == 1:
            merged_delta = delta
        else:
            total = {
                name: merged_delta[name]
                if name in emulate
                else lambda_t * merged_delta[name]
                + (project(merged_delta[name], delta[name], energy) if name in projected else delta[name])
                for name in base
            }
            lambda_t = norm(total) / mean_norm
            merged_delta = {name: total[name] / lambda_t for name in base}
        yield Step({name: base[name] + merged_delta[name] for name in base}, lambda_t, mean_norm)


def project(total: numpy.ndarray, delta: numpy.ndarray, energy: float) -> numpy.ndarray:
    """Delta without the leading block and the diagonal, in the full singular bases of total."""
    left, sigma, right = numpy.linalg.svd(total, full_matrices=True)
    rank = split_rank(sigma, energy)
    inner = left.T @ delta @ right.T
    inner[:rank, :rank] = 0
    numpy.fill_diagonal(inner, 0)
    return left @ inner @ right


def split_rank(sigma: numpy.ndarray, energy: float) -> int:
    """The index of the first cumulative share of the sum of sigma above `energy`."""
    shares = numpy.cumsum(sigma) / sigma.sum()
    return next(index for index, share in enumerate(shares) if share > energy)


def norm(arrays: Arrays) -> float:
    """Frobenius norm over all arrays."""
    return math.sqrt(sum(float((array**2).sum()) for array in arrays.values()))
