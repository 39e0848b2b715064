"""The gate: what passes, what does not, and that nothing uncertain ever does."""

import math
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.gate import Rules, gate, rules_from
from registry.records import FoldinError, Outcome, Report, TaskScore

COUNT = 300


def score(task, correct, suite=None):
    correct = tuple(map(bool, correct))
    value = sum(correct) / len(correct)
    return TaskScore(task, suite or f"suite-{task}", "accuracy", value, tuple(map(int, correct)), correct)


def share(task, right, count=COUNT):
    return score(task, [True] * right + [False] * (count - right))


def flipped(before, losses, wins):
    """`before` with its first `losses` right answers turned wrong and its last `wins` wrong ones turned right."""
    correct = list(before.correct)
    right = [row for row, mark in enumerate(correct) if mark][:losses]
    wrong = [row for row, mark in enumerate(correct) if not mark][-wins or len(correct) :]
    for row in right:
        correct[row] = False
    for row in wrong:
        correct[row] = True
    return score(before.task, correct, before.suite_sha256)


BASE = share("new", 90)
CHAMPION = Report("c" * 64, {"old": share("old", 210), "new": BASE})
EXPERT = share("new", 240)


def candidate(old=None, new=None, expert=EXPERT, base=BASE):
    scores = {"old": old or flipped(CHAMPION.scores["old"], 6, 3), "new": new or share("new", 200)}
    return Report("d" * 64, scores, "new", expert, base)


def failed(verdict):
    return {check.rule for check in verdict.checks if not check.passed}


def test_a_good_candidate_passes_every_rule():
    verdict = gate(candidate(), CHAMPION, Rules())
    assert verdict.outcome is Outcome.PASSED
    assert verdict.reason == ""
    asked = {check.rule for check in verdict.checks}
    assert asked == {field.name for field in fields(Rules)} - {"significance", "expert_significance"}


def test_a_drop_is_refused_with_its_numbers():
    before = score("city", [True] * 356 + [False] * 144)
    after = flipped(before, 40, 9)
    verdict = gate(
        replace(candidate(), scores={"city": after, "new": share("new", 200)}),
        replace(CHAMPION, scores={"city": before, "new": BASE}),
        Rules(),
    )
    assert failed(verdict) == {"max_task_drop", "max_mean_drop"}
    # 356/500 and 325/500; P(Binomial(49, 1/2) >= 40) is about 5e-6.
    assert "city: 0.712 -> 0.650, down 6.2 points; at most 5.0 allowed (p < 0.001)" in verdict.reason


def test_a_large_drop_that_chance_explains_passes():
    old = CHAMPION.scores["old"]
    # 20 points on 30 examples: 10 against 4 flips, p = 1471/16384 = 0.090.
    small = score("old", old.correct[195:225])
    verdict = gate(candidate(old=flipped(small, 10, 4)), replace(CHAMPION, scores={"old": small, "new": BASE}), Rules())
    assert verdict.passed


def test_flips_are_refused_even_when_the_mean_hardly_moves():
    old = CHAMPION.scores["old"]
    verdict = gate(candidate(old=flipped(old, 50, 36)), CHAMPION, Rules(significance=0.1))
    assert failed(verdict) == {"max_negative_flips", "max_mean_drop"}
    assert "old: 50 of 300 answers turned wrong (16.7%) and 36 right; at most 10.0% wrong allowed" in verdict.reason


def test_many_small_losses_fail_together():
    names = [f"task{number}" for number in range(4)]
    before = {name: share(name, 210) for name in names}
    after = {name: flipped(score, 14, 2) for name, score in before.items()}
    verdict = gate(Report("d", after), Report("c", before), Rules())
    assert failed(verdict) == {"max_mean_drop"}
    assert "mean of 4 known tasks: down 4.0 points; at most 3.0 allowed (p < 0.001)" in verdict.reason


