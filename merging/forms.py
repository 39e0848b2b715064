"""The forms that a packed change may have: how each is made within an error, and read.

Everything is quantised with one step for the whole tensor, which for a given Frobenius error takes the fewest bits, and
coded so that small numbers take few of them (`merging.coding`).

>>> change = torch.tensor([[0.5, -0.25], [0.0, 1.0]])
>>> parts = dense(Target(torch.zeros(2, 2), change, change, float(change.norm()), tolerance=0.01))
>>> bool((read_dense(parts, change.shape) - change).norm() / change.norm() <= 0.01)
True
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from merging.coding import LARGEST, decoded, encoded
from merging.spectrum import directions, gram, row_blocks
from merging.target import Target, largest_step, norm, quantised

Parts = Mapping[str, Tensor]
SPREAD = 0.3  # (mean size / root mean square)^2 of a change from which on it is not sparse; 0.64 of normal values
SPARSE = 8  # at most one entry in so many is kept by its place
LARGE = 1024  # short side of a matrix from which on PROBE of its rows are looked at first
PROBE = 512
WHOLE = 2.0**52  # sums of whole numbers below this are exact in float64, in whatever order they are made


# dense: every entry


def dense(target: Target) -> Parts | None:
    """Every entry, quantised."""
    flat, shape = target.change.reshape(-1), target.change.shape

    def restored(step: float) -> Tensor:
        return (quantised(flat, step).double() * step).reshape(shape)

    step = largest_step(target, restored, target.tolerance * target.norm * math.sqrt(12 / len(flat)))
    return {"codes": encoded(quantised(flat, step)), "step": _scalar(step)} if step else None


def read_dense(parts: Parts, shape: torch.Size) -> Tensor:  # -> shape, float64
    """The change that `dense` kept."""
    return (decoded(parts["codes"], shape.numel()) * _step(parts)).reshape(shape)


# sparse: the largest entries and their places


def sparse(target: Target) -> Parts | None:
    """The entries that hold all but half of the error's square, where they are few, and the gaps between them."""
    flat = target.change.reshape(-1)
    if norm([flat]) ** 2 * len(flat) * SPREAD < float(flat.abs().sum(dtype=torch.float64)) ** 2:
        return None
    places = _largest(flat, 1 - target.tolerance**2 / 2)
    if not 0 < len(places) * SPARSE <= len(flat) < LARGEST:
        return None
    values = flat[places]
    dropped = max(0.0, 1 - (norm([values]) / target.norm) ** 2)

    def restored(step: float) -> Tensor:
        return _scattered(quantised(values, step).double() * step, places, target.change.shape)

    begin = target.norm * math.sqrt(12 * max(target.tolerance**2 - dropped, 0.0) / len(values))
    step = largest_step(target, restored, begin)
    if not step:
        return None
    gaps = encoded(torch.diff(places, prepend=torch.tensor([-1])) - 1)
    return {"places": gaps, "codes": encoded(quantised(values, step)), "step": _scalar(step), "count": _count(places)}


def read_sparse(parts: Parts, shape: torch.Size) -> Tensor:  # -> shape, float64
    """The change that `sparse` kept."""
    count = int(_numbers(parts, "count", torch.int64, 1))
    if not 0 < count <= shape.numel():
        raise ValueError(f"{count} entries of {shape.numel()}")
    gaps = decoded(parts["places"], count).long()
    places = (gaps + 1).cumsum(0) - 1
    if int(gaps.min()) < 0 or int(places[-1]) >= shape.numel():
        raise ValueError("places outside the tensor, or not in order")
    return _scattered(decoded(parts["codes"], count) * _step(parts), places, shape)


def _largest(flat: Tensor, share: float) -> Tensor:  # -> (k,), int64, ascending
    """The places of the largest entries that hold this share of the sum of squares."""
    sizes = flat.abs().sort(descending=True).values
    energy = sizes.double().square().cumsum(0)
    last = int(torch.searchsorted(energy, share * energy[-1]))
    return (flat.abs() >= sizes[min(last, len(sizes) - 1)]).nonzero().reshape(-1)


