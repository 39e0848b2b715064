"""One expert into the running model, tensor by tensor: the only place where `expert - base` is computed.

>>> from merging.arithmetic import average
>>> base, expert = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0])
>>> state, found = fold_tensor(average(), base, None, expert, Role())
>>> state["total"], found.delta_norm
(tensor([0., 2.]), 2.0)
"""

import math
from collections.abc import Generator, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from merging.measure import Measure, blocks, measure, measured, products, products_of_sum, quadrature, scratch
from merging.method import MergeError, Method, Role, State, Stats

T = TypeVar("T")
R = TypeVar("R")


def is_folded(value: Tensor | torch.dtype) -> bool:
    """Whether tensors of this dtype are folded: floats are, integers and booleans stay as they are in the base."""
    return (value if isinstance(value, torch.dtype) else value.dtype).is_floating_point


def role_of(
    base: Tensor,  # any shape; (out, in) or more axes if projected
    projected: bool,
    experts: float,  # folded so far, >= 0; with weights the sum of their squares
    stored: torch.dtype | None = None,  # the coarsest dtype any of the experts was stored in; None: the base's
    *,
    stacked: bool = False,  # (matrices, out, in), each a weight of its own; else (out, all other axes together)
) -> Role:
    """How the tensor takes part in the next fold.

    The noise is twice the spectral norm expected of independent roundings, which add up over the experts:
    2 * eps(stored) * rms(base) / sqrt(12) * (sqrt(out) + sqrt(in)) * sqrt(experts + 1).
    Source of the norm: largest singular value of a random matrix, Vershynin, arXiv 1011.3027, Theorem 5.32.

    Raises:
        MergeError: a tensor to project has fewer axes than that, or is not of floats.
    """
    if not projected:
        return Role()
    if base.ndim < 2 + stacked or not is_folded(base):
        found = f"{base.dtype} {tuple(base.shape)}"
        expected = "a stack of float matrices" if stacked else "a float matrix"
        raise MergeError(f"a projected tensor has dtype and shape {found}, expected {expected}; do not project it")
    step = torch.finfo(stored or base.dtype).eps * _rms(base) / math.sqrt(12)
    rows, columns = base.shape[stacked], math.prod(base.shape[stacked + 1 :])
    edges = math.sqrt(rows) + math.sqrt(columns)
    return Role(projected=True, noise=2 * step * edges * math.sqrt(experts + 1), stacked=stacked)


def fold_tensor(
    method: Method,
    base: Tensor,  # any shape, float
    state: State | None,  # None: no expert has moved this tensor yet
    expert: Tensor,  # shape of base, any float dtype
    role: Role,
    weight: float = 1.0,  # what expert - base is multiplied by before anything else, > 0
) -> tuple[State, Measure]:
    """The state after this expert, float32, and what the fold did. No argument is changed.

    Raises:
        MergeError: the tensors cannot be subtracted, or the result is not finite.
    """
    if not role.projected:
        pieces, (found,) = drained(fold_pieces(method, base, state, [expert], [weight]))
        return {name: whole([piece[name] for piece in pieces], base) for name in pieces[0]}, found
    _check_pair(expert, base)
    delta = _subtract(expert, base).mul_(weight)
    after = method.fold(method.init(base) if state is None else state, delta, role)
    found = measure(state, delta, after)
    check_norms(found)
    return after, found


