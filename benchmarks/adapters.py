"""A LoRA adapter of rank 16 folded into a decoder of 1.1 billion parameters: by its factors, and as a full checkpoint.

    python -m benchmarks.adapters                   five runs of each side: an hour or more on two cores
    python -m benchmarks.adapters --layers 4        a decoder of four of its 22 layers
    python -m benchmarks.adapters --quick --json    half a minute: whether it works

The second adapter is folded by OPCM into a total of one, each side into its own. `adapter` keeps that total as factors;
`densified` folds the full checkpoints that the two adapters stand for. Tensors that no adapter changes are left out on
both sides, as intake leaves them out. The sides called served write the serving checkpoint too.

Agreement is ||adapter - densified|| / ||densified|| of the merged delta after both folds, over the whole model and in
its worst tensor. It is found on a small float32 decoder: rounding the densified experts to bfloat16 would hide it.
"""

import argparse
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import Run, Side, compare, ratios, run_side, summary
from benchmarks.ours import merged_delta
from benchmarks.shapes import Architecture, decoder, tinyllama
from benchmarks.synthetic import write_adapter, write_base, write_dense
from benchmarks.telling import carry_out, document, options

SIDES = ("adapter", "densified")
SERVED = ", served"


class Bench(NamedTuple):
    """One base with two adapters, their dense twins, and what both sides made of them."""

    folder: Path
    shape: Architecture
    threads: int

    def side(self, name: str, number: int, serve: bool = False) -> Side:
        """The fold of the first or the second expert by adapter or densified, from its own history."""
        out = self.folder / f"{name}-folded-{number}{'-served' if serve else ''}"
        expert = self.folder / f"adapter-{number}{'-dense' if name == 'densified' else ''}"
        arguments = {
            **{"base": str(self.folder / "base"), "expert": str(expert), "out": str(out), "serve": serve},
            "parent": str(self.folder / f"{name}-folded-1") if number > 1 else None,
            **{"projected": list(self.shape.linear), "moved": list(self.shape.adapted)},
        }
        called = name + (SERVED if serve else "")
        return Side(called, "benchmarks.ours:fold", arguments, lambda: shutil.rmtree(out, ignore_errors=True))

    def fold(self, name: str, number: int) -> None:
        """Make the state of one side after this expert anew."""
        side = self.side(name, number)
        side.before()
        run_side(side, self.threads)


def main() -> None:
    """Run it as the command line says."""
    parser = options("adapters", "A LoRA adapter folded by its factors, against its densified form.")
    parser.add_argument("--layers", type=int, default=22, help="of the decoder")
    parser.add_argument("--served-repeats", type=int, metavar="N", help="runs with serving checkpoint; as --repeats")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.repeats, chosen.layers, chosen.served_repeats = 1, 2, 1
    if chosen.served_repeats is None:
        chosen.served_repeats = chosen.repeats
    carry_out(parser, chosen, measured)


def measured(chosen: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The whole document."""
    whole = decoder(hidden=256, layers=chosen.layers, vocabulary=512) if chosen.quick else tinyllama(chosen.layers)
    folder = "adapted-quick" if chosen.quick else f"adapted-tinyllama-{chosen.layers}"
    bench = prepared(place / folder, whole, chosen)
    small = decoder(hidden=256 if chosen.quick else 512, layers=2, vocabulary=512, dtype="F32")
    agreement = agreed(prepared(place / f"{folder}-float32", small, chosen))
    for name in SIDES:
        bench.fold(name, 1)
    runs: dict[str, list[Run]] = {}
    found: dict[str, object] = {}
    for serve, repeats in ((False, chosen.repeats), (True, chosen.served_repeats)):
        sides = [bench.side(name, 2, serve) for name in SIDES]
        some = compare(sides, repeats, chosen.threads) if repeats else {}
        found |= ratios(some, sides[0].name) if some else {}
        runs |= some
        for side in sides:
            side.before()  # removes what it wrote: up to 7 GB
    return document(
        "adapters", chosen, {name: summary(each) for name, each in runs.items()}, found, agreement=agreement
    )


def prepared(folder: Path, shape: Architecture, chosen: argparse.Namespace) -> Bench:
    """The base, the adapters and their dense twins, made or found."""
    base = write_base(folder / "base", shape, chosen.seed)
    for number in (1, 2):
        adapter = write_adapter(folder / f"adapter-{number}", shape, chosen.seed, number, base="../base")
        write_dense(folder / f"adapter-{number}-dense", base, adapter, shape)
    return Bench(folder, shape, chosen.threads)


def agreed(bench: Bench) -> dict[str, float | str]:
    """How far the two sides' merged deltas are apart, tensor by tensor."""
    for name in SIDES:
        for number in (1, 2):
            bench.fold(name, number)
    apart, moved = {}, {}
    for tensor in bench.shape.adapted:
        left, right = (merged_delta(bench.folder / f"{name}-folded-2", tensor, "opcm").double() for name in SIDES)
        apart[tensor], moved[tensor] = float((left - right).norm()), float(right.norm())
    whole = math.hypot(*apart.values()) / math.hypot(*moved.values())
    worst = max(apart[tensor] / moved[tensor] for tensor in apart)
    what = "||adapter - densified|| / ||densified|| of the merged delta, float32 decoder"
    return {"what": what, "parameters": bench.shape.parameters, "whole": whole, "worst_tensor": worst}


if __name__ == "__main__":
    main()