def _scattered(values: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    whole = torch.zeros(shape.numel(), dtype=torch.float64)
    whole[places] = values
    return whole.reshape(shape)


# factors: a low rank


def factors(target: Target) -> Parts | None:
    """The strongest singular directions, which hold all but half of the error's square; one matrix (first axis, rest).

    Columns of left * sigma and right * sigma are quantised with one step, so that weak directions take few bits, and
    the product is sum over r of codes * codes * step^2 / sigma_r. That is exact arithmetic: see `_exact`.
    """
    change = target.change
    matrix = change.reshape(change.shape[0], -1) if change.ndim > 1 else change.reshape(1, -1)
    if min(matrix.shape) < 2:
        return None
    found = _leading(matrix, target)
    if found is None:
        return None
    left, right, sigma, dropped = found

    def kept(step: float) -> Parts:
        codes = quantised(left, step), quantised(right, step)
        return {"left": codes[0], "right": codes[1], "scale": _exact(*codes, step**2 / sigma)}

    def restored(step: float) -> Tensor:
        return _product(**kept(step)).reshape(change.shape)

    entries = left.numel() + right.numel()
    begin = target.norm * math.sqrt(12 * max(target.tolerance**2 - dropped, 0.0) / entries)
    step = largest_step(target, restored, begin)
    if not step:
        return None
    made = kept(step)
    return {**made, "left": encoded(made["left"].reshape(-1)), "right": encoded(made["right"].reshape(-1))}


def read_factors(parts: Parts, shape: torch.Size) -> Tensor:  # -> shape, float64
    """The change that `factors` kept."""
    scale = _numbers(parts, "scale", torch.float64)
    rank, rows = len(scale), shape[0] if len(shape) > 1 else 1
    columns = shape.numel() // max(1, rows)
    if not 0 < rank <= min(rows, columns):  # what is read is at most as large as the tensor
        raise ValueError(f"rank {rank} of {rows} x {columns}")
    left, right = decoded(parts["left"], rank * rows), decoded(parts["right"], rank * columns)
    return _product(left.reshape(rank, rows), right.reshape(rank, columns), scale).reshape(shape)


def _leading(matrix: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """(left * sigma).T (k, rows), (right * sigma).T (k, columns), sigma (k,), share of the squares that is dropped.

    None where the factors would have as many entries as the matrix.
    """
    if matrix.shape[0] < matrix.shape[1]:
        found = _leading(matrix.mT, target)
        return found and (found[1], found[0], *found[2:])
    if matrix.shape[1] > LARGE and not _may_be_low(matrix, target.tolerance):
        return None
    sigma, basis = directions(gram(matrix))
    left = 1 - sigma.square().cumsum(0) / target.norm**2
    rank = int((left > target.tolerance**2 / 2).sum()) + 1
    if rank > len(sigma) or rank * sum(matrix.shape) >= matrix.numel():
        return None
    long = torch.cat([matrix[rows].double() @ basis[:, :rank] for rows in row_blocks(*matrix.shape)])
    short = basis[:, :rank] * sigma[:rank]
    return long.mT.contiguous(), short.mT.contiguous(), sigma[:rank], max(0.0, float(left[rank - 1]))


def _may_be_low(matrix: Tensor, tolerance: float) -> bool:
    """Whether half as many directions as rows that are looked at hold enough of those: all directions cost minutes."""
    rows = matrix[:: matrix.shape[0] // PROBE][:PROBE]
    sigma, _ = directions(gram(rows.mT))
    energy = sigma.square()
    return float(energy[PROBE // 2 :].sum()) <= tolerance**2 * float(energy.sum())


def _exact(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:  # (k, rows), (k, columns), (k,) float64 -> (k,)
    """The scales rounded to multiples of a power of two such that every partial sum of the product is exact.

    A sum of whole numbers below 2^53 has no rounding error in float64, so the product has the same bytes in whatever
    order, on whatever processor, it is computed.
    """
    largest = left.abs().amax(1).double() * right.abs().amax(1).double()
    bound = float(largest @ scale)
    if not 0 < bound < math.inf:
        return torch.zeros_like(scale)
    unit = 2.0 ** math.ceil(math.log2(bound / WHOLE))
    return (scale / unit).round() * unit


def _product(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:  # -> (rows, columns), float64
    return (left.mT * scale) @ right.double()


def _scalar(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _count(places: Tensor) -> Tensor:
    return torch.tensor([len(places)], dtype=torch.int64)


def _step(parts: Parts) -> Tensor:  # -> (1,), float64
    return _numbers(parts, "step", torch.float64, 1)


def _numbers(parts: Parts, name: str, dtype: torch.dtype, count: int | None = None) -> Tensor:  # -> (count,)
    """A part that is a row of finite numbers, any count of them when it is None."""
    part = parts[name]
    if part.dtype != dtype or part.ndim != 1 or (count is not None and len(part) != count):
        raise ValueError(f"{name} has shape {list(part.shape)} and dtype {part.dtype}")
    if not bool(part.isfinite().all()):
        raise ValueError(f"{name} is not finite")
    return part
