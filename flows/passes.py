"""The two passes over a model: experts into the state, then base and state into serving weights.

A pass reads each tensor once, whatever the number of experts, and holds a few tensors at a time, whatever the size of
the model; what is computed entry by entry lies in memory whole only in the base's dtype. The state is written in parts,
one worker each; a part that is there with its record is not made again.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from flows.first_pass import Folded, Measures, part_job, specs_of
from flows.parts import Part, state_parts
from flows.plan import Plan
from flows.pool import pool, syncing
from flows.second_pass import Read, read_job, read_tensor
from registry.files import sweep

if TYPE_CHECKING:
    from merging.measure import Measure
    from merging.method import Stats
    from registry.weights import Checkpoint

Progress = Callable[[int, int], None]  # tensors done, tensors in all


class Serving(NamedTuple):
    """What the second pass made."""

    sha256: str  # content digest of the serving weights
    cast_loss: float  # norm of what the casts to the base's dtypes took away, over the norm of what was added
    files: Mapping[str, str]  # file of the checkpoint -> SHA-256 of its bytes


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
    with pool(devices) as run, syncing() as later:
        found = run(part_job(folder, records, plan, part) for part in parts)
        for part, each in zip(parts, cast("Iterator[Folded]", found), strict=True):
            later(folder / part.file)
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

    parts, measures, ready = state_parts(plan), list[list[Measures]](), dict[str, Read]()
    # Whatever looked at the norms, which are not known yet, would become NaN and be refused.
    stats = Stats(sum(plan.weights, start=plan.stats[0]), math.nan, math.nan)
    sweep(state)

    def reads() -> "Iterator[Read]":
        for name in (name for names in plan.base.layout.values() for name in names):
            if name in plan.names_set and name not in ready:
                folded = cast("Folded", next(results))
                later(state / parts[len(measures)].file)
                measures.append(folded.measures)
                ready.update({read.name: read for read in folded.reads})
                del folded  # with its tensors, before the next part is waited for
            yield ready.pop(name) if name in plan.names_set else read_tensor(plan, None, stats, name, devices[0])

    with pool(devices) as run, syncing() as later:
        results = run(part_job(state, records, plan, part, stats) for part in parts)
        serving = _serve(folder, plan, reads(), progress)
    return _finish(state, plan, parts, measures), serving


def _finish(folder: Path, plan: Plan, parts: "list[Part]", measures: "list[list[Measures]]") -> list[Measures]:
    """Write the state's index, last; what each expert did over all parts."""
    from registry.writer import write_index

    if len(parts) > 1:
        layout = {part.file: [key for name in part.names for key in plan.slot_specs(name)] for part in parts}
        specs = {key: spec for part in parts for key, spec in specs_of(plan, part).items()}
        write_index(folder, specs, layout)
    return [
        {name: one for part in measures for name, one in part[number].items()} for number in range(len(plan.experts))
    ]


def stats_after(plan: Plan, measures: Iterable[Mapping[str, "Measure"]]) -> "Stats":
    """The statistics after all experts of a pass; running statistics of batch norms count in no norm."""
    from merging import Stats
    from merging.fold import advance

    stats = Stats(*plan.stats)
    for each, weight in zip(measures, plan.weights, strict=True):
        stats = advance(stats, (one for name, one in each.items() if not plan.is_statistic(name)), weight)
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
        found = run(read_job(plan, slots, stats, name) for name in names)
        return _serve(folder, plan, cast("Iterator[Read]", found), progress)


def _serve(folder: Path, plan: Plan, found: "Iterator[Read]", progress: Progress) -> Serving:
    """Write the serving checkpoint from its tensors, which come in the order of the base's files."""
    from merging.measure import quadrature
    from registry.weights import combined_sha256
    from registry.writer import Entry, write_stream

    reads: list[Read] = []

    def entries() -> "Iterator[Entry]":
        for read in found:
            yield from (Entry(read.name, piece) for piece in read.pieces)
            reads.append(read._replace(pieces=[]))
            del read  # with its tensor, before the next one is waited for
            progress(len(reads), len(plan.base))

    files = write_stream(folder, plan.base.specs, entries(), layout=plan.base.layout)
    moved, lost = quadrature(read.moved for read in reads), quadrature(read.lost for read in reads)
    digest = combined_sha256({read.name: read.sha256 for read in reads})
    return Serving(digest, lost / moved if moved else 0.0, files)
