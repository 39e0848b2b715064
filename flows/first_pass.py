"""One part of the first pass: what the experts make of the state of some tensors, into one file with a record."""

from collections.abc import Generator, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from flows.faults import blamed, with_room
from flows.parts import Part
from flows.plan import Plan, numerics_profile
from flows.pool import Job
from flows.second_pass import Read, Reader, expect_slots, read_tensor
from registry.files import read_json, sha256_file, write_json
from registry.records import FoldinError, Refusal, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from merging.lowrank import Factors
    from merging.measure import Measure
    from merging.method import State, Stats
    from registry.writer import Entry

Measures = dict[str, "Measure"]  # tensor name -> what one expert did to it


class Folded(NamedTuple):
    """What came of one part."""

    measures: "list[Measures]"  # per expert
    reads: "list[Read]"  # its serving tensors, where they were asked for


def part_job(folder: Path, records: Path, plan: Plan, part: Part, stats: "Stats | None" = None) -> Job:
    """`fold_part` as a job of a pool; the file is for `files.sync` to make durable, beside the next one's work."""

    def expect() -> None:
        for name in part.names:
            if not plan.is_factored(name):
                plan.base.expect(name)
            for expert in plan.experts:
                if name in expert.moved:
                    expert.expect(name)
            if plan.slots is not None:
                expect_slots(plan.slots, name)

    need = max(_memory(plan, name) for name in part.names)
    if stats is not None:
        need += sum(plan.base.stored[name].bytes for name in part.names)
    return Job(lambda device: fold_part(folder, records, plan, part, device, stats, durable=False), need, expect)


def _memory(plan: Plan, name: str) -> int:
    """Bytes of memory while a tensor is folded: what is mapped of the files, and what is computed beside it."""
    stored, key = plan.base.stored[name], f"{name}:total"
    entries = prod(stored.spec.shape)
    mapped = stored.bytes * (1 + sum(name in expert.moved for expert in plan.experts))
    earlier = 4 * entries if plan.slots is not None and key in plan.slots else 0
    if plan.is_plain(name):
        return mapped + earlier
    return mapped + earlier + entries * (20 if name in plan.kinds.projected and not plan.is_factored(name) else 8)


def fold_part(
    folder: Path,
    records: Path,
    plan: Plan,
    part: Part,
    device: str,
    stats: "Stats | None" = None,
    durable: bool = True,  # as `files.replacing`; what is lost after a crash is made again, for its record tells
) -> Folded:
    """One part, on any worker that sees the same folders: what each expert did, and its serving tensors given `stats`.

    Repeating it is harmless: a part that was finished is found again.
    """
    from registry.weights import Checkpoint
    from registry.writer import write_part

    measures, reads = _recorded(folder, records, part, plan), dict[str, Read]()
    if measures is None:
        _check_profile(plan, device)
        measures = [{} for _ in plan.experts]
        entries = _entries(plan, part, device, measures, stats, reads)
        sha256 = write_part(folder / part.file, specs_of(plan, part), entries, durable)
        write_json(
            _record(records, part),
            {"sha256": sha256, "plan": plan.sha256, "profile": dict(plan.profile), "measures": measures},
        )
    if stats is None:
        return Folded(measures, [])
    slots = Checkpoint.open_file(folder / part.file, "state of the candidate")
    found = [reads.get(name) or read_tensor(plan, slots, stats, name, device) for name in part.names]
    return Folded(measures, found)


def specs_of(plan: Plan, part: Part) -> dict[str, TensorSpec]:
    """Slot -> dtype and shape, in the order of the part's file."""
    return {key: spec for name in part.names for key, spec in plan.slot_specs(name).items()}


def _recorded(folder: Path, records: Path, part: Part, plan: Plan) -> "list[Measures] | None":
    """What a finished part did, when its file is still the one that was written; None when it must be made."""
    from merging.measure import Measure

    path = _record(records, part)
    if not path.exists() or not (folder / part.file).exists():
        return None
    facts = read_json(path)
    if (
        facts.get("plan") != plan.sha256
        or facts["profile"] != dict(plan.profile)
        or facts["sha256"] != sha256_file(folder / part.file)
    ):
        return None
    if [each.keys() for each in facts["measures"]] != [set(part.names)] * len(plan.experts):  # cut in another way
        return None
    return [{name: Measure(*values) for name, values in each.items()} for each in facts["measures"]]


