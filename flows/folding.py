"""Experts folded into a parent version: a candidate in a folder of its own, made in two passes (`flows.passes`)."""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flows.admission import Admitted
from flows.first_pass import Measures, recorded_sha256
from flows.memory import STATE_FILE, STATE_FORMAT, Folded, Memory
from flows.options import LineConfig
from flows.parts import state_parts
from flows.passes import Serving, fold_once, fold_state, materialise, stats_after
from flows.plan import Plan
from flows.planning import plan_for
from flows.pool import devices_of
from flows.recipe import Recipe
from flows.second_pass import read_tensor
from flows.versions import HEADS, STATE_FOLDER, Version
from registry.files import hash_tree, read_json, write_json
from registry.manifests import SIGNATURE

if TYPE_CHECKING:
    from torch import Tensor

    from merging.measure import Measure
    from merging.method import Stats
    from registry.weights import Checkpoint

Progress = Callable[[int, int], None]  # tensors done, tensors in all
DONE_FILE = "fold.json"  # beside the candidate: the digests of a finished fold, so that a restart goes on from it


@dataclass(frozen=True)
class Candidate:
    """A folded model that was not judged yet, in a folder of its own."""

    folder: Path
    memory: Memory
    overlap: Mapping[str, Mapping[str, float]]  # of the last expert, per layer: norms, cosine with the total, removed
    shares: tuple[tuple[float, float], ...]  # of each expert's change: by norm along the total, by its square removed
    files: Mapping[str, str]  # path below the folder -> SHA-256, of what the fold wrote


def fold(
    scratch: Path,  # folder of this merge key alone; finished parts of an interrupted run there are used
    settings: LineConfig,
    recipe: Recipe,
    base: Version,
    parent: Version,
    experts: Sequence[Admitted],  # in the order of folding
    progress: Progress,
) -> Candidate:
    """The candidate in `scratch`, made or found finished; the same inputs and numerics profile give the same bytes.

    A candidate of another recipe that is there is replaced; of one of another strength the state is kept.
    """
    if not _finished(scratch, recipe):
        (scratch / DONE_FILE).unlink(missing_ok=True)
        _make(scratch, settings, recipe, base, parent, experts, progress)
    done, folder = read_json(scratch / DONE_FILE), scratch / "candidate"
    return Candidate(folder, Memory.read(folder), done["overlap"], tuple(map(tuple, done["shares"])), done["files"])


@dataclass(frozen=True)
class Reading(Mapping[str, "Tensor"]):
    """The serving weights that a state gives under a plan, each made when it is asked for."""

    plan: Plan
    slots: "Checkpoint | None"
    stats: "Stats"
    device: str

    def __getitem__(self, name: str) -> "Tensor":
        import torch

        read = read_tensor(self.plan, self.slots, self.stats, name, self.device)
        return torch.cat([piece.reshape(-1) for piece in read.pieces]).reshape(self.plan.base.stored[name].spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.plan.base)

    def __len__(self) -> int:
        return len(self.plan.base)


def read_with(
    candidate: Candidate, settings: LineConfig, recipe: Recipe, base: Version, parent: Version, expert: Admitted
) -> Reading:
    """A candidate's state, read as a recipe says that folds the same way."""
    from merging import Stats
    from registry.weights import Checkpoint

    plan, folder = plan_for(settings, recipe, base, parent, [expert]), candidate.folder / STATE_FOLDER
    slots = Checkpoint.open(folder, "state of the candidate") if plan.names else None
    return Reading(plan, slots, Stats(*candidate.memory.stats), devices_of(settings.device, 1)[0])


def _make(
    scratch: Path,
    settings: LineConfig,
    recipe: Recipe,
    base: Version,
    parent: Version,
    experts: Sequence[Admitted],
    progress: Progress,
) -> None:
    """Make the candidate, and note last that it is finished."""
    from merging.measure import shares, summarise

    folder, records = scratch / "candidate", scratch / "parts"
    plan = plan_for(settings, recipe, base, parent, experts)
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
    write_json(folder / STATE_FILE, _memory(recipe, parent, experts, plan, stats, measures, serving))
    known = {f"{STATE_FOLDER}/{part.file}": recorded_sha256(records, part) for part in parts}
    files = hash_tree(folder, {**known, **serving.files})
    moved = [{name: one for name, one in each.items() if not plan.is_statistic(name)} for each in measures]
    facts = {"files": files, "overlap": summarise(measures[-1]), "shares": [*map(shares, moved)]}
    write_json(scratch / DONE_FILE, {**facts, "recipe": recipe._asdict()})


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
    recipe: Recipe,
    parent: Version,
    experts: Sequence[Admitted],
    plan: Plan,
    stats: "Stats",
    measures: "Sequence[Mapping[str, Measure]]",
    serving: Serving,
) -> dict[str, object]:
    memory = Memory(
        method=recipe.method,
        parameters=dict(recipe.parameters),
        factor=recipe.factor,
        base_sha256=parent.memory.base_sha256,
        weights_sha256=serving.sha256,
        stats=(stats.count, stats.norm_sum, stats.total_norm),
        projected=tuple(sorted(plan.kinds.projected)),
        experts=(*parent.memory.experts, *map(partial(_folded, plan), experts, measures, plan.weights)),
        suites={**{expert.task: expert.suite.sha256 for expert in reversed(experts)}, **parent.memory.suites},
        profile=plan.profile,
        stored=plan.stored[-1],
        cast_loss=serving.cast_loss,
    )
    return {"format": STATE_FORMAT, **asdict(memory)}


def _folded(plan: Plan, expert: Admitted, measures: "Mapping[str, Measure]", weight: float) -> Folded:
    """One expert as the version remembers it."""
    from merging.measure import quadrature

    norm = quadrature(measure.delta_norm for name, measure in measures.items() if not plan.is_statistic(name))
    digests = expert.weights_sha256, expert.tree_sha256
    return Folded(*expert.name, expert.task, *digests, norm, weight, expert.weight)


def _copy_companions(base: Path, parent: Path, folder: Path) -> None:
    """What transformers needs beside the weights, from the base; the heads so far, from the parent."""
    for path in sorted(base.iterdir()):
        if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json", SIGNATURE)):
            shutil.copyfile(path, folder / path.name)
    if (parent / HEADS).exists():
        shutil.copytree(parent / HEADS, folder / HEADS, dirs_exist_ok=True)


def _write_head(folder: Path, expert: Admitted) -> None:
    """The task's head beside the model: kept, never folded."""
    from registry.writer import write_checkpoint

    if len(expert.head):
        layout = {f"{expert.task}.safetensors": sorted(expert.head)}
        write_checkpoint(folder / HEADS, expert.head.specs, expert.head.__getitem__, layout=layout)


def _finished(scratch: Path, recipe: Recipe) -> bool:
    """Whether an earlier run finished this fold, and every byte of it is still there."""
    if not (scratch / DONE_FILE).exists():
        return False
    done = read_json(scratch / DONE_FILE)
    return bool(done["recipe"] == recipe._asdict() and hash_tree(scratch / "candidate") == done["files"])
