"""The best that a line ever had on each task: by the suite that measures it, carried from version to version."""

import json
from types import SimpleNamespace

import pytest

from evaluation.report import Record, as_json
from flows.judging import best_before
from flows.reporting import best_of
from flows.versions import REPORT_FILE, Version, bests
from registry.verdicts import Report, TaskScore


def score(task, value, suite="s", metric="accuracy"):
    return TaskScore(task, suite, metric, value, (), ())


@pytest.fixture
def version(tmp_path):
    def make(best):
        path = tmp_path / REPORT_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(as_json(Record(Report("w", {}), best=best))))
        return Version(1, tmp_path, "m", None)

    return make


def judged(*scores):
    return SimpleNamespace(report=Report("w", {each.task: each for each in scores}))


def test_the_best_is_kept_and_raised(version):
    found = best_of(
        version({"a": (0.9, "s"), "b": (0.5, "s")}), judged(score("a", 0.8), score("b", 0.6), score("c", 0.7))
    )
    assert found == {"a": (0.9, "s"), "b": (0.6, "s"), "c": (0.7, "s")}


def test_with_another_suite_a_tasks_history_begins_anew(version):
    assert best_of(version({"a": (0.9, "old")}), judged(score("a", 0.6, "new"))) == {"a": (0.6, "new")}
    assert best_before(version({"a": (0.9, "old")}), {"a": score("a", 0.6, "new")}) == {}
    assert best_before(version({"a": (0.9, "s")}), {"a": score("a", 0.6), "b": score("b", 0.1)}) == {"a": 0.9}


def test_perplexities_and_what_was_not_measured_have_no_best(version):
    unknown = TaskScore("b", "s", "accuracy", float("nan"), (), (), "timed out")
    assert best_of(version({}), judged(score("a", 12.0, metric="perplexity"), unknown)) == {}


def test_a_report_from_before_has_none(tmp_path, version):
    found = version({})
    document = json.loads((tmp_path / REPORT_FILE).read_text())
    del document["best"]
    (tmp_path / REPORT_FILE).write_text(json.dumps(document))
    assert bests(found) == {}
