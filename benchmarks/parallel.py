"""One OPCM fold of the vision tower of CLIP ViT-B/32 by 1, 2, ... workers: how much faster, and the same bytes.

    python -m benchmarks.parallel                   five runs of each side
    python -m benchmarks.parallel --dask            a side on a local Dask cluster too, where prefect-dask is at hand
    python -m benchmarks.parallel --quick --json    half a minute: whether it works

The third expert is folded into a total of two, from disk to disk with the serving checkpoint. The state and the serving
weights of every run must be those of every other run, byte for byte; else the exit status is 1. The cluster and
Prefect's server are started before and not measured; what a flow run costs is.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness import Run, Side, compare, ratios, summary
from benchmarks.step import EXPERTS, Bench, prepared
from benchmarks.telling import carry_out, document, options
from flows.config import Config
from flows.environment import prepare_environment
from flows.options import RegistryConfig
from flows.serve import temporary_prefect
from registry.files import sha256_file

Written = list[dict[str, str]]  # per run: file -> digest


def main() -> None:
    """Run it as the command line says; exit status 1 where two runs differ by a byte."""
    parser = options("parallel", "One OPCM fold of a ViT-B/32 tower by 1, 2, ... workers.")
    parser.add_argument("--layers", type=int, default=12, help="of the tower")
    parser.add_argument(
        "--workers", type=int, nargs="+", metavar="N", help="numbers to try; default: 1, 2, 4, ..., all"
    )
    parser.add_argument("--dask", action="store_true", help="a side on a local Dask cluster too")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.repeats, chosen.layers = 1, 2  # of full width: two parts, so that two workers have something to share
    if chosen.workers is None:
        chosen.workers = counts(len(os.sched_getaffinity(0)))
    if chosen.dask and not find_spec("prefect_dask"):
        print("prefect-dask is not installed: no side on a Dask cluster", file=sys.stderr)
        chosen.dask = False
    facts = carry_out(parser, chosen, measured)
    if not facts["bytes"]["identical"]:
        parser.exit(1, "the runs did not write the same bytes\n")


def counts(cores: int) -> list[int]:
    """Powers of two below the number of cores, and that number.

    >>> counts(2), counts(6)
    ([1, 2], [1, 2, 4, 6])
    """
    return [2**power for power in range(cores.bit_length()) if 2**power < cores] + [cores]


@contextmanager
def cluster(chosen: argparse.Namespace, place: Path) -> Iterator[str | None]:
    """The address of a Dask scheduler on this machine, with one process for each worker; None where none is wanted."""
    if not chosen.dask:
        yield None
        return
    from distributed import LocalCluster

    config = Config(place, RegistryConfig(), {})
    prepare_environment(config)
    with temporary_prefect(config):  # named in the environment, for the processes too
        workers = {"n_workers": max(chosen.workers), "threads_per_worker": 1, "dashboard_address": None}
        with LocalCluster(**workers) as found:  # type: ignore[no-untyped-call]
            yield str(found.scheduler_address)


def measured(chosen: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The whole document."""
    with cluster(chosen, place) as address:
        return compared(chosen, place, address)


def compared(chosen: argparse.Namespace, place: Path, address: str | None) -> dict[str, Any]:
    """The whole document, with a side for the cluster that has an address."""
    bench = prepared(chosen, place, chosen.layers, 768)
    bench.ensure("foldin", EXPERTS - 1)
    written: Written = []
    sides = [
        folding(bench, f"{count} worker{'s' * (count > 1)}", {"workers": count}, written) for count in chosen.workers
    ]
    if address:
        sides.append(folding(bench, f"Dask, {max(chosen.workers)} processes", {"cluster": address}, written))
    runs = compare(sides, chosen.repeats, chosen.threads)
    for side in sides:
        side.before()
    return document(
        "parallel",
        chosen,
        {name: summary(each) for name, each in runs.items()},
        speed_up(runs, sides),
        bytes=alike(written),
    )


def folding(bench: Bench, name: str, workers: dict[str, Any], written: Written) -> Side:
    """The fold of the last expert by so many workers; what a run wrote is noted before the next one starts."""
    side, out = bench.side("foldin", EXPERTS), bench.folder / f"parallel {name}"
    shutil.rmtree(out, ignore_errors=True)  # of a benchmark that was stopped

    def put_away() -> None:
        if out.exists():
            written.append({str(file.relative_to(out)): sha256_file(file) for file in out.rglob("*.safetensors")})
            shutil.rmtree(out)

    return Side(name, side.target, {**side.arguments, **workers, "out": str(out)}, put_away)


def alike(written: Written) -> dict[str, Any]:
    """Whether all runs wrote the same files with the same bytes, and which they did not.

    >>> alike([{"a": "1", "b": "2"}, {"a": "1"}])
    {'identical': False, 'runs': 2, 'files': 2, 'differing': ['b']}
    """
    files = sorted({file for each in written for file in each})
    differing = [file for file in files if len({each.get(file) for each in written}) > 1]
    return {
        "identical": bool(files) and not differing,
        "runs": len(written),
        "files": len(files),
        "differing": differing,
    }


def speed_up(runs: dict[str, list[Run]], sides: Sequence[Side]) -> dict[str, object]:
    """How many times the seconds of each other side the first one takes."""
    first = sides[0].name
    return {
        f"{first}/{side.name}": ratios({name: runs[name] for name in (first, side.name)}, side.name)[
            f"{first}/{side.name}"
        ]
        for side in sides[1:]
    }


if __name__ == "__main__":
    main()
