"""The rows of a suite: read, checked and written."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evaluation.escape import clean
from evaluation.suites import Question
from evaluation.tables import columns_of, read_table, refused
from registry.records import FoldinError, Refusal

if TYPE_CHECKING:
    from evaluation.suites import Suite

SPLITS = ("gate", "tune")
MOST_CHOICES = 64


def check_rows(suite: "Suite", where: str) -> None:
    """Nothing when every row fits the suite, the gate split has rows and no input stands in both splits.

    Raises FoldinError (E_SUITE) otherwise.
    """
    table = read_table(suite, where)
    if "choices" in columns_of(suite):
        _check_choices(table, suite, where)
    elif "label" in columns_of(suite):
        _check_labels(table["label"], suite, where)
    _check_splits(table["split"], suite, where)
    if suite.image_shape:
        _check_images(table["image"], suite.image_shape, suite, where)
    _check_disjoint(table, suite, where)


def read_rows(suite: "Suite", split: str, sample: int) -> tuple[list[Any], list[int]]:
    """Inputs and label indices of one split in the file's order; raises FoldinError (E_SUITE) when there are none."""
    where = f"suite of task {clean(suite.task)}"
    table = read_table(suite, where)
    named = "gate" if split == "canary" else split
    rows = table.filter(pc.equal(table["split"], named))
    if not rows.num_rows:
        raise refused("the split has no rows", suite, where, expected=f"rows whose split is {named!r}")
    if split == "canary":
        rows = rows.take(_sample(suite.sha256, rows.num_rows, sample))
    return _inputs(rows, suite), rows["label"].to_pylist() if "label" in columns_of(suite) else []


def digests(suite: "Suite", where: str) -> dict[str, list[bytes]]:
    """Split -> the digests of its inputs, 16 bytes each, in the file's order; raises FoldinError like `check_rows`."""
    table = read_table(suite, where)
    found: dict[str, list[bytes]] = {}
    for split, digest in zip(table["split"].to_pylist(), _digests(table, suite), strict=True):
        found.setdefault(split, []).append(digest)
    return found


def write_rows(path: Path, rows: Iterable[Any], kind: str, metric: str) -> None:
    """Writes the Parquet file of a suite; equal rows give equal bytes with the same pyarrow."""
    if kind == "python":
        plain = list(rows)
        if not all(isinstance(row, Mapping) for row in plain):
            what, expected = "a row of a python suite is no dict", '{"split": "gate", ...}'
            raise FoldinError(Refusal("E_SUITE", what, f"suite in {path.parent}", expected=expected))
        table = pa.Table.from_pylist(plain)
    else:
        texts, labels = pa.string(), pa.int64()
        wanted = {"text": texts, "label": labels, "split": texts}
        if kind == "image-classification":
            wanted = {"image": pa.list_(pa.float32()), "label": labels, "split": texts}
        if kind == "causal-lm":
            wanted = {"text": texts, "choices": pa.list_(texts), "label": labels, "split": texts}
        if metric == "perplexity":
            wanted = {"text": texts, "split": texts}
        flat = [(*row[0], *row[1:]) if "choices" in wanted else row for row in rows]
        columns = zip(*flat, strict=True) if flat else ([] for _ in wanted)
        table = pa.table(
            {name: pa.array(list(column), wanted[name]) for name, column in zip(wanted, columns, strict=True)}
        )
    pq.write_table(table, path, compression="zstd")


def _inputs(rows: pa.Table, suite: "Suite") -> list[Any]:
    if suite.kind == "python":
        return list(rows.to_pylist())
    inputs: list[Any] = rows[columns_of(suite)[0]].to_pylist()
    if "choices" in columns_of(suite):
        return [Question(text, tuple(each)) for text, each in zip(inputs, rows["choices"].to_pylist(), strict=True)]
    return inputs


def _sample(identity: str, count: int, sample: int) -> list[int]:
    """`sample` of `count` row numbers, in order; decided by the suite's identity."""
    order = sorted(range(count), key=lambda row: hashlib.sha256(f"{identity}:{row}".encode()).digest())
    return sorted(order[:sample])


