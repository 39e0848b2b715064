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
from merging.measure import Measure, measure, quadrature
from merging.method import MergeError, Method, Role, State, Stats


def is_folded(value: Tensor | torch.dtype) -> bool:
    """Whether tensors of this dtype are folded: floats are, integers and booleans stay as they are in the base."""
    return (value if isinstance(value, torch.dtype) else value.dtype).is_floating_point


def is_trivial(state: State) -> bool:
    """Whether every slot is zero, so that dropping the state changes no result."""
    return not any(bool(slot.any()) for slot in state.values())


def role_of(
    base: Tensor,  # any shape; (out, in) if projected
    projected: bool,
    experts: float,  # folded so far, >= 0
    stored: torch.dtype | None = None,  # the coarsest dtype any of the experts was stored in; None: the base's
) -> Role:
    """How the tensor takes part in the next fold.

    The noise is twice the spectral norm expected of independent roundings, which add up over the experts:
    2 * eps(stored) * rms(base) / sqrt(12) * (sqrt(out) + sqrt(in)) * sqrt(experts + 1).
    Source of the norm: largest singular value of a random matrix, Vershynin, arXiv 1011.3027, Theorem 5.32.

    Raises:
        MergeError: a tensor to project is not a float matrix.
    """
    if not projected:
        return Role()
    if base.ndim != 2 or not is_folded(base):
        found = f"{base.dtype} {tuple(base.shape)}"
        raise MergeError(f"a projected tensor has dtype and shape {found}, expected a float matrix; do not project it")
    step = torch.finfo(stored or base.dtype).eps * _rms(base) / math.sqrt(12)
    edges = sum(math.sqrt(length) for length in base.shape)
    return Role(projected=True, noise=2 * step * edges * math.sqrt(experts + 1))


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
    delta = _subtract(expert, base)
    after = method.fold(method.init(base) if state is None else state, delta, role)
    found = measure(state, delta, after)
    if not (math.isfinite(found.delta_norm) and math.isfinite(found.total_norm)):
        norms = f"|expert - base| = {found.delta_norm}, |total| = {found.total_norm}"
        raise MergeError(f"the fold is not finite: {norms}; look for NaN or infinity in the expert and the base")
    return after, found


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


def read_tensor(method: Method, base: Tensor, state: State | None, stats: Stats) -> Tensor:
    """The merged tensor: base + read(state, stats), computed in float32 or wider, cast once to the dtype of base.

    A new tensor with the base's values where no expert moved anything (state None or all zero).
    """
    if state is None or is_trivial(state):
        return base.detach().clone()
    exact = base.detach().to(_wide(base))
    return (exact + method.read(state, stats)).to(base.dtype)


def merge(
    base: Mapping[str, Tensor],
    experts: Iterable[Mapping[str, Tensor]],  # names and shapes of base
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
            coarsest[name] = max(coarsest[name], expert[name].dtype, key=lambda dtype: torch.finfo(dtype).eps)
            try:
                role = role_of(base[name], name in projected, stats.count, coarsest[name])
                states[name], found = fold_tensor(rule, base[name], state, expert[name], role)
            except MergeError as error:
                raise MergeError(f"expert {number}, tensor {name!r}: {error}") from error
            measures.append(found)
        stats = advance(stats, measures)
    return {name: read_tensor(rule, tensor, states.get(name), stats) for name, tensor in base.items()}


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


def _subtract(expert: Tensor, base: Tensor) -> Tensor:
    if expert.shape != base.shape or not (is_folded(expert) and is_folded(base)):
        found = f"expert {expert.dtype} {tuple(expert.shape)}, base {base.dtype} {tuple(base.shape)}"
        raise MergeError(f"expected float tensors of one shape, found {found}; skip what is_folded refuses")
    wide = torch.promote_types(_wide(expert), _wide(base))
    return (expert.detach().to(wide) - base.detach().to(wide)).float().contiguous()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _rms(tensor: Tensor) -> float:
    squares = tensor.detach().double().square()
    return math.sqrt(float(squares.mean())) if tensor.numel() else 0.0
