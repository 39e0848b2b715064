"""Rows in batches: of like length, short ones first, so that little is padded."""

from collections.abc import Iterator, Sequence


def batches(sizes: Sequence[int], most: int, cells: float = float("inf")) -> Iterator[list[int]]:
    """Row numbers in batches of at most `most` rows, the smallest first.

    No batch of more than one row costs more than `cells`, its rows times the largest size among them.

    >>> list(batches([5, 1, 2, 9], 2)), list(batches([5, 1, 2, 9], 4, cells=10))
    ([[1, 2], [0, 3]], [[1, 2], [0], [3]])
    """
    batch: list[int] = []
    for row in sorted(range(len(sizes)), key=sizes.__getitem__):
        if batch and (len(batch) == most or (len(batch) + 1) * sizes[row] > cells):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