def _digests(table: pa.Table, suite: "Suite") -> Iterator[bytes]:
    if suite.image_shape:
        # Adding zero makes minus zero plus zero: an inverted view must not hide that two images are one.
        values = pc.add(pc.cast(pc.list_flatten(table["image"]), pa.float32()), pa.scalar(0.0, pa.float32()))
        inputs: Iterable[bytes] = values.to_numpy().reshape(table.num_rows, -1)
    elif suite.kind == "python":
        rows = (
            {key: value for key, value in row.items() if key not in ("split", "label")} for row in table.to_pylist()
        )
        inputs = (json.dumps(row, sort_keys=True, default=repr).encode() for row in rows)
    else:
        inputs = (_bytes_of(each) for each in _inputs(table, suite))
    return (hashlib.blake2b(each, digest_size=16).digest() for each in inputs)


def _bytes_of(given: "str | Question") -> bytes:
    return given.encode() if isinstance(given, str) else json.dumps([given.text, *sorted(given.choices)]).encode()


def _check_disjoint(table: pa.Table, suite: "Suite", where: str) -> None:
    first: dict[str, dict[bytes, int]] = {split: {} for split in SPLITS}  # split -> digest -> its first row
    for row, (split, digest) in enumerate(zip(table["split"].to_pylist(), _digests(table, suite), strict=True)):
        first[split].setdefault(digest, row)
    shared = [(row, first["tune"][digest]) for digest, row in first["gate"].items() if digest in first["tune"]]
    if shared:
        pairs = ", ".join(f"rows {gate} (gate) and {tune} (tune)" for gate, tune in shared[:3])
        more = f", and {len(shared) - 3} more" if len(shared) > 3 else ""
        remedy = "keep each input in one split: what is tuned on cannot judge"
        raise refused("the same input is in both splits", suite, where, "different inputs", pairs + more, remedy)


def _check_labels(labels: pa.ChunkedArray, suite: "Suite", where: str) -> None:
    last = len(suite.labels) - 1
    for row, label in enumerate(labels.to_pylist()):
        if not 0 <= label <= last:
            place = f"{label} in row {row}"
            raise refused("a label index is out of range", suite, where, expected=f"0 to {last}", found=place)


def _check_choices(table: pa.Table, suite: "Suite", where: str) -> None:
    for row, (choices, label) in enumerate(zip(table["choices"].to_pylist(), table["label"].to_pylist(), strict=True)):
        if len(choices) < 2 or not all(choices) or len(set(choices)) < len(choices):
            found = f"{choices} in row {row}"
            raise refused("the choices do not fit", suite, where, "two or more different texts, none empty", found)
        if len(choices) > MOST_CHOICES:  # each is read behind the whole context
            raise refused("a row has too many choices", suite, where, f"at most {MOST_CHOICES}", f"{len(choices)}")
        if not 0 <= label < len(choices):
            found = f"{label} in row {row}"
            raise refused("a label index is out of range", suite, where, f"0 to {len(choices) - 1}", found)


def _check_splits(splits: pa.ChunkedArray, suite: "Suite", where: str) -> None:
    names = set(splits.to_pylist())
    if "gate" not in names:
        remedy = 'mark the rows that decide with "gate"'
        raise refused("the split gate has no rows", suite, where, expected="one or more", found="0", remedy=remedy)
    for name in sorted(names.difference(SPLITS)):
        raise refused("a split is unknown", suite, where, expected=f"one of {', '.join(SPLITS)}", found=repr(name))


def _check_images(images: pa.ChunkedArray, shape: Sequence[int], suite: "Suite", where: str) -> None:
    size = shape[0] * shape[1] * shape[2]
    for row, length in enumerate(pc.list_value_length(images).to_pylist()):
        if length != size:
            wanted = f"{size} values for image_shape {list(shape)}"
            raise refused("an image has another size", suite, where, expected=wanted, found=f"{length} in row {row}")
    values = pc.list_flatten(images)
    if values.null_count or not pc.all(pc.is_finite(values)).as_py():
        raise refused("an image holds a value that is not finite", suite, where, expected="finite numbers")
