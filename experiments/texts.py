"""Five text-classification tasks from what every installation carries, split without chance.

A text's place is decided by a hash of the text and the seed, so the rows depend only on the Python version and on the
pinned versions of tzdata and Babel (see `experiments.sources`), not on the machine.
"""

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from experiments.sources import SOURCES, Source
from registry.records import FoldinError, Refusal


class Row(NamedTuple):
    """One example."""

    text: str
    label: int  # index into the task's labels


@dataclass(frozen=True)
class TextTask:
    """A task ready to learn and to measure; the three splits share no text."""

    name: str
    labels: tuple[str, ...]
    prompts: tuple[str, ...]  # one per label
    train: tuple[Row, ...]
    tune: tuple[Row, ...]
    gate: tuple[Row, ...]


def text_task(name: str, *, seed: int = 0) -> TextTask:
    """The task `name` of `sources.SOURCES`; another seed splits the same texts otherwise.

    Raises:
        FoldinError: E_CONFIG, no task has that name.
    """
    if name not in SOURCES:
        raise FoldinError(_unknown(name))
    return split(name, SOURCES[name], seed=seed)


def split(name: str, source: Source, *, seed: int = 0) -> TextTask:
    """The task with each label's texts dealt to gate, tune and train; a text that stands under two labels is left out.

    Texts that an uncased tokenizer cannot tell apart count as one.
    """
    labels = tuple(source.prompts)
    texts = _by_label(source.examples(), seed)
    shares = [_deal(texts[label], source) for label in labels]
    gate, tune, train = (_rows([share[part] for share in shares], seed) for part in range(3))
    return TextTask(name, labels, tuple(source.prompts.values()), train, tune, gate)


def uncased(text: str) -> str:
    """The text as an uncased tokenizer sees it: lower case, no accents, single spaces."""
    letters = unicodedata.normalize("NFD", text.casefold())
    return " ".join("".join(letter for letter in letters if unicodedata.category(letter) != "Mn").split())


def _by_label(examples: Iterable[tuple[str, str]], seed: int) -> Mapping[str, list[str]]:
    """Label -> its distinct texts in the order of their hashes, one spelling of each."""
    owners: dict[str, set[str]] = defaultdict(set)
    spelling: dict[str, str] = {}
    for text, label in examples:
        key = uncased(text)
        owners[key].add(label)
        spelling[key] = min(text, spelling.get(key, text))
    texts: dict[str, list[str]] = defaultdict(list)
    for key in sorted(owners, key=lambda key: _order(key, seed)):
        if len(owners[key]) == 1:
            texts[min(owners[key])].append(spelling[key])
    return texts


def _deal(texts: Sequence[str], source: Source) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """One label's texts as (gate, tune, train); of a small label the gate takes two fifths and tune a quarter."""
    gate = min(source.gate, 2 * len(texts) // 5)
    tune = gate + min(source.tune, len(texts) // 4)
    return texts[:gate], texts[gate:tune], texts[tune : tune + source.train]


def _rows(texts: Sequence[Sequence[str]], seed: int) -> tuple[Row, ...]:
    """The texts of all labels in one order that mixes the labels."""
    rows = chain.from_iterable((Row(text, label) for text in group) for label, group in enumerate(texts))
    return tuple(sorted(rows, key=lambda row: _order(row.text, seed)))


def _order(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{text}".encode()).digest()


def _unknown(name: str) -> Refusal:
    return Refusal(
        "E_CONFIG",
        "there is no such text task",
        where="experiments.texts",
        expected=f"one of {', '.join(SOURCES)}",
        found=repr(name),
        remedy="give one of these names",
    )
