"""A decoder of 1.1 billion parameters in bf16 shards, folded from disk to disk: time against copying, and memory.

    python -m benchmarks.stream                     five runs of each side, some minutes; OPCM takes longest
    python -m benchmarks.stream --quick --json      a few seconds: whether it works

The measured fold is that of the first expert, with its serving checkpoint. `copy` reads and writes the same bytes and
does nothing else: base, expert and state in, state and serving checkpoint out, through one buffer of a megabyte; `copy,
on disk` waits until they are on disk, as foldin does. Files are read from the system's cache on all sides.
"""

import argparse
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import Side, compare, ratios, summary
from benchmarks.shapes import Architecture, decoder, tinyllama
from benchmarks.synthetic import make
from benchmarks.telling import carry_out, document, options

BUFFER = 2**20
METHODS = ("average", "opcm")


def copy(base: str, expert: str, state: str, out: str, durable: bool) -> None:
    """Move the bytes that one fold and its serving checkpoint move, and nothing else."""
    folder = Path(out)
    folder.mkdir()
    copy_folder(Path(base), None, durable)
    copy_folder(Path(expert), None, durable)
    copy_folder(Path(state), folder / "state", durable)  # its bytes are written once and read once
    copy_folder(Path(base), folder / "serving", durable)


def copy_folder(source: Path, target: Path | None, durable: bool) -> None:
    """Read the weights of a folder, and write them too where there is a target."""
    if target is not None:
        target.mkdir()
    buffer = memoryview(bytearray(BUFFER))
    for path in sorted(source.glob("*.safetensors")):
        with ExitStack() as stack:
            file = stack.enter_context(open(path, "rb", buffering=0))
            copied = stack.enter_context(open(target / path.name, "xb", buffering=0)) if target is not None else None
            while count := file.readinto(buffer):
                if copied:
                    copied.write(buffer[:count])
            if copied and durable:
                os.fsync(copied.fileno())


def main() -> None:
    """Run it as the command line says."""
    parser = options("stream", "One fold of a 1.1-billion-parameter decoder: foldin against copying its bytes.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.repeats = 1
    carry_out(parser, chosen, measured)


def measured(chosen: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The whole document."""
    shape = decoder(hidden=128, layers=2, vocabulary=512) if chosen.quick else tinyllama()
    models = make(place / ("decoder" if chosen.quick else "tinyllama"), shape, 1, chosen.seed)
    folds = [folding(models, shape, method) for method in chosen.methods]
    first = compare(folds[:1], 1, chosen.threads)  # leaves the state whose bytes are copied, and warms the cache
    state = models / "state-to-copy"
    shutil.rmtree(state, ignore_errors=True)
    (models / f"stream-{chosen.methods[0]}" / "state").rename(state)
    sides = [copying(models, state, durable) for durable in (False, True)]
    runs = compare([*sides, *folds], chosen.repeats, chosen.threads)
    for side in (*sides, *folds):
        side.before()
    shutil.rmtree(state)
    found = {
        f"{fold.name}/{side.name}": ratios(runs, side.name)[f"{fold.name}/{side.name}"]
        for fold in folds
        for side in sides
    }
    return document("stream", chosen, {name: summary(each) for name, each in (runs or first).items()}, found)


def folding(models: Path, shape: Architecture, method: str) -> Side:
    """foldin's side: the fold of the first expert, and the serving checkpoint."""
    out = models / f"stream-{method}"
    arguments = {
        **{"base": str(models / "base"), "parent": None, "expert": str(models / "expert-1"), "out": str(out)},
        **{"projected": list(shape.linear), "method": method},
    }
    return Side(f"foldin {method}", "benchmarks.ours:fold", arguments, lambda: shutil.rmtree(out, ignore_errors=True))


def copying(models: Path, state: Path, durable: bool) -> Side:
    """The copy of the same bytes."""
    out = models / f"copied-{durable}"
    arguments = {
        **{"base": str(models / "base"), "expert": str(models / "expert-1"), "state": str(state), "out": str(out)},
        "durable": durable,
    }
    name = "copy, on disk" if durable else "copy"
    return Side(name, "benchmarks.stream:copy", arguments, lambda: shutil.rmtree(out, ignore_errors=True))


if __name__ == "__main__":
    main()
