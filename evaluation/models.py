"""Models out of checkpoints; only this file, `tokens` and `architecture` know transformers.

`folder` always holds the config.json (and tokenizer files) of the base. No code from a folder is ever run:
configurations are read as data first, and classes come from transformers itself. "Stored" names are those inside a
checkpoint; a running model may call the same tensors otherwise, and transformers translates between the two.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from evaluation.configs import (
    base_name,
    code_in,
    prefixes,
    read_config,
    refuse,
    some,
    unknown_model,
)
from registry.records import FoldinError, Refusal

Untyped = Any  # classes, models and configurations of transformers, which mypy does not see
MAPPINGS = {
    "zero-shot-text": "MODEL_MAPPING",
    "text-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING",
}


def check_config(folder: Path, where: str) -> Refusal | None:
    """Why the folder's configuration may not be used; None when it may. Nothing is imported from the folder.

    E_REMOTE_CODE for code or keys that name code, E_CONFIG for a missing or malformed config.json, a model type or an
    architecture that transformers does not ship, and an architecture of another model type.
    """
    document = read_config(folder, where)
    if isinstance(document, Refusal):
        return document
    shipped = (transformers.CONFIG_MAPPING, _configuration_of, _shipped())
    return code_in(folder, where) or unknown_model(document, where, *shipped)


def skeleton(folder: Path) -> Untyped:
    """The base's architecture as a model on the meta device, without memory behind its parameters.

    Raises FoldinError as `check_config` refuses.
    """
    return _on_meta(_architecture(folder), configuration(folder))


def own_prefix(model: Untyped) -> str:
    """The outer prefix ("bert.") with or without which the base tensors of this model may be stored, or ""."""
    return f"{model.base_model_prefix}." if model.base_model_prefix else ""


def base_prefix(folder: Path, names: Iterable[str] | None = None) -> str:
    """What stands before a base tensor's name where a task model of this architecture stores it ("vit."), or "".

    `names` are the tensors of the base's checkpoint; without them its config decides. Raises FoldinError as
    `check_config` refuses.
    """
    config = configuration(folder)
    base = _on_meta(_architecture(folder), config)
    own = set(names) if names is not None else set(revert_weight_conversion(base, base.state_dict()))
    task = next((cls for kind in list(MAPPINGS)[1:] if (cls := _task_class(kind, config))), None)
    if task is None:
        return own_prefix(base) if type(base) is _task_class("zero-shot-text", config) else ""
    model = _on_meta(task, config)
    counts = Counter(
        prefix for name in revert_weight_conversion(model, model.state_dict()) for prefix in prefixes(name, own)
    )
    return counts.most_common(1)[0][0] if counts else ""


def build(
    folder: Path,
    weights: Mapping[str, Tensor],  # stored names of the base, with or without the base prefix
    *,
    kind: str,  # a suite's kind
    head: Mapping[str, Tensor] | None = None,  # names without the base prefix, e.g. classifier.weight
    labels: int = 2,  # outputs of the head
    device: str = "cpu",
) -> nn.Module:
    """The model of this kind in float32 and evaluation mode, every parameter loaded.

    It may share memory with `weights`. Base tensors that the model has no place for (a pooler) are left out. The head
    may fill only what the base does not, so it can never replace a merged tensor. Raises FoldinError: E_CONFIG when the
    base's architecture has no model of this kind, E_SCHEMA when a parameter stays unset, has another shape, or a head
    tensor has no place.
    """
    config = configuration(folder)
    cls = _task_class(kind, config)
    if cls is None:
        what = f"the base's architecture has no model for {kind}"
        raise refuse("E_CONFIG", what, folder, found=str(config.model_type), remedy="use a suite of another kind")
    if kind != "zero-shot-text":
        config.num_labels = labels
        if getattr(config, "pad_token_id", None) is None:  # GPT-2; the same choice as in `tokens.tokenizer_of`
            config.pad_token_id = getattr(config, "eos_token_id", None)
    model, unset = _load(cls, config, weights, folder)
    _set_head(model, head or {}, unset, folder)
    # Mean pooling never reads a pooler.
    left = {name for name in unset if kind != "zero-shot-text" or not name.startswith("pooler.")}
    if left:
        raise refuse("E_SCHEMA", "parameters stay unset", folder, tensor=some(left), remedy="give the weights or head")
    placed: nn.Module = model.to(device).eval()
    return placed


@cache
def _shipped() -> frozenset[str]:
    return frozenset(dir(transformers))  # takes a fifth of a second


def _class_named(name: str) -> Untyped:
    """The model class of transformers with this name, or None. A stranger's name is looked up before it is used."""
    cls = getattr(transformers, name) if name in _shipped() else None
    return cls if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) else None


def _configuration_of(name: str) -> Untyped:
    cls = _class_named(name)
    return cls.config_class if cls else None


def configuration(folder: Path) -> Untyped:
    """The folder's config.json as transformers' own class. Raises FoldinError as `check_config` refuses."""
    problem = check_config(folder, base_name(folder))
    if problem:
        raise FoldinError(problem)
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise refuse("E_CONFIG", "the configuration cannot be loaded", folder, found=str(error)) from None


def _architecture(folder: Path) -> Untyped:
    config = configuration(folder)
    names = config.architectures or [""]
    cls = _class_named(names[0]) or _task_class("zero-shot-text", config)
    if cls is None:
        raise refuse("E_CONFIG", "config.json names no architecture", folder, remedy="fill architectures")
    return cls


def _task_class(kind: str, config: Untyped) -> Untyped:
    """The class that the auto model of this kind would pick, or None."""
    found = getattr(transformers, MAPPINGS[kind]).get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _on_meta(cls: Untyped, config: Untyped) -> Untyped:
    """A model without memory behind its parameters."""
    with _quiet(), torch.device("meta"):
        return cls(config)


def _load(cls: Untyped, config: Untyped, weights: Mapping[str, Tensor], folder: Path) -> tuple[Untyped, set[str]]:
    """The model with the base's tensors in it, and the names of the parameters they did not fill."""
    options = {"dtype": torch.float32, "output_loading_info": True}
    with _quiet():
        # Other shapes are reported below, by name.
        model, info = cls.from_pretrained(
            None, config=config, state_dict=dict(weights), ignore_mismatched_sizes=True, **options
        )
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        sizes = {"expected": str(tuple(expected)), "found": str(tuple(found))}
        raise refuse("E_SCHEMA", "the tensor has another shape", folder, tensor=name, **sizes)
    return model, set(info["missing_keys"])


def _set_head(model: Untyped, head: Mapping[str, Tensor], unset: set[str], folder: Path) -> None:
    """Copies the head into the model and takes its names out of `unset`; nothing else can be written."""
    parameters = dict(model.named_parameters())
    for name, tensor in head.items():
        place = name if name in unset else own_prefix(model) + name
        if place not in unset:
            remedy = "keep only tensors in the head that the base lacks"
            raise refuse("E_SCHEMA", "the head's tensor has no free place", folder, tensor=name, remedy=remedy)
        if parameters[place].shape != tensor.shape:
            sizes = {"expected": str(tuple(parameters[place].shape)), "found": str(tuple(tensor.shape))}
            raise refuse("E_SCHEMA", "the head's tensor has another shape", folder, tensor=name, **sizes)
        parameters[place].data.copy_(tensor)
        unset.discard(place)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' load reports and progress bars off stderr: what they say is returned as errors here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
