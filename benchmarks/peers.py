"""Other tools on the same checkpoints: mergekit's batch merges of two experts beside foldin's fold of both in one pass.

    python -m benchmarks.peers --peers .venv-peers        `make bench-peers` makes that environment first

Each side is a program, started as its users start it: time includes its imports, memory is that of its largest
process. Both make one merged checkpoint from two experts; foldin writes a float32 state beside it, from which the next
expert can be folded, and digests of everything, and waits until the bytes are on disk.
mergekit is run as it is published, nothing of it is used here.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import Run, Side, compare, ratios, summary
from benchmarks.shapes import decoder, tinyllama
from benchmarks.synthetic import make
from benchmarks.telling import carry_out, document, options
from registry.weights import Checkpoint

PAIRS = {"average": "linear", "task_arithmetic": "task_arithmetic"}  # foldin's method -> mergekit's
WEIGHTS = {"linear": 0.5, "task_arithmetic": 0.3}  # of each expert; 0.3 is foldin's default scale
FLAGS = ("--no-cuda", "--no-copy-tokenizer", "--no-write-model-card", "--quiet")


def main() -> None:
    """Run it as the command line says."""
    parser = options("peers", "mergekit's merges of two experts of 1.1 billion parameters, beside foldin's folds.")
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers"), help="the environment that has mergekit")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.repeats = 1
    if not (chosen.peers / "bin/mergekit-yaml").exists():
        parser.error(f"there is no mergekit in {chosen.peers}; run make bench-peers")
    carry_out(parser, chosen, measured)


def measured(chosen: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The whole document."""
    shape = decoder(hidden=128, layers=2, vocabulary=512) if chosen.quick else tinyllama()
    models = make(place / ("decoder" if chosen.quick else "tinyllama"), shape, experts=2, seed=chosen.seed)
    found: dict[str, list[Run]] = {}
    times: dict[str, object] = {}
    agreement: dict[str, float] = {}
    for method, peer in PAIRS.items():
        sides = (ours(models, method), theirs(chosen.peers, models, peer))
        runs = compare(sides, chosen.repeats, chosen.threads)
        found |= runs
        times |= ratios(runs, sides[0].name)
        agreement[f"{method} and {peer}"] = distance(models, f"foldin-{method}", f"mergekit-{peer}")
        for side in sides:
            side.before()  # removes what it wrote: up to 13 GB
    imports = compare(importing(chosen.peers), 1, chosen.threads)
    more = {"agreement": agreement, "imports": {name: told(runs) for name, runs in imports.items()}}
    peers, chosen.peers = chosen.peers, str(chosen.peers)
    sections = {name: told(runs) for name, runs in found.items()}
    return document("peers", chosen, sections, times, **more, peers=mergekit_versions(peers))


def told(runs: list[Run]) -> dict[str, Any]:
    """A side's figures without those of the process that only started it."""
    return {**summary(runs), "baseline_rss_mb": None, "read_mb": None, "written_mb": None}


def distance(models: Path, left: str, right: str) -> float:
    """||left - right|| / ||right - base|| over all tensors of two merged models."""
    base, one, other = (Checkpoint.open(models / name) for name in ("base", left, right))
    apart = math.hypot(*(float((one[name].double() - other[name].double()).norm()) for name in base))
    return apart / math.hypot(*(float((other[name].double() - base[name].double()).norm()) for name in base))


def ours(models: Path, method: str) -> Side:
    """foldin: both experts in one pass."""
    out = models / f"foldin-{method}"
    experts = [str(models / f"expert-{number}") for number in (1, 2)]
    arguments = [str(models / "base"), *experts, "--out", str(out), "--method", method]
    return program(f"foldin {method}", [sys.executable, "-m", "benchmarks.ours", *arguments], out)


def theirs(peers: Path, models: Path, method: str) -> Side:
    """mergekit: one merge."""
    out, recipe = models / f"mergekit-{method}", models / f"{method}.yml"
    entries = [{"model": str(models / f"expert-{one}"), "parameters": {"weight": WEIGHTS[method]}} for one in (1, 2)]
    facts: dict[str, object] = {"merge_method": method, "models": entries, "dtype": "bfloat16"}
    if method != "linear":
        facts["base_model"] = str(models / "base")
    recipe.write_text(json.dumps(facts))  # JSON is YAML
    return program(f"mergekit {method}", [str(peers / "bin/mergekit-yaml"), str(recipe), str(out), *FLAGS], out)


def importing(peers: Path) -> list[Side]:
    """Both programs without any work: what of the figures is their imports."""
    commands = {
        "foldin": [sys.executable, "-c", "import benchmarks.ours"],
        "mergekit": [str(peers / "bin/python"), "-c", "import mergekit.merge, mergekit.scripts.run_yaml"],
    }
    return [Side(name, "benchmarks.harness:launch", {"command": command}) for name, command in commands.items()]


def program(name: str, command: list[str], out: Path) -> Side:
    """A side that is a command and writes to a folder, which is removed before each start."""
    return Side(name, "benchmarks.harness:launch", {"command": command}, lambda: shutil.rmtree(out, ignore_errors=True))


def mergekit_versions(peers: Path) -> dict[str, str]:
    """What mergekit ran with."""
    names = ("mergekit", "torch", "transformers", "safetensors")
    script = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    finished = subprocess.run([str(peers / "bin/python"), "-c", script], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(finished.stdout)
    return versions


if __name__ == "__main__":
    main()
