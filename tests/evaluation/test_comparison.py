"""Changes against the champion: the gate's intervals where it has some, exact flips, nothing where nothing is known."""

import math
from dataclasses import replace

import pytest

from evaluation import paired
from evaluation.comparison import changes
from registry.verdicts import Check, Outcome, Report, Verdict
from tests.evaluation.sample_reports import answered, sample


def one(record, task):
    return next(change for change in changes(record) if change.task == task)


def test_a_change_is_candidate_minus_champion_with_its_flips():
    lost, won = one(sample(), "city"), one(sample(), "fr-legal")
    assert (round(lost.value, 9), lost.wrong, lost.right, lost.failed, lost.safety) == (-0.12, 12, 0, True, True)
    assert (round(won.value, 9), won.wrong, won.right, won.failed, won.new) == (0.4, 0, 40, False, True)


def test_the_interval_is_the_one_that_the_gate_decided_by():
    assert one(sample(), "city").interval == (-0.185, -0.055)  # of a drop of 0.12 it said 0.055 to 0.185


def test_an_interval_that_speaks_of_another_number_is_not_taken():
    other = Check("max_task_drop", "city", 0.03, 0.05, True, "on the canary", "canary", (0.0, 0.9))
    record = sample()._replace(verdict=Verdict(Outcome.PASSED, (other,)))
    low, high = one(record, "city").interval
    assert -0.25 < low < -0.12 < high < 0.0


def test_the_canarys_interval_is_not_taken_for_the_full_rungs_when_both_changes_are_the_same():
    canary = Check("max_canary_drop", "city", 0.12, 0.15, True, "on the canary", "canary", (0.0, 0.9))
    full = Check("max_task_drop", "city", 0.12, 0.15, True, "on every row", "full", (0.055, 0.185))
    record = sample()._replace(verdict=Verdict(Outcome.PASSED, (canary, full)))
    assert one(record, "city").interval == (-0.185, -0.055)


def test_a_perplexity_changes_by_its_ratio_and_less_is_better():
    change = one(sample(), "news-text")
    ratio = change.after.value / change.before.value
    assert (change.is_perplexity, change.wrong, round(change.value, 9)) == (True, None, round(ratio - 1, 9))
    assert 0 < change.interval[0] < change.value < change.interval[1] < 0.04


@pytest.mark.parametrize(
    ("candidate", "problem"),
    [
        (None, "the candidate was not scored"),
        (answered("city", [1], error="timed out"), "the candidate could not be measured: timed out"),
        (replace(answered("city", [1]), value=math.inf), "the candidate's accuracy is inf"),
        (replace(answered("city", [1] * 100), suite_sha256="other"), "different suites"),
        (replace(answered("city", [1] * 100), split="canary"), "measured on the rows 'canary', not on 'gate'"),
        (replace(answered("city", [1] * 100), metric="score"), "the candidate's answers are missing"),
    ],
)
def test_what_cannot_be_compared_has_no_value_but_a_reason(candidate, problem):
    scores = {**sample().report.scores, "city": candidate}
    if candidate is None:
        del scores["city"]
    change = one(sample()._replace(report=Report("w", scores)), "city")
    assert math.isnan(change.value)
    assert (change.interval, change.wrong) == (None, None)
    assert problem in change.problem


def test_there_is_nothing_to_compare_without_a_champion_or_without_scores():
    assert changes(sample()._replace(champion=None)) == []
    assert changes(sample()._replace(report=Report("w", {}))) == []


def test_a_canary_is_compared_on_its_own_rows():
    before, after = (replace(answered("city", right), split="canary") for right in ([1, 1, 1], [1, 1, 0]))
    record = sample()._replace(champion=Report("c", {"city": before}), report=Report("w", {"city": after}))
    change = one(record, "city")
    assert (round(change.value, 9), change.wrong, change.problem) == (-0.333333333, 1, "")


@pytest.mark.parametrize("task", ["city", "news-text", "fr-legal"])
def test_without_the_gate_the_interval_is_the_one_that_it_would_find(task):
    change = one(sample()._replace(verdict=None), task)
    found = paired.change((change.before, change.after))
    told = paired.rise if change.is_perplexity else (lambda loss: -loss)
    assert math.isclose(told(found.loss), change.value, abs_tol=1e-9)
    assert sorted(map(told, found.interval)) == list(change.interval)
    assert change.interval[0] < change.value < change.interval[1]
