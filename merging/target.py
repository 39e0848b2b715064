"""What a change is packed for: how near the restored tensor must be, and how coarse a step may be for that.

>>> change = torch.linspace(-1.1, 0.7, 50)
>>> wanted = Target(torch.zeros(50), change, change, norm([change]), tolerance=0.01)
>>> step = largest_step(wanted, lambda step: quantised(change, step).double() * step, begin=0.1)
>>> 0.009 < wanted.error(quantised(change, step).double() * step) <= 0.01
True
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from merging.coding import LARGEST
from merging.measure import blocks, quadrature

TRIES = 6  # steps looked at
NEAR = 0.97  # of the tolerance: near enough


class Target(NamedTuple):
    """What is to be restored, and how well."""

    base: Tensor  # any shape, floating point
    expert: Tensor  # shape of the base, floating point
    change: Tensor  # expert - base, float32 or float64, finite
    norm: float  # of the change, Frobenius, > 0
    tolerance: float  # of the relative error

    def error(self, change: Tensor) -> float:  # shape of the base
        """The relative error when another change is added to the base."""
        return self.distance(added(self.base, change, self.expert.dtype))

    def distance(self, restored: Tensor) -> float:  # dtype and shape of the expert
        """||restored - expert|| / ||expert - base||, float64; NaN or infinite where the restored is not finite."""
        found, own = restored.reshape(-1), self.expert.reshape(-1)
        return norm(found[part].double() - own[part].double() for part in blocks(own)) / self.norm


def wide(base: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which dtype a change is computed: float32, or float64 where one of both is."""
    return torch.promote_types(torch.promote_types(base.dtype, dtype), torch.float32)


def added(base: Tensor, change: Tensor, dtype: torch.dtype) -> Tensor:
    """base + change, rounded to a dtype."""
    work = wide(base, dtype)
    return (base.to(work) + change.to(work)).to(dtype)


def norm(pieces: Iterable[Tensor]) -> float:
    """The Frobenius norm of what comes in pieces."""
    return quadrature(float(torch.linalg.vector_norm(piece, dtype=torch.float64)) for piece in pieces)


def quantised(values: Tensor, step: float) -> Tensor:  # -> same shape, int32
    """values / step, rounded, from what is divided in float64."""
    flat, codes = values.reshape(-1), torch.empty(values.numel(), dtype=torch.int32)
    for part in blocks(flat):
        codes[part] = (flat[part].double() / step).round().clamp(1 - LARGEST, LARGEST - 1).to(torch.int32)
    return codes.reshape(values.shape)


def largest_step(target: Target, restored: Callable[[float], Tensor], begin: float) -> float:
    """The largest of a few steps whose error is within the tolerance; 0.0 where none is."""
    best, step = 0.0, begin
    for _ in range(TRIES):
        if not (step > 0 and math.isfinite(1 / step)):
            break
        error = target.error(restored(step))
        fits = error <= target.tolerance
        best = max(best, step) if fits else best
        if fits and error >= NEAR * target.tolerance:
            break
        wished = 0.99 * target.tolerance / error if error > 0 else 4.0
        step *= min(4.0, max(0.25, wished)) if math.isfinite(error) else 0.25
    return best
