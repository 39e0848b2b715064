"""One OPCM fold of all tensors of a 7-billion-parameter decoder on a GPU, against the published rule's full bases.

    python -m benchmarks.gpu                            five runs of the fold, one of the reference: some minutes
    python -m benchmarks.gpu --disk --keep DIR          from disk to disk too: about 100 GB in DIR
    python -m benchmarks.gpu --quick --json             whether it works; with --device cpu also where no GPU is

The tensors have the shapes of Llama 7B and are made on the device, one at a time, so that neither a download nor much
memory is needed; making them is not timed. Each is folded as a third expert into a total of two and then read, by the
functions that the engine calls; `fold` and `read` are the sums over all tensors. The first factorisation of a process
loads libraries, so each process starts with a small one that is not timed.

The reference is measured on one matrix of each shape: gesvd with full bases and the products with them, as the public
code does it on a GPU. Its time is scaled up by how often the shape occurs; what else its step does is left out.
Parity is how far the projection on the device is from the one on the processor, for the same matrices.
"""

import argparse
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.harness import Run, Side, compare, run_side, summary
from benchmarks.reference import project as published
from benchmarks.shapes import Architecture, decoder, llama_7b
from benchmarks.synthetic import DECAY, SPREAD, make
from benchmarks.telling import carry_out, document, options
from merging import Stats, build
from merging.fold import drained, fold_tensor, role_of
from merging.measure import Measure
from merging.method import Method, State
from merging.opcm import project
from merging.read import read_pieces

T = TypeVar("T")
Kinds = Sequence[tuple[Sequence[int], bool, int]]  # shape, whether it is projected, how many tensors
ENERGY = 0.5
PARTS = ("fold", "reference", "parity")
NOTE = "one matrix of each shape, scaled up by how many there are"


def main() -> None:
    """Run it as the command line says; exit status 2 where there is no such device."""
    parser = options("gpu", "One OPCM fold of 7-billion-parameter shapes on a GPU.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to see that it works")
    parser.add_argument("--layers", type=int, default=32, help="of the decoder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--disk", action="store_true", help="the whole fold from disk to disk too")
    chosen = parser.parse_args()
    if chosen.device != "cpu" and not torch.cuda.is_available():
        parser.exit(2, "benchmarks.gpu needs a CUDA device, and torch sees none here\n")
    if chosen.quick:
        chosen.repeats, chosen.layers = 1, min(chosen.layers, 2)
    carry_out(parser, chosen, measured)


