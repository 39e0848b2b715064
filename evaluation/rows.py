"""The rows of a suite's Parquet file: the only file that imports pyarrow."""

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
from registry.records import SYSTEM_ERRORS, FoldinError, Refusal

if TYPE_CHECKING:
    from evaluation.suites import Suite

SPLITS = ("gate", "tune")
UNPACKED_BYTES = 2**30  # what a file may unpack to: small files can hold huge columns
MOST_ROWS, BATCH = 2**20, 2**8
MOST_CHOICES = 64


def check_rows(suite: "Suite", where: str) -> None:
    """Nothing when every row fits the suite, the gate split has rows and no input stands in both splits.

    Raises FoldinError (E_SUITE) otherwise.
    """
    table = _table(suite, where)
    if "choices" in _columns(suite):
        _check_choices(table, suite, where)
    elif "label" in _columns(suite):
        _check_labels(table["label"], suite, where)
    _check_splits(table["split"], suite, where)
    if suite.image_shape:
        _check_images(table["image"], suite.image_shape, suite, where)
    _check_disjoint(table, suite, where)


def read_rows(suite: "Suite", split: str, sample: int) -> tuple[list[Any], list[int]]:
    """Inputs and label indices of one split in the file's order; raises FoldinError (E_SUITE) when there are none."""
    where = f"suite of task {clean(suite.task)}"
    table = _table(suite, where)
    named = "gate" if split == "canary" else split
    rows = table.filter(pc.equal(table["split"], named))
    if not rows.num_rows:
        raise _refuse("the split has no rows", suite, where, expected=f"rows whose split is {named!r}")
    if split == "canary":
        rows = rows.take(_sample(suite.sha256, rows.num_rows, sample))
    return _inputs(rows, suite), rows["label"].to_pylist() if "label" in _columns(suite) else []


def digests(suite: "Suite", where: str) -> dict[str, list[bytes]]:
    """Split -> the digests of its inputs, 16 bytes each, in the file's order; raises FoldinError like `check_rows`."""
    table = _table(suite, where)
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


def _columns(suite: "Suite") -> tuple[str, ...]:
    """What the kind must find in a row."""
    if suite.kind == "python":
        return ("split",)
    if suite.kind == "causal-lm":
        return ("text", "split") if suite.metric == "perplexity" else ("text", "choices", "label", "split")
    return ("image" if suite.image_shape else "text", "label", "split")


def _inputs(rows: pa.Table, suite: "Suite") -> list[Any]:
    if suite.kind == "python":
        return list(rows.to_pylist())
    inputs: list[Any] = rows[_columns(suite)[0]].to_pylist()
    if "choices" in _columns(suite):
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
        raise _refuse("the same input is in both splits", suite, where, "different inputs", pairs + more, remedy)


def _table(suite: "Suite", where: str) -> pa.Table:
    names = _columns(suite)
    assert suite.data is not None  # who has no rows does not ask for them
    try:
        # ParquetFile, not read_table: the latter reads columns out of folder names such as "label=3".
        with pq.ParquetFile(suite.data) as file:
            _check_size(file.metadata, suite, where)
            _check_columns(file.schema_arrow, names, suite, where)
            table = _read(file, None if suite.kind == "python" else list(names), suite, where)
            table.validate(full=True)  # text that is not UTF-8 would fail only later, outside this try
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
            raise
        remedy = "write it with evaluation.write_suite or pyarrow"
        raise _refuse("the data cannot be read as Parquet", suite, where, found=str(error), remedy=remedy) from None
    _check_nulls(table.select(names), suite, where)
    return table


def _read(file: pq.ParquetFile, names: list[str] | None, suite: "Suite", where: str) -> pa.Table:
    """The whole file; what a row is repeated counts each time, which the file's own sizes do not tell."""
    batches, size = list[pa.RecordBatch](), 0
    for batch in file.iter_batches(columns=names, batch_size=BATCH):
        size += batch.nbytes
        if size > UNPACKED_BYTES or len(batches) >= MOST_ROWS // BATCH:
            limit = f"at most {UNPACKED_BYTES} bytes and {MOST_ROWS} rows unpacked"
            raise _refuse("the data is too large", suite, where, expected=limit, remedy="use fewer rows")
        batches.append(batch)
    schema = file.schema_arrow
    return pa.Table.from_batches(
        batches, schema if names is None else pa.schema([schema.field(name) for name in names])
    )


