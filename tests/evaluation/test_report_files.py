"""Reports survive the way to JSON, answers the way to Parquet; what is malformed is refused by name."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.answers import answers_bytes, read_answers
from evaluation.report import FORMAT, Record, as_json, rows_in
from registry.records import FoldinError
from registry.verdicts import Check, Outcome, Report, TaskScore, Verdict

text = st.text(st.characters(codec="utf-8"), max_size=12)
number = st.one_of(st.floats(allow_nan=False), st.just(math.nan))
answers = st.lists(st.tuples(st.integers(0, 40_000), st.booleans()), max_size=9)
score = st.builds(
    lambda task, suite, value, rows, error, safety: TaskScore(
        task,
        suite,
        "accuracy",
        value,
        tuple(guess for guess, _ in rows),
        tuple(right for _, right in rows),
        error,
        safety=safety,
    ),
    text,
    text,
    number,
    answers,
    text,
    st.booleans(),
)
optional = st.one_of(st.none(), score)
report = st.builds(Report, text, st.dictionaries(text, score, max_size=3), text, optional, optional)
interval = st.one_of(st.none(), st.tuples(number, number))
check = st.builds(Check, text, text, number, number, st.booleans(), text, text, interval, st.booleans())
verdict = st.builds(Verdict, st.sampled_from(Outcome), st.lists(check, max_size=3).map(tuple))
row = st.dictionaries(text, number, max_size=3)
rows = st.lists(row, max_size=3).map(tuple)
record = st.builds(
    lambda *parts: Record(*parts), report, st.one_of(st.none(), verdict), rows, row, st.one_of(st.none(), report), rows
)


@given(record)
def test_the_rows_of_a_record_survive_json(record):
    document = json.loads(json.dumps(as_json(record), allow_nan=False))
    for name in ("matrix", "perplexities"):
        # repr, since NaN is not equal to itself
        assert repr(rows_in(document, name, "version 7")) == repr([dict(row) for row in getattr(record, name)])
    assert list(document["report"]["scores"]) == list(record.report.scores)


def test_the_document_says_what_was_decided_and_holds_no_single_answers():
    measured = TaskScore("city", "s", "accuracy", 0.5, (1, 0), (True, False))
    why = Check("min_gain", "city", math.nan, 0.0, False, "city: down", "canary", (-0.1, 0.1), hard=True)
    document = as_json(Record(Report("w", {"city": measured}), Verdict(Outcome.REJECTED, (why,))))
    assert document["verdict"]["outcome"] == "rejected"
    assert document["verdict"]["checks"][0] | {"text": ""} == {
        "rule": "min_gain",
        "task": "city",
        "value": "nan",
        "threshold": 0.0,
        "passed": False,
        "text": "",
        "rung": "canary",
        "interval": [-0.1, 0.1],
        "hard": True,
    }
    assert document["report"]["scores"]["city"]["examples"] == 2
    assert "correct" not in document["report"]["scores"]["city"]


@pytest.mark.parametrize("value", [None, 3, [3], [None], [{"city": None}], [{"city": "x"}], [{"city": []}]])
def test_a_malformed_report_is_refused(value):
    with pytest.raises(FoldinError, match="E_FORMAT version 7: the report is malformed"):
        rows_in({"format": FORMAT, "matrix": value}, "matrix", "version 7")


@pytest.mark.parametrize("found", [{}, {"format": "foldin-report/1", "matrix": []}, {"format": 2}])
def test_another_format_is_refused(found):
    with pytest.raises(FoldinError, match=r"the report has another format. Expected foldin-report/2. Found"):
        rows_in(found, "matrix", "version 7")


@settings(deadline=None)  # the first file takes longer than the others
@given(score)
def test_answers_survive_parquet(tmp_path_factory, score):
    path = tmp_path_factory.mktemp("answers") / "city.parquet"
    path.write_bytes(answers_bytes(score))
    found = read_answers(path)
    assert repr(found) == repr(dataclasses.replace(score, seconds=0.0))


def test_points_and_weights_survive_parquet_and_seconds_do_not(tmp_path):
    measured = TaskScore("text", "s", "perplexity", 3.5, points=(-1.0, -1.5), weights=(20.0, 7.0), seconds=3.0)
    (tmp_path / "text.parquet").write_bytes(answers_bytes(measured))
    found = read_answers(tmp_path / "text.parquet")
    assert (found, found.seconds) == (measured, 0.0)
    assert answers_bytes(measured) == answers_bytes(dataclasses.replace(measured, seconds=9.0))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"{}" * 100])
def test_what_holds_no_answers_is_refused(tmp_path, content):
    (tmp_path / "city.parquet").write_bytes(content)
    with pytest.raises(FoldinError, match=r"E_FORMAT .*these are no answers of a model"):
        read_answers(tmp_path / "city.parquet")
