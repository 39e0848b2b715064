"""What adapter_config.json says of a LoRA adapter, read as data: rank and scaling by module, or why it is refused."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from registry.files import Place, read_json, shown

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
READ = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "use_dora"),
    *("lora_bias", "modules_to_save", "trainable_token_indices", "init_lora_weights"),
}
NEUTRAL = {  # where it came from, how it was trained, and what its tensors say themselves
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "bias"),
    *("runtime_config", "ensure_weight_tying", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of initialisations, see KEPT_BASE
}
VARIANTS = {
    "alora_invocation_tokens": "aLoRA changes the model for some tokens only, so no weights stand for it",
    "arrow_config": "Arrow routes every token, so no weights stand for it",
    "kasa_config": "KaSA changed the base's weights before it was trained",
    "layer_replication": "the adapter was trained on a model with repeated layers",
    "megatron_config": "adapters of Megatron layers are not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "target_parameters": "adapters of bare parameters (fused experts) are not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "use_qalora": "QA-LoRA is not supported",
    "velora_config": "VeLoRA is not supported",
}
KEPT_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")  # initialisations that leave the base as it is
PLAIN_LORA = "train a plain LoRA adapter, or register the merged model as a full checkpoint"
CONVERT = "save it again with path_initial_model_for_weight_conversion, or register the merged model"
MAX_PATTERNS = 4096
MAX_SEARCHES = 256  # patterns that are more than a name


@dataclass(frozen=True)
class ByModule:
    """A number that PEFT chooses by module path: the first pattern that matches the path's end, else the default."""

    default: float
    named: Mapping[str, float]
    patterns: tuple[tuple[re.Pattern[str], float], ...]

    def at(self, path: str) -> float:
        """The number of the module at `path` of the running model, as PEFT 0.21 `get_pattern_key` finds it."""
        found = (value for pattern, value in self.patterns if pattern.match(path))
        return next(found, self.named.get(path, self.default))


@dataclass(frozen=True)
class AdapterConfig:
    """What of adapter_config.json decides what the adapter does to the base."""

    rank: ByModule  # r
    alpha: ByModule  # lora_alpha
    rslora: bool  # scaling is alpha / sqrt(r) instead of alpha / r
    turned: bool  # fan_in_fan_out: weights are stored as (in, out)
    dora: bool
    lora_bias: bool
    saved: tuple[str, ...]  # modules_to_save: ends of the paths of modules that are stored whole
    tokens: Mapping[str, tuple[int, ...]]  # end of an embedding's path -> rows that are stored whole; "" for any path

    def scaling(self, path: str) -> float:
        """What B @ A is multiplied by in the module at `path`."""
        rank = self.rank.at(path)
        return self.alpha.at(path) / (math.sqrt(rank) if self.rslora else rank)

    def is_saved(self, name: str) -> bool:
        """Whether the tensor `name` of the running model lies in one of modules_to_save."""
        parts = name.split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts))]
        return any(path.endswith(self.saved) for path in paths) if self.saved else False


def read_config(path: Path, where: str = "") -> AdapterConfig:
    """The adapter's configuration, from a file of at most 64 MiB; no name in it is ever imported or fetched.

    Raises:
        FoldinError: E_ADAPTER for what foldin cannot fold, naming the field; E_FORMAT, E_TOO_LARGE, E_FILETYPE or
            E_UNREACHABLE as `files.read_json`.
    """
    fields = read_json(path, where)
    place = Place(where, shown(path.name), PLAIN_LORA)
    _check_kind(fields, place)
    return AdapterConfig(
        _by_module(fields, "r", "rank_pattern", place),
        _by_module(fields, "lora_alpha", "alpha_pattern", place),
        _flag(fields, "use_rslora", place),
        _flag(fields, "fan_in_fan_out", place),
        _flag(fields, "use_dora", place),
        _flag(fields, "lora_bias", place),
        _saved(fields.get("modules_to_save"), place),
        _tokens(fields.get("trainable_token_indices"), place),
    )


