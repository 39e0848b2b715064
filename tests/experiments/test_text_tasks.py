"""The text tasks: the same every time, fairly split, not given away by the text."""

from collections import Counter
from functools import cache
from itertools import pairwise

import pytest

from experiments.sources import DOCSTRING, SOURCES, Source
from experiments.texts import TextTask, split, text_task, uncased
from registry.records import FoldinError

made = cache(text_task)  # each source is read once for the tests that only look at the rows


@pytest.fixture(params=sorted(SOURCES))
def task(request: pytest.FixtureRequest) -> TextTask:
    return made(request.param)


def texts(task: TextTask, part: str) -> list[str]:
    return [row.text for row in getattr(task, part)]


def test_two_calls_give_equal_tasks(task):
    assert text_task(task.name) == task


def test_splits_share_no_text_that_the_tokenizer_could_tell_apart(task):
    parts = [texts(task, part) for part in ("train", "tune", "gate")]
    together = [uncased(text) for part in parts for text in part]
    assert len(set(together)) == len(together)


def test_every_split_has_enough_rows(task):
    # The time-zone database names some 420 cities in these regions; the other sources have thousands of texts.
    assert len(task.gate) >= (120 if task.name == "city" else 300)
    assert len(task.tune) >= 100
    assert len(task.train) >= (180 if task.name == "city" else 1000)


def test_every_label_is_in_every_split(task):
    for part in ("train", "tune", "gate"):
        assert {row.label for row in getattr(task, part)} == set(range(len(task.labels)))


def test_no_label_dominates_the_gate(task):
    counts = Counter(row.label for row in task.gate)
    assert max(counts.values()) / len(task.gate) < (0.3 if task.name == "city" else 0.15)


def test_labels_are_mixed_in_training_order(task):
    labels = [row.label for row in task.train]
    changes = sum(one != other for one, other in pairwise(labels))
    assert changes > len(labels) / 2  # sorted by label it would be len(task.labels) - 1


def test_there_is_one_prompt_per_label_and_all_differ(task):
    assert len(set(task.prompts)) == len(task.labels) == len(set(task.labels)) > 1


@pytest.mark.parametrize("name", ["script", "docstring", "city"])
def test_the_text_does_not_say_the_label(name):
    task = made(name)
    rows = (*task.train, *task.tune, *task.gate)
    said = [row for row in rows if task.labels[row.label].casefold() in row.text.casefold().split()]
    assert said == []


def test_docstrings_name_no_package_at_all():
    rows = made("docstring").gate
    assert [row.text for row in rows if any(name in row.text.lower() for name in DOCSTRING)] == []


def test_line_kinds_are_right_on_lines_that_anyone_can_tell():
    task = made("line")
    starts = {"import ": "import", "from ": "import", "return ": "return", "class ": "class", "# ": "comment"}
    for row in task.gate:
        for start, kind in starts.items():
            if row.text.startswith(start):
                assert task.labels[row.label] == kind, row.text


def test_another_seed_gives_other_splits_of_the_same_task():
    one, other = made("city"), text_task("city", seed=1)
    assert set(texts(one, "gate")) != set(texts(other, "gate"))
    assert one.labels == other.labels


def source(*examples: tuple[str, str]) -> Source:
    return Source({"a": "first", "b": "second"}, lambda: iter(examples), gate=2, tune=1, train=1)


def test_a_text_under_two_labels_is_left_out_whatever_its_spelling():
    found = split("t", source(("Été", "a"), ("ete", "b"), *((f"x{i}", "a") for i in range(5)), ("y", "b")))
    assert not {"Été", "ete"} & {text for part in ("train", "tune", "gate") for text in texts(found, part)}


def test_the_order_of_the_source_does_not_matter():
    examples = [*((f"x{i}", "a") for i in range(9)), *((f"y{i}", "b") for i in range(9)), ("X1", "a")]
    assert split("t", source(*examples)) == split("t", source(*reversed(examples)))


def test_sizes_are_kept_and_small_labels_shared_out():
    found = split("t", source(*((f"x{i}", "a") for i in range(9)), *((f"y{i}", "b") for i in range(4))))
    # a: 9 texts -> gate 2, tune 1, train 1 (the caps); b: 4 texts -> gate 4*2//5 = 1, tune 4//4 = 1, train 1 (cap)
    counts = [Counter(row.label for row in part) for part in (found.gate, found.tune, found.train)]
    assert counts == [{0: 2, 1: 1}, {0: 1, 1: 1}, {0: 1, 1: 1}]


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(FoldinError, match=r"E_CONFIG .*one of city, script, docstring, line, language.*'cities'"):
        text_task("cities")
