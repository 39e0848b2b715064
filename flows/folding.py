"""Experts folded into a parent version: a candidate in a folder of its own, made in two passes (`flows.passes`)."""

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flows.admission import Admitted
from flows.config import LineConfig
from flows.first_pass import Measures, recorded_sha256
from flows.parts import state_parts
from flows.passes import Serving, fold_once, fold_state, materialise, stats_after
from flows.plan import Plan
from flows.planning import plan_for
from flows.pool import devices_of
from flows.versions import HEADS, STATE_FILE, STATE_FOLDER, STATE_FORMAT, Folded, Memory, Version
from registry.files import hash_tree, read_json, write_json

if TYPE_CHECKING:
    from merging.measure import Measure
    from merging.method import Stats

Progress = Callable[[int, int], None]  # tensors done, tensors in all
DONE_FILE = "folded.json"  # beside the candidate: the digests of a finished fold, so that a restart goes on from it


@dataclass(frozen=True)
class Candidate:
    """A folded model that was not judged yet, in a folder of its own."""

    folder: Path
    memory: Memory
    overlap: Mapping[str, Mapping[str, float]]  # per layer: norms, cosine with the total, share removed
    files: Mapping[str, str]  # path below the folder -> SHA-256, of what the fold wrote


def fold(
    scratch: Path,  # folder of this merge key alone; finished parts of an interrupted run there are used
    settings: LineConfig,
    base: Version,
    parent: Version,
    experts: Sequence[Admitted],  # in the order of folding
    progress: Progress,
) -> Candidate:
    """The candidate in `scratch`, made or found finished; the same inputs and numerics profile give the same bytes."""
    if not _finished(scratch):
        _make(scratch, settings, base, parent, experts, progress)
    done, folder = read_json(scratch / DONE_FILE), scratch / "candidate"
    return Candidate(folder, Memory.read(folder), done["overlap"], done["files"])


def _make(
    scratch: Path,
    settings: LineConfig,
    base: Version,
    parent: Version,
    experts: Sequence[Admitted],
    progress: Progress,
) -> None:
    """Make the candidate, and note last that it is finished."""
    from merging.measure import summarise

    folder, records = scratch / "candidate", scratch / "parts"
    plan = plan_for(settings, base, parent, experts)
    cluster = settings.workers if "://" in settings.workers else ""
    devices = devices_of(settings.device, int(settings.workers or 0) if not cluster else 0)
    if cluster:
        from flows.cluster import fold_on_cluster

        fold_on_cluster(cluster, folder / STATE_FOLDER, records, plan, settings.device)
    parts = state_parts(plan)
    _clear(folder, {part.file for part in parts})
    measures, serving = _passes(folder, records, plan, devices, progress)
    stats = stats_after(plan, measures)
    _copy_companions(base.folder, parent.folder, folder)
    for expert in experts:
        _write_head(folder, expert)
    write_json(folder / STATE_FILE, _memory(settings, parent, experts, plan, stats, measures, serving))
    known = {f"{STATE_FOLDER}/{part.file}": recorded_sha256(records, part) for part in parts}
    files = hash_tree(folder, {**known, **serving.files})
    write_json(scratch / DONE_FILE, {"files": files, "overlap": summarise(measures[-1])})


def _clear(folder: Path, parts: Collection[str]) -> None:
    """Remove what an interrupted run left, but for finished parts of the state."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.parent != folder / STATE_FOLDER or path.name not in parts:
            path.unlink()


def _passes(
    folder: Path, records: Path, plan: Plan, devices: tuple[str, ...], progress: Progress
) -> tuple[list[Measures], Serving]:
    """State and serving weights, in one pass where the method allows it."""
    from registry.weights import Checkpoint

    state = folder / STATE_FOLDER
    if plan.one_pass:
        return fold_once(state, records, folder, plan, devices, progress)
    first, total = len(plan.names), len(plan.names) + len(plan.base)
    measures = fold_state(state, records, plan, devices, lambda done, _: progress(done, total))
    slots = Checkpoint.open(state, "state of the candidate") if plan.names else None
    stats = stats_after(plan, measures)
    return measures, materialise(folder, slots, plan, stats, devices, lambda done, _: progress(first + done, total))


def _memory(
    settings: LineConfig,
    parent: Version,
    experts: Sequence[Admitted],
    plan: Plan,
    stats: "Stats",
    measures: "Sequence[Mapping[str, Measure]]",
    serving: Serving,
) -> dict[str, object]:
    memory = Memory(
        method=settings.method,
        parameters=dict(settings.parameters),
        base_sha256=parent.memory.base_sha256,
        weights_sha256=serving.sha256,
        stats=(stats.count, stats.norm_sum, stats.total_norm),
        projected=tuple(sorted(plan.kinds.projected)),
        experts=(*parent.memory.experts, *map(partial(_folded, plan), experts, measures)),
        suites={**{expert.task: expert.suite.sha256 for expert in reversed(experts)}, **parent.memory.suites},
        profile=plan.profile,
        stored=plan.stored[-1],
        cast_loss=serving.cast_loss,
    )
    return {"format": STATE_FORMAT, **asdict(memory)}


def _folded(plan: Plan, expert: Admitted, measures: "Mapping[str, Measure]") -> Folded:
    """One expert as the version remembers it."""
    from merging.measure import quadrature

    norm = quadrature(measure.delta_norm for name, measure in measures.items() if not plan.is_statistic(name))
    return Folded(*expert.name, expert.task, expert.weights_sha256, expert.tree_sha256, norm)


def _copy_companions(base: Path, parent: Path, folder: Path) -> None:
    """What transformers needs beside the weights, from the base; the heads so far, from the parent."""
    for path in sorted(base.iterdir()):
        if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(path, folder / path.name)
    if (parent / HEADS).exists():
        shutil.copytree(parent / HEADS, folder / HEADS, dirs_exist_ok=True)


def _write_head(folder: Path, expert: Admitted) -> None:
    """The task's head beside the model: kept, never folded."""
    from registry.writer import write_checkpoint

    if len(expert.head):
        layout = {f"{expert.task}.safetensors": sorted(expert.head)}
        write_checkpoint(folder / HEADS, expert.head.specs, expert.head.__getitem__, layout=layout)


def _finished(scratch: Path) -> bool:
    """Whether an earlier run finished this fold, and every byte of it is still there."""
    done = scratch / DONE_FILE
    return done.exists() and hash_tree(scratch / "candidate") == read_json(done)["files"]
