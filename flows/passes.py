"""The two passes over a model: experts into the state, then base and state into serving weights.

A pass reads each tensor once, whatever the number of experts, and holds a few tensors at a time, whatever the size of
the model; what is computed entry by entry never lies in memory whole. The state is written in parts, one worker each; a
part that is there with its record is not made again.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from flows.plan import Plan, numerics_profile, parts_of, state_in
from flows.pool import Job, pool
from registry.files import read_json, sha256_file, shown, sweep, write_json
from registry.records import FoldinError, Refusal, TensorSpec

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
PART_BYTES = 32 * 2**20  # of state in one part: what a crash costs, and what one worker takes at a time


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
    parts, done, measures = state_parts(plan), 0, list[list[Measures]]()
    sweep(folder)
    with pool(devices) as run:
        found = run(_part_job(folder, records, plan, part) for part in parts)
        for part, each in zip(parts, cast("Iterator[Folded]", found), strict=True):
            measures.append(each.measures)
            done += len(part.names)
            progress(done, len(plan.names))
    return _finish(folder, plan, parts, measures)


def fold_once(
    state: Path,  # gets the state's files
    records: Path,  # folder for what is known of finished parts
    folder: Path,  # gets the serving checkpoint
    plan: Plan,  # whose method allows it: `Plan.one_pass`
    devices: tuple[str, ...],
    progress: Progress = lambda done, total: None,
) -> tuple[list[Measures], Serving]:
    """Both passes in one, where the serving weights depend on no sum over the whole model. Raises like the two."""
    from merging import Stats

    parts, measures, ready = state_parts(plan), list[list[Measures]](), dict[str, _Read]()
    # Whatever looked at the norms, which are not known yet, would become NaN and be refused.
    stats = Stats(plan.stats[0] + len(plan.experts), math.nan, math.nan)
    sweep(state)

    def reads() -> "Iterator[_Read]":
        for name in (name for names in plan.base.layout.values() for name in names):
            if name in plan.names_set and name not in ready:
                folded = cast("Folded", next(results))
                measures.append(folded.measures)
                ready.update({read.name: read for read in folded.reads})
            yield ready.pop(name) if name in plan.names_set else _read(plan, None, stats, name, devices[0])

    with pool(devices) as run:
        results = run(_part_job(state, records, plan, part, stats) for part in parts)
        serving = _serve(folder, plan, reads(), progress)
    return _finish(state, plan, parts, measures), serving


def _finish(folder: Path, plan: Plan, parts: "list[Part]", measures: "list[list[Measures]]") -> list[Measures]:
    """Write the state's index, last; what each expert did over all parts."""
    from registry.writer import write_index

    if len(parts) > 1:
        layout = {part.file: [key for name in part.names for key in plan.slot_specs(name)] for part in parts}
        specs = {key: spec for part in parts for key, spec in _specs(plan, part).items()}
        write_index(folder, specs, layout)
    return [
        {name: one for part in measures for name, one in part[number].items()} for number in range(len(plan.experts))
    ]


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
    names = [name for names in plan.base.layout.values() for name in names]
    with pool(devices) as run:
        found = run(_read_job(plan, slots, stats, name) for name in names)
        return _serve(folder, plan, cast("Iterator[_Read]", found), progress)


def _serve(folder: Path, plan: Plan, found: "Iterator[_Read]", progress: Progress) -> Serving:
    """Write the serving checkpoint from its tensors, which come in the order of the base's files."""
    from merging.measure import quadrature
    from registry.weights import combined_sha256
    from registry.writer import Entry, write_stream

    reads: list[_Read] = []

    def entries() -> "Iterator[Entry]":
        for read in found:
            yield from (Entry(read.name, piece) for piece in read.pieces)
            reads.append(read._replace(pieces=[]))
            progress(len(reads), len(plan.base))

    write_stream(folder, plan.base.specs, entries(), layout=plan.base.layout)
    moved, lost = quadrature(read.moved for read in reads), quadrature(read.lost for read in reads)
    return Serving(combined_sha256({read.name: read.sha256 for read in reads}), lost / moved if moved else 0.0)


