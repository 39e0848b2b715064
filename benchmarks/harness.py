"""Sides of a comparison, each run in a fresh process, alternately, and what they took.

A side is a function `module:name` with arguments that JSON can say. A process imports the module first, so that
imports are part of the baseline and not of the time, then calls the function once and reports. The function may return
a mapping of numbers: what it measured itself, the same keys each time. Its process is this module run as a program.
"""

import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MEBI = 2**20
STATUS, IO = Path("/proc/self/status"), Path("/proc/self/io")
Arguments = Mapping[str, Any]  # what JSON can say


class SideError(RuntimeError):
    """A side that did not finish: which one, how it ended, and what it said."""


class Side(NamedTuple):
    """One contestant."""

    name: str
    target: str  # "module:function"
    arguments: Arguments
    before: Callable[[], None] = lambda: None  # run in this process before each start; not measured


class Run(NamedTuple):
    """One process. Memory is resident memory: its peak or that of its largest child, and after its imports."""

    seconds: float  # wall time of the call
    peak_rss_mb: float  # MiB; files mapped into memory count while they are resident
    baseline_rss_mb: float
    read_mb: float  # MiB through read calls during the call; mapped files are not seen here
    written_mb: float
    details: dict[str, float]  # what the function returned
    programs: bool = False  # whether the peak is that of a child: the side started a program


def compare(sides: Sequence[Side], repeats: int, threads: int) -> dict[str, list[Run]]:
    """Side name -> its runs; the sides take turns, so that a slow minute of the machine hits all of them.

    Raises:
        SideError: a process failed; nothing is reported then.
    """
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            side.before()
            runs[side.name].append(run_side(side, threads))
    return runs


def run_side(side: Side, threads: int) -> Run:
    """One run of one side in a fresh interpreter with `threads` threads. Raises SideError as `compare`."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        task = json.dumps({"target": side.target, "arguments": side.arguments, "result": str(result)})
        finished = subprocess.run(
            [sys.executable, "-m", "benchmarks.harness"],
            input=task,
            env=environment(threads),
            capture_output=True,
            text=True,
        )
        if finished.returncode or not result.exists():
            ending = f"ended with status {finished.returncode}"
            raise SideError(f"side {side.name!r} ({side.target}) {ending}:\n{finished.stderr.strip()}")
        return Run(**json.loads(result.read_text()))


def launch(command: Sequence[str]) -> dict[str, float]:
    """A side that is a program: run it to its end. Its imports are part of the time.

    What it measured itself it prints as a JSON object of numbers on its last line. Raises SideError if it fails.
    """
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SideError(f"{command[0]} ended with status {finished.returncode}:\n{finished.stderr[-4000:]}")
    last = finished.stdout.strip().rpartition("\n")[2]
    details: dict[str, float] = json.loads(last) if last.startswith("{") else {}
    return details


def environment(threads: int) -> dict[str, str]:
    """The environment of a process that is to use this many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "HF_HUB_OFFLINE": "1"}


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians of one side's runs, and the spread of its time."""
    seconds = [run.seconds for run in runs]
    facts: dict[str, Any] = {"seconds": {**spread(seconds), "all": [round(value, 4) for value in seconds]}}
    for key in ("peak_rss_mb", "baseline_rss_mb", "read_mb", "written_mb"):
        facts[key] = round(statistics.median(getattr(run, key) for run in runs), 1)
    if runs[0].details:
        facts["details"] = {key: statistics.median(run.details[key] for run in runs) for key in runs[0].details}
    return facts


def ratios(runs: Mapping[str, Sequence[Run]], ours: str) -> dict[str, dict[str, Any]]:
    """Other side -> how many times our seconds and memory it takes.

    `seconds`: over the pairs of runs that followed each other; `peak_rss`: of the medians; `peak_rss_over_baseline`:
    the same, counting only what was added to the memory after the imports. Of programs, which import for themselves,
    the last says nothing and is left out.
    """

    def peak(name: str, over: float) -> float:
        return statistics.median(run.peak_rss_mb - over * run.baseline_rss_mb for run in runs[name])

    found: dict[str, dict[str, Any]] = {}
    for name in runs:
        if name != ours:
            pairs = [theirs.seconds / own.seconds for theirs, own in zip(runs[name], runs[ours], strict=True)]
            programs = all(run.programs for each in (name, ours) for run in runs[each])
            added = {"peak_rss": 0.0} if programs else {"peak_rss": 0.0, "peak_rss_over_baseline": 1.0}
            memory = {key: round(peak(name, over) / max(peak(ours, over), 1.0), 3) for key, over in added.items()}
            found[f"{name}/{ours}"] = {"seconds": spread(pairs), **memory}
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    chosen = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {key: round(value, 4) for key, value in chosen.items()}


def _memory(key: str) -> float:
    """VmHWM (peak) or VmRSS (now) of this process in MiB.

    Not getrusage: its peak is inherited from the process that started this one, through fork and exec. For children
    of this process, which is small, getrusage is good enough.
    """
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def _transferred() -> tuple[float, float]:
    """MiB read and written by this process so far, through system calls."""
    facts = dict(line.split(": ") for line in IO.read_text().splitlines())
    return int(facts["rchar"]) / MEBI, int(facts["wchar"]) / MEBI


def _measured(function: Callable[..., Mapping[str, float] | None], arguments: Arguments) -> Run:
    baseline, (read, written) = _memory("VmRSS"), _transferred()
    start = time.perf_counter()
    details = function(**arguments)
    seconds = time.perf_counter() - start
    after = _transferred()
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    own, transfer = _memory("VmHWM"), (after[0] - read, after[1] - written)
    return Run(seconds, max(own, children), baseline, *transfer, dict(details or {}), children > own)


def _child() -> None:
    """Do what standard input says: import, call, report."""
    task = json.load(sys.stdin)
    module, _, name = task["target"].partition(":")
    function = getattr(importlib.import_module(module), name)
    run = _measured(function, task["arguments"])
    Path(task["result"]).write_text(json.dumps(run._asdict()))


if __name__ == "__main__":
    _child()
