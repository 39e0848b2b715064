"""The files of a state, cut so that folding each takes about the same work."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from flows.plan import Plan

PART_BYTES = 32 * 2**20  # written for one part: what a crash costs, and what one worker takes at a time
MOST_PARTS = 256


@dataclass(frozen=True)
class Part:
    """One file of the state."""

    file: str
    names: tuple[str, ...]  # of the tensors whose slots it holds


def state_parts(plan: Plan) -> list[Part]:
    """The files of the state after this pass; none where no expert moved anything."""
    cut = _cut_by_cost(plan) if plan.names else ()
    if len(cut) == 1:
        return [Part("model.safetensors", cut[0])]
    return [Part(f"model-{number:05}-of-{len(cut):05}.safetensors", names) for number, names in enumerate(cut, 1)]


def _cut_by_cost(plan: Plan) -> tuple[tuple[str, ...], ...]:
    """The names of the plan cut into parts of about equal cost, as many as there are PART_BYTES to write.

    The cut depends on the model alone, never on the number of workers, so that a state's files do not either.
    """
    sizes = [4 * prod(spec.shape) for name in plan.names for spec in plan.slot_specs(name).values()]
    if plan.one_pass:  # a part's serving weights are held until they are written
        sizes += [plan.base.stored[name].bytes for name in plan.names]
    costs = {name: cost(plan, name) for name in plan.names}
    count = max(1, min(MOST_PARTS, round(sum(sizes) / PART_BYTES)))
    return tuple(_cut(plan.names, costs, count))


def cost(plan: Plan, name: str) -> float:
    """What folding one tensor takes, in multiply-adds of float64 products; entries count as 50 for being moved."""
    shape = plan.base.stored[name].spec.shape
    moved = 50.0 * sum(prod(spec.shape) for spec in plan.slot_specs(name).values()) + 10.0 * prod(shape)
    if plan.is_plain(name) or plan.is_factored(name):
        return moved
    stacks, rows, columns = (shape[0], *shape[1:]) if name in plan.kinds.stacked else (1, shape[0], prod(shape[1:]))
    short, long = min(rows, columns), max(rows, columns)
    return moved + len(plan.experts) * stacks * (8.0 * short**3 + 3.0 * long * short**2)


def _cut(names: Sequence[str], costs: Mapping[str, float], count: int) -> Iterable[tuple[str, ...]]:
    """At most `count` runs of names; a run ends where the cost so far passes its share."""
    share, spent, run = sum(costs.values()) / count, 0.0, list[str]()
    ends = 1
    for name in names:
        run.append(name)
        spent += costs[name]
        if spent >= share * ends * (1 - 1e-9) and ends < count:
            yield tuple(run)
            run = []
            ends = max(ends, int(spent / share)) + 1
    if run:
        yield tuple(run)