# the first pass, one part


class Folded(NamedTuple):
    """What came of one part."""

    measures: "list[Measures]"  # per expert
    reads: "list[_Read]"  # its serving tensors, where they were asked for


def _part_job(folder: Path, records: Path, plan: Plan, part: Part, stats: "Stats | None" = None) -> Job:
    def expect() -> None:
        for name in part.names:
            plan.base.expect(name)
            for expert in plan.experts:
                if name in expert.moved:
                    expert.expect(name)
            if plan.slots is not None and f"{name}:total" in plan.slots:
                plan.slots.expect(f"{name}:total")

    need = max(prod(plan.base.stored[name].spec.shape) * _bytes_per_entry(plan, name) for name in part.names)
    if stats is not None:
        need += sum(plan.base.stored[name].end - plan.base.stored[name].begin for name in part.names)
    return Job(lambda device: fold_part(folder, records, plan, part, device, stats), need, expect)


def _bytes_per_entry(plan: Plan, name: str) -> int:
    """Of memory while a tensor is folded: files are mapped, and what is projected lies in float32 three times."""
    return 8 + 4 + (16 if name in plan.kinds.projected and not plan.is_factored(name) else 0)


def fold_part(folder: Path, records: Path, plan: Plan, part: Part, device: str, stats: "Stats | None" = None) -> Folded:
    """One part, on any worker that sees the same folders: what each expert did, and its serving tensors given `stats`.

    Repeating it is harmless: a part that was finished is found again.
    """
    from registry.weights import Checkpoint
    from registry.writer import write_part

    measures, reads = _recorded(folder, records, part, plan), dict[str, _Read]()
    if measures is None:
        _check_profile(plan, device)
        measures = [{} for _ in plan.experts]
        entries = _entries(plan, part, device, measures, stats, reads)
        sha256 = write_part(folder / part.file, _specs(plan, part), entries)
        write_json(
            _record(records, part),
            {"sha256": sha256, "plan": plan.sha256, "profile": dict(plan.profile), "measures": measures},
        )
    if stats is None:
        return Folded(measures, [])
    slots = Checkpoint.open_file(folder / part.file, "state of the candidate")
    found = [reads.get(name) or _read(plan, slots, stats, name, device) for name in part.names]
    return Folded(measures, found)


def _specs(plan: Plan, part: Part) -> dict[str, TensorSpec]:
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


def _record(records: Path, part: Part) -> Path:
    return records / f"{part.file}.json"


def _entries(
    plan: Plan,
    part: Part,
    device: str,
    measures: "list[Measures]",  # gets what each expert did
    stats: "Stats | None",
    reads: "dict[str, _Read]",  # gets the serving tensors that could be made on the way
) -> "Iterator[Entry]":
    """The slots of a part's tensors in the order of its file."""
    for name in part.names:
        with _blamed(name):
            if plan.is_plain(name):
                reader = None if stats is None else _Reader(plan, name, stats)
                found = yield from _fold_pieces(plan, name, device, reader)
                if reader:
                    reads[name] = reader.read()
            else:
                found = yield from _fold_whole(plan, name, device)
        for each, one in zip(measures, found, strict=True):
            each[name] = one


