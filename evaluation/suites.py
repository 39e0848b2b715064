"""What is measured: a suite is a folder with suite.json and, for most kinds, a Parquet file of examples.

suite.json is data from strangers: every key is known (`evaluation.kinds`), every path stays inside the folder, every
row is checked before anything is scored. Kinds that run code are read only where the line's own configuration names
them, and nothing of theirs is imported before they are scored.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.escape import clean
from evaluation.kinds import CHANGING, DATA, KINDS, checked, refuse

SAMPLE = 64  # rows of a canary


@dataclass(frozen=True)
class Suite:
    """How one task is measured."""

    task: str
    kind: str  # one of KINDS
    data: Path | None  # the Parquet file; None for lm-eval, and for python without one
    labels: tuple[str, ...]  # at least two, all different; () for kinds without
    prompts: tuple[str, ...]  # zero-shot-text: one text per label; () for the other kinds
    metric: str  # "accuracy", "perplexity" or "score"
    image_shape: tuple[int, ...] | None  # (channels, height, width), image-classification only
    sha256: str  # identity: of the canonical suite.json, which holds the data's digest and leaves its file name out
    safety: bool = False  # the task may not get worse at all
    per_byte: bool = False  # causal-lm, accuracy: log-likelihoods are divided by the bytes of the choice
    function: str = ""  # python: "module:name"
    harness_task: str = ""  # lm-eval: its name there
    measure: str = ""  # lm-eval: the harness's name of what counts; "": the first that the task has
    include: Path | None = None  # lm-eval: the folder of the task's own YAML and data


class Question(NamedTuple):
    """An example of multiple choice."""

    text: str  # the context
    choices: tuple[str, ...]  # what may follow it


class Examples(NamedTuple):
    """One split of a suite, in the file's order."""

    inputs: list[Any]  # texts; images flattened from image_shape; Questions; or whole rows as dicts, for python
    labels: list[int]  # indices into the suite's labels or the question's choices; [] where the metric needs none


def load_suite(
    folder: Path,
    *,
    task: str,
    where: str,
    trusted: bool = False,  # whether the line's own configuration names the folder; never for what an expert brings
) -> Suite:
    """The suite in `folder`, checked to the last row; `where` names its owner in messages ("expert demo v3").

    Raises FoldinError (E_SUITE) for a missing or malformed suite.json, an unknown key or kind, a kind that runs code
    and is not trusted, data that is missing, outside the folder, of another digest, or whose rows do not fit, and for
    an input that stands in both splits.
    """
    document = _document(folder / "suite.json", where)
    fields = checked(document, where)
    _check_trust(fields, trusted, where)
    suite = _located(document, fields, folder, task, where)
    if suite.data:
        from evaluation.rows import check_rows  # pyarrow is slow to import

        check_rows(suite, where)
    return suite


def read_examples(suite: Suite, split: str = "gate", sample: int = SAMPLE) -> Examples:
    """The rows of one split in the file's order: "gate", "tune", or "canary", a fixed sample of `sample` gate rows.

    The sample is the rows with the smallest SHA-256 of the suite's identity and the row's number among the gate's, so
    that nobody chooses it. A suite without data has no rows. Raises FoldinError (E_SUITE) when the split has no rows
    or the file does not hold what the suite says.
    """
    if suite.data is None and split == "tune":
        where, remedy = f"suite of task {clean(suite.task)}", "give it data, or do not search on this task"
        raise refuse("the suite has no rows kept for tuning", where, remedy=remedy)
    if suite.data is None:
        return Examples([], [])
    from evaluation.rows import read_rows

    return Examples(*read_rows(suite, split, sample))


def input_digests(suite: Suite, split: str = "gate") -> frozenset[bytes]:
    """The 16-byte digests of a split's inputs, equal for equal inputs of any suite; none for a suite without data.

    An input is the text, the context with its choices, the image, or, for python, the row without split and label.
    Raises like `read_examples`, but not for a split without rows.
    """
    if suite.data is None:
        return frozenset()
    from evaluation.rows import digests

    return frozenset(digests(suite, f"suite of task {clean(suite.task)}").get(split, ()))


