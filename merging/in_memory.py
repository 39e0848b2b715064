"""Whole models in memory, for notebooks and tests.

>>> base, expert = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}
>>> merge(base, [expert, expert], "average", projected=[])["w"]
tensor([1., 3.])
"""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from merging.catalogue import build
from merging.check import check_schema
from merging.fold import advance, fold_tensor, is_folded, role_of
from merging.method import MergeError, Method, State, Stats
from merging.read import read_tensor


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
