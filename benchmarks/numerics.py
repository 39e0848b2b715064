"""How many digits of a fold are the same: float32 against float64, one thread against several, processor against GPU.

    python -m benchmarks.numerics --base DIR --experts DIR DIR ...     real checkpoints
    python -m benchmarks.numerics --synthetic                          one matrix of each shape of a 1.1 B decoder

Every projected matrix is folded by OPCM, all experts one after the other: as foldin does (state in float32, products as
`merging.opcm` chooses them), in float64 from end to end, and by the published rule in float32 (full singular bases).
Reported is ||found - exact|| / ||exact|| of the total after the last expert, over all matrices and for the worst one.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.shapes import tinyllama
from benchmarks.synthetic import moved
from benchmarks.telling import document, options
from evaluation.architecture import linear_weights
from merging import build
from merging.fold import fold_tensor, role_of
from merging.method import State
from registry.weights import Checkpoint

Matrices = Iterator[tuple[str, Tensor, list[Tensor]]]  # name, base, experts
ENERGY = 0.5


def main() -> None:
    """Run it as the command line says."""
    parser = options("numerics", "How many digits of a fold are the same, however it is computed.")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--experts", type=Path, nargs="+", default=[])
    parser.add_argument("--synthetic", action="store_true", help="one matrix of each shape of a 1.1 B decoder")
    chosen = parser.parse_args()
    if not chosen.synthetic and not (chosen.base and chosen.experts):
        parser.error("name --base and --experts, or --synthetic")
    found = measured(synthetic(chosen.seed) if chosen.synthetic else stored(chosen.base, chosen.experts))
    chosen.base, chosen.experts = str(chosen.base), [str(expert) for expert in chosen.experts]
    show(document("numerics", chosen, {}, {}, gaps=found), chosen.json)


def stored(base: Path, experts: Sequence[Path]) -> Matrices:
    """The linear weights of a base with those of its experts."""
    weights, others = Checkpoint.open(base), [Checkpoint.open(expert) for expert in experts]
    for name in sorted(linear_weights(base, list(weights))):
        if any(not torch.equal(other[name], weights[name]) for other in others):
            yield name, weights[name], [other[name] for other in others]


def synthetic(seed: int) -> Matrices:
    """One matrix of each shape, with three experts that moved it by about 2 %."""
    shape = tinyllama()
    generator = torch.Generator().manual_seed(seed)
    for size in sorted({shape.shapes[name] for name in shape.linear}):
        if max(size) > 10_000:
            continue  # the reference would build a basis of its long side
        base = 0.025 * torch.randn(size, generator=generator)
        # In float32: below the rounding of bf16 storage foldin's rule is another one than the published (ADR 3).
        yield "x".join(map(str, size)), base, [moved(base, generator) for _ in range(3)]


def measured(matrices: Matrices) -> dict[str, dict[str, float]]:
    """Way of computing -> its distance from float64, over all matrices and for the worst one."""
    ways: dict[str, Callable[[Tensor, Sequence[Tensor]], Tensor]] = {
        "foldin": lambda base, experts: folded(base, experts, 1),
        "foldin, a matrix on all cores": lambda base, experts: folded(base, experts, os.cpu_count() or 1),
        "published rule in float32": published,
    }
    wrong: dict[str, list[float]] = {name: [] for name in ways}
    whole: list[float] = []
    for _, base, experts in matrices:
        exact = in_float64(base, experts)
        whole.append(float(exact.norm()))
        for name, way in ways.items():
            wrong[name].append(float((way(base, experts).double() - exact).norm()))
    return {
        name: {
            "whole": math.hypot(*each) / math.hypot(*whole),
            "worst_matrix": max(part / size for part, size in zip(each, whole, strict=True)),
        }
        for name, each in wrong.items()
    }


def folded(base: Tensor, experts: Sequence[Tensor], threads: int) -> Tensor:
    """The total as foldin makes it, with this many threads for each matrix; foldin itself takes one."""
    rule, state = build("opcm", {"energy": ENERGY}), None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for number, expert in enumerate(experts):
            state, _ = fold_tensor(rule, base, state, expert, role_of(base, True, number))
    finally:
        torch.set_num_threads(before)
    assert state is not None
    return state["total"]


def in_float64(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """foldin's rule with state and products in float64."""
    rule = build("opcm", {"energy": ENERGY})
    state: State = {"total": torch.zeros(base.shape, dtype=torch.float64)}
    for number, expert in enumerate(experts):
        state = rule.fold(state, expert.double() - base.double(), role_of(base, True, number))
    return state["total"]


def published(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """The published rule in float32."""
    total = torch.zeros(base.shape)
    for number, expert in enumerate(experts):
        delta = expert.float() - base.float()
        total = total + (reference.project(total, delta, ENERGY) if number else delta)
    return total


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Print the gaps, or the whole document."""
    if as_json:
        print(json.dumps(facts))
        return
    for name, gap in facts["gaps"].items():
        print(f"{name:28} whole {gap['whole']:.1e}  worst matrix {gap['worst_matrix']:.1e}")


if __name__ == "__main__":
    main()