def _check_size(metadata: pq.FileMetaData, suite: "Suite", where: str) -> None:
    size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    if size > UNPACKED_BYTES:
        limit = f"at most {UNPACKED_BYTES} bytes unpacked"
        raise _refuse("the data is too large", suite, where, expected=limit, found=str(size), remedy="use fewer rows")


def _check_columns(schema: pa.Schema, names: Sequence[str], suite: "Suite", where: str) -> None:
    fits = {"image": _is_image, "choices": _is_texts, "label": pa.types.is_integer}
    wanted = {"image": "list<float32>", "choices": "list<string>", "label": "int64"}
    for name in names:
        count = schema.names.count(name)
        found = str(schema.field(name).type) if count == 1 else f"{count or 'no'} such columns"
        if count != 1 or not fits.get(name, _is_text)(schema.field(name).type):
            expected = wanted.get(name, "string")
            raise _refuse(f"the column {name!r} does not fit", suite, where, expected=expected, found=found)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_image(kind: pa.DataType) -> bool:
    return _is_list(kind) and bool(pa.types.is_floating(kind.value_type))


def _is_texts(kind: pa.DataType) -> bool:
    return _is_list(kind) and _is_text(kind.value_type)


def _is_list(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _check_nulls(table: pa.Table, suite: "Suite", where: str) -> None:
    for name in table.column_names:
        if table[name].null_count:
            found = f"{table[name].null_count} empty cells"
            raise _refuse(f"the column {name!r} has empty cells", suite, where, expected="none", found=found)


def _check_labels(labels: pa.ChunkedArray, suite: "Suite", where: str) -> None:
    last = len(suite.labels) - 1
    for row, label in enumerate(labels.to_pylist()):
        if not 0 <= label <= last:
            place = f"{label} in row {row}"
            raise _refuse("a label index is out of range", suite, where, expected=f"0 to {last}", found=place)


def _check_choices(table: pa.Table, suite: "Suite", where: str) -> None:
    for row, (choices, label) in enumerate(zip(table["choices"].to_pylist(), table["label"].to_pylist(), strict=True)):
        if len(choices) < 2 or not all(choices) or len(set(choices)) < len(choices):
            found = f"{choices} in row {row}"
            raise _refuse("the choices do not fit", suite, where, "two or more different texts, none empty", found)
        if len(choices) > MOST_CHOICES:  # each is read behind the whole context
            raise _refuse("a row has too many choices", suite, where, f"at most {MOST_CHOICES}", f"{len(choices)}")
        if not 0 <= label < len(choices):
            found = f"{label} in row {row}"
            raise _refuse("a label index is out of range", suite, where, f"0 to {len(choices) - 1}", found)


def _check_splits(splits: pa.ChunkedArray, suite: "Suite", where: str) -> None:
    names = set(splits.to_pylist())
    if "gate" not in names:
        remedy = 'mark the rows that decide with "gate"'
        raise _refuse("the split gate has no rows", suite, where, expected="one or more", found="0", remedy=remedy)
    for name in sorted(names.difference(SPLITS)):
        raise _refuse("a split is unknown", suite, where, expected=f"one of {', '.join(SPLITS)}", found=repr(name))


def _check_images(images: pa.ChunkedArray, shape: Sequence[int], suite: "Suite", where: str) -> None:
    size = shape[0] * shape[1] * shape[2]
    for row, length in enumerate(pc.list_value_length(images).to_pylist()):
        if length != size:
            wanted = f"{size} values for image_shape {list(shape)}"
            raise _refuse("an image has another size", suite, where, expected=wanted, found=f"{length} in row {row}")
    values = pc.list_flatten(images)
    if values.null_count or not pc.all(pc.is_finite(values)).as_py():
        raise _refuse("an image holds a value that is not finite", suite, where, expected="finite numbers")


def _refuse(
    what: str, suite: "Suite", where: str, expected: str = "", found: str = "", remedy: str = ""
) -> FoldinError:
    name = clean(suite.data.name) if suite.data else ""
    return FoldinError(Refusal("E_SUITE", what, where, file=name, expected=expected, found=clean(found), remedy=remedy))
