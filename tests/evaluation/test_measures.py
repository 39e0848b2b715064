"""What answers add up to, how rows are dealt to batches, and what a budget does."""

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.batches import batches
from evaluation.clock import started, within
from evaluation.measures import NOT_FINITE, accuracy, mean_score, perplexity


@given(
    sizes=st.lists(st.integers(0, 50), max_size=60),
    most=st.integers(1, 9),
    cells=st.one_of(st.just(math.inf), st.integers(1, 200)),
)
def test_every_row_is_in_one_batch_and_none_is_too_large(sizes, most, cells):
    found = list(batches(sizes, most, cells))
    assert sorted(row for batch in found for row in batch) == list(range(len(sizes)))
    for batch in found:
        assert 1 <= len(batch) <= most
        assert len(batch) == 1 or len(batch) * max(sizes[row] for row in batch) <= cells
    lengths = [sizes[row] for batch in found for row in batch]
    assert lengths == sorted(sizes)


@given(st.lists(st.tuples(st.floats(-50, 0), st.integers(1, 100)), min_size=1, max_size=30))
def test_perplexity_is_of_all_tokens_and_points_of_one_example(rows):
    totals = [point * count for point, count in rows]
    found = perplexity(totals, [count for _, count in rows])
    assert found.points == pytest.approx([point for point, _ in rows])
    assert found.value == pytest.approx(math.exp(-math.fsum(totals) / sum(count for _, count in rows)))
    assert found.value >= 1
    assert found.weights == tuple(count for _, count in rows)


@pytest.mark.parametrize("total", [math.nan, -math.inf, -1e6])
def test_no_perplexity_without_finite_likelihoods(total):
    assert perplexity([-1.0, total], [1, 1]) == NOT_FINITE


def test_a_probability_that_rounds_above_one_is_one():
    assert perplexity([1e-9], [2]) == perplexity([0.0], [2])


def test_accuracy_counts_what_is_right():
    assert accuracy([1, 0, 2], [1, 1, 2])[:3] == (2 / 3, (1, 0, 2), (True, False, True))


@given(st.lists(st.floats(0, 1), min_size=1))
def test_scores_from_0_to_1_have_their_mean(points):
    found = mean_score(points, "who")
    assert found.value == pytest.approx(math.fsum(points) / len(points))
    assert found.points == tuple(points)


@given(st.lists(st.floats(), max_size=5), st.floats(-math.inf, -1e-9) | st.floats(1.001) | st.just(math.nan))
def test_one_number_that_is_no_score_spoils_all(points, wrong):
    assert isinstance(mean_score([*points, wrong], "who"), str)


def test_a_budget_ends():
    started(math.inf).check()
    with pytest.raises(TimeoutError, match=r"timed out after 0 s \(evaluation_seconds\)"):
        started(0.0).check()


def test_what_is_done_in_time_comes_back_from_its_own_thread():
    assert within(started(60.0), threading.current_thread) is not threading.current_thread()
    with pytest.raises(KeyError, match="lost"):
        within(started(math.inf), lambda: {}["lost"])


def test_what_is_too_late_does_not_hold_the_process_up():
    stop, threads = threading.Event(), []

    def wait():
        threads.append(threading.current_thread())
        stop.wait(60)

    with pytest.raises(TimeoutError, match=r"timed out after 0.1 s \(evaluation_seconds\)"):
        within(started(0.1), wait)
    assert threads[0].daemon
    stop.set()
    threads[0].join(60)
