"""How PEFT names an adapter's tensors, and which tensor of the base each of them belongs to."""

import re
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from registry.files import Place, shown

PEFT_PREFIX = "base_model.model."
PIECES = (
    re.compile(r"(?P<path>.+)\.(?P<role>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<field>weight|bias)"),
    re.compile(r"(?P<path>.+)\.(?P<role>lora_embedding_[AB])(?:\.(?P<adapter>[^.]+))?(?P<field>)"),
    re.compile(
        r"(?P<path>.+)\.(?P<role>lora_magnitude_vector)(?:\.(?P<adapter>(?!weight$)[^.]+))?(?P<field>\.weight)?"
    ),
    re.compile(r"(?P<path>.+)\.token_adapter\.(?P<role>trainable_tokens_delta)(?:\.(?P<adapter>[^.]+))?(?P<field>)"),
)
FOREIGN = re.compile(r"(?:.*\.)?(?:lora_|token_adapter\.|trainable_tokens_|modules_to_save\.)")
WHOLE = ("whole", "inner_whole")
MAX_PATH = 200  # characters; searches in longer ones could take long


class Piece(NamedTuple):
    """What one stored tensor of an adapter is."""

    key: str  # its name in the file
    name: str  # the tensor of the running model that it changes: "model.layers.0.self_attn.q_proj.weight"
    path: str  # that tensor's module: "model.layers.0.self_attn.q_proj"
    role: str  # lora_A, lora_B, lora_bias, lora_embedding_A, ..., trainable_tokens_delta, whole, or inner_whole
    adapter: str  # the adapter's name, where the key spells it


def read_keys(keys: Iterable[str], place: Place) -> list[Piece]:
    """The pieces of an adapter, by its keys as PEFT writes them, with or without the adapter's name.

    Copies of trained modules that PEFT writes twice (with bias="all") are left out.

    Raises:
        FoldinError: E_ADAPTER for a key that belongs to no known part of LoRA, or several adapters in one file.
    """
    known = set(keys)
    pieces = [_piece(key, place) for key in sorted(known) if not _is_copy(key, known)]
    names = sorted({piece.adapter for piece in pieces if piece.role not in WHOLE})
    if len(names) > 1:
        found = ", ".join(shown(name) or "none" for name in names)
        raise place.refuse("E_ADAPTER", "the file holds several adapters", "one adapter's name in every key", found)
    return pieces


def _is_copy(key: str, keys: Collection[str]) -> bool:
    """Whether this is a module as it was before training, or one that is also there under its plain name."""
    before, _, rest = key.partition(".modules_to_save.")
    plain = (f"{before}.{rest}", f"{before}.{rest.partition('.')[2]}")
    return ".original_module." in key or any(name in keys for name in plain)


def _piece(key: str, place: Place) -> Piece:
    name = key.removeprefix(PEFT_PREFIX)
    if len(name) > MAX_PATH:
        raise place.refuse(
            "E_ADAPTER", "the tensor's name is too long", f"at most {MAX_PATH} characters", "", shown(key)
        )
    for pattern in PIECES:
        if found := pattern.fullmatch(name):
            return _lora_piece(key, **found.groupdict(default=""))
    if FOREIGN.match(name):
        what = "the tensor is no part of LoRA that is supported"
        raise place.refuse("E_ADAPTER", what, "lora_A, lora_B and the like", "", shown(key))
    path, _, field = name.rpartition(".")
    inner = path.endswith(".base_layer")
    path = path.removesuffix(".base_layer")
    return Piece(key, f"{path}.{field}" if path else field, path, "inner_whole" if inner else "whole", "")


def _lora_piece(key: str, path: str, role: str, adapter: str, field: str) -> Piece:
    if field == "bias":
        return Piece(key, f"{path}.bias", path, "lora_bias" if role == "lora_B" else "lora_A bias", adapter)
    return Piece(key, f"{path}.weight", path, role, adapter)


def align(
    names: Collection[str],  # of the running model
    optional: Callable[[str], bool],  # may the base lack this one?
    base: Collection[str],
    place: Place,
) -> dict[str, str]:
    """Name in the running model -> name in the base, for all `names` that the base has.

    The names are the base's, or differ from them by one outer prefix that is the same for all of them: models store
    their tensors with or without the name of the part that a task's head was put on.

    Raises:
        FoldinError: E_ADAPTER where no prefix, or more than one, makes the names fit.
    """
    needed = sorted(name for name in names if not optional(name)) or sorted(names)[:1]
    if not needed:
        raise place.refuse("E_ADAPTER", "the adapter changes no tensor", "LoRA factors")
    if missing := [name for name in needed if name not in base]:
        found = _prefixes(needed, base)
        if len(found) != 1:
            what = "several tensors of the base fit" if found else "the base has no such tensor"
            place = place._replace(remedy="train the adapter on this line's base, or register the merged model")
            raise place.refuse("E_ADAPTER", what, "a name of the base", ", ".join(map(shown, found)), shown(missing[0]))
        return {name: moved for name in names if (moved := _moved(name, found[0])) in base}
    return {name: name for name in names if name in base}


def _prefixes(names: list[str], base: Collection[str]) -> list[str]:
    """'+model.' or '-bert.' for every prefix whose addition or removal makes all names names of the base."""
    parts = names[0].split(".")
    removed = [f"-{'.'.join(parts[:end])}." for end in range(1, len(parts))]
    added = [f"+{name.removesuffix(names[0])}" for name in base if name.endswith(f".{names[0]}")]
    return sorted(prefix for prefix in {*removed, *added} if all(_moved(name, prefix) in base for name in names))


def _moved(name: str, prefix: str) -> str:
    if prefix.startswith("+"):
        return prefix[1:] + name
    return name.removeprefix(prefix[1:]) if name.startswith(prefix[1:]) else ""
