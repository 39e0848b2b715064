"""What may wait for a person, and what no person can wave through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.approval import APPROVALS, under_approval
from registry.verdicts import Check, Outcome, Verdict

settings = st.sampled_from(APPROVALS)
checks = st.builds(
    Check,
    rule=st.sampled_from(("max_task_drop", "min_gain")),
    task=st.sampled_from(("", "city")),
    value=st.floats(),
    threshold=st.floats(0, 1),
    passed=st.booleans(),
    text=st.text(max_size=5),
    hard=st.booleans(),
)


@st.composite
def verdicts(draw):
    """Verdicts as the gate makes them: passed when every check did."""
    answers = tuple(draw(st.lists(checks, min_size=1, max_size=5)))
    return Verdict(Outcome.PASSED if all(check.passed for check in answers) else Outcome.REJECTED, answers)


@given(verdicts(), settings)
def test_a_hard_rejection_never_waits_and_a_rejection_never_passes(verdict, approval):
    after = under_approval(verdict, approval)
    assert after.checks == verdict.checks
    assert after.passed <= verdict.passed
    if any(check.hard and not check.passed for check in verdict.checks):
        assert after == verdict


@given(verdicts())
def test_never_asks_nobody(verdict):
    assert under_approval(verdict, "never") == verdict


@given(verdicts())
def test_on_reject_asks_about_soft_rejections_alone_and_always_about_the_rest_as_well(verdict):
    soft = not verdict.passed and not any(check.hard and not check.passed for check in verdict.checks)
    assert (under_approval(verdict, "on-reject").outcome is Outcome.WAITING) == soft
    assert (under_approval(verdict, "always").outcome is Outcome.WAITING) == (soft or verdict.passed)


@given(verdicts(), settings)
def test_asked_twice_it_says_the_same(verdict, approval):
    once = under_approval(verdict, approval)
    assert under_approval(once, approval) == once


@pytest.mark.parametrize("approval", APPROVALS)
def test_a_rejection_without_a_reason_is_nothing_to_overrule(approval):
    verdict = Verdict(Outcome.REJECTED)
    assert under_approval(verdict, approval) == verdict


def test_another_setting_is_an_error():
    with pytest.raises(ValueError, match="approval is 'sometimes', not one of never, on-reject, always"):
        under_approval(Verdict(Outcome.PASSED), "sometimes")
