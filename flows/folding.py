"""One expert folded into a parent version: two streaming passes over lazily read checkpoints, one tensor at a time."""

import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from flows.admission import Admitted
from flows.config import LineConfig
from flows.versions import HEADS, STATE_FILE, STATE_FOLDER, Folded, Memory, Version
from registry.files import hash_tree, read_json, write_json
from registry.records import FoldinError, Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from merging.measure import Measure
    from merging.method import Method, Role, State, Stats
    from registry.records import TensorSpec
    from registry.weights import Checkpoint

Progress = Callable[[int, int], None]  # tensors done, tensors in all
DONE_FILE = "folded.json"  # beside the candidate: the digests of a finished fold, so that a restart goes on from it


@dataclass(frozen=True)
class Candidate:
    """A folded model that was not judged yet, in a folder of its own."""

    folder: Path
    memory: Memory
    overlap: Mapping[str, Mapping[str, float]]  # per layer: norms, cosine with the total, share removed


def fold(
    scratch: Path,  # folder of this merge key alone; what an interrupted run left there is made again
    settings: LineConfig,
    base: Version,
    parent: Version,
    expert: Admitted,
    name: tuple[str, int],  # the expert's registered model and version, for the record
    progress: Progress,
) -> Candidate:
    """The candidate in `scratch`, made or found finished; the same inputs and numerics profile give the same bytes."""
    from merging.measure import summarise

    folder = scratch / "candidate"
    overlap = _finished(scratch)
    if overlap is None:
        shutil.rmtree(scratch, ignore_errors=True)
        plan = _plan(settings, base, parent, expert)
        stats, measures = _fold_state(folder / STATE_FOLDER, plan, expert, progress)
        weights_sha256 = _materialise(folder, plan, stats, progress)
        _copy_companions(base.folder, parent.folder, folder)
        _write_head(folder, expert)
        write_json(folder / STATE_FILE, _memory(settings, parent, expert, name, plan, stats, measures, weights_sha256))
        overlap = summarise(measures)
        write_json(scratch / DONE_FILE, {"files": hash_tree(folder), "overlap": overlap})
    return Candidate(folder, Memory.read(folder), overlap)


def projected_weights(settings: LineConfig, base: Version) -> tuple[str, ...]:
    """The linear weights of the base's architecture, less those that the line wants added plainly."""
    from evaluation.architecture import linear_weights

    names = sorted(linear_weights(base.folder, list(base.weights())))
    return tuple(name for name in names if not any(fnmatchcase(name, pattern) for pattern in settings.plain))


def numerics_profile(device: str) -> dict[str, str]:
    """What the bytes of a fold may depend on besides its inputs."""
    import torch

    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else f"cpu {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class _Plan:
    """What is folded, by which rule, from where."""

    method: "Method"
    device: str
    base: "Checkpoint"
    slots: "Mapping[str, Tensor]"  # the parent's, as NAME:SLOT
    slot_names: tuple[str, ...]  # of the method's state
    names: tuple[str, ...]  # the tensors that this expert or an earlier one moved, sorted
    projected: frozenset[str]
    stats: "Stats"  # the parent's
    stored: Mapping[str, str]  # tensor -> the coarsest dtype an expert stored it in, where coarser than the base's

    def state(self, slots: "Mapping[str, Tensor]", name: str) -> "State | None":
        """One tensor's state among some slots; None where no expert moved it."""
        if f"{name}:{self.slot_names[0]}" not in slots:
            return None
        return {slot: slots[f"{name}:{slot}"].to(self.device) for slot in self.slot_names}

    def role(self, name: str, base: "Tensor") -> "Role":
        """How one tensor takes part."""
        from merging.fold import role_of
        from registry.weights import DTYPES

        stored = DTYPES[self.stored[name]] if name in self.stored else None
        return role_of(base, name in self.projected, self.stats.count, stored)


def _plan(settings: LineConfig, base: Version, parent: Version, expert: Admitted) -> _Plan:
    import torch

    from merging import Stats, build
    from merging.fold import is_folded
    from registry.weights import DTYPES

    _check_method(settings, parent)
    method, weights, slots = build(settings.method, settings.parameters), base.weights(), parent.slots()
    names = {key.rpartition(":")[0] for key in slots} | expert.moved
    folded = sorted(name for name in names if is_folded(DTYPES[weights.specs[name].dtype]))
    return _Plan(
        method=method,
        device=settings.device,
        base=weights,
        slots=slots,
        slot_names=tuple(sorted(method.init(torch.zeros(1)))),
        names=tuple(folded),
        projected=frozenset(projected_weights(settings, base)),
        stats=Stats(*parent.memory.stats),
        stored=_coarsest(weights.specs, parent.memory.stored, expert),
    )


def _coarsest(base: "Mapping[str, TensorSpec]", earlier: Mapping[str, str], expert: Admitted) -> dict[str, str]:
    """Per tensor the coarsest float dtype an expert stored it in, where it is coarser than the base's."""
    import torch

    from registry.weights import DTYPES

    def step(dtype: str) -> float:
        return float(torch.finfo(DTYPES[dtype]).eps)

    stored = dict(earlier)
    for name in expert.moved:
        own, known = expert.body.specs[name].dtype, stored.get(name, base[name].dtype)
        if DTYPES[own].is_floating_point and step(own) > step(known):
            stored[name] = own
    return stored


