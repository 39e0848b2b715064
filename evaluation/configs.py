"""A checkpoint folder's files, and its JSON read as data: nothing in it may name code. Standard library only."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from evaluation.escape import clean, nearest
from registry.records import FoldinError, Refusal

Json = dict[str, object]

# Keys by which transformers loads code from beside a checkpoint, or from a hub.
CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate", "use_kernels", "kernel_config")
IMPLEMENTATIONS = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "grouped_mm",
    "batched_mm",
)


VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model")  # patterns of the files that hold a tokenizer's vocabulary


def vocabulary_files(folder: Path) -> set[str]:
    """The names of the files that hold the folder's vocabulary; none where it has no tokenizer."""
    return {path.name for pattern in VOCABULARIES for path in folder.glob(pattern)}


def read_config(folder: Path, where: str) -> Json | Refusal:
    """config.json as a dict, or E_CONFIG when it is missing or is not a JSON object."""
    document = _parsed(folder / "config.json", where)
    if isinstance(document, dict | Refusal):
        return document
    what, found = "the file does not hold a JSON object", type(document).__name__
    return Refusal("E_CONFIG", what, where, file="config.json", expected="{…}", found=found)


def code_in(folder: Path, where: str) -> Refusal | None:
    """E_REMOTE_CODE when the folder carries Python files, or JSON that names code to run; None when it does not.

    Refused are the keys of CODE_KEYS at any depth, and attention implementations that transformers does not ship: a
    name such as "someone/kernel" is downloaded and run (CVE-2026-4372).
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".py", ".pyc", ".so"):
            return _code(where, path.name, "the folder carries code", clean(path.name))
    for path in sorted(folder.glob("*config*.json")):
        document = _parsed(path, where)
        refusal = document if isinstance(document, Refusal) else _code_in_document(document, where, path.name)
        if refusal:
            return refusal
    return None


def unknown_model(
    document: Json,
    where: str,
    configurations: Mapping[str, object],  # model type -> configuration class
    configuration_of: Callable[[str], object | None],  # name of a model class -> its configuration class
    names: Iterable[str],  # all names that transformers ships
) -> Refusal | None:
    """E_CONFIG when transformers lacks the document's model type or its first architecture; None when it has both."""
    kind, architectures = document.get("model_type"), document.get("architectures") or [""]
    if not isinstance(kind, str) or kind not in configurations:
        remedy = nearest(kind, configurations) if isinstance(kind, str) else "write its name into model_type"
        return _config_refusal("the model type is unknown to transformers", where, "one that it ships", kind, remedy)
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        return _config_refusal("the architectures are not a list of names", where, '["…"]', architectures, "")
    name = architectures[0]
    found = configuration_of(name) if name else configurations[kind]
    if found is None:
        remedy = nearest(name, (known for known in names if "For" in known or known.endswith("Model")))
        return _config_refusal("the architecture is unknown to transformers", where, "one that it ships", name, remedy)
    if found is not configurations[kind]:
        return _config_refusal(
            "the architecture belongs to another model type", where, f"one of model type {kind}", name, ""
        )
    return None


def _parsed(path: Path, where: str) -> object:
    """The file's JSON value, or a Refusal when it has none."""
    remedy = "register the folder that save_pretrained wrote"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Refusal("E_CONFIG", "the file is missing", where, file=path.name, remedy=remedy)
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8 and bad JSON
        found = clean(str(error))
        return Refusal("E_CONFIG", "the file is not valid JSON", where, file=path.name, found=found, remedy=remedy)


def _code_in_document(document: object, where: str, file: str) -> Refusal | None:
    for key, value in _entries(document):
        # custom_generate and use_kernels are harmless while off
        if key in CODE_KEYS and value not in (None, False):
            return _code(where, file, f"the key {key!r} names code to run", clean(repr(value)))
        unknown = [name for name in _texts(value) if name not in IMPLEMENTATIONS] if "implementation" in key else []
        if unknown:
            what = f"the key {clean(key, 40)!r} names an implementation that transformers does not ship"
            return _code(where, file, what, clean(unknown[0]), f"one of {', '.join(IMPLEMENTATIONS)}")
    return None


def _entries(document: object) -> Iterator[tuple[str, object]]:
    """Every key and its value at any depth; a stack, because strangers choose the depth."""
    stack = [document]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            yield from value.items()
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)


def _texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in _texts(inner)]
    return [value] if isinstance(value, str) else []


def _code(where: str, file: str, what: str, found: str, expected: str = "data only") -> Refusal:
    remedy = "remove it and register the expert again; foldin never runs code from a checkpoint"
    return Refusal("E_REMOTE_CODE", what, where, file=file, expected=expected, found=found, remedy=remedy)


def _config_refusal(what: str, where: str, expected: str, found: object, remedy: str) -> Refusal:
    text = clean(repr(found))
    return Refusal("E_CONFIG", what, where, file="config.json", expected=expected, found=text, remedy=remedy)


def refuse(
    code: str, what: str, folder: Path, *, tensor: str = "", expected: str = "", found: str = "", remedy: str = ""
) -> FoldinError:
    """The error for a base, a head or weights that do not make a model."""
    tensor, found = clean(tensor, 300), clean(found)
    return FoldinError(
        Refusal(code, what, base_name(folder), tensor=tensor, expected=expected, found=found, remedy=remedy)
    )


def base_name(folder: Path) -> str:
    """How messages name the base in `folder`, without the machine's path."""
    return f"base {clean(folder.name)}"


def some(names: Iterable[str]) -> str:
    """The first three names in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


def prefixes(name: str, own: Collection[str]) -> Iterator[str]:
    """What stands before one of the `own` names at the end of a dotted name, "" included.

    >>> list(prefixes("vit.encoder.weight", {"encoder.weight"}))
    ['vit.']
    """
    parts = name.split(".")
    for cut in range(len(parts)):
        if ".".join(parts[cut:]) in own:
            yield "".join(f"{part}." for part in parts[:cut])
