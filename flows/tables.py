"""Tables of a TOML file as dataclasses of settings: every key is known, every value has the field's type."""

import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from registry.records import FoldinError, Refusal

T = TypeVar("T")
EXAMPLES = {"base": '"a folder"', "experts": '["a registered model"]'}
WORDS: Mapping[Any, str] = {str: "a text", float: "a number"}
MANY: Mapping[Any, str] = {str: "texts", float: "numbers"}


def read_table(path: Path, where: str, kind: type[T], value: object) -> T:
    """One table of the file as a dataclass of settings.

    Raises:
        FoldinError: E_CONFIG with the key, what was expected and found, and the nearest known key.
    """
    table, hints = as_table(path, where, value), get_type_hints(kind)
    check_keys(path, where, table, set(hints))
    for key, example in EXAMPLES.items():
        if key in hints and key not in table and not hasattr(kind, key):  # a field with a default may be left out
            raise refused(path, f"[{where}] has no {key}", f"{key} = {example}", remedy=f"add it to {path.name}")
    values = {key: _typed(path, f"[{where}] {key}", value, hints[key]) for key, value in table.items()}
    return kind(**values)


def _typed(path: Path, where: str, value: Any, hint: Any) -> Any:  # noqa: ANN401 - TOML values
    """The value as the field wants it: lists become tuples, whole numbers may stand for floats."""
    if isinstance(hint, type) and is_dataclass(hint):
        return read_table(path, where.removeprefix("[").replace("] ", "."), hint, value)
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is tuple:
        fits = isinstance(value, list) and all(_is(each, inner[0]) for each in value)
        words = f"a list of {MANY[inner[0]]}"
    elif kind in WORDS:
        fits, words = _is(value, kind), WORDS[kind]
    else:
        texts = inner[1:] == (str,)
        fits = isinstance(value, dict) and (not texts or all(isinstance(each, str) for each in value.values()))
        words = "a table of texts" if texts else "a table"
    if not fits:
        raise refused(path, f"{where} has the wrong type", words, repr(value))
    return tuple(value) if isinstance(value, list) else value


def _is(value: object, kind: type) -> bool:
    """Whether a TOML value is of a kind; whole numbers may stand for floats, and truth values for nothing."""
    return isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)


def as_table(path: Path, where: str, value: object) -> Mapping[str, Any]:
    """A TOML value as a table; raises FoldinError (E_CONFIG) when it is none."""
    if isinstance(value, dict):
        return value
    raise refused(path, f"{where} is not a table", f"a table [{where}]", repr(value))


def check_keys(path: Path, where: str, table: Mapping[str, Any], known: set[str]) -> None:
    """Nothing, when every key is known; raises FoldinError (E_CONFIG) with the nearest known one."""
    for key in table:
        if key not in known:
            near = get_close_matches(key, sorted(known), n=1, cutoff=0.0)
            what = f"unknown key {key!r} in [{where}]" if where else f"unknown table {key!r}"
            raise refused(path, what, f"one of {', '.join(sorted(known))}", remedy=f"did you mean {near[0]!r}")


def refused(path: Path, what: str, expected: str, found: str = "", remedy: str = "") -> FoldinError:
    """The E_CONFIG error that says so of the file at `path`."""
    refusal = Refusal("E_CONFIG", what, str(path), "", "", expected, found, remedy or f"correct it in {path.name}")
    return FoldinError(refusal)


def check_number(
    path: Path, where: str, value: float, expected: str, least: float, most: float = math.inf, *, whole: bool = False
) -> None:
    """Nothing, when a number is finite, in its range and, where asked, whole; else raises as `refused`."""
    if not (math.isfinite(value) and least <= value <= most and (not whole or value == int(value))):
        raise refused(path, f"{where} is out of range", expected, repr(value))