def write_suite(
    folder: Path,
    *,
    kind: str,
    labels: Sequence[str] = (),
    prompts: Sequence[str] = (),
    rows: Iterable[
        tuple[Any, ...]
    ] = (),  # (input, label index, split); (text, split) for perplexity; a dict for python
    image_shape: Sequence[int] | None = None,  # (channels, height, width)
    metric: str = "",  # "": the kind's first
    **more: str | bool,  # safety, per_byte, function, task, measure, include
) -> None:
    """Writes suite.json and, where there are rows, examples.parquet into `folder`; equal arguments give equal bytes.

    The input of a row is a text, an image flattened from image_shape, or for multiple choice (context, choices). Raises
    FoldinError (E_SUITE) when what was written is not a suite that `load_suite` accepts from a trusted place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, object] = {"kind": kind}
    metric = metric or (KINDS[kind].metrics[0] if kind in KINDS else "")
    if kind != "lm-eval" and (rows or kind != "python"):
        document |= _write_data(folder, rows, kind, metric)
    if labels:
        document |= {"labels": list(labels), "prompts": list(prompts)}
    document["metric"] = metric
    if labels:
        document["image_shape"] = list(image_shape) if image_shape else None
    text = json.dumps({**document, **more}, indent=2, ensure_ascii=False)
    (folder / "suite.json").write_text(text + "\n", encoding="utf-8")
    load_suite(folder, task="", where=f"suite in {folder}", trusted=True)


def _write_data(folder: Path, rows: Iterable[Any], kind: str, metric: str) -> dict[str, object]:
    from evaluation.rows import write_rows

    data = folder / "examples.parquet"
    write_rows(data, rows, kind, metric)
    return {"data": data.name, "data_sha256": _sha256(data)}


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


def _check_trust(fields: Mapping[str, Any], trusted: bool, where: str) -> None:
    kind = fields["kind"]
    if fields["safety"] and not trusted:  # it would be a veto over every later candidate
        remedy = "leave safety out, or name the suite in the line's suites or guards"
        raise refuse("an expert may not make its own suite a hard rule", where, found="safety", remedy=remedy)
    if KINDS[kind].trusted and not trusted:
        what = f"the kind {kind} runs code, and an expert may not bring code"
        remedy = "name the suite in the line's [suites], or measure the task by a suite of another kind"
        raise refuse(what, where, found=kind, remedy=remedy)
    if kind == "lm-eval" and find_spec("lm_eval") is None:
        raise refuse("lm-evaluation-harness is not installed", where, remedy="install foldin[lm-eval]")


def _located(document: Mapping[str, object], fields: Mapping[str, Any], folder: Path, task: str, where: str) -> Suite:
    """The suite with its files found and its identity. A default adds nothing to the identity, so new keys keep it."""
    data, digest = _data(document, folder, where) if any(key in document for key in DATA) else (None, "")
    include, own = _include(document, folder, where)
    identity = {key: fields[key] for key in ("kind", "metric", "labels", "prompts", "image_shape")}
    changed = {key: fields[key] for key in CHANGING if fields[key]}
    if fields["kind"] == "lm-eval":  # the harness's own tasks come with it, and their prompts change with its version
        own = {**own, "harness": version("lm_eval")}
    sha256 = _canonical_sha256({**identity, **changed, **own, "data_sha256": digest})
    return Suite(task=task, data=data, include=include, sha256=sha256, **fields)


def _include(document: Mapping[str, object], folder: Path, where: str) -> tuple[Path | None, dict[str, object]]:
    """The folder of a harness task's own files, and their digests by their names in it."""
    if "include" not in document:
        return None, {}
    name = document["include"]
    if not isinstance(name, str) or not name:
        raise refuse("include is not a path", where, expected="a folder beside suite.json", found=repr(name))
    include = _inside(folder, name, where, "include")
    files = sorted(path for path in include.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    if not files:
        raise refuse("the folder to include is missing or empty", where, expected=clean(name))
    return include, {"include": {path.relative_to(include).as_posix(): _sha256(path) for path in files}}


def _data(document: Mapping[str, object], folder: Path, where: str) -> tuple[Path, str]:
    name, digest = document.get("data"), document.get("data_sha256")
    if not isinstance(name, str) or not name:
        raise refuse("data is not a path", where, expected="a path inside the folder", found=repr(name))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name):
        remedy = "put the Parquet file into the suite's folder"
        raise refuse("data by URI is not supported yet", where, expected="a relative path", found=name, remedy=remedy)
    data = _inside(folder, name, where, "data")
    if not data.is_file():
        raise refuse("the data file is missing", where, expected=clean(name), remedy="put it beside suite.json")
    actual = _sha256(data)
    if digest != actual:
        remedy = "restore the data, or write its digest into data_sha256"
        raise refuse("the data has another digest", where, expected=clean(str(digest)), found=actual, remedy=remedy)
    return data, actual


def _inside(folder: Path, name: str, where: str, key: str) -> Path:
    if not any(mark in name for mark in "\\\0"):
        path = (folder / name).resolve()  # follows links, so a link that leads out is refused like ".."
        if path.is_relative_to(folder.resolve()):
            return path
    raise refuse(f"{key} leaves the suite's folder", where, expected="a relative path inside it", found=repr(name))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _canonical_sha256(fields: Mapping[str, object]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
