"""The singular directions of a matrix that stand above its noise, from the Gram matrix of its short side.

It is formed and diagonalised in float64, the long side in blocks of rows, so that no second copy of a large matrix is
made. The Gram matrix squares the spectrum: directions below about 1e-8 of the largest singular value are lost, which
float32 storage of the matrix hides anyway.

>>> matrix = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
>>> sigma, right = directions(gram(matrix))
>>> [round(value, 6) for value in sigma.tolist()]
[3.0, 1.0]
>>> split_rank(sigma, energy=0.8)
1
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Entries turned into float64 at a time.
BLOCK = 1 << 22
# Columns of a Gram matrix that are multiplied out together.
PANEL = 192


class Directions(NamedTuple):
    """The k leading singular values of a matrix with their right singular vectors, strongest first, float64."""

    sigma: Tensor  # (k,), descending, above the noise
    right: Tensor  # (in, k), orthonormal columns


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover the rows of a matrix, of about BLOCK entries each; they depend on nothing but its shape."""
    step = max(1, BLOCK // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def gram(matrix: Tensor) -> Tensor:  # (rows, n), any float dtype
    """matrix.T @ matrix, (n, n), in float64; only its upper half is multiplied out."""
    side = matrix.shape[1]
    squares = torch.zeros(side, side, dtype=torch.float64, device=matrix.device)
    for rows in row_blocks(*matrix.shape):
        wide = matrix[rows].double()
        for start in range(0, side, PANEL):
            panel = slice(start, start + PANEL)
            squares[panel, start:].addmm_(wide[:, panel].mT, wide[:, start:])
    return torch.triu(squares) + torch.triu(squares, 1).mT


def cross_gram(matrix: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:  # both (rows, n), any float dtype
    """matrix.T @ other, (n, n), in `dtype`."""
    products = torch.zeros(matrix.shape[1], other.shape[1], dtype=dtype, device=matrix.device)
    for rows in row_blocks(*matrix.shape):
        products.addmm_(matrix[rows].to(dtype).mT, other[rows].to(dtype))
    return products


def directions(squares: Tensor, noise: float = 0.0) -> Directions:  # squares: matrix.T @ matrix, (n, n), float64
    """The directions whose singular value exceeds the noise; never a full basis.

    A direction is kept where sigma > max(noise, sqrt(n * eps64) * largest sigma): below the first bound it is storage
    rounding, below the second the Gram path cannot tell it from zero. A zero matrix has k = 0. The signs of the vectors
    are arbitrary. `squares` must be finite.
    """
    values, basis = torch.linalg.eigh(squares)
    sigma = values.flip(0).clamp(min=0).sqrt()
    kept = int((sigma > _cut(sigma, noise)).sum())
    return Directions(sigma[:kept], basis.flip(1)[:, :kept])


def split_rank(sigma: Tensor, energy: float) -> int:  # sigma: (k,), descending; energy in [0, 1)
    """How many leading directions hold at most `energy` of the sum of sigma (not of its squares).

    Source: OPCM, arXiv 2501.09522, with the rank convention of its public code.
    """
    running = sigma.cumsum(0)
    return int((running <= energy * running[-1:]).sum())


def _cut(sigma: Tensor, noise: float) -> float:
    strongest = float(sigma[0]) if len(sigma) else 0.0
    return max(noise, math.sqrt(len(sigma) * torch.finfo(torch.float64).eps) * strongest)
