"""The singular triplets of a matrix that stand above its noise, from the Gram matrix of its short side.

The Gram matrix is formed and diagonalised in float64. On two CPU cores that took 0.02 s for 1536 x 384 and 0.12 s for
3072 x 768, against 0.05 s and 0.27 s for a thin SVD in float64. It squares the spectrum, so directions below about
1e-8 of the largest singular value are lost; float32 storage of the total hides those anyway.

>>> spectrum = triplets(torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 1.0]]))
>>> [round(sigma, 6) for sigma in spectrum.sigma.tolist()]
[3.0, 1.0]
>>> split_rank(spectrum.sigma, energy=0.8)
1
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Spectrum(NamedTuple):
    """The k leading singular triplets of a matrix, strongest first, float64: matrix ~ left * sigma @ right.T."""

    left: Tensor  # (out, k), orthonormal columns
    sigma: Tensor  # (k,), descending, above the noise
    right: Tensor  # (in, k), orthonormal columns


def triplets(matrix: Tensor, noise: float = 0.0) -> Spectrum:  # matrix: (out, in), any float dtype; noise >= 0
    """The singular triplets whose singular value exceeds the noise; never a full basis.

    A direction is kept where sigma > max(noise, sqrt(min(out, in) * eps64) * largest sigma): below the first bound it
    is storage rounding, below the second the Gram path cannot tell it from zero. A zero matrix has k = 0. The sign of
    a pair (left_i, right_i) is arbitrary. `matrix` must be finite.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, sigma, right = triplets(matrix.mT, noise)
        return Spectrum(right, sigma, left)
    tall = matrix.double()
    squares, basis = torch.linalg.eigh(tall.mT @ tall)
    sigma = squares.flip(0).clamp(min=0).sqrt()
    kept = int((sigma > _cut(sigma, noise)).sum())
    right, sigma = basis.flip(1)[:, :kept], sigma[:kept]
    return Spectrum((tall @ right) / sigma, sigma, right)


def split_rank(sigma: Tensor, energy: float) -> int:  # sigma: (k,), descending; energy in [0, 1)
    """How many leading directions hold at most `energy` of the sum of sigma (not of its squares).

    Source: OPCM, arXiv 2501.09522, with the rank convention of its public code.
    """
    running = sigma.cumsum(0)
    return int((running <= energy * running[-1:]).sum())


def _cut(sigma: Tensor, noise: float) -> float:
    strongest = float(sigma[0]) if len(sigma) else 0.0
    return max(noise, math.sqrt(len(sigma) * torch.finfo(torch.float64).eps) * strongest)
