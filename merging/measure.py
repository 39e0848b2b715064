"""How far one expert moved each tensor, and along which direction.

>>> before, delta = {"total": torch.tensor([2.0, 0.0])}, torch.tensor([0.0, 3.0])
>>> measure(before, delta, {"total": torch.tensor([2.0, 3.0])}).cosine
0.0
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from merging.method import State

# Entries looked at together: few enough that their float64 copies stay in a processor's cache, and enough that threads
# seldom wait for each other between two pieces (a quarter of this took a third longer on two cores).
BLOCK = 1 << 17
# A graphics processor has no such cache, but a start-up cost for each piece of work.
DEVICE_BLOCK = 1 << 22
# Of squared norms: differences below are the rounding of sums in float64.
NOTHING = 1e-12


class Measure(NamedTuple):
    """One tensor, one expert. Norms are Frobenius norms in weight units."""

    delta_norm: float  # of expert - base
    total_norm: float  # of the slot "total" after the fold
    cosine: float  # between expert - base and the total before the fold, in [-1, 1]; 0 where either is 0
    removed: float  # share of ||expert - base||^2 that the fold did not add to the total, in [0, 1]


def blocks(tensor: Tensor, device: torch.device | None = None) -> Iterator[slice]:
    """Slices that cover a tensor's entries in order, at least one; for work on a device, None for the tensor's."""
    step, size = block_length(tensor, device), tensor.numel()
    return (slice(start, min(start + step, size)) for start in range(0, max(1, size), step))


def block_length(tensor: Tensor, device: torch.device | None = None) -> int:
    """The most entries that a slice of `blocks` covers."""
    where = device or tensor.device
    return max(1, min(BLOCK if where.type == "cpu" else DEVICE_BLOCK, tensor.numel()))


def scratch(
    tensor: Tensor, rows: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None
) -> Tensor:
    """Room for some slices of a tensor, used again for each: fresh memory would cost more than the arithmetic."""
    return torch.empty(rows, block_length(tensor, device), dtype=dtype, device=device or tensor.device)


def products(room: Tensor, delta: Tensor, after: Tensor, before: Tensor | None) -> Tensor:
    """What `measured` needs of some entries: six inner products, float64.

    Args:
        room: `scratch` of three rows, written over.
        delta: expert - base, (n,).
        after: the total after the fold, (n,).
        before: the total before it, (n,); None where it is zero.
    """
    rows = [delta, after] if before is None else [delta, after, before]
    wide = [place[: len(delta)].copy_(row) for place, row in zip(room, rows, strict=False)]
    pairs = [left @ right for at, left in enumerate(wide) for right in wide[at:]]
    if before is None:
        own, gained, whole = pairs
        nothing = torch.zeros_like(own)
        pairs = [own, gained, nothing, whole, nothing, nothing]
    return torch.stack(pairs)


def products_of_sum(room: Tensor, delta: Tensor, after: Tensor, before: Tensor | None) -> Tensor:
    """`products` where after is before + delta up to rounding: half of them, from which the others follow.

    Whether `before` is what was called `after` a moment ago or was read back from a file, the numbers are the same.
    """
    moved = room[0, : len(delta)].copy_(delta)
    own = moved @ moved
    if before is None:
        nothing = torch.zeros_like(own)
        return torch.stack([own, own, nothing, own, nothing, nothing])
    past = room[1, : len(delta)].copy_(before)
    shared, earlier = moved @ past, past @ past
    grown = room[2, : len(delta)].copy_(after)
    whole = grown @ grown
    # The second is such that nothing was removed.
    return torch.stack([own, (own + whole - earlier) / 2, shared, whole, earlier + shared, earlier])


def measured(sums: Tensor) -> Measure:  # (6,), float64: the sum of `products` over all entries
    """The measure of a fold.

    `removed` compares delta with what the total gained, so it is 0 where delta was simply added, and has the meaning
    "removed by the projection" for methods that add.
    """
    own, gained, shared, whole, kept, past = sums.tolist()
    lost = own + whole + past + 2 * (shared - gained - kept)  # ||delta - (after - before)||^2
    lost = lost if abs(lost) > NOTHING * (own + whole + past) else 0.0
    return Measure(
        delta_norm=math.sqrt(own),
        total_norm=math.sqrt(whole),
        cosine=_at_most_one(_ratio(shared, math.sqrt(own) * math.sqrt(past))),
        removed=_at_most_one(_ratio(max(0.0, lost), own)),
    )


def measure(
    before: State | None,  # None: no expert has moved this tensor yet
    delta: Tensor,  # expert - base, float32, any shape
    after: State,
) -> Measure:
    """What one fold did to one tensor; sums in float64."""
    flat, total = delta.reshape(-1), after["total"].reshape(-1)
    earlier = None if before is None else before["total"].reshape(-1)
    room, sums = scratch(flat, 3), torch.zeros(6, dtype=torch.float64, device=delta.device)
    for part in blocks(flat):
        sums += products(room, flat[part], total[part], None if earlier is None else earlier[part])
    return measured(sums)


def summarise(measures: Mapping[str, Measure]) -> dict[str, dict[str, float]]:  # tensor name -> measure
    """Per layer, for a report: norms joined in quadrature; cosine and removed weighted by delta_norm squared.

    A layer is a tensor's name without its last component ("encoder.0.bias" -> "encoder.0"); a name with no dot is its
    own layer. Layers keep the order of their first tensor. The joined cosine is a mean of the tensors' cosines.
    """
    layers: dict[str, list[Measure]] = {}
    for name, value in measures.items():
        layers.setdefault(name.rpartition(".")[0] or name, []).append(value)
    return {layer: _join(members)._asdict() for layer, members in layers.items()}


def shares(measures: Mapping[str, Measure]) -> tuple[float, float]:
    """Over the whole model: the share of the change's norm that lies along the total, of its square that was removed.

    Along the total means tensor by tensor: 1 where each tensor's change is a multiple of its total. Both in [0, 1].
    """
    whole = math.fsum(each.delta_norm**2 for each in measures.values())
    along = math.fsum((each.cosine * each.delta_norm) ** 2 for each in measures.values())
    removed = math.fsum(each.removed * each.delta_norm**2 for each in measures.values())
    return _at_most_one(math.sqrt(_ratio(along, whole))), _at_most_one(_ratio(removed, whole))


def _at_most_one(ratio: float) -> float:
    """The ratio without what rounding put beyond 1 or -1; NaN stays NaN."""
    return math.copysign(1.0, ratio) if abs(ratio) > 1.0 else ratio


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


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