def _check_kind(fields: Mapping[str, object], place: Place) -> None:
    """Refuse what is not LoRA, what changed the base, and every field that is set and not known to be harmless."""
    if fields.get("peft_type") != "LORA":
        raise place.refuse("E_ADAPTER", "the adapter is not LoRA", "peft_type LORA", shown(fields.get("peft_type")))
    for field in sorted(fields.keys() - READ - NEUTRAL):
        if fields[field]:
            what = VARIANTS.get(field, f"the field {shown(field)} is not known to leave the weights alone")
            raise place.refuse("E_ADAPTER", what, f"no {shown(field)}", shown(fields[field]))
    start = fields.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in KEPT_BASE:
        what = "the adapter's initialisation may have changed the base's weights, which are not in the adapter"
        expected = "init_lora_weights true, false, gaussian, orthogonal, eva or mica"
        raise place._replace(remedy=CONVERT).refuse("E_ADAPTER", what, expected, shown(start))
    if fields.get("use_dora") and fields.get("lora_bias"):
        raise place.refuse("E_ADAPTER", "PEFT does not define use_dora together with lora_bias", "one of the two")


def _flag(fields: Mapping[str, object], field: str, place: Place) -> bool:
    value = fields.get(field)
    if value is not None and not isinstance(value, bool):
        raise place.refuse("E_ADAPTER", f"the field {field} is malformed", "true or false", shown(value))
    return bool(value)


def _by_module(fields: Mapping[str, object], field: str, patterns: str, place: Place) -> ByModule:
    whole = field == "r"
    default = _number(fields.get(field), field, place, whole)
    given = fields.get(patterns) or {}
    if not isinstance(given, dict) or len(given) > MAX_PATTERNS:
        expected = f"at most {MAX_PATTERNS} module patterns, each with a number"
        raise place.refuse("E_ADAPTER", f"the field {patterns} is malformed", expected, shown(given))
    numbers = {key: _number(value, f"{patterns} at {shown(key)}", place, whole) for key, value in given.items()}
    if sum(not _is_name(key) for key in numbers) > MAX_SEARCHES:
        raise place.refuse("E_ADAPTER", f"{patterns} holds too many searches", f"at most {MAX_SEARCHES}, or names")
    return ByModule(default, numbers, tuple((_compiled(key, patterns, place), n) for key, n in numbers.items()))


def _number(value: object, field: str, place: Place, whole: bool) -> float:
    """A rank, which is a whole number above 0, or an alpha, which is any finite number."""
    number = type(value) in ((int,) if whole else (int, float))
    if not number or not isinstance(value, int | float) or not abs(value) < 2**53 or (whole and value < 1):
        expected = "a whole number from 1" if whole else "a finite number"
        raise place.refuse("E_ADAPTER", f"the field {field} is malformed", expected, shown(value))
    return value


def _is_name(pattern: str) -> bool:
    return re.fullmatch(r"[\w.\\^-]*", pattern) is not None


def _compiled(pattern: str, field: str, place: Place) -> re.Pattern[str]:
    """PEFT's search for one key of a pattern. Only such keys are run that cannot make the search explode."""
    bare = re.sub(r"\\[dw.\-]", "x", pattern).replace("(?:", "(").replace("*?", "*").replace("+?", "+")
    odd = re.search(r"[{\\]|\)[*+?]|\(\?|\[\[|--|&&|~~", bare)
    busy = sum(map(bare.count, "*+?")) > 2 or bare.count("(") > 2 or bare.count("|") > 64
    try:
        if odd or busy or len(pattern) > 512:
            raise re.error("more than two repetitions or groups, or a construct that is not needed for names")
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        what = f"{field} holds a search that is not run"
        place = place._replace(remedy="write module names, or simpler patterns, and save the adapter again")
        raise place.refuse("E_ADAPTER", what, "a simple regular expression", f"{shown(pattern)} ({error})") from error


def _saved(value: object, place: Place) -> tuple[str, ...]:
    if value is not None and not (isinstance(value, list) and all(isinstance(end, str) and end for end in value)):
        raise place.refuse("E_ADAPTER", "the field modules_to_save is malformed", "a list of names", shown(value))
    return tuple(value or ())


def _tokens(value: object, place: Place) -> dict[str, tuple[int, ...]]:
    """End of the embedding's path -> rows; PEFT also takes a bare list, which means the input embedding."""
    rows = {"": value} if isinstance(value, list) else value or {}
    if not isinstance(rows, dict) or not all(_is_rows(indices) for indices in rows.values()):
        expected = "a list of different row numbers, or one per embedding"
        raise place.refuse("E_ADAPTER", "the field trainable_token_indices is malformed", expected, shown(value))
    return {path: tuple(indices) for path, indices in rows.items()}


def _is_rows(value: object) -> bool:
    whole = isinstance(value, list) and all(type(row) is int and row >= 0 for row in value)
    return isinstance(value, list) and whole and len(set(value)) == len(value)
