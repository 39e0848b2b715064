"""One expert into the running model, tensor by tensor: the only place where `expert - base` and `base +` are computed.

>>> base, expert = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}
>>> merge(base, [expert, expert], "average", projected=[])["w"]
tensor([1., 3.])
"""

import math
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from merging.catalogue import build
from merging.check import check_schema
from merging.measure import Measure, blocks, measure, measured, products, products_of_sum, quadrature, scratch
from merging.method import MergeError, Method, Role, State, Stats


def is_folded(value: Tensor | torch.dtype) -> bool:
    """Whether tensors of this dtype are folded: floats are, integers and booleans stay as they are in the base."""
    return (value if isinstance(value, torch.dtype) else value.dtype).is_floating_point


def is_trivial(state: State) -> bool:
    """Whether every slot is zero, so that dropping the state changes no result."""
    return not any(bool(slot.any()) for slot in state.values())


def role_of(
    base: Tensor,  # any shape; (out, in) or more axes if projected
    projected: bool,
    experts: float,  # folded so far, >= 0
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
) -> tuple[State, Measure]:
    """The state after this expert, float32, and what the fold did. No argument is changed.

    Raises:
        MergeError: the tensors cannot be subtracted, or the result is not finite.
    """
    if not role.projected:
        pieces, (found,) = drained(fold_pieces(method, base, state, [expert]))
        return {name: _whole([piece[name] for piece in pieces], base) for name in pieces[0]}, found
    _check_pair(expert, base)
    delta = _subtract(expert, base)
    after = method.fold(method.init(base) if state is None else state, delta, role)
    found = measure(state, delta, after)
    check_norms(found)
    return after, found


def fold_pieces(
    method: Method,
    base: Tensor,  # any shape, float
    state: State | None,  # None: no expert has moved this tensor yet
    experts: Sequence[Tensor],  # in the order of folding, each of the shape of base and any float dtype
) -> Generator[State, None, list[Measure]]:
    """The state of a tensor that is not projected after all experts, piece by piece; returns what each fold did.

    The pieces are flat and cover the entries in order. What is computed on the way stays in a core's cache, and the
    result is that of folding the experts one after the other.

    Raises:
        MergeError: the tensors cannot be subtracted, or the result is not finite.
    """
    for expert in experts:
        _check_pair(expert, base)
    old, news = base.detach().reshape(-1), [expert.detach().reshape(-1) for expert in experts]
    earlier = None if state is None else {name: slot.reshape(-1) for name, slot in state.items()}
    given, room = scratch(old, 2, _wide(base, *experts)), scratch(old, 3)
    sums = torch.zeros(len(news), 6, dtype=torch.float64, device=base.device)
    inner = products_of_sum if method.additive else products
    for part in blocks(old):
        theirs, ours = given[:, : part.stop - part.start]
        ours.copy_(old[part])
        found = None if earlier is None else {name: slot[part] for name, slot in earlier.items()}
        for number, new in enumerate(news):
            delta = theirs.copy_(new[part]).sub_(ours).float()
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


def advance(stats: Stats, measures: Iterable[Measure]) -> Stats:
    """The statistics after one more expert, from the measures of all folded tensors, in any order.

    Tensors that the expert did not move count too, since total_norm covers the whole model. The sums are exactly
    rounded, so they depend on neither the order of the tensors nor on how the work was cut into parts.
    """
    found = list(measures)
    return Stats(
        count=stats.count + 1,
        norm_sum=stats.norm_sum + quadrature(one.delta_norm for one in found),
        total_norm=quadrature(one.total_norm for one in found),
    )


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
    return _whole(pieces, base), found


def read_pieces(method: Method, base: Tensor, state: State | None, stats: Stats) -> Generator[Tensor, None, Reading]:
    """The merged tensor piece by piece, flat, in the order of its entries; returns what came of it."""
    old = base.detach().reshape(-1)
    if state is None:
        yield from (old[part].clone() for part in blocks(old))
        return Reading(0.0, 0.0, True)
    slots = {name: slot.reshape(-1) for name, slot in state.items()}
    whole = None if method.entrywise else method.read(state, stats).reshape(-1)
    room, sums = reading_room(old), torch.zeros(3, dtype=torch.float64, device=base.device)
    for part in blocks(old):
        update = (
            method.read({name: slot[part] for name, slot in slots.items()}, stats) if whole is None else whole[part]
        )
        merged, found = merged_piece(old[part], update, room)
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


