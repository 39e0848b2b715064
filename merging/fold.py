"""One expert into the running model, tensor by tensor: the only place where `expert - base` and `base +` are computed.

>>> base, expert = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}
>>> merge(base, [expert, expert], "average", projected=[])["w"]
tensor([1., 3.])
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from merging.catalogue import build
from merging.check import check_schema
from merging.measure import Measure, blocks, measure, measured, products, quadrature, sum_of
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
    _check_pair(expert, base)
    if role.projected:
        delta = _subtract(expert, base)
        after = method.fold(method.init(base) if state is None else state, delta, role)
        found = measure(state, delta, after)
    else:
        after, found = _fold_entries(method, base, state, expert, role)
    check_norms(found)
    return after, found


def check_norms(found: Measure) -> None:
    """Nothing, when a fold's norms are finite.

    Raises:
        MergeError: they are not.
    """
    if not (math.isfinite(found.delta_norm) and math.isfinite(found.total_norm)):
        norms = f"|expert - base| = {found.delta_norm}, |total| = {found.total_norm}"
        raise MergeError(f"the fold is not finite: {norms}; look for NaN or infinity in the expert and the base")


def _fold_entries(
    method: Method, base: Tensor, state: State | None, expert: Tensor, role: Role
) -> tuple[State, Measure]:
    """Piece by piece, so that what is computed on the way stays in a core's cache."""
    names = list(state or method.init(base[:0] if base.ndim else base))
    after = {name: torch.empty(base.shape, dtype=torch.float32, device=base.device) for name in names}
    flat = {name: slot.view(-1) for name, slot in after.items()}
    earlier = None if state is None else {name: slot.reshape(-1) for name, slot in state.items()}
    old, new = base.detach().reshape(-1), expert.detach().reshape(-1)

    def piece(part: slice) -> Tensor:
        delta = _subtract(new[part], old[part])
        before = method.init(delta) if earlier is None else {name: slot[part] for name, slot in earlier.items()}
        found = method.fold(before, delta, role)
        for name, slot in found.items():
            flat[name][part] = slot
        return products(delta, found["total"], before["total"])

    return after, measured(sum_of(piece(part) for part in blocks(old)))


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
    """A merged tensor and what its last cast cost."""

    tensor: Tensor  # shape and dtype of the base
    moved: float  # Frobenius norm of what was added to the base, weight units
    lost: float  # Frobenius norm of what the cast to the base's dtype took away, weight units
    finite: bool  # whether every value of the tensor is; a cast can overflow


def read_tensor(method: Method, base: Tensor, state: State | None, stats: Stats) -> Reading:
    """The merged tensor: base + read(state, stats), computed in float32 or wider, cast once to the dtype of base.

    A new tensor with the base's values where no expert moved anything (state None or all zero).
    """
    if state is None or is_trivial(state):
        return Reading(base.detach().clone(), 0.0, 0.0, True)
    merged = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    flat, old = merged.view(-1), base.detach().reshape(-1)
    slots = {name: slot.reshape(-1) for name, slot in state.items()}
    whole = None if method.entrywise else method.read(state, stats).reshape(-1)

    def piece(part: slice) -> Tensor:
        given = {name: slot[part] for name, slot in slots.items()}
        update = method.read(given, stats) if whole is None else whole[part]
        exact = old[part].to(_wide(base)) + update
        flat[part] = exact
        return _cast_sums(update, exact, flat[part])

    moved, lost, peak = sum_of(piece(part) for part in blocks(old)).tolist()
    return Reading(merged, math.sqrt(moved), math.sqrt(lost), math.isfinite(peak))


def _cast_sums(update: Tensor, exact: Tensor, cast: Tensor) -> Tensor:  # (n,) each -> (3,), float64
    """Squared norms of the update and of what the cast lost; a number that is finite when every value is."""
    peak = cast.abs().max() if len(cast) else cast.new_zeros(())
    gap = torch.zeros((), dtype=torch.float64, device=cast.device)
    if cast.dtype != exact.dtype:
        difference = (cast - exact).double()
        gap = difference @ difference
    wide = update.double()
    return torch.stack([wide @ wide, gap, peak.double() * 0])


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
    return {name: read_tensor(rule, tensor, states.get(name), stats).tensor for name, tensor in base.items()}


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
    wide = torch.promote_types(_wide(expert), _wide(base))
    return (expert.detach().to(wide) - base.detach()).float().contiguous()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _rms(tensor: Tensor) -> float:
    flat = tensor.detach().reshape(-1)
    squares = math.fsum(float(part @ part) for part in (flat[part].double() for part in blocks(flat)))
    return math.sqrt(squares / len(flat)) if len(flat) else 0.0