def measured(chosen: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The whole document."""
    shape = decoder(hidden=128, layers=chosen.layers, vocabulary=512) if chosen.quick else llama_7b(chosen.layers)
    arguments = {"kinds": kinds(shape), "device": chosen.device, "seed": chosen.seed}
    runs: dict[str, list[Run]] = {}
    found: dict[str, object] = {}
    more: dict[str, dict[str, Any]] = {"device": device_facts(chosen.device, shape)}
    for part in chosen.parts:
        side = Side(part, f"benchmarks.gpu:{part}_shapes", arguments)
        runs |= compare([side], chosen.repeats if part == "fold" else 1, chosen.threads)
    if "reference" in runs:
        more["reference"] = {"what": NOTE, **scaled_up(runs["reference"][0].details, kinds(shape))}
    if "parity" in runs:
        more["parity"] = runs["parity"][0].details
    if "reference" in runs and "fold" in runs:
        own = summary(runs["fold"])["details"]
        found["reference, scaled up/fold and read"] = {
            "seconds": more["reference"]["seconds"] / (own["fold_seconds"] + own["read_seconds"])
        }
    if chosen.disk:
        runs |= from_disk(chosen, place, shape)
    return document("gpu", chosen, {name: summary(each) for name, each in runs.items()}, found, **more)


def kinds(shape: Architecture) -> list[tuple[tuple[int, ...], bool, int]]:
    """The distinct tensors of an architecture, the most frequent first.

    >>> kinds(decoder(hidden=64, layers=2, vocabulary=96))[:2]
    [((64, 64), True, 8), ((64,), False, 5)]
    """
    linear = set(shape.linear)
    found = Counter((size, name in linear) for name, size in shape.shapes.items())
    return [(size, projected, count) for (size, projected), count in found.most_common()]


def scaled_up(seconds: dict[str, float], wanted: Kinds) -> dict[str, float]:
    """The seconds of each matrix, and those of the whole model."""
    whole = sum(count * seconds[_called(size)] for size, projected, count in wanted if projected)
    return {**seconds, "seconds": whole}


def device_facts(device: str, shape: Architecture) -> dict[str, Any]:
    """What the device is, and how large the model."""
    if device == "cpu":
        return {"name": "cpu", "parameters": shape.parameters}
    facts = torch.cuda.get_device_properties(device)
    memory = round(facts.total_memory / 2**30, 1)
    return {"name": facts.name, "memory_gb": memory, "cuda": torch.version.cuda, "parameters": shape.parameters}


# the sides: each in a process of its own


def fold_shapes(kinds: Kinds, device: str, seed: int) -> dict[str, float]:
    """All tensors through fold and read: seconds of both, and the most memory of the device in MiB."""
    warm_up(device)
    rule, generator = build("opcm", {"energy": ENERGY}), torch.Generator(device).manual_seed(seed)
    seconds = {"fold_seconds": 0.0, "read_seconds": 0.0}
    for size, projected, count in kinds:
        for _ in range(count):
            base = (SPREAD * torch.randn(*size, generator=generator, device=device)).bfloat16()
            total = change(size, generator).add_(change(size, generator))
            expert = change(size, generator).add_(base).bfloat16()
            (state, measure), spent = timed(device, partial(folded, rule, base, total, expert, projected))
            seconds["fold_seconds"] += spent
            stats = Stats(3.0, 3 * measure.delta_norm, measure.total_norm)  # of this tensor: the work is the same
            pieces = read_pieces(rule, base, state, stats)
            seconds["read_seconds"] += timed(device, partial(drained, pieces))[1]
    peak = 0.0 if device == "cpu" else torch.cuda.max_memory_allocated(device) / 2**20
    return {**seconds, "device_peak_mb": peak}


def reference_shapes(kinds: Kinds, device: str, seed: int) -> dict[str, float]:
    """Seconds of the published projection of one matrix of each shape."""
    warm_up(device)
    generator, seconds = torch.Generator(device).manual_seed(seed), dict[str, float]()
    for size, projected, _ in kinds:
        if projected:
            total, delta = change(size, generator), change(size, generator)
            seconds[_called(size)] = timed(device, partial(published, total, delta, ENERGY))[1]
    return seconds


def parity_shapes(kinds: Kinds, device: str, seed: int) -> dict[str, float]:
    """||device - processor|| / ||processor|| of the projection, and the same of the largest entries, for each shape."""
    generator, found = torch.Generator(device).manual_seed(seed), dict[str, float]()
    for size, projected, _ in kinds:
        if projected:
            total, delta = change(size, generator), change(size, generator)
            for dtype in (torch.float32, torch.float64):
                there = project(total.to(dtype), delta.to(dtype), ENERGY).cpu()
                here = project(total.cpu().to(dtype), delta.cpu().to(dtype), ENERGY)
                name = f"{_called(size)} {str(dtype).removeprefix('torch.')}"
                found[name] = float((there - here).norm() / here.norm())
                found[f"{name}, largest entry"] = float((there - here).abs().max() / here.abs().max())
    return found


def folded(rule: Method, base: Tensor, total: Tensor, expert: Tensor, projected: bool) -> tuple[State, Measure]:
    """One tensor's state after the expert, and what the fold did, as the engine asks for it."""
    return fold_tensor(rule, base, {"total": total}, expert, role_of(base, projected, 2.0))


def change(size: Sequence[int], generator: torch.Generator) -> Tensor:
    """What one expert moves, float32, on the generator's device: a decaying spectrum under noise of full rank."""
    device = generator.device
    delta = torch.randn(*size, generator=generator, device=device)
    if len(size) == 2:
        rank = max(1, min(64, min(size) // 4))
        strengths = torch.arange(1, rank + 1, device=device).float().pow(-DECAY)
        left = torch.randn(size[0], rank, generator=generator, device=device) * strengths
        delta += 0.5 * left @ torch.randn(rank, size[1], generator=generator, device=device)
    return delta.mul_(0.02 * SPREAD)


def warm_up(device: str) -> None:
    """What a process does once: start the device and load its libraries."""
    small = change((300, 280), torch.Generator(device).manual_seed(0))
    project(small, small.clone(), ENERGY)
    published(small, small.clone(), ENERGY)
    timed(device, lambda: None)


def timed(device: str, work: Callable[[], T]) -> tuple[T, float]:
    """What the work returns, and its seconds on the device."""
    _finish(device)
    start = perf_counter()
    result = work()
    _finish(device)
    return result, perf_counter() - start


def _finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _called(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def from_disk(chosen: argparse.Namespace, place: Path, shape: Architecture) -> dict[str, list[Run]]:
    """The second expert folded by the engine on the device, with the serving checkpoint."""
    models = make(place / f"gpu-{shape.parameters}", shape, 2, chosen.seed)

    def side(number: int, serve: bool) -> Side:
        out = models / f"gpu-folded-{number}"
        parent = str(models / "gpu-folded-1") if number > 1 else None
        arguments = {
            **{"base": str(models / "base"), "parent": parent, "expert": str(models / f"expert-{number}")},
            **{"out": str(out), "projected": list(shape.linear), "device": chosen.device, "serve": serve},
        }
        return Side("disk to disk", "benchmarks.ours:fold", arguments, lambda: shutil.rmtree(out, ignore_errors=True))

    first, second = side(1, False), side(2, True)
    first.before()
    run_side(first, chosen.threads)
    runs = compare([second], chosen.repeats, chosen.threads)
    for each in (first, second):
        each.before()
    return runs


if __name__ == "__main__":
    main()
