"""A line's rows of the ledger as one document, and back: what MLflow keeps, so that the ledger may be lost."""

import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Engine, Table, insert, select

from registry import database
from registry.files import Place, parse_json, shown
from registry.records import FoldinError, Refusal
from registry.schema import events, experts, leases, lines, merges

FORMAT = "foldin-history/1"
BEYOND = 1_000_000  # claims that nobody wrote under; whoever made one before the ledger was lost stays fenced
TABLES = (experts, merges, events)
Row = Mapping[str, Any]


def export(engine: Engine, line: str) -> bytes:
    """Everything the ledger knows of a line but who works on it now; equal rows give equal bytes."""
    with database.transaction(engine) as tx:
        (whole,) = _rows(tx, lines, lines.c.name == line)
        found = {table.name: _rows(tx, table, table.c.line == line) for table in TABLES}
    places = {row["id"]: place for place, row in enumerate(found["experts"], 1)}  # ids are this ledger's alone
    for rows in found.values():
        for place, row in enumerate(rows, 1):
            row["id"] = place
    for row in found["merges"]:
        row["expert_id"] = places.get(row["expert_id"])
        row["also"] = [places[each] for each in json.loads(row["also"])]
    text = json.dumps({"format": FORMAT, "line": whole, **found}, sort_keys=True, allow_nan=False)
    return gzip.compress(text.encode(), mtime=0)


def read(content: bytes, line: str) -> dict[str, Any]:
    """The document that `export` made of a line.

    Raises:
        FoldinError: E_HISTORY when it is none, or another line's.
    """
    place = Place(f"history of line {line}", "", "restore the ledger from a backup")
    try:
        text = gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise place.refuse("E_HISTORY", "the history is damaged", found=shown(str(error))) from error
    document = parse_json(text, place, "E_HISTORY")
    if document.get("format") != FORMAT or document["line"]["name"] != line:
        expected = f"{FORMAT} of line {line}"
        raise place.refuse("E_HISTORY", "this is another history", expected, shown(document.get("format")))
    return document


def restore(engine: Engine, document: Mapping[str, Any]) -> None:
    """Put a line back that the ledger does not know; all of it or nothing.

    Raises:
        FoldinError: E_HISTORY when the ledger knows the line.
    """
    line = document["line"]
    with database.transaction(engine) as tx:
        if tx.execute(select(lines.c.name).where(lines.c.name == line["name"])).first() is not None:
            what, remedy = "the ledger knows the line", "move the ledger away first, then rebuild it"
            raise FoldinError(Refusal("E_HISTORY", what, f"line {line['name']}", remedy=remedy))
        tx.execute(insert(lines).values(**line))
        fence = max((row["fence"] for row in (*document["merges"], *document["events"])), default=0)
        tx.execute(insert(leases).values(line=line["name"], holder="", fence=fence + BEYOND, expires=0.0))
        known = _insert(tx, experts, document["experts"])
        _insert(tx, merges, [{**row, **_experts(row, known)} for row in document["merges"]])
        _insert(tx, events, document["events"])


def _rows(tx: Connection, table: Table, mine: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - a condition of SQLAlchemy
    order = table.c.id if "id" in table.c else table.c.name
    return [dict(row._mapping) for row in tx.execute(select(table).where(mine).order_by(order))]


def _experts(row: Row, known: Mapping[int, int]) -> dict[str, Any]:
    """The columns that name experts, by the ids that this ledger gave them."""
    also = [known[each] for each in row.get("also", ())]  # histories of an older foldin name one expert a merge
    return {"expert_id": known.get(row["expert_id"]), "also": json.dumps(also)}


def _insert(tx: Connection, table: Table, rows: Sequence[Row]) -> dict[int, int]:
    """Old id -> new id of rows in their order; other lines may hold the old ids by now."""
    ids = {}
    for row in rows:
        values = {name: value for name, value in row.items() if name != "id"}
        ids[row["id"]] = tx.execute(insert(table).values(**values).returning(table.c.id)).scalar_one()
    return ids
