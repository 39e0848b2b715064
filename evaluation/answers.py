"""Single answers as Parquet: what every example got, beside the score that they add up to.

One row an example, in the suite's order. The columns are those of "prediction" (int64), "correct" (bool), "point"
(float64) and "weight" (float64) that the metric has; the file's metadata holds the rest of the score.
"""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evaluation.escape import clean
from registry.records import SYSTEM_ERRORS, FoldinError, Refusal
from registry.verdicts import TaskScore

COLUMNS = {
    "predictions": ("prediction", pa.int64()),
    "correct": ("correct", pa.bool_()),
    "points": ("point", pa.float64()),
    "weights": ("weight", pa.float64()),
}
KEY = b"foldin.score"


def answers_bytes(score: TaskScore) -> bytes:
    """The Parquet file of a score; equal scores give equal bytes with the same pyarrow, whatever they took."""
    facts = asdict(score)
    del facts["seconds"]
    filled = {field: facts.pop(field) for field in COLUMNS}
    columns = {COLUMNS[field][0]: pa.array(rows, COLUMNS[field][1]) for field, rows in filled.items() if rows}
    table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(facts, sort_keys=True)})
    target = io.BytesIO()
    pq.write_table(table, target, compression="zstd")
    return target.getvalue()


def read_answers(path: Path) -> TaskScore:
    """The score whose answers a file holds. Raises FoldinError (E_FORMAT) when it holds none."""
    try:
        table = pq.ParquetFile(path).read()
        facts: dict[str, Any] = json.loads(table.schema.metadata[KEY])
        rows: dict[str, Any] = {field: _column(table, name) for field, (name, _) in COLUMNS.items()}
        return TaskScore(**facts, **rows)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
            raise
        what, remedy = "these are no answers of a model", "remove the file; the model is measured again"
        raise FoldinError(Refusal("E_FORMAT", what, str(path), found=clean(str(error)), remedy=remedy)) from None


def _column(table: pa.Table, name: str) -> tuple[int | bool | float, ...]:
    return tuple(table[name].to_pylist()) if name in table.column_names else ()
