"""What is measured: a suite is a folder with suite.json and a Parquet file of examples.

suite.json is data from strangers: every key is known, every path stays inside the folder, every row is checked before
anything is scored. The Parquet columns are "text" (string) or "image" (list of float32), "label" (index into `labels`)
and "split" (gate | tune).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evaluation.escape import clean, nearest
from registry.records import FoldinError, Refusal

KINDS = ("zero-shot-text", "text-classification", "image-classification")
KEYS = ("kind", "data", "data_sha256", "labels", "prompts", "metric", "image_shape")
REQUIRED = ("kind", "data", "data_sha256", "labels")


@dataclass(frozen=True)
class Suite:
    """How one task is measured."""

    task: str
    kind: str  # one of KINDS
    data: Path  # the Parquet file
    labels: tuple[str, ...]  # at least two, all different
    prompts: tuple[str, ...]  # zero-shot-text: one text per label; () for the other kinds
    metric: str  # "accuracy"
    image_shape: tuple[int, ...] | None  # (channels, height, width), image-classification only
    sha256: str  # identity: of the canonical suite.json, which holds the data's digest and leaves its file name out


class Examples(NamedTuple):
    """One split of a suite, in the file's order."""

    inputs: list[str] | list[list[float]]  # texts, or images flattened from image_shape
    labels: list[int]  # indices into the suite's labels


def load_suite(folder: Path, *, task: str, where: str) -> Suite:
    """The suite in `folder`, checked to the last row; `where` names its owner in messages ("expert demo v3").

    Raises FoldinError (E_SUITE) for a missing or malformed suite.json, an unknown key or kind, data that is missing,
    outside the folder, of another digest, or whose rows do not fit the labels.
    """
    document = _document(folder / "suite.json", where)
    suite = _checked(document, folder, task, where)
    from evaluation.rows import check_rows  # pyarrow is slow to import

    check_rows(suite, where)
    return suite


def read_examples(suite: Suite, split: str = "gate") -> Examples:
    """The rows of one split ("gate" or "tune") in the file's order.

    Raises FoldinError (E_SUITE) when the split has no rows or the file does not hold what the suite says.
    """
    from evaluation.rows import read_rows

    return Examples(*read_rows(suite, split))


def write_suite(
    folder: Path,
    *,
    kind: str,
    labels: Sequence[str],
    prompts: Sequence[str] = (),
    rows: Iterable[tuple[str | Sequence[float], int, str]],  # (input, label index, split)
    image_shape: Sequence[int] | None = None,  # (channels, height, width)
) -> None:
    """Writes suite.json and examples.parquet into `folder`; equal arguments give equal bytes.

    Raises FoldinError (E_SUITE) when what was written is not a suite that `load_suite` accepts.
    """
    from evaluation.rows import write_rows

    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "examples.parquet"
    write_rows(data, rows, image=kind == "image-classification")
    document = {
        "kind": kind,
        "data": data.name,
        "data_sha256": _sha256(data),
        "labels": list(labels),
        "prompts": list(prompts),
        "metric": "accuracy",
        "image_shape": list(image_shape) if image_shape else None,
    }
    (folder / "suite.json").write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    load_suite(folder, task="", where=f"suite in {folder}")


def refuse(what: str, where: str, *, expected: str = "", found: str = "", remedy: str = "") -> FoldinError:
    """The E_SUITE error that says so; strangers' words in `found` are cleaned."""
    return FoldinError(
        Refusal("E_SUITE", what, where, file="suite.json", expected=expected, found=clean(found), remedy=remedy)
    )


def _document(path: Path, where: str) -> dict[str, object]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = "put suite.json beside the data, for example with evaluation.write_suite"
        raise refuse("the file is missing", where, remedy=remedy) from None
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8 and bad JSON
        raise refuse(
            "the file is not valid JSON", where, found=str(error), remedy="write one JSON object in UTF-8"
        ) from None
    if not isinstance(document, dict):
        raise refuse("the file does not hold a JSON object", where, expected="{…}", found=type(document).__name__)
    return document


def _checked(document: Mapping[str, object], folder: Path, task: str, where: str) -> Suite:
    _check_keys(document, where)
    kind = _choice(document["kind"], KINDS, "kind", where)
    metric = _choice(document.get("metric", "accuracy"), ("accuracy",), "metric", where)
    labels = _texts(document["labels"], "labels", where)
    prompts = _texts(document.get("prompts", []), "prompts", where)
    shape = _shape(document.get("image_shape"), kind, where)
    _check_labels(labels, prompts, kind, where)
    data, digest = _data(document, folder, where)
    identity = {"kind": kind, "metric": metric, "labels": labels, "prompts": prompts, "image_shape": shape}
    sha256 = _canonical_sha256({**identity, "data_sha256": digest})
    return Suite(task, kind, data, labels, prompts, metric, shape, sha256)


def _check_keys(document: Mapping[str, object], where: str) -> None:
    for key in document:
        if key not in KEYS:
            raise refuse(f"the key {clean(key, 40)!r} is unknown", where, remedy=nearest(key, KEYS))
    for key in REQUIRED:
        if key not in document:
            raise refuse(f"the key {key!r} is missing", where, remedy=f"add {key!r}")


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


def _shape(value: object, kind: str, where: str) -> tuple[int, ...] | None:
    if kind != "image-classification":
        if value is not None:
            raise refuse(f"image_shape does not belong to kind {kind}", where, expected="null", found=repr(value))
        return None
    if isinstance(value, list) and len(value) == 3 and all(type(side) is int and side > 0 for side in value):
        return tuple(value)
    raise refuse("image_shape is not a shape", where, expected="[channels, height, width]", found=repr(value))


def _check_labels(labels: tuple[str, ...], prompts: tuple[str, ...], kind: str, where: str) -> None:
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


def _data(document: Mapping[str, object], folder: Path, where: str) -> tuple[Path, str]:
    name, digest = document["data"], document["data_sha256"]
    if not isinstance(name, str) or not name:
        raise refuse("data is not a path", where, expected="a path inside the folder", found=repr(name))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name):
        remedy = "put the Parquet file into the suite's folder"
        raise refuse("data by URI is not supported yet", where, expected="a relative path", found=name, remedy=remedy)
    data = _inside(folder, name, where)
    if not data.is_file():
        raise refuse("the data file is missing", where, expected=clean(name), remedy="put it beside suite.json")
    actual = _sha256(data)
    if digest != actual:
        remedy = "restore the data, or write its digest into data_sha256"
        raise refuse("the data has another digest", where, expected=clean(str(digest)), found=actual, remedy=remedy)
    return data, actual


def _inside(folder: Path, name: str, where: str) -> Path:
    if not any(mark in name for mark in "\\\0"):
        path = (folder / name).resolve()  # follows links, so a link that leads out is refused like ".."
        if path.is_relative_to(folder.resolve()):
            return path
    raise refuse("data leaves the suite's folder", where, expected="a relative path inside it", found=repr(name))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _canonical_sha256(fields: Mapping[str, object]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
