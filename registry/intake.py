"""May this expert enter? Decided from its files before a tensor is read: names, formats, headers, configuration.

An expert is a full checkpoint with its config.json, or a LoRA adapter as PEFT saves it; never both.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from registry.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_config
from registry.far import names_in
from registry.files import MAX_BYTES, Place, open_regular, parse_json, shown
from registry.headers import MAX_HEADER, RESAVE, read_folder, read_header
from registry.manifests import SIGNATURE
from registry.records import FoldinError, Refusal
from registry.store import copy_in

COPIED = (  # at the top of the folder, beside the weights
    *("generation_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "*.model", "chat_template.jinja", "modules.json", "sentence_*_config.json"),
    *("config_sentence_transformers.json", "suite.json", "README.md", "LICENSE*", "*.parquet"),
    SIGNATURE,
)
FULL = ("config.json", "*.safetensors", "*.safetensors.index.json")
ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
COPIED_BELOW = re.compile(r"(?:[\w-]+/)*[\w.-]+\.parquet|\d_\w+/config\.json", re.ASCII)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npz", ".npy", ".h5", ".msgpack")
CONFIGS = ("config.json", ADAPTER_CONFIG, "tokenizer_config.json", "generation_config.json", "preprocessor_config.json")
CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines", "kernel_config", "use_kernels")
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
SIZES = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "type_vocab_size", "hidden_act", "image_size"),
    *("patch_size", "num_channels", "d_model", "d_ff", "n_layer", "n_head", "n_embd", "num_experts"),
)


@dataclass(frozen=True)
class Admitted:
    """An expert whose files may be used: a copy of our own, which later changes of the source do not reach."""

    folder: Path  # the copy, in the content-addressed store
    files_sha256: Mapping[str, str]  # relative path -> SHA-256
    tree_sha256: str  # names the copy
    ignored: tuple[str, ...]  # files of the source that were not copied, fit to be printed

    @property
    def is_adapter(self) -> bool:
        """Whether it is a LoRA adapter, to be read with `Adapter.open`, and not a full checkpoint."""
        return ADAPTER_CONFIG in self.files_sha256


def admit(source: Path, store: Path, where: str, *, keep: str = "", max_bytes: int = MAX_BYTES) -> Admitted | Refusal:
    """The admitted copy of an expert's folder, or the reason why it may not enter. Runs nothing and loads no tensor.

    Only files on the allow-list are copied. `where` names the expert in messages; `max_bytes` bounds the copy; `keep`
    as in `store.copy_in`.
    """
    try:
        names = names_in(source, where)
        _check_names(names, where)
        wanted = partial(copied, weights=ADAPTER if _is_adapter(names) else FULL)
        check = partial(_check_copy, where=where)
        folder, tree, files = copy_in(
            source, store, wanted=wanted, keep=keep, check=check, max_bytes=max_bytes, where=where
        )
    except FoldinError as error:
        return error.refusal
    return Admitted(folder, files, tree, tuple(shown(name) for name in names if not wanted(name)))


def copied(name: str, weights: tuple[str, ...] = FULL) -> bool:
    """Whether a file is on the allow-list, given the patterns for the expert's kind of weights."""
    if "/" in name:
        return COPIED_BELOW.fullmatch(name) is not None
    return any(fnmatchcase(name, pattern) for pattern in (*weights, *COPIED))


def _is_adapter(names: Collection[str]) -> bool:
    return not set(ADAPTER).isdisjoint(names)


def _check_names(names: list[str], where: str) -> None:
    """Refuse code, pickled weights without safetensors, and folders without weights or configuration, or with two."""
    for name in names:
        if PurePosixPath(name).suffix.lower() in (".py", ".pyc", ".so"):
            place = Place(where, shown(name), "remove the file; experts are weights and data")
            raise place.refuse("E_REMOTE_CODE", "the expert carries code")
    adapter = _is_adapter(names)
    full = [name for name in names if "/" not in name and name.endswith(".safetensors") and name != ADAPTER_WEIGHTS]
    if adapter and full:
        place = Place(where, shown(full[0]), "register the adapter or the full model, each in a folder of its own")
        raise place.refuse("E_ADAPTER", "the folder holds an adapter and a full checkpoint", "one of the two")
    if ADAPTER_WEIGHTS not in names if adapter else not full:
        pickled = [name for name in names if PurePosixPath(name).suffix.lower() in PICKLED]
        what = "there are only pickled weights" if pickled else "there are no weights"
        expected = ADAPTER_WEIGHTS if adapter else "*.safetensors"
        raise Place(where, shown(pickled[0]) if pickled else "", RESAVE).refuse("E_FORMAT", what, expected)
    config = ADAPTER_CONFIG if adapter else "config.json"
    if config not in names:
        place = Place(where, config, "register the model's configuration beside its weights")
        raise place.refuse("E_CONFIG", "the configuration is missing")


def _check_copy(folder: Path, where: str) -> None:
    names = names_in(folder)
    _check_names(names, where)  # again: the source may have changed since it was listed
    for name in CONFIGS:
        if (folder / name).exists():
            _check_config(_config(folder / name, where), Place(where, name, "remove the field, or use a library model"))
    if _is_adapter(names):
        read_config(folder / ADAPTER_CONFIG, where)
        read_header(folder / ADAPTER_WEIGHTS, where)
    else:
        read_folder(folder, where)


def _config(path: Path, where: str) -> dict[str, Any]:
    with open_regular(path, where) as file:
        text = file.read(MAX_HEADER)
    return parse_json(text, Place(where, path.name), "E_CONFIG")


def _check_config(config: Mapping[str, object], place: Place) -> None:
    """Refuse fields that make a model library fetch or run code: named ones, and attention kernels by address."""
    for key, value in config.items():
        code = key in CODE_KEYS and value not in (None, False)
        kernel = "_implementation" in f"_{key}" and not _known_implementation(value)
        if code or kernel:
            raise place.refuse("E_REMOTE_CODE", f"the field {shown(key)} may load code", found=shown(value))
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                _check_config(part, place)


def _known_implementation(value: object) -> bool:
    parts = value.values() if isinstance(value, dict) else [value]  # one level: a choice per sub-model
    return all(part is None or isinstance(part, bool) or part in IMPLEMENTATIONS for part in parts)


def architecture_differs(base: Mapping[str, object], expert: Mapping[str, object]) -> tuple[str, str, str] | None:
    """(field, the base's value, the expert's) of the first architecture field that both configs have and that differs.

    For an E_SCHEMA refusal, "other architecture". None when they agree.
    """
    for field in SIZES:
        if field in base and field in expert and base[field] != expert[field]:
            return field, shown(base[field]), shown(expert[field])
    return None


def base_matches(declared: str, accepted: Collection[str], where: str) -> Refusal | None:
    """Why the tag foldin.base_sha256 does not name one of the `accepted` digests; None when it does.

    `declared` is a digest or its first 12 or more hex digits, in either case.
    """
    prefix = declared.strip().lower()
    if re.fullmatch(r"[0-9a-f]{12,64}", prefix) and any(digest.lower().startswith(prefix) for digest in accepted):
        return None
    place = Place(where, "", "fine-tune from this line's base, or correct the tag foldin.base_sha256")
    expected = " or ".join(sorted(accepted))
    return place.refuse("E_BASE", "the expert declares another base", expected, shown(declared)).refusal
