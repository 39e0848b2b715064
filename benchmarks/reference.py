"""One step of OPCM as its public implementation takes it: whole models in memory, full singular bases, one scale.

The rule is from "Merging Models on the Fly Without Retraining", arXiv 2501.09522. The order of the work, what is held
meanwhile and what is computed although nobody needs it are those of tanganke/fusion_bench, method `opcm`, because that
is what its users wait and pay for. The side that foldin is compared with, and, run in float64, the measure of accuracy:

    python -m benchmarks.reference --base BASE --merged EXPERT_1 --expert EXPERT_2 --out DIR
    python -m benchmarks.reference --base BASE --merged DIR --expert EXPERT_3 --out NEXT

>>> eye = torch.eye(2)
>>> project(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), 5 * eye + 1, alpha=0.5)
tensor([[0., 1.],
        [1., 0.]])
"""

import argparse
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from registry.files import read_json, write_json
from registry.weights import DTYPES, Checkpoint

MEMORY = "memory.json"
ALPHA = 0.5


class Memory(NamedTuple):
    """What the public implementation keeps between steps, in RAM only; here it is a file beside the merged model."""

    lambda_t: float  # of the latest step, 1 after the first expert
    norms: tuple[float, ...]  # Frobenius norm of expert - base over the whole model, per expert


def step(
    base: Mapping[str, Tensor],
    merged: dict[str, Tensor],  # names, shapes and dtype of base; changed in place, as the model is there
    expert: Mapping[str, Tensor],  # like base
    memory: Memory | None,  # None: merged is the first expert
    projected: Collection[str],  # names of the nn.Linear weights, each (out, in)
    alpha: float = ALPHA,  # share of the sum of singular values that is protected, in [0, 1)
    stranded: Collection[str] = (),  # what the public loop rescales but never adds to: see tests/golden/README.md
) -> Memory:
    """Fold one more expert into `merged`; what the next step must know.

    With tau = merged - base, delta = expert - base and n the mean of the experts' norms:
    new = base + lambda_{t-1} * tau + project(tau, delta), then merged = base + (new - base) * n / ||new - base||.
    """
    earlier = memory or Memory(1.0, (float(_distance(merged, base)),))
    norms = (*earlier.norms, float(_distance(expert, base)))
    mean_norm = sum(norms) / len(norms)
    for name in merged:
        if name not in stranded:
            merged[name] = _added(base[name], merged[name], expert[name], earlier.lambda_t, name in projected, alpha)
    length = _distance(merged, base)
    for name, value in merged.items():
        merged[name] = base[name] + (value - base[name]) * (mean_norm / length)
    # Needless, since it equals mean_norm: the public code measures the norm once more for its log.
    _distance(merged, base)
    return Memory(float(length) / mean_norm, norms)


def _added(base: Tensor, merged: Tensor, expert: Tensor, lambda_t: float, projected: bool, alpha: float) -> Tensor:
    """One parameter before the final rescale."""
    tau, delta = merged - base, expert - base
    return base + (lambda_t * tau + (project(tau, delta, alpha) if projected else delta))


def project(tau: Tensor, delta: Tensor, alpha: float) -> Tensor:  # (out, in) both
    """Delta without its leading block and diagonal in the singular bases of tau, all square, (out, out) and (in, in).

    Needless: the columns beyond min(out, in) take part in two products and are left as they were.
    """
    left, sigma, right = torch.linalg.svd(tau, full_matrices=True, driver="gesvd" if tau.is_cuda else None)
    shares = sigma.cumsum(0) / sigma.sum()
    rank = int((shares > alpha).int().argmax())
    inner = left.T @ delta @ right.T
    inner.diagonal().fill_(0)
    inner[:rank, :rank] = 0
    cleaned: Tensor = left @ inner @ right
    return cleaned


def _distance(model: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Tensor:
    """The Frobenius norm of model - base over all tensors.

    Needless: the public code makes all differences, then one vector of them, so two more models are in memory.
    """
    differences = {name: model[name] - base[name] for name in model}
    norm: Tensor = torch.linalg.norm(torch.cat([differences[name].reshape(-1) for name in sorted(differences)]))
    return norm


def load(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """A whole model in memory of its own, as from_pretrained leaves it."""
    model: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt", device="cpu") as tensors:
            model |= {name: tensors.get_tensor(name).to(dtype, copy=True) for name in tensors.keys()}  # noqa: SIM118
    return model


@torch.no_grad()
def run(
    base: str,  # folders of safetensors checkpoints with the same tensors
    merged: str,  # what an earlier run wrote, or the first expert
    expert: str,
    out: str,  # gets the merged model, its config.json and the memory
    projected: list[str],
    dtype: str = "F32",  # F32, or F64 for the measure of accuracy
    alpha: float = ALPHA,
) -> dict[str, float]:
    """One step from disk to disk: lambda, the experts' mean norm, and the seconds of the step without the files."""
    wide, target = DTYPES[dtype], Path(out)
    pretrained, model, other = (load(Path(folder), wide) for folder in (base, merged, expert))
    start = time.perf_counter()
    memory = step(pretrained, model, other, _remembered(Path(merged)), projected, alpha)
    seconds = time.perf_counter() - start
    target.mkdir(parents=True, exist_ok=True)
    save_file(model, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(Path(base) / "config.json", target / "config.json")
    write_json(target / MEMORY, {"lambda_t": memory.lambda_t, "norms": list(memory.norms)})
    mean_norm = sum(memory.norms) / len(memory.norms)
    return {"lambda_t": memory.lambda_t, "mean_norm": mean_norm, "step_seconds": seconds}


def _remembered(folder: Path) -> Memory | None:
    if not (folder / MEMORY).exists():
        return None
    facts = read_json(folder / MEMORY)
    return Memory(float(facts["lambda_t"]), tuple(map(float, facts["norms"])))


def main() -> None:
    """One step from the command line; the nn.Linear weights are read from the architecture."""
    from evaluation.architecture import linear_weights

    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference", description="One published OPCM step.")
    for name in ("base", "merged", "expert", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="a folder")
    parser.add_argument("--dtype", choices=["F32", "F64"], default="F32")
    parser.add_argument("--alpha", type=float, default=ALPHA)
    chosen = parser.parse_args()
    projected = sorted(linear_weights(chosen.base, list(Checkpoint.open(chosen.base))))
    base, merged, expert, out = map(str, (chosen.base, chosen.merged, chosen.expert, chosen.out))
    print(run(base, merged, expert, out, projected, chosen.dtype, chosen.alpha))


if __name__ == "__main__":
    main()