def recorded_sha256(records: Path, part: Part) -> str:
    """The digest of a finished part's file."""
    digest: str = read_json(_record(records, part))["sha256"]
    return digest


def _record(records: Path, part: Part) -> Path:
    return records / f"{part.file}.json"


def _entries(
    plan: Plan,
    part: Part,
    device: str,
    measures: "list[Measures]",  # gets what each expert did
    stats: "Stats | None",
    reads: "dict[str, Read]",  # gets the serving tensors that could be made on the way
) -> "Iterator[Entry]":
    """The slots of a part's tensors in the order of its file."""
    for name in part.names:
        with blamed(name):
            if plan.is_plain(name):
                reader = None if stats is None else Reader(plan, name, stats)
                found = yield from _fold_pieces(plan, name, device, reader)
                if reader:
                    reads[name] = reader.read()
            else:
                found = yield from _fold_whole(plan, name, device)
        for each, one in zip(measures, found, strict=True):
            each[name] = one


def _fold_pieces(
    plan: Plan, name: str, device: str, reader: "Reader | None"
) -> "Generator[Entry, None, list[Measure]]":
    """One tensor through all experts of a plan, piece by piece; the reader makes the serving tensor of them."""
    import torch

    from merging.fold import fold_pieces
    from merging.measure import Measure
    from registry.writer import Entry

    base, state, where = plan.tensor(plan.base, name), plan.earlier(name, "cpu"), torch.device(device)
    # While nobody has moved it an unmoved tensor has no state, and folding it would make one of zeros: the same.
    late = next(at for at, expert in enumerate(plan.experts) if name in expert.moved) if state is None else 0
    experts = [plan.tensor(expert, name) if name in expert.moved else base for expert in plan.experts[late:]]
    method, weights = plan.method_for(name), plan.weights[late:]
    pieces = fold_pieces(method, base, cast("State | None", state), experts, weights, where)
    measures, flat, at = [Measure(0.0, 0.0, 0.0, 0.0)] * late, base.reshape(-1), 0
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return measures + cast("list[Measure]", end.value)
        yield Entry(f"{name}:total", piece["total"])
        if reader:
            reader.take(flat[at : at + len(piece["total"])].to(where), piece)
            at += len(piece["total"])


def _fold_whole(plan: Plan, name: str, device: str) -> "Generator[Entry, None, list[Measure]]":
    """One tensor through all experts of a plan, one after the other; once more where a GPU was short of memory."""
    from merging.lowrank import Factors
    from registry.writer import Entry

    state, measures = with_room(device, lambda: _folded_whole(plan, name, device))
    sides = {f"total.{side}": each for side, each in state._asdict().items()} if isinstance(state, Factors) else state
    yield from (Entry(f"{name}:{slot}", sides[slot]) for slot in sorted(sides))
    return measures


def _folded_whole(plan: Plan, name: str, device: str) -> "tuple[State | Factors, list[Measure]]":
    base = None if plan.is_factored(name) else plan.tensor(plan.base, name).to(device)
    state, measures = plan.earlier(name, device), []
    for number in range(len(plan.experts)):
        state, found = _step(plan, name, number, base, state, device)
        measures.append(found)
    assert state is not None, "a tensor of the plan was moved by somebody"
    return state, measures


def _step(
    plan: Plan, name: str, number: int, base: "Tensor | None", state: "State | Factors | None", device: str
) -> "tuple[State | Factors | None, Measure]":
    """One expert into one tensor's state."""
    from merging.fold import fold_tensor
    from merging.lowrank import Factors, dense_state, fold_factors
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
        delta = delta._replace(left=delta.left * plan.weights[number])
        role = Role(projected=name in plan.kinds.projected)  # factors carry no rounding of the base's storage
        after, found = fold_factors(method, state, delta, role)
        return (after if moved else state), found
    assert base is not None
    new = plan.tensor(expert, name).to(device) if moved else base
    role = plan.role(name, base, number)
    return fold_tensor(method, base, dense_state(state), new, role, plan.weights[number])


def _nothing(state: "Factors | None") -> "Factors":
    """The update of an expert that left the tensor alone: rank 0."""
    from merging.lowrank import Factors

    assert state is not None
    return Factors(*(side[:, :0] for side in state))


def _check_profile(plan: Plan, device: str) -> None:
    """A worker of another kind would give other bytes than the process that made the plan."""
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
