"""What became of the experts that were to be archived, for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.escape import clean


def print_archives(rows: Sequence[Mapping[str, Any]]) -> None:
    """A row for each expert."""
    from rich.table import Table
    from rich.text import Text

    from flows.printing import console

    table = Table("expert", "", "bytes before", "bytes after", "ratio", "error", box=None, pad_edge=False)
    for row in rows:
        sizes = ("", "", "", "")
        if row["after"] is not None:
            sizes = (f"{row['before']:,}", f"{row['after']:,}", f"{row['ratio']:.1f}", f"{row['error']:.4f}")
        table.add_row(Text(clean(row["expert"])), row["state"], *sizes)
    console().print(table)
