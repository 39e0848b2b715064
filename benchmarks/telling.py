"""What a benchmark says: one JSON object, or tables for a reader; and the options that all benchmarks share."""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import SideError

PACKAGES = ("torch", "foldin", "safetensors", "transformers", "numpy")


def options(name: str, purpose: str) -> argparse.ArgumentParser:
    """The command line that every benchmark has."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=purpose)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side; fewer than 5 are no evidence")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each process")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic models")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the models are made, found again and left")
    parser.add_argument("--quick", action="store_true", help="tiny models, one run: whether it works, not how fast")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


@contextmanager
def workplace(keep: Path | None) -> Iterator[Path]:
    """The folder of the models: the one to keep, or a temporary one."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="foldin-benchmark-") as folder:
        yield Path(folder)


def carry_out(
    parser: argparse.ArgumentParser,
    chosen: argparse.Namespace,  # what the parser made of the command line
    measured: Callable[[argparse.Namespace, Path], dict[str, Any]],  # the benchmark, given the folder of its models
) -> dict[str, Any]:
    """Run a benchmark and say what came of it; exit status 1, and no figure, where a side fails."""
    with workplace(chosen.keep) as place:
        try:
            facts = measured(chosen, place)
        except SideError as error:
            parser.exit(1, f"{error}\n")
    tell(facts, chosen.json)
    return facts


def document(
    name: str,
    chosen: argparse.Namespace,
    sides: Mapping[str, object],
    ratios: Mapping[str, object],
    **more: object,  # further sections, by name
) -> dict[str, Any]:
    """Everything about one benchmark: what ran, where, and what came of it."""
    parameters = {key: value for key, value in vars(chosen).items() if key not in ("json", "keep", "seed", "threads")}
    return {
        "benchmark": name,
        "command": f"python -m benchmarks.{name} {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "threads": chosen.threads,
        "seed": chosen.seed,
        "parameters": parameters,
        "sides": sides,
        "ratios": ratios,
        **more,
    }


def machine() -> dict[str, object]:
    """Processor, cores that may be used, memory in GiB, operating system."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    system = f"{platform.system()} {platform.release()}"
    return {"cpu": model, "cores": cores, "memory_gb": round(memory, 1), "os": system}


def versions() -> dict[str, str]:
    """Package -> version, of Python and what the sides import."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def tell(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print the document."""
    if as_json:
        print(json.dumps(facts))
        return
    console = Console()
    where = facts["machine"]
    console.print(f"[bold]{facts['benchmark']}[/bold]  {facts['date']}")
    console.print(f"{where['cpu']}, {where['cores']} cores, {where['memory_gb']} GiB, {where['os']}")
    console.print(", ".join(f"{name} {number}" for name, number in facts["versions"].items()))
    if facts["parameters"].get("quick"):
        console.print("[bold]tiny models, one run: it shows that the program works, and measures nothing[/bold]")
    console.print(_sides(facts))
    known = {"benchmark", "command", "date", "machine", "versions", "threads", "seed", "parameters", "sides"}
    for key, value in facts.items():
        if key not in known:
            console.print(_pairs(key, value))


def _sides(facts: Mapping[str, Any]) -> Table:
    title = f"medians of {facts['parameters']['repeats']} runs, {facts['threads']} threads"
    table = Table("side", "seconds", "min", "max", "peak MiB", "imports MiB", title=title, title_justify="left")
    for name, side in facts["sides"].items():
        seconds = [f"{side['seconds'][key]:.3f}" for key in ("median", "min", "max")]
        memory = [f"{side[key]:.0f}" if side[key] is not None else "-" for key in ("peak_rss_mb", "baseline_rss_mb")]
        table.add_row(name, *seconds, *memory)
    return table


def _pairs(title: str, value: Mapping[str, Any]) -> Table:
    table = Table("what", "value", title=title, title_justify="left")
    for name, found in _flat(value):
        table.add_row(name, f"{found:.4g}" if isinstance(found, float) else str(found))
    return table


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested mappings as "outer, inner" -> value."""
    for key, found in value.items():
        if isinstance(found, Mapping):
            yield from _flat(found, f"{prefix}{key}, ")
        else:
            yield f"{prefix}{key}", found
