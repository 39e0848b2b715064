"""How far one expert moved each tensor, and along which direction.

>>> before, delta = {"total": torch.tensor([2.0, 0.0])}, torch.tensor([0.0, 3.0])
>>> measure(before, delta, {"total": torch.tensor([2.0, 3.0])}).cosine
0.0
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from merging.method import State

# Entries turned into float64 at a time, so that the sums need no second copy of a large tensor.
BLOCK = 1 << 22


class Measure(NamedTuple):
    """One tensor, one expert. Norms are Frobenius norms in weight units."""

    delta_norm: float  # of expert - base
    total_norm: float  # of the slot "total" after the fold
    cosine: float  # between expert - base and the total before the fold, in [-1, 1]; 0 where either is 0
    removed: float  # share of ||expert - base||^2 that the fold did not add to the total, in [0, 1]


def measure(
    before: State | None,  # None: no expert has moved this tensor yet
    delta: Tensor,  # expert - base, float32, any shape
    after: State,
) -> Measure:
    """What one fold did to one tensor; sums in float64.

    `removed` compares delta with what the total gained, so it is about 1e-14 where delta was simply added, and has the
    meaning "removed by the projection" for methods that add.
    """
    total = after["total"]
    earlier = torch.zeros_like(total) if before is None else before["total"]
    flat = [one.flatten() for one in (delta, total, earlier)]
    starts = range(0, max(1, delta.numel()), BLOCK)
    rows = [_sums(*(one[start : start + BLOCK].double() for one in flat)) for start in starts]
    own, whole, past, shared, lost = (math.fsum(column) for column in zip(*rows, strict=True))
    return Measure(
        delta_norm=math.sqrt(own),
        total_norm=math.sqrt(whole),
        cosine=_ratio(shared, math.sqrt(own) * math.sqrt(past)),
        removed=min(1.0, _ratio(lost, own)),
    )


def summarise(measures: Mapping[str, Measure]) -> dict[str, dict[str, float]]:  # tensor name -> measure
    """Per layer, for a report: norms joined in quadrature; cosine and removed weighted by delta_norm squared.

    A layer is a tensor's name without its last component ("encoder.0.bias" -> "encoder.0"); a name with no dot is its
    own layer. Layers keep the order of their first tensor. The joined cosine is a mean of the tensors' cosines.
    """
    layers: dict[str, list[Measure]] = {}
    for name, value in measures.items():
        layers.setdefault(name.rpartition(".")[0] or name, []).append(value)
    return {layer: _join(members)._asdict() for layer, members in layers.items()}


def quadrature(norms: Iterable[float]) -> float:
    """The norm of a vector whose parts have these norms: sqrt of the exactly rounded sum of squares."""
    return math.sqrt(math.fsum(norm * norm for norm in norms))


def _join(members: list[Measure]) -> Measure:
    squares = [member.delta_norm**2 for member in members]
    return Measure(
        delta_norm=quadrature(member.delta_norm for member in members),
        total_norm=quadrature(member.total_norm for member in members),
        cosine=_mean((member.cosine for member in members), squares),
        removed=_mean((member.removed for member in members), squares),
    )


def _mean(values: Iterable[float], weights: list[float]) -> float:
    products = [value * weight for value, weight in zip(values, weights, strict=True)]
    return _ratio(math.fsum(products), math.fsum(weights))


def _sums(delta: Tensor, total: Tensor, earlier: Tensor) -> tuple[float, ...]:  # each (n,), float64
    lost = delta - (total - earlier)
    pairs = ((delta, delta), (total, total), (earlier, earlier), (delta, earlier), (lost, lost))
    return tuple(float(left @ right) for left, right in pairs)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
