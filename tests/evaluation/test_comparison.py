"""Changes against the champion: the gate's intervals where it has some, exact flips, nothing where nothing is known."""

import math
import random
from dataclasses import replace

import pytest

from evaluation.comparison import changes, paired_interval
from registry.records import Check, Outcome, Report, Verdict
from tests.evaluation.sample_reports import answered, read, sample


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


def test_a_perplexity_changes_by_its_ratio_and_less_is_better():
    change = one(sample(), "news-text")
    ratio = change.after.value / change.before.value
    assert (change.is_perplexity, change.wrong, round(change.value, 9)) == (True, None, round(ratio - 1, 9))
    assert 0 < change.interval[0] < change.value < change.interval[1] < 0.04


@pytest.mark.parametrize(
    ("candidate", "problem"),
    [
        (None, "the candidate was not measured"),
        (answered("city", [1], error="timed out"), "the candidate could not be measured: timed out"),
        (replace(answered("city", [1]), value=math.inf), "its value is no number"),
        (replace(answered("city", [1] * 100), suite_sha256="other"), "different suites"),
        (replace(answered("city", [1] * 100), split="canary"), "different suites"),
        (replace(answered("city", [1] * 100), metric="score"), "different suites"),
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


def test_no_interval_without_answers():
    empty = replace(answered("a", [1]), correct=(), predictions=())
    assert paired_interval(empty, empty) is None
    assert paired_interval(read("a", [-1.0]), read("a", [-1.0])) is None
    odd = replace(read("a", [-1.0, -1.0]), points=(math.nan, -1.0))
    assert paired_interval(odd, odd) is None


@pytest.mark.parametrize("lose", [0.02, 0.1, 0.3])
def test_the_interval_holds_the_true_change_in_95_of_100_trials(lose):
    """Flips of known rates; 0.93 leaves room for the error of 1000 trials (0.7 points) and of the formula."""
    chance, held, gain = random.Random(3), 0, 0.05
    for _ in range(1000):
        before = [chance.random() < 0.7 for _ in range(120)]
        after = [chance.random() >= lose if right else chance.random() < gain for right in before]
        low, high = paired_interval(answered("a", before), answered("a", after))
        held += low <= 0.3 * gain - 0.7 * lose <= high
    assert held >= 930
