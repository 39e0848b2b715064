"""A guard for the demonstration: does the sentence encoder still find what it was made to find?

`retrieval` is a function of a suite of kind `python`: each row holds two sentences that follow each other in Python's
reference manual, and the model has to find the second among all second ones. No expert trains for it, so it shows what
the experts together cost in general ability.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import torch

from evaluation.functions import Model
from registry.files import sha256_file, write_json

if TYPE_CHECKING:
    from evaluation.classify import Embedder

PAIRS = 300
BATCH = 32
SENTENCE = re.compile(r"(?<=[.])\s+")
RULES = set("*=-^~")  # what headings are underlined with


def retrieval(model: Model, examples: Sequence[Mapping[str, Any]]) -> list[float]:
    """1.0 for each pair whose second sentence is nearest to the first among all second ones, else 0.0."""
    from evaluation.classify import embedder

    encoder = embedder(model.folder, model.weights, model.device)
    with torch.inference_mode():
        first, second = (_embedded(encoder, [row[side] for row in examples]) for side in ("first", "second"))
    return [float(found == row) for row, found in enumerate((first @ second.T).argmax(1).tolist())]


def _embedded(encoder: "Embedder", texts: Sequence[str]) -> torch.Tensor:  # -> (texts, dim)
    """Unit vectors of the texts, in batches of like length."""
    tokens = encoder.tokenizer.tokens(texts)
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    pieces = [
        encoder.embed([tokens[row] for row in order[start : start + BATCH]]) for start in range(0, len(order), BATCH)
    ]
    return torch.cat(pieces)[torch.tensor(order).argsort()]


def write_guard(folder: Path) -> Path:
    """The suite of `retrieval` in a folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"first": first, "second": second, "split": split} for split, first, second in _dealt()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    data = {"data": "pairs.parquet", "data_sha256": sha256_file(folder / "pairs.parquet")}
    write_json(folder / "suite.json", {"kind": "python", "function": f"{__name__}:retrieval", **data})
    return folder


def _dealt() -> Iterator[tuple[str, str, str]]:
    """Every third pair for tuning; no sentence stands in two pairs."""
    for number, (first, second) in enumerate(_pairs()):
        yield ("gate" if number % 3 else "tune", first, second)


def _pairs() -> list[tuple[str, str]]:
    seen: set[str] = set()
    found = []
    for name in sorted(topics):
        lines = (line.strip() for line in topics[name].splitlines())
        text = " ".join(line for line in lines if line and not set(line) <= RULES)
        fit = (each for each in SENTENCE.split(text) if 40 <= len(each) <= 120)
        sentences = [each for each in dict.fromkeys(fit) if each not in seen]
        seen.update(sentences)
        found += list(zip(sentences[::2], sentences[1::2], strict=False))
    step = max(1, len(found) // PAIRS)
    return found[::step][:PAIRS]
