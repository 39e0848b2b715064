"""The two passes over a model, tensor by tensor: experts into the state, then base and state into serving weights.

A pass reads each tensor once, whatever the number of experts, and holds a few tensors at a time, whatever the size of
the model. The state is written in parts; a part that is there with its record is not made again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from flows.plan import Plan, numerics_profile, parts_of, state_in
from flows.pool import Job, devices_of, pool
from registry.files import read_json, sha256_file, sweep, write_json
from registry.headers import BYTES
from registry.records import FoldinError, Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from merging.fold import Reading
    from merging.lowrank import Factors
    from merging.measure import Measure
    from merging.method import State, Stats
    from registry.weights import Checkpoint
    from registry.writer import Entry

Progress = Callable[[int, int], None]  # tensors done, tensors in all
Measures = dict[str, "Measure"]  # tensor name -> what one expert did to it
PART_BYTES = 128 * 2**20  # of state in one part: what a crash costs, and what one worker takes at a time


@dataclass(frozen=True)
class Part:
    """One file of the state."""

    file: str
    names: tuple[str, ...]  # of the tensors whose slots it holds


class Serving(NamedTuple):
    """What the second pass made."""

    sha256: str  # content digest of the serving weights
    cast_loss: float  # norm of what the casts to the base's dtypes took away, over the norm of what was added


def fold_state(
    folder: Path,  # gets the state's files
    records: Path,  # folder for what is known of finished parts; both may hold an earlier run's
    plan: Plan,
    devices: tuple[str, ...],
    progress: Progress = lambda done, total: None,
) -> list[Measures]:
    """First pass: base, earlier state and experts in, the new state out; what each expert did, in their order.

    Raises:
        FoldinError: E_FOLD naming a tensor that cannot be folded; E_DISK, or as `Checkpoint` where a file is damaged.
    """
    from registry.writer import write_index

    parts = state_parts(plan)
    sweep(folder)
    done = {part.file: _recorded(folder, records, part, plan) for part in parts}
    todo = [part for part in parts if done[part.file] is None]
    made = 0

    def count(name: str) -> None:
        nonlocal made
        made += 1
        progress(made, sum(len(part.names) for part in todo))

    with pool(devices) as run:
        jobs = (_fold_job(plan, name) for part in todo for name in part.names)
        results = cast("Iterator[_Folded]", run(jobs))
        for part in todo:
            done[part.file] = _write_part(folder, records, part, plan, results, count)
    if len(parts) > 1:
        layout = {part.file: [key for name in part.names for key in plan.slot_specs(name)] for part in parts}
        specs = {key: spec for part in parts for name in part.names for key, spec in plan.slot_specs(name).items()}
        write_index(folder, specs, layout)
    return [_joined(done.values(), number) for number in range(len(plan.experts))]


def state_parts(plan: Plan) -> list[Part]:
    """The files of the state after this pass; none where no expert moved anything."""
    cut = parts_of(plan, PART_BYTES) if plan.names else ()
    if len(cut) == 1:
        return [Part("model.safetensors", cut[0])]
    return [Part(f"model-{number:05}-of-{len(cut):05}.safetensors", names) for number, names in enumerate(cut, 1)]


def stats_after(plan: Plan, measures: Iterable[Mapping[str, "Measure"]]) -> "Stats":
    """The statistics after all experts of a pass; running statistics of batch norms count in no norm."""
    from merging import Stats
    from merging.fold import advance

    stats = Stats(*plan.stats)
    for each in measures:
        stats = advance(stats, (one for name, one in each.items() if not plan.is_statistic(name)))
    return stats


def materialise(
    folder: Path,  # gets the serving checkpoint, in the dtypes and shards of the base
    slots: "Checkpoint | None",  # the state after the first pass
    plan: Plan,
    stats: "Stats",
    devices: tuple[str, ...],
    progress: Progress = lambda done, total: None,
) -> Serving:
    """Second pass: base and state in, the serving checkpoint out.

    Raises:
        FoldinError: E_FOLD where a merged tensor overflows its dtype; E_DISK, or as `Checkpoint`.
    """
    from merging.measure import quadrature
    from registry.writer import Entry, write_checkpoint

    losses: list[tuple[float, float]] = []

    def entries() -> "Iterator[Entry]":
        for read in cast("Iterator[_Read]", results):
            losses.append((read.moved, read.lost))
            progress(len(losses), len(plan.base))
            yield Entry(read.name, read.tensor, read.sha256)

    with pool(devices) as run:
        results = run(_read_job(plan, slots, stats, name) for names in plan.base.layout.values() for name in names)
        written = write_checkpoint(folder, plan.base.specs, entries(), layout=plan.base.layout)
    moved, lost = (quadrature(column) for column in zip(*losses, strict=True))
    return Serving(written.sha256, lost / moved if moved else 0.0)


# one tensor


class _Folded(NamedTuple):
    name: str
    slots: "dict[str, Tensor]"  # key -> on the CPU
    measures: "list[Measure]"  # per expert


class _Read(NamedTuple):
    name: str
    tensor: "Tensor"
    sha256: str
    moved: float
    lost: float


def _fold_job(plan: Plan, name: str) -> Job:
    entries, long = prod(plan.base.stored[name].spec.shape), 4 * (4 if name in plan.kinds.projected else 3)

    def expect() -> None:
        plan.base.expect(name)
        if plan.slots is not None and f"{name}:total" in plan.slots:
            plan.slots.expect(f"{name}:total")
        for expert in plan.experts:
            if name in expert.moved:
                expert.expect(name)

    return Job(lambda device: fold_one(plan, name, device), entries * long, expect)


def fold_one(plan: Plan, name: str, device: str) -> _Folded:
    """One tensor through all experts of a plan."""
    from merging.lowrank import Factors

    with _blamed(name):
        base = None if plan.is_factored(name) else _base_of(plan, name, device)
        state, measures = plan.earlier(name, device), []
        for number in range(len(plan.experts)):
            state, found = _step(plan, name, number, base, state, device)
            measures.append(found)
    assert state is not None, "a tensor of the plan was moved by somebody"
    sides = {f"total.{side}": each for side, each in state._asdict().items()} if isinstance(state, Factors) else state
    return _Folded(name, {f"{name}:{slot}": sides[slot].cpu() for slot in sorted(sides)}, measures)


def _step(
    plan: Plan, name: str, number: int, base: "Tensor | None", state: "State | Factors | None", device: str
) -> "tuple[State | Factors | None, Measure]":
    """One expert into one tensor's state."""
    from merging.fold import fold_tensor
    from merging.lowrank import Factors, dense, fold_factors
    from merging.measure import Measure
    from merging.method import Role

    expert, method = plan.experts[number], plan.method_for(name)
    moved = name in expert.moved
    if state is None and not moved:
        return None, Measure(0.0, 0.0, 0.0, 0.0)
    if name in plan.ranks and plan.ranks[name][number] >= 0:
        assert state is None or isinstance(state, Factors)
        update = expert.factors(name) if moved else None
        delta = Factors(*(side.to(device) for side in update)) if update else _nothing(state)
        role = Role(projected=name in plan.kinds.projected)  # factors carry no rounding of the base's storage
        return fold_factors(method, state, delta, role)
    assert base is not None
    whole = {"total": dense(state)} if isinstance(state, Factors) else state
    new = _tensor_of(plan, expert, name).to(device) if moved else base
    return fold_tensor(method, base, whole, new, plan.role(name, base, number))


