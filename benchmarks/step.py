"""One OPCM fold of the vision tower of CLIP ViT-B/32, the third expert into a total of two: foldin and the public rule.

    python -m benchmarks.step                       five runs of each side, a few minutes
    python -m benchmarks.step --quick --json        a few seconds: whether it works

Both sides start from files and end with files: foldin reads and writes its state and a serving checkpoint, tensor by
tensor, with digests, and waits until the bytes are on disk; the reference loads three whole models and saves one. Each
goes on from its own history. Files that were just written are read from the system's cache, on both sides.

Accuracy is the distance of each side's written model, after its own three experts, to the reference in float64 all the
way: ||found - exact|| / ||exact - base|| over all tensors, and the largest of any tensor; on --oracle-layers layers.
"""

import argparse
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import Run, Side, compare, ratios, run_side, summary
from benchmarks.shapes import Architecture, vit_b32
from benchmarks.synthetic import make
from benchmarks.telling import carry_out, document, options
from registry.weights import Checkpoint

EXPERTS = 3
SIDES = ("foldin", "reference")


class Bench(NamedTuple):
    """One synthetic tower with its experts, and what both sides made of them."""

    folder: Path
    shape: Architecture
    threads: int

    def path(self, name: str) -> str:
        """A folder of it."""
        return str(self.folder / name)

    def side(self, name: str, expert: int) -> Side:
        """The fold of one expert by foldin, reference or exact (the reference in float64), from its own history."""
        earlier, out = self.folder / f"{name}-{expert - 1}", self.folder / f"{name}-{expert}"
        common = {
            **{"base": self.path("base"), "expert": self.path(f"expert-{expert}"), "out": str(out)},
            "projected": list(self.shape.linear),
        }

        def clear() -> None:
            shutil.rmtree(out, ignore_errors=True)

        if name == "foldin":
            parent = str(earlier) if expert > 1 else None
            return Side(name, "benchmarks.ours:fold", {**common, "parent": parent}, clear)
        merged = str(earlier) if expert > 2 else self.path("expert-1")
        dtype = "F64" if name == "exact" else "F32"
        return Side(name, "benchmarks.reference:run", {**common, "merged": merged, "dtype": dtype}, clear)

    def ensure(self, name: str, expert: int) -> str:
        """The folder of a side's model after this expert, made together with its history.

        What is found of the reference is kept; foldin's is made again, because foldin changes.
        """
        for number in range(1 if name == "foldin" else 2, expert + 1):
            done = self.folder / f"{name}-{number}" / "done"
            if name == "foldin" or not done.exists():
                side = self.side(name, number)
                side.before()
                run_side(side, self.threads)
                done.touch()
        return self.path(f"{name}-{expert}")


def main() -> None:
    """Run it as the command line says."""
    parser = options("step", "One OPCM fold of a ViT-B/32 tower: foldin against the published rule.")
    parser.add_argument("--layers", type=int, default=12, help="of the tower")
    parser.add_argument("--oracle-layers", type=int, default=2, help="of the tower whose accuracy is measured")
    chosen = parser.parse_args()
    width = 768
    if chosen.quick:
        chosen.repeats, chosen.layers, chosen.oracle_layers, width = 1, 2, 2, 128
    carry_out(parser, chosen, lambda chosen, place: measured(chosen, place, width))


def measured(chosen: argparse.Namespace, place: Path, width: int) -> dict[str, Any]:
    """The whole document."""
    bench = prepared(chosen, place, chosen.layers, width)
    for name in SIDES:
        bench.ensure(name, EXPERTS - 1)
    runs = compare([bench.side(name, EXPERTS) for name in SIDES], chosen.repeats, chosen.threads)
    small = prepared(chosen, place, chosen.oracle_layers, width)
    return document(
        "step",
        chosen,
        {name: summary(found) for name, found in runs.items()},
        ratios(runs, "foldin"),
        profile=profile(bench, runs["foldin"], 512 if chosen.quick else 2048),
        accuracy={"layers": chosen.oracle_layers, **{name: accuracy(small, name) for name in SIDES}},
    )


def prepared(chosen: argparse.Namespace, place: Path, layers: int, width: int) -> Bench:
    """The tower and its experts, made or found."""
    shape = vit_b32(layers, width)
    folder = place / f"vit-b32-{layers}x{width}-seed-{chosen.seed}"
    return Bench(make(folder, shape, EXPERTS, chosen.seed), shape, chosen.threads)


def profile(bench: Bench, runs: list[Run], size: int) -> dict[str, Any]:
    """Where foldin's time goes: its own account of the measured runs, and one more run with operations watched."""
    side = bench.side("foldin", EXPERTS)
    side.before()
    watched = Side("profile", "benchmarks.stages:profile", {"arguments": side.arguments, "size": size})
    operations = run_side(watched, bench.threads).details
    return {"medians": summary(runs)["details"], "operations": operations}


def accuracy(bench: Bench, name: str) -> dict[str, float]:
    """How far a side's merged delta is from the exact one, over the whole model and in its worst tensor."""
    folders = (bench.path("base"), bench.ensure("exact", EXPERTS), bench.ensure(name, EXPERTS))
    base, exact, found = (Checkpoint.open(Path(folder)) for folder in folders)
    wrong, moved = {}, {}
    for tensor in base:
        target = exact[tensor]
        wrong[tensor] = float((found[tensor].double() - target).norm())
        moved[tensor] = float((target - base[tensor].double()).norm())
    whole = math.hypot(*wrong.values()) / math.hypot(*moved.values())
    return {"whole": whole, "worst_tensor": max(wrong[tensor] / moved[tensor] for tensor in base)}


if __name__ == "__main__":
    main()
