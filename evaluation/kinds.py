"""What suite.json may say for each kind of suite. Every value is checked, and what does not belong is refused."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from evaluation.escape import clean, nearest
from registry.records import FoldinError, Refusal

DATA = ("data", "data_sha256")
COMMON = ("kind", "metric", "safety")
USUAL = ("prompts", "image_shape")  # written, empty, by every kind that has labels


class Kind(NamedTuple):
    """The keys of one kind."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    metrics: tuple[str, ...]  # the first is the default
    trusted: bool = False  # it runs code: only a line's own configuration may name it


KINDS = {
    "zero-shot-text": Kind((*DATA, "labels"), USUAL, ("accuracy",)),
    "text-classification": Kind((*DATA, "labels"), USUAL, ("accuracy",)),
    "image-classification": Kind((*DATA, "labels"), USUAL, ("accuracy",)),
    "causal-lm": Kind((*DATA, "metric"), ("per_byte",), ("perplexity", "accuracy")),
    "python": Kind(("function",), DATA, ("score",), trusted=True),
    "lm-eval": Kind(("task",), ("include", "measure"), ("accuracy", "score"), trusted=True),
}
KEYS = tuple(dict.fromkeys(key for kind in KINDS.values() for key in (*COMMON, *kind.required, *kind.optional)))
CHANGING = ("safety", "per_byte", "function", "harness_task", "measure")  # part of the identity where they are set


def refuse(what: str, where: str, *, expected: str = "", found: str = "", remedy: str = "") -> FoldinError:
    """The E_SUITE error that says so; strangers' words in `found` are cleaned."""
    return FoldinError(
        Refusal("E_SUITE", what, where, file="suite.json", expected=expected, found=clean(found), remedy=remedy)
    )


def checked(document: Mapping[str, object], where: str) -> dict[str, Any]:
    """Fields of a Suite -> their values, all but where the data are and the identity.

    Raises FoldinError (E_SUITE) for an unknown key, kind or metric, a key of another kind, or a malformed value.
    """
    for key in document:
        if key not in KEYS:
            raise refuse(f"the key {clean(key, 40)!r} is unknown", where, remedy=nearest(key, KEYS))
    kind = _choice(_present(document, "kind", where), tuple(KINDS), "kind", where)
    _check_keys(document, kind, where)
    metrics = KINDS[kind].metrics
    fields = {
        "kind": kind,
        "metric": _choice(document.get("metric", metrics[0]), metrics, "metric", where),
        "labels": _texts(document.get("labels", []), "labels", where),
        "prompts": _texts(document.get("prompts", []), "prompts", where),
        "image_shape": _shape(document.get("image_shape"), kind, where),
        "safety": _flag(document, "safety", where),
        "per_byte": _flag(document, "per_byte", where),
        "function": _function(document, where),
        "harness_task": _word(document, "task", where),
        "measure": _word(document, "measure", where),
    }
    _check_labels(fields, where)
    if fields["per_byte"] and fields["metric"] != "accuracy":
        raise refuse("per_byte belongs to the metric accuracy", where, found=str(fields["metric"]), remedy="remove it")
    return fields


def _present(document: Mapping[str, object], key: str, where: str) -> object:
    if key not in document:
        raise refuse(f"the key {key!r} is missing", where, remedy=f"add {key!r}")
    return document[key]


def _check_keys(document: Mapping[str, object], kind: str, where: str) -> None:
    required, optional, *_ = KINDS[kind]
    for key in required:
        _present(document, key, where)
    for key in document:
        if key not in (*COMMON, *required, *optional):
            raise refuse(f"the key {key!r} does not belong to kind {kind}", where, remedy=f"remove {key!r}")


def _choice(value: object, known: Sequence[str], key: str, where: str) -> str:
    if isinstance(value, str) and value in known:
        return value
    raise refuse(
        f"the {key} is unknown",
        where,
        expected=f"one of {', '.join(known)}",
        found=repr(value),
        remedy=nearest(str(value), known),
    )


def _texts(value: object, key: str, where: str) -> tuple[str, ...]:
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return tuple(value)
    raise refuse(f"{key} is not a list of texts", where, expected='["…", "…"]', found=repr(value))


def _flag(document: Mapping[str, object], key: str, where: str) -> bool:
    value = document.get(key, False)
    if isinstance(value, bool):
        return value
    raise refuse(f"{key} is neither true nor false", where, expected="true or false", found=repr(value))


def _word(document: Mapping[str, object], key: str, where: str) -> str:
    value = document.get(key, "")
    if isinstance(value, str) and (value or key not in document):
        return value
    raise refuse(f"{key} is not a name", where, expected='"…"', found=repr(value))


def _function(document: Mapping[str, object], where: str) -> str:
    name = _word(document, "function", where)
    module, colon, attribute = name.partition(":")
    if not name or (colon and all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))):
        return name
    raise refuse("function does not name a function", where, expected='"package.module:function"', found=repr(name))


def _shape(value: object, kind: str, where: str) -> tuple[int, ...] | None:
    if kind != "image-classification":
        if value is not None:
            raise refuse(f"image_shape does not belong to kind {kind}", where, expected="null", found=repr(value))
        return None
    if isinstance(value, list) and len(value) == 3 and all(type(side) is int and side > 0 for side in value):
        return tuple(value)
    raise refuse("image_shape is not a shape", where, expected="[channels, height, width]", found=repr(value))


def _check_labels(fields: Mapping[str, Any], where: str) -> None:
    kind, labels, prompts = fields["kind"], fields["labels"], fields["prompts"]
    if "labels" not in KINDS[kind].required:
        return
    if len(labels) < 2:
        raise refuse("labels are too few to tell apart", where, expected="two or more", found=str(len(labels)))
    label, count = Counter(labels).most_common(1)[0]
    if count > 1:
        raise refuse("a label stands twice", where, found=repr(label), remedy="give each label once")
    wanted = len(labels) if kind == "zero-shot-text" else 0
    if len(prompts) != wanted:
        raise refuse(
            "the number of prompts does not fit",
            where,
            expected=f"{wanted} ({'one per label' if wanted else f'kind {kind} has none'})",
            found=str(len(prompts)),
        )