def _nothing(state: "Factors | None") -> "Factors":
    """The update of an expert that left the tensor alone: rank 0."""
    from merging.lowrank import Factors

    assert state is not None
    return Factors(*(side[:, :0] for side in state))


def _base_of(plan: Plan, name: str, device: str) -> "Tensor":
    return _tensor_of(plan, plan.base, name).to(device)


def _tensor_of(plan: Plan, tensors: "Mapping[str, Tensor]", name: str) -> "Tensor":
    """A tensor as it is folded: in place of a running variance the mean square."""
    from merging.statistics import second_moment

    if name not in plan.kinds.variances:
        return tensors[name]
    mean = plan.kinds.variances[name]
    return second_moment(tensors[mean] if mean in tensors else plan.base[mean], tensors[name])


def _read_job(plan: Plan, slots: "Checkpoint | None", stats: "Stats", name: str) -> Job:
    stored = plan.base.stored[name]

    def expect() -> None:
        plan.base.expect(name)
        if slots is not None and f"{name}:total" in slots:
            slots.expect(f"{name}:total")

    size = prod(stored.spec.shape) * (4 + 2 * BYTES[stored.spec.dtype])
    return Job(lambda device: _read_one(plan, slots, stats, name, device), size, expect)


def _read_one(plan: Plan, slots: "Checkpoint | None", stats: "Stats", name: str, device: str) -> _Read:
    """One serving tensor with its digest."""
    from merging.fold import Reading, is_folded, read_tensor
    from registry.weights import tensor_sha256

    kept = plan.kinds.same.get(name, name)
    base = plan.base[kept]
    if slots is None or not is_folded(base):
        return _Read(name, base, tensor_sha256(base), 0.0, 0.0)

    def reading(name: str) -> Reading:
        state = _dense(state_in(slots, name, plan.method_for(name), device))
        return read_tensor(plan.method_for(name), _base_of(plan, name, device), state, stats)

    with _blamed(kept):
        found = _variance(plan, kept, reading, base) if kept in plan.kinds.variances else reading(kept)
    if not found.finite:
        raise FoldinError(_unfoldable(kept, "the merged tensor is not finite", _first_wrong(kept, found.tensor)))
    tensor = found.tensor.cpu()
    counted = kept == name and not plan.is_statistic(name)
    return _Read(name, tensor, tensor_sha256(tensor), *((found.moved, found.lost) if counted else (0.0, 0.0)))


