"""Time and memory of a fold against the number of experts folded before, and against the size of the model.

    python -m benchmarks.scaling                        both, average and OPCM: an hour or more on two cores
    python -m benchmarks.scaling --parts experts        154 million parameters, the 1st, 2nd, 5th and 20th expert
    python -m benchmarks.scaling --sizes 4              without the largest decoder, of 1.1 billion parameters
    python -m benchmarks.scaling --quick --json         half a minute: whether it works

Every fold is from disk to disk, with its serving checkpoint. The first expert of a line has no total to be projected
on, so OPCM's time is compared from the second on; against the model's size it is the second that is folded. A few
experts are folded again and again under later numbers: what a fold takes does not depend on what the expert is.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Run, Side, compare, ratios, run_side, summary
from benchmarks.shapes import Architecture, decoder, tinyllama
from benchmarks.synthetic import make
from benchmarks.telling import carry_out, document, options

METHODS = ("average", "opcm")
PARTS = ("experts", "sizes")
NUMBERS = (1, 2, 5, 20)  # of the expert whose fold is measured
EXPERTS = 3  # made; expert n is folded as number n, n + 3, ...
Runs = dict[str, list[Run]]


def main() -> None:
    """Run it as the command line says."""
    parser = options("scaling", "Time and memory of a fold against the number of experts and the model's size.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sizes", type=int, default=5, metavar="N", help="how many decoders, from the smallest on")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw both")
    chosen = parser.parse_args()
    plot, chosen.plot = chosen.plot, None
    if chosen.quick:
        chosen.repeats = 1
    facts = carry_out(parser, chosen, measured)
    if plot:
        from benchmarks.drawing import draw

        draw(facts, plot)


def decoders(quick: bool) -> list[Architecture]:
    """From 20 million parameters to 1.1 billion, bfloat16; or two tiny ones."""
    if quick:
        return [decoder(hidden=64, layers=1, vocabulary=96), decoder(hidden=128, layers=2, vocabulary=512)]
    return [
        decoder(hidden=512, layers=4, vocabulary=8000),
        decoder(hidden=768, layers=8, vocabulary=16000),
        decoder(hidden=1024, layers=8, vocabulary=32000),
        decoder(hidden=1536, layers=16, vocabulary=32000),
        tinyllama(),
    ]


def measured(chosen: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The whole document; `experts` and `sizes` are what the plot shows."""
    shapes = decoders(chosen.quick)
    runs: Runs = {}
    found: dict[str, object] = {}
    sections: dict[str, dict[str, Any]] = {part: {} for part in chosen.parts}
    if "experts" in chosen.parts:
        shape = shapes[0 if chosen.quick else 2]
        for method in chosen.methods:
            some = by_experts(chosen, place, shape, method)
            found |= ratios(some, called(method, shape, 2))
            points = zip(numbers(chosen), some.values(), strict=True)
            sections["experts"][method] = {str(number): point(each) for number, each in points}
            runs |= some
    if "sizes" in chosen.parts:
        for shape in shapes[: chosen.sizes]:
            for method in chosen.methods:
                some = second_fold(chosen, place, shape, method)
                name = called(method, shape, 2)
                sections["sizes"].setdefault(method, {})[str(shape.parameters)] = point(some[name])
                runs[f"{name}, by size" if name in runs else name] = some[name]
    return document("scaling", chosen, {name: summary(each) for name, each in runs.items()}, found, **sections)


def numbers(chosen: argparse.Namespace) -> tuple[int, ...]:
    """Of the experts whose folds are measured."""
    return NUMBERS[:2] if chosen.quick else NUMBERS


def point(runs: Sequence[Run]) -> dict[str, float]:
    """What the plot shows of one fold."""
    facts = summary(runs)
    return {"seconds": facts["seconds"]["median"], "peak_rss_mb": facts["peak_rss_mb"]}


def called(method: str, shape: Architecture, number: int) -> str:
    """The name of a side."""
    return f"{method}, {shape.parameters / 1e6:.3g} M, expert {number}"


def by_experts(chosen: argparse.Namespace, place: Path, shape: Architecture, method: str) -> Runs:
    """The folds of some experts of one line, each into the state of all before it."""
    models = made(chosen, place, shape)
    wanted = numbers(chosen)
    last = 0
    for number in (number - 1 for number in wanted if number > 1):
        run_side(folding(models, shape, method, last, number, serve=False), chosen.threads)
        last = number
    sides = [folding(models, shape, method, number - 1, number) for number in wanted]
    runs = compare(sides, chosen.repeats, chosen.threads)
    removed(models, method, chosen)
    return runs


def second_fold(chosen: argparse.Namespace, place: Path, shape: Architecture, method: str) -> Runs:
    """The fold of the second expert into a model of some size."""
    models = made(chosen, place, shape)
    run_side(folding(models, shape, method, 0, 1, serve=False), chosen.threads)
    runs = compare([folding(models, shape, method, 1, 2)], chosen.repeats, chosen.threads)
    removed(models, method, chosen)
    return runs


def made(chosen: argparse.Namespace, place: Path, shape: Architecture) -> Path:
    """The folder of a decoder with its experts, made or found."""
    experts = EXPERTS if shape.parameters < 2e8 else 2
    return make(place / f"scaling-{shape.parameters}", shape, experts, chosen.seed)


def folding(models: Path, shape: Architecture, method: str, before: int, number: int, serve: bool = True) -> Side:
    """The fold, in one pass, of the experts after number `before` up to `number` into the state of those up to it."""
    out = models / (f"{method}-{number}-served" if serve else f"{method}-{number}")
    experts = [str(models / f"expert-{index % EXPERTS + 1}") for index in range(before, number)]
    arguments = {
        **{"base": str(models / "base"), "parent": str(models / f"{method}-{before}") if before else None},
        **{"expert": experts, "out": str(out), "projected": list(shape.linear), "method": method, "serve": serve},
    }

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)

    if not serve:
        clear()
    return Side(called(method, shape, number), "benchmarks.ours:fold", arguments, clear)


def removed(models: Path, method: str, chosen: argparse.Namespace) -> None:
    """Take away what the folds wrote, and the models too unless they are to be kept: gigabytes."""
    for folder in models.glob(f"{method}-*"):
        shutil.rmtree(folder)
    if chosen.keep is None and method == chosen.methods[-1]:
        shutil.rmtree(models)


if __name__ == "__main__":
    main()