def _fold_pieces(
    plan: Plan, name: str, device: str, reader: "_Reader | None"
) -> "Generator[Entry, None, list[Measure]]":
    """One tensor through all experts of a plan, piece by piece; the reader makes the serving tensor of them."""
    from merging.fold import fold_pieces
    from merging.measure import Measure
    from registry.writer import Entry

    base, state = plan.tensor(plan.base, name).to(device), plan.earlier(name, device)
    # While nobody has moved it an unmoved tensor has no state, and folding it would make one of zeros: the same.
    late = next(at for at, expert in enumerate(plan.experts) if name in expert.moved) if state is None else 0
    experts = [plan.tensor(expert, name).to(device) if name in expert.moved else base for expert in plan.experts[late:]]
    pieces = fold_pieces(plan.method_for(name), base, cast("State | None", state), experts)
    measures, flat, at = [Measure(0.0, 0.0, 0.0, 0.0)] * late, base.reshape(-1), 0
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return measures + cast("list[Measure]", end.value)
        yield Entry(f"{name}:total", piece["total"])
        if reader:
            reader.take(flat[at : at + len(piece["total"])], piece)
            at += len(piece["total"])


class _Reader:
    """Makes a serving tensor out of the pieces of its state, while they are at hand."""

    def __init__(self, plan: Plan, name: str, stats: "Stats") -> None:
        from registry.weights import start_digest

        self._plan, self._name, self._stats = plan, name, stats
        self._digest = start_digest(plan.base.stored[name].spec)
        self._pieces: list[Tensor] = []
        self._room: Tensor | None = None
        self._sums: Tensor | None = None

    def take(self, base: "Tensor", state: "State") -> None:
        """The next piece: of the base, (n,), and of the slots."""
        from merging.fold import merged_piece, reading_room
        from registry.weights import raw_bytes

        update = self._plan.method_for(self._name).read(state, self._stats)
        if self._room is None or self._room.shape[1] < len(base):
            self._room = reading_room(base)
        merged, sums = merged_piece(base, update, self._room)
        self._digest.update(raw_bytes(merged))
        self._pieces.append(merged.cpu())
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self) -> "_Read":
        """The whole tensor."""
        from merging.fold import reading_of

        assert self._sums is not None, "every tensor has a piece"
        found = reading_of(self._sums)
        _check_finite(self._plan, self._name, found)
        return _Read(self._name, self._pieces, self._digest.hexdigest(), found.moved, found.lost)


def _fold_whole(plan: Plan, name: str, device: str) -> "Generator[Entry, None, list[Measure]]":
    """One tensor through all experts of a plan, one after the other."""
    from merging.lowrank import Factors
    from registry.writer import Entry

    base = None if plan.is_factored(name) else plan.tensor(plan.base, name).to(device)
    state, measures = plan.earlier(name, device), []
    for number in range(len(plan.experts)):
        state, found = _step(plan, name, number, base, state, device)
        measures.append(found)
    assert state is not None, "a tensor of the plan was moved by somebody"
    sides = {f"total.{side}": each for side, each in state._asdict().items()} if isinstance(state, Factors) else state
    yield from (Entry(f"{name}:{slot}", sides[slot]) for slot in sorted(sides))
    return measures


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
        after, found = fold_factors(method, state, delta, role)
        return (after if moved else state), found
    assert base is not None
    whole = {"total": dense(state)} if isinstance(state, Factors) else state
    new = plan.tensor(expert, name).to(device) if moved else base
    return fold_tensor(method, base, whole, new, plan.role(name, base, number))


def _nothing(state: "Factors | None") -> "Factors":
    """The update of an expert that left the tensor alone: rank 0."""
    from merging.lowrank import Factors

    assert state is not None
    return Factors(*(side[:, :0] for side in state))


# the second pass, one tensor


class _Read(NamedTuple):
    name: str
    pieces: "list[Tensor]"  # of the serving tensor, flat, in order
    sha256: str  # of the tensor
    moved: float
    lost: float


def _read_job(plan: Plan, slots: "Checkpoint | None", stats: "Stats", name: str) -> Job:
    def expect() -> None:
        plan.base.expect(name)
        if slots is not None and f"{name}:total" in slots:
            slots.expect(f"{name}:total")

    stored = plan.base.stored[name]
    need = 2 * (stored.end - stored.begin) + 4 * prod(stored.spec.shape)
    return Job(lambda device: _read(plan, slots, stats, name, device), need, expect)