def test_a_drop_of_exactly_the_limit_is_allowed():
    before = share("old", 75, 100)
    verdict = gate(
        candidate(old=flipped(before, 5, 0)),
        replace(CHAMPION, scores={"old": before, "new": BASE}),
        Rules(max_mean_drop=0.05),  # 0.75 - 0.70 > 0.05 in binary
    )
    assert verdict.passed


def test_a_candidate_that_lost_the_new_task_is_refused():
    verdict = gate(candidate(new=share("new", 89)), CHAMPION, Rules())
    assert failed(verdict) == {"min_gain", "min_retention"}
    assert "new: 0.300 -> 0.297, down 0.3 points against the champion; at least 0.0 up wanted" in verdict.reason


def test_an_expert_trained_on_shuffled_labels_is_refused():
    # It answers anew by chance: 42 of the base's 90 right answers lost, 44 of its wrong ones hit.
    expert = flipped(BASE, 42, 44)
    verdict = gate(candidate(new=flipped(BASE, 20, 22), expert=expert), CHAMPION, Rules())
    assert failed(verdict) == {"min_expert_gain"}
    assert "new: the expert alone 0.300 -> 0.307, up 0.7 points against the base" in verdict.reason
    lucky = flipped(BASE, 42, 50)  # +2.7 points, and still p = 0.23
    assert failed(gate(candidate(expert=lucky), CHAMPION, Rules())) == {"min_expert_gain"}


def test_an_honest_weak_expert_passes():
    # +2 points of 300 examples: six more right than wrong, p = 1471/16384 = 0.090.
    weak = flipped(BASE, 4, 10)
    assert gate(candidate(new=flipped(BASE, 3, 9), expert=weak), CHAMPION, Rules()).passed


def test_a_fold_that_keeps_nothing_of_its_expert_is_refused():
    verdict = gate(candidate(new=flipped(BASE, 0, 3)), CHAMPION, Rules())
    assert failed(verdict) == {"min_retention"}
    assert "keeps 1.0 of the expert's 50.0 points over the base (2%); at least 10% wanted" in verdict.reason


def test_the_base_itself_can_be_champion():
    champion = Report("b" * 64, {"new": BASE})
    assert gate(Report("d", {"new": share("new", 200)}, "new", EXPERT, BASE), champion, Rules()).passed


def test_without_a_new_task_only_the_known_ones_count():
    assert gate(Report("d", {"old": share("old", 210)}), Report("c", {"old": share("old", 210)}), Rules()).passed
    stray = Report("d", {"old": share("old", 210)}, "", EXPERT)
    assert "names no new task" in gate(stray, Report("c", {"old": share("old", 210)}), Rules()).reason


def test_nothing_measured_is_not_passed():
    verdict = gate(Report("d", {}), Report("c", {}), Rules())
    assert verdict.outcome is Outcome.REJECTED
    assert verdict.reason == "neither report holds a score"


SPOILT = {
    "not a number": lambda score: replace(score, value=math.nan),
    "above one": lambda score: replace(score, value=1.5),
    "below zero": lambda score: replace(score, value=-0.1),
    "infinite": lambda score: replace(score, value=math.inf),
    "failed": lambda score: replace(score, error="timeout after 60 s"),
    "another suite": lambda score: replace(score, suite_sha256="other"),
    "no suite": lambda score: replace(score, suite_sha256=""),
    "another task": lambda score: replace(score, task="other"),
    "another metric": lambda score: replace(score, metric="f1"),
    "no answers": lambda score: replace(score, predictions=(), correct=()),
    "fewer answers": lambda score: replace(score, predictions=score.predictions[:-30], correct=score.correct[:-30]),
    "contradiction": lambda score: replace(score, value=min(1.0, score.value + 0.1)),
    "missing": lambda score: None,
}
PLACES = ("candidate old", "candidate new", "champion old", "champion new", "expert", "base")


