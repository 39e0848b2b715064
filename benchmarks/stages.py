"""Where foldin's fold spends its time, operation by operation, against what the machine can do.

The operations are watched from outside, in the thread that calls, whatever the engine is. Counts for factorisations
are nominal: what the textbook algorithm needs, not what the library did.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import ours
from benchmarks.harness import Arguments

GIGA = 1e9
STAGES = ("factorisation", "products_float64", "products_float32", "rest")


def profile(arguments: Arguments, size: int = 2048) -> dict[str, float]:
    """One fold with every operation timed; `arguments` are those of `ours.fold`, `size` is the peak's matrix.

    STAGE_seconds, STAGE_gflop and STAGE_gflops (per second) for factorisation, products in float64 and in float32, and
    the rest; the peaks of both; and bound_seconds: what all counted operations would take at their peak.
    """
    peaks = {str(dtype).removeprefix("torch."): peak(size, dtype) for dtype in (torch.float64, torch.float32)}
    with Watch() as watch:
        ours.fold(**{**arguments, "workers": 1})
    found: dict[str, float] = {}
    for stage in STAGES:
        found[f"{stage}_seconds"] = watch.seconds[stage]
        if watch.flops[stage]:
            found[f"{stage}_gflop"] = watch.flops[stage] / GIGA
            found[f"{stage}_gflops"] = watch.flops[stage] / GIGA / watch.seconds[stage]
    found |= {f"peak_{dtype}_gflops": value for dtype, value in peaks.items()}
    bounds = (watch.flops[stage] / GIGA / peaks["float32" if "32" in stage else "float64"] for stage in STAGES)
    return {**found, "bound_seconds": sum(bounds)}


def peak(size: int, dtype: torch.dtype) -> float:
    """GFLOP/s of a square matrix product, the best of six."""
    square = torch.randn(size, size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        square @ square
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / GIGA / best


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's way to see every operation
    """Seconds and floating point operations by stage, while entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: OpOverload[..., object], types: object, args: tuple[Any, ...] = (), kwargs: Arguments | None = None
    ) -> object:
        """Run one operation and charge it."""
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        spent = time.perf_counter() - start
        stage, flops = classify(func.overloadpacket.__name__, args)
        self.seconds[stage] += spent
        self.flops[stage] += flops
        return result


def classify(name: str, args: tuple[Any, ...]) -> tuple[str, float]:
    """The stage of an operation of torch, and its floating point operations.

    >>> classify("mm", (torch.ones(2, 3), torch.ones(3, 5)))
    ('products_float32', 60.0)
    """
    if name in PRODUCTS:
        left, right = args[PRODUCTS[name]], args[PRODUCTS[name] + 1]
        return f"products_{str(left.dtype).removeprefix('torch.')}", 2.0 * left.numel() * right.shape[-1]
    if name in FACTORISATIONS:
        return "factorisation", FACTORISATIONS[name](args[0])
    return "rest", 0.0


def _edges(matrix: Tensor) -> tuple[float, float]:
    return float(max(matrix.shape[-2:])), float(min(matrix.shape[-2:]))


def _eigh(matrix: Tensor) -> float:
    """Reduction 4/3, divide and conquer 4/3, transformation back 2 times the cube of the side."""
    return 14 / 3 * _edges(matrix)[1] ** 3


def _svd(matrix: Tensor) -> float:
    """The thin factors: 6 m n^2 + 20 n^3 (Golub and Van Loan, R-SVD)."""
    long, short = _edges(matrix)
    return 6 * long * short**2 + 20 * short**3


def _qr(matrix: Tensor) -> float:
    """The factor and the basis: 2 (2 m n^2 - 2/3 n^3)."""
    long, short = _edges(matrix)
    return 2 * (2 * long * short**2 - 2 / 3 * short**3)


PRODUCTS = {
    "mm": 0,
    "bmm": 0,
    "mv": 0,
    "addmm": 1,
    "addmm_": 1,
    "baddbmm": 1,
}  # operation of torch -> place of its left factor
FACTORISATIONS: dict[str, Callable[[Tensor], float]] = {"_linalg_eigh": _eigh, "_linalg_svd": _svd, "linalg_qr": _qr}
