"""foldin's side of the benchmarks: experts folded from disk to disk by the two passes that make a version.

The only file here that calls the engine. What it reads and writes is what a version of a line holds.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

from torch import Tensor

from flows.fitting import Fitted
from flows.kinds import Kinds
from flows.passes import fold_once, fold_state, materialise, stats_after
from flows.plan import Plan, state_in
from flows.planning import make_plan
from flows.pool import devices_of
from merging import Stats, build
from merging.lowrank import dense_state
from registry.adapters import Adapter
from registry.files import read_json, write_json
from registry.weights import Checkpoint

STATE, RECORDS, FACTS = "state", "parts", "facts.json"


def fold(
    base: str,  # folder of the base's checkpoint
    parent: str | None,  # folder that an earlier call wrote; None: the experts are the first
    expert: str | list[str],  # folders of full checkpoints or of LoRA adapters of the base, in the order of folding
    out: str,  # gets state/, the serving checkpoint, config.json and facts.json
    projected: list[str],  # names of the linear weights
    method: str = "opcm",
    workers: int = 0,  # 0: as many as there are cores
    serve: bool = True,  # whether the second pass runs too
    device: str = "cpu",
    moved: list[str] | None = None,  # names that the experts moved; None: all that each of them holds
    cluster: str | None = None,  # address of a Dask scheduler whose workers make the parts of the state
) -> dict[str, float]:
    """Fold experts together and write the next version: seconds of each pass where there are two, what the casts lost.

    Both passes include the digests and waiting until the bytes are on disk.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as flows.wiring sets it; read at torch's first allocation
    start, folder = time.perf_counter(), Path(out)
    plan = _plan(base, parent, [expert] if isinstance(expert, str) else expert, projected, method, device, moved)
    devices = devices_of(device, workers)
    if cluster:
        from flows.cluster import fold_on_cluster

        fold_on_cluster(cluster, folder / STATE, folder / RECORDS, plan, device)
    if serve and plan.one_pass:
        measures, made = fold_once(folder / STATE, folder / RECORDS, folder, plan, devices)
        stats, told = stats_after(plan, measures), {"cast_loss": made.cast_loss}
    else:
        measures = fold_state(folder / STATE, folder / RECORDS, plan, devices)
        stats, folded = stats_after(plan, measures), time.perf_counter()
        told = {"fold_seconds": folded - start}
        if serve:
            made = materialise(folder, Checkpoint.open(folder / STATE), plan, stats, devices)
            told |= {"materialise_seconds": time.perf_counter() - folded, "cast_loss": made.cast_loss}
    if serve:
        shutil.copyfile(Path(base) / "config.json", folder / "config.json")
    write_json(folder / FACTS, {"stats": list(stats), "stored": dict(plan.stored[-1])})
    return told


def merged_delta(folder: Path, name: str, method: str) -> Tensor:  # shape of the tensor, float32
    """What the version in a folder, made with `method`, adds to one tensor of the base; the tensor was moved."""
    rule = build(method, {})
    state = dense_state(state_in(Checkpoint.open(folder / STATE), name, rule, "cpu"))
    assert state is not None, f"{name} has no state in {folder}"
    return rule.read(state, Stats(*read_json(folder / FACTS)["stats"]))


def _plan(
    base: str,
    parent: str | None,
    experts: list[str],
    projected: list[str],
    method: str,
    device: str,
    moved: list[str] | None,
) -> Plan:
    weights = Checkpoint.open(Path(base))
    facts = read_json(Path(parent) / FACTS) if parent else {}
    count, norm_sum, total_norm = facts.get("stats", (0.0, 0.0, 0.0))
    return make_plan(
        method,
        {},
        weights,
        Checkpoint.open(Path(parent) / STATE) if parent else None,
        tuple(_fitted(Path(expert), weights, moved) for expert in experts),
        Kinds(projected=frozenset(projected)),
        stats=(count, norm_sum, total_norm),
        stored=facts.get("stored", {}),
        device=device,
    )


def _fitted(folder: Path, base: Checkpoint, moved: list[str] | None) -> Fitted:
    """An expert that moved these tensors; unless they are named, every tensor that it holds."""
    adapter = (folder / "adapter_config.json").exists()
    tensors = Adapter.open(folder, base) if adapter else Checkpoint.open(folder)
    return Fitted(tensors, base, frozenset(tensors if moved is None else moved))


def main() -> None:
    """Fold experts into a base in one pass; the last line printed is what the passes took, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ours", description="Fold experts from disk to disk.")
    parser.add_argument("base", type=Path)
    parser.add_argument("experts", nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="gets the version")
    parser.add_argument("--method", choices=["average", "task_arithmetic", "opcm"], default="average")
    parser.add_argument("--projected", nargs="*", default=[], help="names of the linear weights")
    chosen = parser.parse_args()
    told = fold(str(chosen.base), None, chosen.experts, str(chosen.out), chosen.projected, chosen.method)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