def _check_method(settings: LineConfig, parent: Version) -> None:
    """Another method cannot read the state that this one wrote."""
    if parent.memory.experts and parent.memory.method != settings.method:
        raise FoldinError(
            Refusal(
                code="E_METHOD",
                what="the line's method was changed after experts were folded",
                where=f"version {parent.number}",
                expected=f"method {parent.memory.method}",
                found=f"method {settings.method}",
                remedy="set the method back, or start a new line for the new method",
            )
        )


def _fold_state(folder: Path, plan: _Plan, expert: Admitted, progress: Progress) -> "tuple[Stats, dict[str, Measure]]":
    """First pass: base, the parent's slots and the expert in; the new slots and the sums out."""
    from merging.fold import advance
    from registry.writer import plan_layout, write_checkpoint

    measures: dict[str, Measure] = {}
    if plan.names:
        specs = _slot_specs(plan)
        layout = plan_layout(specs)
        order = [key for names in layout.values() for key in names]
        write_checkpoint(folder, specs, _slots(order, plan, expert, measures, progress), layout=layout)
    return advance(plan.stats, measures.values()), measures


def _slots(
    order: list[str], plan: _Plan, expert: Admitted, measures: "dict[str, Measure]", progress: Progress
) -> "Iterator[tuple[str, Tensor]]":
    """The new slots in the order of the file; a tensor is folded when its first slot is due."""
    from merging.fold import fold_tensor

    steps, current, state = len(plan.names) + len(plan.base), "", None
    for key in order:
        name, _, slot = key.rpartition(":")
        if name != current:
            base = plan.base[name].to(plan.device)
            moved = expert.body[name].to(plan.device) if name in expert.moved else base
            with _blamed(name):
                earlier, role = plan.state(plan.slots, name), plan.role(name, base)
                state, measures[name] = fold_tensor(plan.method, base, earlier, moved, role)
            current = name
            progress(len(measures), steps)
        assert state is not None
        yield key, state[slot]


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


def _slot_specs(plan: _Plan) -> "dict[str, TensorSpec]":
    import torch

    from registry.weights import DTYPES, spec_of

    specs = {}
    for name in plan.names:
        dtype, shape = plan.base.specs[name]
        for slot, tensor in plan.method.init(torch.empty(shape, dtype=DTYPES[dtype], device="meta")).items():
            specs[f"{name}:{slot}"] = spec_of(tensor)
    return specs


def _materialise(folder: Path, plan: _Plan, stats: "Stats", progress: Progress) -> str:
    """Second pass: base and new slots in, the serving checkpoint out, in the base's dtypes and shards; its digest."""
    from merging.check import check_finite
    from merging.fold import read_tensor
    from registry.weights import Checkpoint
    from registry.writer import write_checkpoint

    slots: Mapping[str, Tensor] = {}
    if plan.names:
        slots = Checkpoint.open(folder / STATE_FOLDER, "state of the candidate")
    done = len(plan.names)

    def serving(name: str) -> "Tensor":
        nonlocal done
        done += 1
        progress(done, len(plan.names) + len(plan.base))
        base = plan.base[name].to(plan.device)
        with _blamed(name):
            merged = read_tensor(plan.method, base, plan.state(slots, name), stats)
        found = check_finite(name, merged)  # the cast to the base's dtype can overflow
        if found:
            raise FoldinError(_unfoldable(name, "the merged tensor is not finite", found.found))
        return merged

    return write_checkpoint(folder, plan.base.specs, serving, layout=plan.base.layout).sha256


def _memory(
    settings: LineConfig,
    parent: Version,
    expert: Admitted,
    name: tuple[str, int],
    plan: _Plan,
    stats: "Stats",
    measures: "Mapping[str, Measure]",
    weights_sha256: str,
) -> dict[str, object]:
    from merging.measure import quadrature

    norm = quadrature(measure.delta_norm for measure in measures.values())
    folded = Folded(*name, expert.task, expert.weights_sha256, expert.tree_sha256, norm)
    memory = Memory(
        method=settings.method,
        parameters=dict(settings.parameters),
        base_sha256=parent.memory.base_sha256,
        weights_sha256=weights_sha256,
        stats=(stats.count, stats.norm_sum, stats.total_norm),
        projected=tuple(sorted(plan.projected)),
        experts=(*parent.memory.experts, folded),
        suites={expert.task: expert.suite.sha256, **parent.memory.suites},
        profile=numerics_profile(settings.device),
        stored=plan.stored,
    )
    return {"format": 1, **asdict(memory)}


def _copy_companions(base: Path, parent: Path, folder: Path) -> None:
    """What transformers needs beside the weights, from the base; the heads so far, from the parent."""
    for path in sorted(base.iterdir()):
        if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(path, folder / path.name)
    if (parent / HEADS).exists():
        shutil.copytree(parent / HEADS, folder / HEADS)


def _write_head(folder: Path, expert: Admitted) -> None:
    """The task's head beside the model: kept, never folded."""
    from registry.writer import write_checkpoint

    if len(expert.head):
        layout = {f"{expert.task}.safetensors": sorted(expert.head)}
        write_checkpoint(folder / HEADS, expert.head.specs, expert.head.__getitem__, layout=layout)


def _finished(scratch: Path) -> dict[str, dict[str, float]] | None:
    """The overlap of a fold that an earlier run finished here, if every byte of it is still there; else None."""
    done = scratch / DONE_FILE
    if not done.exists():
        return None
    facts = read_json(done)
    return facts["overlap"] if hash_tree(scratch / "candidate") == facts["files"] else None
