"""A suite's Parquet file as a table: of bounded size, with the columns that the suite's kind needs, none empty."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from evaluation.escape import clean
from registry.records import SYSTEM_ERRORS, FoldinError, Refusal

if TYPE_CHECKING:
    from evaluation.suites import Suite

UNPACKED_BYTES = 2**30  # what a file may unpack to: small files can hold huge columns
MOST_ROWS, BATCH = 2**20, 2**8


def read_table(suite: "Suite", where: str) -> pa.Table:
    """The columns that the suite's kind needs (all of a python suite); raises FoldinError (E_SUITE) where not."""
    names = columns_of(suite)
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
        raise refused("the data cannot be read as Parquet", suite, where, found=str(error), remedy=remedy) from None
    _check_nulls(table.select(names), suite, where)
    return table


def _read(file: pq.ParquetFile, names: list[str] | None, suite: "Suite", where: str) -> pa.Table:
    """The whole file; what a row is repeated counts each time, which the file's own sizes do not tell."""
    batches, size = list[pa.RecordBatch](), 0
    for batch in file.iter_batches(columns=names, batch_size=BATCH):
        size += batch.nbytes
        if size > UNPACKED_BYTES or len(batches) >= MOST_ROWS // BATCH:
            limit = f"at most {UNPACKED_BYTES} bytes and {MOST_ROWS} rows unpacked"
            raise refused("the data is too large", suite, where, expected=limit, remedy="use fewer rows")
        batches.append(batch)
    schema = file.schema_arrow
    return pa.Table.from_batches(
        batches, schema if names is None else pa.schema([schema.field(name) for name in names])
    )


def _check_size(metadata: pq.FileMetaData, suite: "Suite", where: str) -> None:
    size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    if size > UNPACKED_BYTES:
        limit = f"at most {UNPACKED_BYTES} bytes unpacked"
        raise refused("the data is too large", suite, where, expected=limit, found=str(size), remedy="use fewer rows")


def _check_columns(schema: pa.Schema, names: Sequence[str], suite: "Suite", where: str) -> None:
    fits = {"image": _is_image, "choices": _is_texts, "label": pa.types.is_integer}
    wanted = {"image": "list<float32>", "choices": "list<string>", "label": "int64"}
    for name in names:
        count = schema.names.count(name)
        found = str(schema.field(name).type) if count == 1 else f"{count or 'no'} such columns"
        if count != 1 or not fits.get(name, _is_text)(schema.field(name).type):
            expected = wanted.get(name, "string")
            raise refused(f"the column {name!r} does not fit", suite, where, expected=expected, found=found)


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
            raise refused(f"the column {name!r} has empty cells", suite, where, expected="none", found=found)


def columns_of(suite: "Suite") -> tuple[str, ...]:
    """What the kind must find in a row."""
    if suite.kind == "python":
        return ("split",)
    if suite.kind == "causal-lm":
        return ("text", "split") if suite.metric == "perplexity" else ("text", "choices", "label", "split")
    return ("image" if suite.image_shape else "text", "label", "split")


def refused(
    what: str, suite: "Suite", where: str, expected: str = "", found: str = "", remedy: str = ""
) -> FoldinError:
    """The error to raise for a suite's data; `found` may hold a stranger's text."""
    name = clean(suite.data.name) if suite.data else ""
    return FoldinError(Refusal("E_SUITE", what, where, file=name, expected=expected, found=clean(found), remedy=remedy))
