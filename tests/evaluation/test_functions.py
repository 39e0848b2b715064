"""Functions that a line names: called with the model, held to one number in [0, 1] an example, and to their time."""

import math
import sys
import textwrap
import time

import pytest
import torch

from evaluation.score import score, score_all
from evaluation.suites import load_suite, write_suite

WEIGHTS = {"a": torch.tensor([0.25, 0.5])}
ROWS = [{"text": "one", "wanted": 0.2, "split": "gate"}, {"text": "two", "wanted": 1.0, "split": "gate"}]
ROWS += [{"text": "three", "wanted": 0.0, "split": "tune"}]


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """A function that writes a module `judge_N` with a function `judge`, and the suite that names it."""
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(body, rows=ROWS, **more):
        name = f"judge_{len(written)}_{tmp_path.name.replace('-', '_')}"
        written.append(name)
        text = f"import math, time\ndef judge(model, examples):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        (tmp_path / f"{name}.py").write_text(text)
        write_suite(tmp_path / name, kind="python", function=f"{name}:judge", rows=rows, **more)
        return load_suite(tmp_path / name, task="judged", where="test", trusted=True)

    yield write
    for name in written:
        sys.modules.pop(name, None)


def measured(suite, tmp_path, weights=WEIGHTS, **more):
    return score(tmp_path, weights, suite, **more)


def test_a_function_scores_the_rows_of_a_split(judge, tmp_path):
    suite = judge("return [row['wanted'] for row in examples]")
    result = measured(suite, tmp_path)
    assert (result.metric, result.value, result.points, result.error) == ("score", 0.6, (0.2, 1.0), "")
    assert measured(suite, tmp_path, split="tune").points == (0.0,)


def test_a_function_is_given_the_model(judge, tmp_path):
    suite = judge("assert (model.device, str(model.folder)) != ('', '')\nreturn model.weights['a']", rows=())
    assert measured(suite, tmp_path).points == (0.25, 0.5)


def test_nothing_is_imported_before_scoring(judge, tmp_path):
    suite = judge("return [1.0]", rows=())
    module = suite.function.partition(":")[0]
    assert module not in sys.modules
    assert measured(suite, tmp_path).value == 1.0
    assert module in sys.modules


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return [0.5]", "gave 1 numbers for 2 examples"),
        ("return [0.5, math.nan]", "gave nan for example 1, not a number from 0 to 1"),
        ("return [-0.1, 0.5]", "gave -0.1 for example 0"),
        ("return [0.5, 1.01]", "gave 1.01 for example 1"),
        ("raise KeyError('lost')", "failed with KeyError: 'lost'"),
        ("raise SystemExit(3)", "failed with SystemExit: 3"),
        ("raise TimeoutError", "failed with TimeoutError"),
        ("return None", "failed with TypeError"),
        ("return ['much', 'more']", "failed with ValueError"),
    ],
)
def test_what_is_no_score_is_not_measured(judge, tmp_path, body, reason):
    result = measured(judge(body), tmp_path)
    assert math.isnan(result.value)
    assert reason in result.error
    assert result.points == ()


def test_a_function_that_is_not_there_is_not_measured(tmp_path):
    write_suite(tmp_path / "gone", kind="python", function="no_such_module_anywhere:judge")
    suite = load_suite(tmp_path / "gone", task="gone", where="test", trusted=True)
    assert "failed with ModuleNotFoundError" in measured(suite, tmp_path).error


def test_no_number_is_no_score(judge, tmp_path):
    assert "gave no number" in measured(judge("return []", rows=()), tmp_path).error


def test_weights_that_are_not_finite_are_not_shown_to_a_function(judge, tmp_path):
    result = measured(judge("return [1.0, 1.0]"), tmp_path, {"a": torch.tensor([0.0, math.nan])})
    assert result.error == "the model's weights are not finite"


def test_without_rows_there_is_nothing_to_tune_on(judge, tmp_path):
    suite = judge("return [1.0]", rows=())
    result = score_all(tmp_path, WEIGHTS, {"judged": suite}, split="tune")["judged"]
    assert "the suite has no rows kept for tuning" in result.error
    assert result.split == "tune"
    assert measured(suite, tmp_path, split="canary").value == 1.0


def test_a_function_that_takes_too_long_is_abandoned(judge, tmp_path):
    suite = judge("time.sleep(20)\nreturn [1.0, 1.0]")
    start = time.monotonic()
    result = measured(suite, tmp_path, seconds=0.2)
    assert time.monotonic() - start < 10
    assert math.isnan(result.value)
    assert result.error == "timed out after 0.2 s (evaluation_seconds)"
    assert 0.2 <= result.seconds < 10