def _read(plan: Plan, slots: "Checkpoint | None", stats: "Stats", name: str, device: str) -> _Read:
    """One serving tensor with its digest."""
    from merging.fold import is_folded
    from registry.weights import raw_bytes, start_digest

    kept, ending = plan.kinds.same.get(name, name), list["Reading"]()
    base, digest, pieces = plan.base[kept], start_digest(plan.base.stored[name].spec), list["Tensor"]()
    source: Iterator[Tensor] = iter([base])
    if slots is not None and is_folded(base):
        merged = _merged_variance if kept in plan.kinds.variances else _merged
        source = merged(plan, slots, stats, kept, device, ending)
    with _blamed(kept):
        for piece in source:
            digest.update(raw_bytes(piece))
            pieces.append(piece)
    for each in ending:
        _check_finite(plan, kept, each)
    # Running statistics, and the second name of a tied tensor, do not count.
    found = ending[0] if ending and kept == name and not plan.is_statistic(name) else None
    return _Read(name, pieces, digest.hexdigest(), found.moved if found else 0.0, found.lost if found else 0.0)


def _check_finite(plan: Plan, name: str, found: "Reading") -> None:
    if not found.finite:
        what = f"a value is beyond the range of {plan.base.stored[name].spec.dtype}"
        raise FoldinError(_unfoldable(name, "the merged tensor is not finite", what))


def _merged(
    plan: Plan, slots: "Checkpoint", stats: "Stats", name: str, device: str, ending: "list[Reading]"
) -> "Iterator[Tensor]":
    """A merged tensor piece by piece; `ending` gets what came of it."""
    from merging.fold import read_pieces
    from merging.lowrank import Factors, dense

    method, state = plan.method_for(name), state_in(slots, name, plan.method_for(name), device)
    whole = {"total": dense(state)} if isinstance(state, Factors) else state
    ending.append((yield from read_pieces(method, plan.tensor(plan.base, name).to(device), whole, stats)))


def _merged_variance(
    plan: Plan, slots: "Checkpoint", stats: "Stats", name: str, device: str, ending: "list[Reading]"
) -> "Iterator[Tensor]":
    """A merged running variance: of the mean square about the base's mean, less the mean's own move squared."""
    import torch

    from merging.fold import Reading
    from merging.lowrank import Factors
    from merging.statistics import variance
    from registry.weights import DTYPES

    base, spec = plan.base[name].to(device), plan.base.stored[name].spec
    moved = []
    for each in (plan.kinds.variances[name], name):
        state = state_in(slots, each, plan.method_for(each), device)
        assert not isinstance(state, Factors), "a vector has no factors"
        moved.append(torch.zeros_like(base) if state is None else plan.method_for(each).read(state, stats))
    merged = variance(moved[0], base.double() + moved[1]).to(DTYPES[spec.dtype]) if any(map(torch.any, moved)) else base
    ending.append(Reading(0.0, 0.0, bool(torch.isfinite(merged).all())))
    yield merged


# what cannot be folded


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


NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # how torch says it, by device


@contextmanager
def _blamed(name: str) -> Iterator[None]:
    """What cannot be folded is said with the tensor's name, and is the expert's fault; too little memory is not."""
    from merging import MergeError

    try:
        yield
    except MergeError as error:
        raise FoldinError(_unfoldable(name, "the tensor cannot be folded", str(error))) from error
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY)):
            raise
        what, remedy = "there is too little memory for the tensor", "set workers to a smaller number, or use a machine"
        refusal = Refusal("E_MEMORY", what, "", "", name, "", shown(str(error)), f"{remedy} with more memory")
        raise FoldinError(refusal) from error


def _unfoldable(name: str, what: str, found: str) -> Refusal:
    remedy = "look at the expert's training; its change of this tensor is too large to be merged"
    return Refusal("E_FOLD", what, "", "", name, "finite values", found, remedy)