def reading_room(base: Tensor) -> Tensor:
    """What `merged_piece` computes in."""
    return scratch(base, 2, _wide(base))


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


T = TypeVar("T")
R = TypeVar("R")


def drained(pieces: Generator[T, None, R]) -> tuple[list[T], R]:
    """All that a generator yields, and what it returns."""
    items: list[T] = []
    while True:
        try:
            items.append(next(pieces))
        except StopIteration as end:
            return items, end.value


def _whole(pieces: Sequence[Tensor], base: Tensor) -> Tensor:
    return torch.cat(list(pieces)).reshape(base.shape)


def merge(
    base: Mapping[str, Tensor],
    experts: Iterable[Mapping[str, Tensor]],  # names and shapes of base; what one lacks it left unchanged
    method: str = "opcm",
    *,
    projected: Collection[str],  # names of the linear weights, each (out, in)
    **parameters: object,  # of the method
) -> dict[str, Tensor]:
    """The base with all experts folded in, in the given order; names, shapes and dtypes of base, new tensors.

    Raises:
        MergeError: an unknown method, parameter or projected name, or an expert that does not fit the base.
    """
    rule, stats = build(method, parameters), Stats()
    _check_names(projected, base)
    states: dict[str, State | None] = dict.fromkeys(name for name in base if is_folded(base[name]))
    coarsest = {name: base[name].dtype for name in states}
    for number, expert in enumerate(experts, start=1):
        _check_expert(base, expert, number)
        measures = []
        for name, state in states.items():
            given = expert.get(name, base[name])
            coarsest[name] = max(coarsest[name], given.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            try:
                role = role_of(base[name], name in projected, stats.count, coarsest[name])
                states[name], found = fold_tensor(rule, base[name], state, given, role)
            except MergeError as error:
                raise MergeError(f"expert {number}, tensor {name!r}: {error}") from error
            measures.append(found)
        stats = advance(stats, measures)
    return {name: _merged(rule, tensor, states.get(name), stats) for name, tensor in base.items()}


def _merged(method: Method, base: Tensor, state: State | None, stats: Stats) -> Tensor:
    return read_tensor(method, base, state, stats)[0] if is_folded(base) else base.detach().clone()


class _Spec(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, _Spec]:
    return {name: _Spec(str(one.dtype).removeprefix("torch."), tuple(one.shape)) for name, one in tensors.items()}


def _check_names(projected: Collection[str], base: Mapping[str, Tensor]) -> None:
    unknown = sorted(set(projected) - set(base))
    if unknown:
        raise MergeError(f"projected names {unknown} are not in the base; name its linear weights as it does")


def _check_expert(base: Mapping[str, Tensor], expert: Mapping[str, Tensor], number: int) -> None:
    findings = check_schema(_specs(base), _specs(expert), heads=lambda name: False)
    if findings:
        _, tensor, what, expected, found = findings[0]
        problem = f"expert {number}, tensor {tensor!r}: {what}; expected {expected}, found {found}"
        raise MergeError(f"{problem} (problem 1 of {len(findings)}); pass the base's tensors only, from this base")


def _check_pair(expert: Tensor, base: Tensor) -> None:
    if expert.shape != base.shape or not (is_folded(expert) and is_folded(base)):
        found = f"expert {expert.dtype} {tuple(expert.shape)}, base {base.dtype} {tuple(base.shape)}"
        raise MergeError(f"expected float tensors of one shape, found {found}; skip what is_folded refuses")


def _subtract(expert: Tensor, base: Tensor) -> Tensor:
    """expert - base in float32 or wider, as float32, contiguous."""
    return (expert.detach().to(_wide(expert, base)) - base.detach()).float().contiguous()


def _wide(*tensors: Tensor) -> torch.dtype:
    """The dtype in which these are computed with: float32, or float64 where one of them is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _rms(tensor: Tensor) -> float:
    flat = tensor.detach().reshape(-1)
    squares = math.fsum(float(part @ part) for part in (flat[part].double() for part in blocks(flat)))
    return math.sqrt(squares / len(flat)) if len(flat) else 0.0
