"""Metrics against examples worked by hand."""

import math
from fractions import Fraction

import pytest

from evaluation.metrics import (
    average_accuracy,
    backward_transfer,
    backward_transfer_all,
    forgetting,
    negative_flip_rate,
    sign_test,
    summary,
)
from registry.records import FoldinError
from registry.verdicts import TaskScore

# Three tasks in three folds. By hand: ACC = (.7 + .6 + .9) / 3; BWT = ((.7 - .9) + (.6 - .8)) / 2;
# BWT' = the same sum / 3; forgetting = ((max(.9, .95) - .7) + (.8 - .6)) / 2.
MATRIX = [{"a": 0.9}, {"a": 0.95, "b": 0.8}, {"a": 0.7, "b": 0.6, "c": 0.9}]
ARRIVALS = {"a": 0, "b": 1, "c": 2}


def answers(marks, suite="s"):
    correct = tuple(mark == "1" for mark in marks)
    value = sum(correct) / len(correct) if correct else math.nan
    return TaskScore("t", suite, "accuracy", value, tuple(map(int, correct)), correct)


def test_the_worked_example():
    assert average_accuracy(MATRIX, ARRIVALS) == pytest.approx(2.2 / 3)
    assert backward_transfer(MATRIX, ARRIVALS) == pytest.approx(-0.2)
    assert backward_transfer_all(MATRIX, ARRIVALS) == pytest.approx(-0.4 / 3)
    assert forgetting(MATRIX, ARRIVALS) == pytest.approx(0.225)


def test_the_two_denominators_differ_by_the_factor_of_the_papers():
    tasks = len(ARRIVALS)
    expected = backward_transfer_all(MATRIX, ARRIVALS) * tasks / (tasks - 1)
    assert backward_transfer(MATRIX, ARRIVALS) == pytest.approx(expected)


def test_one_task_has_nothing_to_forget():
    assert summary([{"a": 0.9}], {"a": 0}) == {
        "average_accuracy": 0.9,
        "backward_transfer": 0.0,
        "backward_transfer_all": 0.0,
        "forgetting": 0.0,
    }


def test_rows_before_the_arrival_do_not_count_as_forgotten():
    matrix = [{"a": 0.9, "b": 0.99}, {"a": 0.9, "b": 0.5}, {"a": 0.9, "b": 0.4, "c": 1.0}]
    assert forgetting(matrix, ARRIVALS) == pytest.approx((0.0 + 0.1) / 2)


def test_a_hole_in_the_matrix_is_named():
    with pytest.raises(FoldinError, match=r"task b: the accuracy matrix has no value .* Expected row 2 of 3"):
        average_accuracy([*MATRIX[:2], {"a": 0.7, "c": 0.9}], ARRIVALS)
    with pytest.raises(FoldinError, match="task a: the accuracy matrix has no value"):
        average_accuracy([], {"a": 0})


def test_the_rate_of_negative_flips():
    before, after = answers("1111100000"), answers("1110011000")
    assert negative_flip_rate(before, after) == 0.2


def test_an_unchanged_mean_hides_flips():
    assert negative_flip_rate(answers("10"), answers("01")) == 0.5


@pytest.mark.parametrize(
    ("losses", "wins", "p"),
    [
        (0, 0, 1.0),
        (5, 0, 1 / 32),
        (0, 5, 1.0),
        (3, 1, 5 / 16),  # (4 + 1) / 2**4
        (10, 4, 1471 / 16384),  # (1001 + 364 + 91 + 14 + 1) / 2**14
    ],
)
def test_the_sign_test_is_exact_and_one_sided(losses, wins, p):
    assert sign_test(losses, wins) == pytest.approx(p, rel=1e-14)


def test_the_sign_test_stays_finite_for_large_suites():
    # The median of a symmetric binomial of odd count: exactly one half.
    assert sign_test(200_001, 200_000) == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize(("losses", "wins"), [(3, 40), (40, 3), (60, 61), (500, 520)])
def test_the_sign_test_against_whole_numbers(losses, wins):
    count = losses + wins
    tail = Fraction(sum(math.comb(count, kept) for kept in range(losses, count + 1)), 2**count)
    assert sign_test(losses, wins) == pytest.approx(float(tail), rel=1e-12)


def test_scores_of_different_suites_cannot_be_compared():
    with pytest.raises(
        FoldinError, match=r"task t: the two scores come from different suites. Expected suite s. Found z"
    ):
        negative_flip_rate(answers("10"), answers("10", suite="z"))


@pytest.mark.parametrize(("before", "after"), [("10", "1"), ("", "")])
def test_scores_without_the_same_examples_cannot_be_compared(before, after):
    with pytest.raises(FoldinError, match="do not hold the same examples"):
        negative_flip_rate(answers(before), answers(after))
