"""How a plan is made: which tensors somebody moved, how coarse they were stored, which totals are kept as factors."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flows.admission import Admitted
from flows.fitting import Fitted
from flows.kinds import Kinds, kinds_of
from flows.options import LineConfig
from flows.plan import LEFT, Plan, numerics_profile
from flows.recipe import Recipe
from flows.versions import Version
from registry.records import FoldinError, Refusal

if TYPE_CHECKING:
    from registry.weights import Checkpoint


def plan_for(settings: LineConfig, recipe: Recipe, base: Version, parent: Version, experts: Sequence[Admitted]) -> Plan:
    """The plan of folding experts into a version.

    Raises:
        FoldinError: E_METHOD when the method cannot read the parent's state.
    """
    from evaluation.architecture import anatomy

    check_method(recipe.method, parent)
    weights = base.weights()
    kinds = kinds_of(settings, weights, anatomy(base.folder, list(weights)))
    slots = parent.slots()
    return make_plan(
        recipe.method,
        recipe.parameters,
        weights,
        slots,
        tuple(expert.body for expert in experts),
        kinds,
        stats=parent.memory.stats,
        stored=parent.memory.stored,
        weights=tuple(recipe.weight * expert.weight for expert in experts),
        squares=sum(each.weight**2 for each in parent.memory.experts),
        device=settings.device,
    )


def plan_to_read(settings: LineConfig, base: Version, version: Version) -> Plan:
    """The plan of making a version's serving weights again, from the base and the version's own state: nothing to fold.

    What was done with which tensor was decided when the version was made; patterns that changed since change nothing.
    """
    from evaluation.architecture import anatomy

    weights, slots, memory = base.weights(), version.slots(), version.memory
    kinds = kinds_of(replace(settings, plain=(), project=()), weights, anatomy(base.folder, list(weights)))
    kinds, touched = replace(kinds, projected=frozenset(memory.projected)), _touched(slots)
    names = tuple(name for name in weights.stored if name in touched)
    profile = numerics_profile(settings.device)
    return Plan(memory.method, memory.parameters, weights, slots, (), kinds, memory.stats, names, (), {}, profile)


def make_plan(
    method: str,
    parameters: Mapping[str, Any],
    base: "Checkpoint",
    slots: "Checkpoint | None",
    experts: tuple[Fitted, ...],
    kinds: Kinds,
    *,
    stats: tuple[float, float, float] = (0.0, 0.0, 0.0),
    stored: Mapping[str, str] | None = None,  # by the experts before
    weights: tuple[float, ...] = (),  # per expert; () for 1
    squares: float | None = None,  # of the weights before, summed; None where all were 1
    device: str = "cpu",
) -> Plan:
    """A plan from its parts: names, dtypes and ranks follow from what the experts and the slots hold."""
    experts = tuple(_with_moments(expert, kinds) for expert in experts)
    touched = _touched(slots).union(*(expert.moved for expert in experts))
    names = tuple(name for name in base.stored if name in touched and _is_folded(base, name, kinds))
    profile, weights = numerics_profile(device), weights or (1.0,) * len(experts)
    past = stats[0] if squares is None else squares
    plan = Plan(method, dict(parameters), base, slots, experts, kinds, stats, names, (), {}, profile, weights, past)
    steps, before = list[Mapping[str, str]](), _touched(slots)
    for expert in experts:
        steps.append(_coarsest(base, steps[-1] if steps else stored or {}, expert, before))
        before |= expert.moved
    ranks = {name: _ranks(plan, name) for name in names if plan.rule.additive}
    factored = {name: each for name, each in ranks.items() if max(_rank_before(plan, name), *each) > 0}
    return replace(plan, stored=tuple(steps), ranks=factored)


def _with_moments(expert: Fitted, kinds: Kinds) -> Fitted:
    """The expert with the mean squares that its means moved, whether or not the variances beside them moved too."""
    return replace(expert, moved=expert.moved.union(kinds.means[name] for name in expert.moved & kinds.means.keys()))


def _is_folded(base: "Checkpoint", name: str, kinds: Kinds) -> bool:
    from merging.fold import is_folded
    from registry.weights import DTYPES

    return is_folded(DTYPES[base.stored[name].spec.dtype]) and name not in kinds.untouched and name not in kinds.same


def _touched(slots: "Checkpoint | None") -> frozenset[str]:
    """Names of the tensors that somebody moved before."""
    return frozenset(key.rpartition(":")[0] for key in slots or ())


def _coarsest(
    base: "Checkpoint",
    earlier: Mapping[str, str],  # what this was before the expert
    expert: Fitted,
    before: Collection[str],  # what others moved
) -> dict[str, str]:
    """Per tensor the coarsest dtype that those who moved it rounded it to, where that is not the base's."""
    import torch

    from registry.weights import DTYPES

    stored = dict(earlier)
    for name in expert.moved:
        if name not in base or name not in expert or not DTYPES[expert.specs[name].dtype].is_floating_point:
            continue
        known = [stored.get(name, base.stored[name].spec.dtype)] if name in before else []
        stored[name] = max([expert.rounded_to(name), *known], key=lambda dtype: torch.finfo(DTYPES[dtype]).eps)
    return {name: dtype for name, dtype in stored.items() if dtype != base.stored[name].spec.dtype}


def _ranks(plan: Plan, name: str) -> tuple[int, ...]:
    """The rank of a tensor's total after each expert, as long as it is kept as factors: then -1."""
    from merging.lowrank import fits

    rank, ranks, shape = _rank_before(plan, name), list[int](), plan.base.stored[name].spec.shape
    for expert in plan.experts:
        if name in expert.moved:
            own = expert.rank(name)
            kept = own is not None and rank >= 0 and fits(rank + own, shape)
            rank = rank + own if kept and own is not None else -1
        ranks.append(rank)
    return tuple(ranks)


def _rank_before(plan: Plan, name: str) -> int:
    if plan.slots is None or not any(f"{name}:total{end}" in plan.slots for end in ("", f".{LEFT}")):
        return 0
    key = f"{name}:total.{LEFT}"
    return plan.slots.stored[key].spec.shape[1] if key in plan.slots else -1


def check_method(method: str, parent: Version) -> None:
    """Nothing, when a method can go on from a version's state: its own, or a sum where both keep one."""
    from merging import build

    written = parent.memory.method
    if not parent.memory.experts or written == method or (build(written, {}).additive and build(method, {}).additive):
        return
    raise FoldinError(
        Refusal(
            code="E_METHOD",
            what="the method cannot go on from the version's state",
            where=f"version {parent.number}",
            expected=f"method {written}, or one that keeps a sum as it does",
            found=f"method {method}",
            remedy="set the method back, or start a new line for the new method",
        )
    )
