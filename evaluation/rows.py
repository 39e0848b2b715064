"""The rows of a suite's Parquet file: the only file that imports pyarrow."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evaluation.escape import clean
from registry.records import SYSTEM_ERRORS, FoldinError, Refusal

if TYPE_CHECKING:
    from evaluation.suites import Suite

SPLITS = ("gate", "tune")
UNPACKED_BYTES = 2**32  # what a file may unpack to, by its own metadata: small files can hold huge columns


def check_rows(suite: "Suite", where: str) -> None:
    """Nothing when every row fits the suite and the gate split has rows; raises FoldinError (E_SUITE) otherwise."""
    table = _table(suite, where)
    _check_labels(table["label"], suite, where)
    _check_splits(table["split"], suite, where)
    if suite.image_shape:
        _check_images(table["image"], suite.image_shape, suite, where)


def read_rows(suite: "Suite", split: str) -> tuple[list[str] | list[list[float]], list[int]]:
    """Inputs and label indices of one split in the file's order; raises FoldinError (E_SUITE) when there are none."""
    where = f"suite of task {clean(suite.task)}"
    table = _table(suite, where)
    rows = table.filter(pc.equal(table["split"], split))
    if not rows.num_rows:
        raise _refuse("the split has no rows", suite, where, expected=f"rows whose split is {split!r}")
    return rows[_column(suite)].to_pylist(), rows["label"].to_pylist()


def write_rows(path: Path, rows: Iterable[tuple[str | Sequence[float], int, str]], *, image: bool) -> None:
    """Writes the Parquet file of a suite; equal rows give equal bytes with the same pyarrow."""
    inputs, labels, splits = [], [], []
    for value, label, split in rows:
        inputs.append(list(value) if image else value)
        labels.append(label)
        splits.append(split)
    kind = pa.list_(pa.float32()) if image else pa.string()
    columns = {"image" if image else "text": pa.array(inputs, kind), "label": pa.array(labels, pa.int64())}
    table = pa.table({**columns, "split": pa.array(splits, pa.string())})
    pq.write_table(table, path, compression="zstd")


def _column(suite: "Suite") -> str:
    return "image" if suite.image_shape else "text"


def _table(suite: "Suite", where: str) -> pa.Table:
    names = [_column(suite), "label", "split"]
    try:
        # ParquetFile, not read_table: the latter reads columns out of folder names such as "label=3".
        with pq.ParquetFile(suite.data) as file:
            _check_size(file.metadata, suite, where)
            _check_columns(file.schema_arrow, names, suite, where)
            table = file.read(columns=names)
            table.validate(full=True)  # text that is not UTF-8 would fail only later, outside this try
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
            raise
        remedy = "write it with evaluation.write_suite or pyarrow"
        raise _refuse("the data cannot be read as Parquet", suite, where, found=str(error), remedy=remedy) from None
    _check_nulls(table, suite, where)
    return table


def _check_size(metadata: pq.FileMetaData, suite: "Suite", where: str) -> None:
    size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    if size > UNPACKED_BYTES:
        limit = f"at most {UNPACKED_BYTES} bytes unpacked"
        raise _refuse("the data is too large", suite, where, expected=limit, found=str(size), remedy="use fewer rows")


def _check_columns(schema: pa.Schema, names: Sequence[str], suite: "Suite", where: str) -> None:
    fits = {"text": _is_text, "image": _is_image, "label": pa.types.is_integer, "split": _is_text}
    wanted = {"text": "string", "image": "list<float32>", "label": "int64", "split": "string"}
    for name in names:
        count = schema.names.count(name)
        found = str(schema.field(name).type) if count == 1 else f"{count or 'no'} such columns"
        if count != 1 or not fits[name](schema.field(name).type):
            raise _refuse(f"the column {name!r} does not fit", suite, where, expected=wanted[name], found=found)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_image(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(check(kind) for check in lists) and bool(pa.types.is_floating(kind.value_type))


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
    what: str, suite: "Suite", where: str, *, expected: str = "", found: str = "", remedy: str = ""
) -> FoldinError:
    name = clean(suite.data.name)
    return FoldinError(Refusal("E_SUITE", what, where, file=name, expected=expected, found=clean(found), remedy=remedy))