def spoil(place, damage):
    """(candidate, champion) with one of the six scores damaged."""
    who, _, task = place.partition(" ")
    good, champion = candidate(), CHAMPION
    if not task:
        return replace(good, **{who: damage(getattr(good, who))}), champion
    report = good if who == "candidate" else champion
    scores = {**report.scores, task: damage(report.scores[task])}
    spoilt = replace(report, scores={name: score for name, score in scores.items() if score})
    return (spoilt, champion) if who == "candidate" else (good, spoilt)


LOOSEST = Rules(1.0, 1.0, 1.0, -1.0, -1.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("damage", SPOILT.values(), ids=SPOILT)
def test_nothing_uncertain_passes_even_the_loosest_rules(place, damage):
    assert gate(*spoil(place, lambda score: score), LOOSEST).passed
    verdict = gate(*spoil(place, damage), LOOSEST)
    assert verdict.outcome is Outcome.REJECTED
    assert any(math.isnan(check.value) and not check.passed for check in verdict.checks)


@given(
    place=st.sampled_from(PLACES),
    damage=st.sampled_from(list(SPOILT.values())),
    rules=st.builds(Rules, *[st.floats(0, 1)] * 3, *[st.floats(-1, 1)] * 2, *[st.floats(0, 1)] * 3),
)
def test_nothing_uncertain_passes_whatever_the_rules(place, damage, rules):
    assert gate(*spoil(place, damage), rules).outcome is Outcome.REJECTED


marks = st.lists(st.booleans(), min_size=12, max_size=12)


@given(
    old=st.tuples(marks, marks),
    new=st.tuples(marks, marks, marks),
    better=st.tuples(marks, marks),
    level=st.floats(0, 1),
)
def test_more_right_answers_never_turn_a_pass_into_a_rejection(old, new, better, level):
    rules = Rules(significance=level, expert_significance=1.0, min_expert_gain=-1.0)
    base = score("new", new[0])
    champion = Report("c", {"old": score("old", old[0]), "new": score("new", new[0])})

    def judged(old_answers, new_answers):
        scores = {"old": score("old", old_answers), "new": score("new", new_answers)}
        return gate(Report("d", scores, "new", score("new", new[2]), base), champion, rules)

    improved = [
        [a or b for a, b in zip(before, extra, strict=True)]
        for before, extra in ((old[1], better[0]), (new[1], better[1]))
    ]
    if judged(old[1], new[1]).passed:
        assert judged(*improved).passed


def test_the_texts_hold_no_control_characters():
    task = "a\x1b[31m\u202e\n<script>"
    verdict = gate(Report("d", {task: share(task, 10)}), Report("c", {}), Rules())
    assert verdict.reason.startswith("a[31m <script>: the champion was not scored")
    assert verdict.reason.isprintable()


def test_rules_come_from_a_table():
    assert rules_from({}) == Rules()
    rules = rules_from({"max_task_drop": 0.1, "min_gain": -1})
    assert rules == Rules(max_task_drop=0.1, min_gain=-1.0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"max_taks_drop": 0.1}, "the key 'max_taks_drop' is unknown. Did you mean 'max_task_drop'."),
        ({"zzz": 1}, "Use one of: expert_significance"),
        (
            {"max_task_drop": 5.0},
            r"max_task_drop is not a number in range. Expected a number from 0 to 1 (0.05 is five",
        ),
        ({"max_task_drop": "0.1"}, "Found '0.1'"),
        ({"min_gain": -1.5}, "Expected a number from -1 to 1"),
        ({"significance": math.nan}, "Found nan"),
        ({"significance": True}, "Found True"),
    ],
)
def test_wrong_rules_are_refused(table, message):
    with pytest.raises(FoldinError) as caught:
        rules_from(table, "line demo")
    assert caught.value.refusal.code == "E_CONFIG"
    assert message in str(caught.value)


@pytest.mark.parametrize("module", ["evaluation", "evaluation.gate", "evaluation.metrics", "evaluation.suites"])
def test_light_modules_stay_light(module):
    heavy = "{'torch', 'transformers', 'matplotlib', 'pyarrow'}"
    code = f"import {module}, sys; print(sorted({heavy} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
