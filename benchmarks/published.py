"""Whether benchmarks/reference.py is fair to what it transcribes: the real fusion-bench on the same tower, beside it.

    python -m benchmarks.published --peers .venv-fusion-bench     `make bench-peers` makes that environment, if it can

Times to compare are `step_seconds`, the third expert alone; the program's own seconds include its imports and two
steps. `agreement` leaves out the class embedding, to which the public code adds nothing (tests/golden/README.md).
"""

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.harness import Side, compare, summary
from benchmarks.step import EXPERTS, prepared
from benchmarks.telling import carry_out, document, options
from registry.weights import Checkpoint

SCRIPT = Path(__file__).with_name("fusion_bench_run.py")
STRANDED = "embeddings.class_embedding"


def main() -> None:
    """Run it as the command line says."""
    parser = options("published", "fusion-bench's OPCM beside its transcription, on a ViT-B/32 tower.")
    parser.add_argument("--layers", type=int, default=12, help="of the tower")
    parser.add_argument("--peers", type=Path, default=Path(".venv-fusion-bench"), help="has fusion-bench")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.repeats, chosen.layers = 1, 2
    if not (chosen.peers / "bin/fusion_bench").exists():
        parser.error(f"there is no fusion-bench in {chosen.peers}; run make bench-peers")
    carry_out(parser, chosen, measured)


def measured(chosen: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The whole document."""
    bench = prepared(chosen, place, chosen.layers, 128 if chosen.quick else 768)
    bench.ensure("reference", EXPERTS - 1)
    out = bench.folder / "published.safetensors"
    command = [str(chosen.peers / "bin/python"), str(SCRIPT), str(bench.folder), str(out)]
    sides = [
        Side("fusion_bench", "benchmarks.harness:launch", {"command": command}, lambda: out.unlink(missing_ok=True)),
        bench.side("reference", EXPERTS),
    ]
    runs = compare(sides, chosen.repeats, chosen.threads)
    found = {name: summary(each) for name, each in runs.items()}
    steps = {name: facts["details"]["step_seconds"] for name, facts in found.items()}
    chosen.peers = str(chosen.peers)
    agreement = distance(bench.folder, out)
    quotient = {"fusion_bench/reference": {"step_seconds": steps["fusion_bench"] / steps["reference"]}}
    return document("published", chosen, found, quotient, agreement={"whole": agreement})


def distance(folder: Path, out: Path) -> float:
    """||transcription - published|| / ||published - base|| over all tensors but the class embedding."""
    base, ours = Checkpoint.open(folder / "base"), Checkpoint.open(folder / f"reference-{EXPERTS}")
    theirs = Checkpoint.open_file(out)
    names = [name for name in base if name != STRANDED]
    apart = math.hypot(*(float((ours[name].double() - theirs[name].double()).norm()) for name in names))
    return apart / math.hypot(*(float((theirs[name].double() - base[name].double()).norm()) for name in names))


if __name__ == "__main__":
    main()
