"""Seeded checkpoints with the shapes of real models and fine-tunings of them, written one tensor at a time.

    python -m benchmarks.synthetic tinyllama DIR --experts 2 --lora --seed 0

makes DIR/base, DIR/expert-1, DIR/expert-2 and, from the adapter alone, DIR/lora-1 and DIR/lora-1-dense. The same
arguments give the same bytes. What exists already is kept.
"""

import argparse
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shapes import Architecture, decoder, tinyllama, vit_b32
from registry.files import write_json
from registry.records import TensorSpec
from registry.weights import DTYPES, Checkpoint, spec_of
from registry.writer import plan_layout, write_checkpoint

SPREAD = 0.025  # standard deviation of base weights
DECAY = 0.7  # singular value i of a change's structured part is proportional to i ** -DECAY
STRUCTURED = 0.7  # share of a change's squared norm in its structured part; the rest is noise of full rank
RANK, ALPHA = 16, 32  # of an adapter: change = ALPHA / RANK * lora_B @ lora_A
SHARD = 5 * 10**8  # bytes


def write_base(folder: Path, shape: Architecture, seed: int, shard: int = SHARD) -> Path:
    """A base of random weights of SPREAD, norms near 1 and biases near 0; its folder."""
    return _write(folder, shape, lambda name: _base(name, shape.shapes[name], seed), shard)


def write_expert(folder: Path, base: Path, shape: Architecture, seed: int, number: int, shard: int = SHARD) -> Path:
    """A full fine-tuning: every tensor moved by 1 to 3 % of its norm, over all directions, a few of them strongly."""
    weights = Checkpoint.open(base)
    return _write(folder, shape, lambda name: moved(weights[name].float(), _generator(seed, number, name)), shard)


def write_adapter(folder: Path, shape: Architecture, seed: int, number: int, base: str = "base") -> Path:
    """A LoRA adapter in the format of PEFT, float32, over all projections of the decoder; `base`: what it names."""
    if not folder.exists():
        factors: dict[str, Tensor] = {}
        for name in shape.adapted:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            down, up = _factors(shape.shapes[name], _generator(seed, number, name))
            factors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        specs = {name: spec_of(tensor) for name, tensor in factors.items()}
        layout = {"adapter_model.safetensors": sorted(factors)}
        write_checkpoint(folder, specs, factors.__getitem__, layout=layout)
        write_json(folder / "adapter_config.json", _adapter_config(shape, base))
    return folder


def write_dense(folder: Path, base: Path, adapter: Path, shape: Architecture, shard: int = SHARD) -> Path:
    """The full checkpoint that the adapter stands for: base + ALPHA / RANK * lora_B @ lora_A, in the base's dtype."""
    weights, factors = Checkpoint.open(base), Checkpoint.open_file(adapter / "adapter_model.safetensors")

    def tensor(name: str) -> Tensor:
        if name not in shape.adapted:
            return weights[name]
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        change = factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
        return weights[name].float().add_(change, alpha=ALPHA / RANK)

    return _write(folder, shape, tensor, shard)


def make(folder: Path, shape: Architecture, experts: int, seed: int = 0, adapter: bool = False) -> Path:
    """A base with experts in one folder, and an adapter with its dense twin if asked for; the folder."""
    base = write_base(folder / "base", shape, seed)
    for number in range(1, experts + 1):
        write_expert(folder / f"expert-{number}", base, shape, seed, number)
    if adapter:
        lora = write_adapter(folder / "lora-1", shape, seed, experts + 1, base="../base")
        write_dense(folder / "lora-1-dense", base, lora, shape)
    return folder


def _write(folder: Path, shape: Architecture, tensor: Callable[[str], Tensor], shard: int) -> Path:
    """One checkpoint with its config.json, which comes last: a folder that has it is complete."""
    if not (folder / "config.json").exists():
        specs = {name: TensorSpec(shape.dtype, size) for name, size in shape.shapes.items()}
        dtype = DTYPES[shape.dtype]
        write_checkpoint(folder, specs, lambda name: tensor(name).to(dtype), layout=plan_layout(specs, shard))
        write_json(folder / "config.json", dict(shape.config))
    return folder


def _generator(seed: int, number: int, name: str) -> torch.Generator:
    """Random numbers of one tensor of one model (0 is the base), whatever the order in which tensors are made."""
    digest = hashlib.sha256(f"{seed} {number} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _base(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    noise = SPREAD * torch.randn(shape, generator=_generator(seed, 0, name))
    return noise + 1 if len(shape) == 1 and "norm" in name and name.endswith("weight") else noise


def moved(base: Tensor, generator: torch.Generator) -> Tensor:
    """base + delta with ||delta|| = 1 to 3 % of ||base||; delta is a decaying spectrum plus noise, of full rank."""
    share = 0.01 + 0.02 * float(torch.rand(1, generator=generator))
    delta = torch.randn(base.shape, generator=generator)
    if base.ndim == 2:
        structure = _structure(base.shape[0], base.shape[1], generator)
        delta *= math.sqrt(1 - STRUCTURED) / delta.norm()
        delta.add_(structure, alpha=math.sqrt(STRUCTURED) / float(structure.norm()))
    return delta.mul_(share * base.norm() / delta.norm()).add_(base)


def _structure(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A (rows, columns) matrix of rank 64 at most, whose singular values decay."""
    rank = max(1, min(64, min(rows, columns) // 4))
    strengths = torch.arange(1, rank + 1).float().pow(-DECAY)
    left = torch.randn(rows, rank, generator=generator) / math.sqrt(rows)
    return (left * strengths) @ torch.randn(rank, columns, generator=generator) / math.sqrt(columns)


def _factors(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(lora_A, lora_B) of shapes (RANK, in) and (out, RANK); the change is about 2 % of a base of SPREAD."""
    rows, columns = shape
    wanted = 0.02 * SPREAD * RANK / ALPHA  # standard deviation of an entry of lora_B @ lora_A
    down = torch.randn(RANK, columns, generator=generator) / math.sqrt(columns)
    strengths = torch.arange(1, RANK + 1).float().pow(-DECAY)
    up = torch.randn(rows, RANK, generator=generator) * (strengths / strengths.norm())
    return down, up * (wanted * math.sqrt(columns))


def _adapter_config(shape: Architecture, base: str) -> dict[str, object]:
    targets = sorted({name.split(".")[-2] for name in shape.adapted})
    return {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True},
        **{"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "bias": "none", "target_modules": targets},
        **{"fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "modules_to_save": None},
        **{"rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True},
    }


def main() -> None:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthetic", description="Synthetic checkpoints.")
    parser.add_argument("shape", choices=["vit_b32", "tinyllama", "decoder"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", action="store_true", help="an adapter and its dense twin too (decoders)")
    parser.add_argument("--hidden", type=int, default=512, help="of the decoder, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder")
    parser.add_argument("--vocabulary", type=int, default=8000, help="of the decoder")
    chosen = parser.parse_args()
    shapes: Mapping[str, Callable[[], Architecture]] = {
        "vit_b32": vit_b32,
        "tinyllama": tinyllama,
        "decoder": lambda: decoder(chosen.hidden, chosen.layers, chosen.vocabulary),
    }
    shape = shapes[chosen.shape]()
    if chosen.lora and not shape.adapted:
        parser.error("--lora needs a decoder")
    print(make(chosen.folder, shape, chosen.experts, chosen.seed, chosen.lora))


if __name__ == "__main__":
    main()