def fold_pieces(
    method: Method,
    base: Tensor,  # any shape, float
    state: State | None,  # None: no expert has moved this tensor yet
    experts: Sequence[Tensor],  # in the order of folding, each of the shape of base and any float dtype
    weights: Sequence[float] = (),  # what each expert - base is multiplied by, > 0; () for 1
    device: torch.device | None = None,  # where it is computed; None: where base is
) -> Generator[State, None, list[Measure]]:
    """The state of a tensor that is not projected after all experts, piece by piece; returns what each fold did.

    The pieces are flat and cover the entries in order. What is computed on the way stays in a core's cache, and the
    result is that of folding the experts one after the other. A device needs room for one piece of each tensor.

    Raises:
        MergeError: the tensors cannot be subtracted, or the result is not finite.
    """
    for expert in experts:
        _check_pair(expert, base)
    old, news = base.detach().reshape(-1), [expert.detach().reshape(-1) for expert in experts]
    earlier = None if state is None else {name: slot.reshape(-1) for name, slot in state.items()}
    where = device or base.device
    given, room = scratch(old, 2, wide(base, *experts), where), scratch(old, 3, device=where)
    sums = torch.zeros(len(news), 6, dtype=torch.float64, device=where)
    inner = products_of_sum if method.additive else products
    for part in blocks(old, where):
        theirs, ours = given[:, : part.stop - part.start]
        ours.copy_(old[part])
        found = None if earlier is None else {name: slot[part].to(where) for name, slot in earlier.items()}
        for number, new in enumerate(news):
            delta = theirs.copy_(new[part]).sub_(ours).float()
            if weights and weights[number] != 1:  # a pass over the piece, which most experts need not pay
                delta.mul_(weights[number])
            before = method.init(delta) if found is None else found
            after = method.fold(before, delta, Role())
            sums[number] += inner(room, delta, after["total"], None if found is None else found["total"])
            found = {name: slot.clone() if slot is delta else slot for name, slot in after.items()}
        assert found is not None
        yield found
    measures = [measured(row) for row in sums]
    for each in measures:
        check_norms(each)
    return measures


def check_norms(found: Measure) -> None:
    """Nothing, when a fold's norms are finite.

    Raises:
        MergeError: they are not.
    """
    if not (math.isfinite(found.delta_norm) and math.isfinite(found.total_norm)):
        norms = f"|expert - base| = {found.delta_norm}, |total| = {found.total_norm}"
        raise MergeError(f"the fold is not finite: {norms}; look for NaN or infinity in the expert and the base")


def advance(stats: Stats, measures: Iterable[Measure], weight: float = 1.0) -> Stats:
    """The statistics after one more expert, from the measures of all folded tensors, in any order.

    An expert of weight w counts as w experts; its norm is that of what was folded, so a common factor on all weights
    changes nothing that is read.

    Tensors that the expert did not move count too, since total_norm covers the whole model. The sums are exactly
    rounded, so they depend on neither the order of the tensors nor on how the work was cut into parts.
    """
    found = list(measures)
    return Stats(
        count=stats.count + weight,
        norm_sum=stats.norm_sum + quadrature(one.delta_norm for one in found),
        total_norm=quadrature(one.total_norm for one in found),
    )


def drained(pieces: Generator[T, None, R]) -> tuple[list[T], R]:
    """All that a generator yields, and what it returns."""
    items: list[T] = []
    while True:
        try:
            items.append(next(pieces))
        except StopIteration as end:
            return items, end.value


def whole(pieces: Sequence[Tensor], base: Tensor) -> Tensor:
    """A tensor of the shape of base from its pieces."""
    return torch.cat(list(pieces)).reshape(base.shape)


def _check_pair(expert: Tensor, base: Tensor) -> None:
    if expert.shape != base.shape or not (is_folded(expert) and is_folded(base)):
        found = f"expert {expert.dtype} {tuple(expert.shape)}, base {base.dtype} {tuple(base.shape)}"
        raise MergeError(f"expected float tensors of one shape, found {found}; skip what is_folded refuses")


def _subtract(expert: Tensor, base: Tensor) -> Tensor:
    """expert - base in float32 or wider, as float32, contiguous."""
    return (expert.detach().to(wide(expert, base)) - base.detach()).float().contiguous()


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype in which these are computed with: float32, or float64 where one of them is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _rms(tensor: Tensor) -> float:
    flat = tensor.detach().reshape(-1)
    squares = math.fsum(float(part @ part) for part in (flat[part].double() for part in blocks(flat)))
    return math.sqrt(squares / len(flat)) if len(flat) else 0.0