def _variance(plan: Plan, name: str, reading: "Callable[[str], Reading]", base: "Tensor") -> "Reading":
    """A running variance, from the merged mean square and the merged mean."""
    from merging.statistics import variance

    moment, mean = reading(name), reading(plan.kinds.variances[name])
    return moment._replace(tensor=variance(mean.tensor, moment.tensor).to(base.dtype))


def _dense(state: "State | Factors | None") -> "State | None":
    from merging.lowrank import Factors, dense

    return {"total": dense(state)} if isinstance(state, Factors) else state


# one part


def _write_part(
    folder: Path, records: Path, part: Part, plan: Plan, results: Iterator[_Folded], count: Callable[[str], None]
) -> "list[Measures]":
    """Write one file of the state from the next results, then the record that it is there."""
    from registry.writer import Entry, write_part

    measures: list[Measures] = [{} for _ in plan.experts]

    def entries() -> "Iterator[Entry]":
        for name in part.names:
            found = next(results)
            for number, each in enumerate(found.measures):
                measures[number][name] = each
            yield from (Entry(key, slot) for key, slot in found.slots.items())
            count(name)

    specs = {key: spec for name in part.names for key, spec in plan.slot_specs(name).items()}
    sha256 = write_part(folder / part.file, specs, entries())
    write_json(_record(records, part), {"sha256": sha256, "profile": dict(plan.profile), "measures": measures})
    return measures


def fold_part(folder: Path, records: Path, plan: Plan, part: Part, device: str) -> "list[Measures]":
    """One part on its own, on any worker that sees the same folders; repeating it is harmless."""
    found = _recorded(folder, records, part, plan)
    if found is not None:
        return found
    _check_profile(plan, device)
    with pool(devices_of(device)) as run:
        results = cast("Iterator[_Folded]", run(_fold_job(plan, name) for name in part.names))
        return _write_part(folder, records, part, plan, results, lambda name: None)


def _recorded(folder: Path, records: Path, part: Part, plan: Plan) -> "list[Measures] | None":
    """What a finished part did, when its file is still the one that was written; None when it must be made."""
    from merging.measure import Measure

    path = _record(records, part)
    if not path.exists() or not (folder / part.file).exists():
        return None
    facts = read_json(path)
    if facts["profile"] != dict(plan.profile) or facts["sha256"] != sha256_file(folder / part.file):
        return None
    return [{name: Measure(*values) for name, values in each.items()} for each in facts["measures"]]


def _record(records: Path, part: Part) -> Path:
    return records / f"{part.file}.json"


def _joined(parts: "Iterable[list[Measures] | None]", number: int) -> "Measures":
    """One expert's measures over all parts."""
    return {name: found for measures in parts if measures for name, found in measures[number].items()}


def _check_profile(plan: Plan, device: str) -> None:
    """A worker of another kind would give other bytes than this one."""
    mine = numerics_profile(device)
    if mine != plan.profile:
        key = next(key for key in mine if mine[key] != plan.profile.get(key))
        raise FoldinError(
            Refusal(
                code="E_PROFILE",
                what=f"a worker has another {key} than the process that planned the fold",
                expected=str(plan.profile.get(key)),
                found=mine[key],
                remedy="give all workers the same software and the same kind of processor",
            )
        )


# what cannot be folded


@contextmanager
def _blamed(name: str) -> Iterator[None]:
    """What cannot be folded is said with the tensor's name, and is the expert's fault."""
    from merging import MergeError

    try:
        yield
    except MergeError as error:
        raise FoldinError(_unfoldable(name, "the tensor cannot be folded", str(error))) from error


def _unfoldable(name: str, what: str, found: str) -> Refusal:
    remedy = "look at the expert's training; its change of this tensor is too large to be merged"
    return Refusal("E_FOLD", what, "", "", name, "finite values", found, remedy)


def _first_wrong(name: str, tensor: "Tensor") -> str:
    from merging.check import check_finite

    found = check_finite(name, tensor)
    return found.found if found else ""
