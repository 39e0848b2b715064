"""The serving weights of one tensor: the only place where `base +` is computed.

>>> from merging.arithmetic import average
>>> base, state = torch.tensor([1.0, 1.0]), {"total": torch.tensor([0.0, 4.0])}
>>> merged, found = read_tensor(average(), base, state, Stats(count=2.0))
>>> merged, found.moved
(tensor([1., 3.]), 2.0)
"""

import math
from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from merging.fold import drained, whole, wide
from merging.measure import blocks, scratch
from merging.method import Method, State, Stats


class Reading(NamedTuple):
    """What came of reading a merged tensor."""

    moved: float  # Frobenius norm of what was added to the base, weight units
    lost: float  # Frobenius norm of what the cast to the base's dtype took away, weight units
    finite: bool  # whether every merged value is; a cast can overflow


def read_tensor(method: Method, base: Tensor, state: State | None, stats: Stats) -> tuple[Tensor, Reading]:
    """The merged tensor: base + read(state, stats), computed in float32 or wider, cast once to the dtype of base.

    A new tensor with the base's values where no expert moved anything (state None or all zero).
    """
    pieces, found = drained(read_pieces(method, base, state, stats))
    return whole(pieces, base), found


def read_pieces(
    method: Method,
    base: Tensor,
    state: State | None,
    stats: Stats,
    device: torch.device | None = None,  # where it is computed; None: where base is
) -> Generator[Tensor, None, Reading]:
    """The merged tensor piece by piece, flat, in the order of its entries; returns what came of it.

    A device needs room for one piece of each tensor, where the method reads entry by entry.
    """
    old, where = base.detach().reshape(-1), device or base.device
    if state is None:
        yield from (old[part].to(where, copy=True) for part in blocks(old, where))
        return Reading(0.0, 0.0, True)
    slots = {name: slot.reshape(-1) for name, slot in state.items()}
    there = {name: slot.to(where) for name, slot in state.items()} if not method.entrywise else {}
    update_of_all = method.read(there, stats).reshape(-1) if there else None
    room, sums = reading_room(old, where), torch.zeros(3, dtype=torch.float64, device=where)
    for part in blocks(old, where):
        update = (
            method.read({name: slot[part].to(where) for name, slot in slots.items()}, stats)
            if update_of_all is None
            else update_of_all[part]
        )
        merged, found = merged_piece(old[part].to(where), update, room)
        sums += found
        yield merged
    return reading_of(sums)


def merged_piece(base: Tensor, update: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """base + update in the dtype of base, (n,), and what `reading_of` takes the sum of.

    Args:
        base: (n,), any float dtype.
        update: what to add to it, (n,), float32.
        room: `reading_room` of the tensor, written over.
    """
    if not _reach(update):  # adding zeros would turn -0.0 into 0.0
        return base.clone(), torch.zeros(3, dtype=torch.float64, device=base.device)
    exact, cast = room[:, : len(base)]
    merged = exact.copy_(base).add_(update).to(base.dtype, copy=True)
    lost = exact.sub_(cast.copy_(merged))
    # The last is 0 where every value is finite.
    return merged, torch.stack([(update @ update).double(), (lost @ lost).double(), _reach(cast).double() * 0])


def reading_room(base: Tensor, device: torch.device | None = None) -> Tensor:
    """What `merged_piece` computes in."""
    return scratch(base, 2, wide(base), device)


def reading_of(sums: Tensor) -> Reading:  # (3,), float64
    """What came of reading a tensor, from all its pieces."""
    moved, lost, check = sums.tolist()
    return Reading(math.sqrt(moved), math.sqrt(lost), check == 0)


def _reach(values: Tensor) -> Tensor:  # (n,) -> (), 0 only where all are 0, NaN or infinite where one of them is
    """The largest distance between two of the values and 0."""
    if not len(values):
        return values.new_zeros(())
    least, most = torch.aminmax(values)
    return torch.maximum(most, -least)
