"""foldin's side of the benchmarks: one expert folded from disk to disk, as flows/folding.py does it for a version.

The only file here that calls the engine. What it reads and writes (`Line`, below) is what a version of a line holds,
so that another engine can be put behind `fold` alone.
"""

import argparse
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from merging import Stats, build
from merging.fold import advance, fold_tensor, is_folded, read_tensor, role_of
from merging.measure import Measure
from merging.method import State
from registry.files import read_json, write_json
from registry.records import TensorSpec
from registry.weights import DTYPES, Checkpoint
from registry.writer import plan_layout, write_checkpoint

STATE, STATS = "state", "stats.json"
SLOT = "total"


class Clock:
    """Seconds by what they were spent on; inner spans are not counted again in outer ones.

    >>> clock = Clock()
    >>> with clock("a"):
    ...     pass
    >>> list(clock.seconds)
    ['a']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Charge the block to a stage, less what its own inner blocks are charged to."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent - self._inner.pop()
            self._inner[-1] += spent


@torch.no_grad()
def fold(
    base: str,  # folder of the base's checkpoint
    parent: str | None,  # folder that an earlier call wrote; None: the expert is the first
    expert: str,  # folder of a full checkpoint of the base
    out: str,  # gets state/, the serving checkpoint, config.json and stats.json
    projected: list[str],  # names of the linear weights
    method: str = "opcm",
) -> dict[str, float]:
    """Fold one expert and write the next version: seconds of each stage.

    Files are mapped into memory, so part of reading happens, and is charged, where a tensor is first used. Writing
    includes the digests and waiting until the bytes are on disk.
    """
    clock, rule = Clock(), build(method, {})
    weights, moved, folder = Checkpoint.open(Path(base)), Checkpoint.open(Path(expert)), Path(out)
    slots, stats = _earlier(Path(parent) if parent else None)
    names = [name for name in weights if is_folded(DTYPES[weights.specs[name].dtype])]
    measures: list[Measure] = []

    def folded(slot: str) -> Tensor:
        name = slot.removesuffix(f":{SLOT}")
        with clock("reading"):
            own, theirs, state = weights[name], moved[name], _state(slots, name)
        with clock("folding"):
            role = role_of(own, name in projected, stats.count, theirs.dtype)
            after, found = fold_tensor(rule, own, state, theirs, role)
        measures.append(found)
        return after[SLOT]

    specs = {f"{name}:{SLOT}": TensorSpec("F32", weights.specs[name].shape) for name in names}
    with clock("writing"):
        write_checkpoint(folder / STATE, specs, folded, layout=plan_layout(specs))
    after, written = advance(stats, measures), Checkpoint.open(folder / STATE)

    def serving(name: str) -> Tensor:
        with clock("reading"):
            own, state = weights[name], _state(written, name)
        with clock("exporting"):
            return read_tensor(rule, own, state, after)

    with clock("writing"):
        write_checkpoint(folder, weights.specs, serving, layout=weights.layout)
        write_json(folder / STATS, after._asdict())
        shutil.copyfile(Path(base) / "config.json", folder / "config.json")
    return {f"{stage}_seconds": seconds for stage, seconds in clock.seconds.items()}


def main() -> None:
    """Fold experts one after the other, each into the version before it, projecting none; print the stages' seconds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ours", description="Fold experts from disk to disk.")
    parser.add_argument("base", type=Path)
    parser.add_argument("experts", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="gets a folder for each version: 1, 2, ...")
    parser.add_argument("--method", choices=["average", "task_arithmetic"], default="average")
    chosen = parser.parse_args()
    parent: str | None = None
    spent: Counter[str] = Counter()
    for number, expert in enumerate(chosen.experts, start=1):
        version = str(chosen.out / str(number))
        spent.update(fold(str(chosen.base), parent, str(expert), version, [], chosen.method))
        parent = version
    print(json.dumps(spent))


def _earlier(parent: Path | None) -> tuple[Mapping[str, Tensor], Stats]:
    """The slots and the statistics of a version; nothing, before the first expert."""
    if parent is None:
        return {}, Stats()
    facts = read_json(parent / STATS)
    return Checkpoint.open(parent / STATE), Stats(**{key: float(facts[key]) for key in Stats._fields})


def _state(slots: Mapping[str, Tensor], name: str) -> State | None:
    slot = f"{name}:{SLOT}"
    return {SLOT: slots[slot]} if slot in slots else None


if __name__ == "__main__":
    main()
