"""The gate's single questions. Each takes scores and rules and answers with a Check whose text holds the numbers."""

import math

from evaluation.escape import clean
from evaluation.metrics import flips, sign_test
from evaluation.rules import Rules
from registry.records import Check, TaskScore

ROUNDING = 1e-9  # 0.75 - 0.70 is a little more than 0.05 in binary; it must not fail a limit of 0.05

Pair = tuple[TaskScore, TaskScore]  # (before, after), both usable and on the same examples


def uncertain(rule: str, task: str, threshold: float, problem: str) -> Check:
    """A failed check for what could not be decided."""
    return Check(rule, task, math.nan, threshold, False, f"{_name(task)}: {problem}" if task else problem)


def problem_with(score: TaskScore | None, who: str, task: str) -> str:
    """Why a score cannot be used, as a clause; '' when it can."""
    if score is None:
        return f"the {who} was not scored"
    if score.error:
        return f"the {who} could not be measured: {clean(score.error, 300)}"
    if score.task != task:
        return f"the {who}'s score belongs to task {_name(score.task)}"
    if not (isinstance(score.value, int | float) and 0.0 <= score.value <= 1.0):
        return f"the {who}'s accuracy is {score.value}, not a number from 0 to 1"
    return _contradiction(score, who)


def pair(before: TaskScore | None, after: TaskScore | None, who: tuple[str, str], task: str) -> Pair | str:
    """The two scores when they can be compared example by example, else why not, as a clause. `who` names the two."""
    alone = problem_with(before, who[0], task) or problem_with(after, who[1], task)
    if alone or before is None or after is None:
        return alone
    if not before.suite_sha256 or before.suite_sha256 != after.suite_sha256:
        found = f"{before.suite_sha256[:12] or 'none'} and {after.suite_sha256[:12] or 'none'}"
        return f"the {who[0]} and the {who[1]} were measured on different suites ({found})"
    if before.metric != after.metric:
        return f"the {who[0]} and the {who[1]} were measured by different metrics"
    if before.examples != after.examples:
        return f"the {who[0]} answered {before.examples} examples and the {who[1]} {after.examples}"
    return before, after


def task_drop(task: str, both: Pair, rules: Rules) -> Check:
    """Whether a known task fell no further than max_task_drop, or no further than chance explains."""
    drop, p = both[0].value - both[1].value, sign_test(*flips(*both))
    passed = drop <= rules.max_task_drop + ROUNDING or _chance(p, both, rules)
    text = f"{_name(task)}: {_change(both)}; at most {_points(rules.max_task_drop)} allowed ({_p(p)})"
    return Check("max_task_drop", task, drop, rules.max_task_drop, passed, text)


def negative_flips(task: str, both: Pair, rules: Rules) -> Check:
    """Whether no more than max_negative_flips of a known task's examples turned wrong, or chance explains it."""
    losses, wins = flips(*both)
    rate, p = losses / both[0].examples, sign_test(losses, wins)
    passed = rate <= rules.max_negative_flips + ROUNDING or _chance(p, both, rules)
    counts = f"{losses} of {both[0].examples} answers turned wrong ({rate:.1%}) and {wins} right"
    text = f"{_name(task)}: {counts}; at most {rules.max_negative_flips:.1%} wrong allowed ({_p(p)})"
    return Check("max_negative_flips", task, rate, rules.max_negative_flips, passed, text)


def _chance(p: float, both: Pair, rules: Rules) -> bool:
    """Whether chance explains a loss; never with so few examples that no loss at all could be significant."""
    return p >= rules.significance > 0.5 ** both[0].examples


def mean_drop(pairs: list[Pair], rules: Rules) -> Check:
    """Whether the mean over the known tasks fell no further than max_mean_drop, or chance explains the pooled flips."""
    drop = math.fsum(before.value - after.value for before, after in pairs) / len(pairs)
    counts = [flips(*both) for both in pairs]
    p = sign_test(sum(lost for lost, _ in counts), sum(won for _, won in counts))
    passed = drop <= rules.max_mean_drop + ROUNDING or p >= rules.significance
    limit = f"at most {_points(rules.max_mean_drop)} allowed ({_p(p)})"
    text = f"mean of {len(pairs)} known task{'s' * (len(pairs) > 1)}: {_direction(-drop)}; {limit}"
    return Check("max_mean_drop", "", drop, rules.max_mean_drop, passed, text)


def gain(task: str, both: Pair, rules: Rules) -> Check:
    """Whether the candidate beats the champion on the new task by min_gain."""
    value = both[1].value - both[0].value
    text = f"{_name(task)}: {_change(both)} against the champion; at least {_points(rules.min_gain)} up wanted"
    return Check("min_gain", task, value, rules.min_gain, value >= rules.min_gain - ROUNDING, text)


def expert_gain(task: str, both: Pair, rules: Rules) -> Check:
    """Whether the expert alone beats the base on its own task by min_expert_gain, and by more than chance explains."""
    value = both[1].value - both[0].value
    losses, wins = flips(*both)
    p = sign_test(wins, losses)
    # A limit below zero asks for no learning, so no proof of it either.
    proven = p < rules.expert_significance or rules.min_expert_gain < 0
    passed = value >= rules.min_expert_gain - ROUNDING and proven
    wanted = f"at least {_points(rules.min_expert_gain)} up with p < {rules.expert_significance:g} wanted ({_p(p)})"
    text = f"{_name(task)}: the expert alone {_change(both)} against the base; {wanted}"
    return Check("min_expert_gain", task, value, rules.min_expert_gain, passed, text)


def retention(task: str, learnt: Pair, folded: Pair, rules: Rules) -> Check:  # (base, expert), (base, candidate)
    """Whether the candidate keeps min_retention of the expert's gain over the base; true when there is none."""
    gained, kept = (after.value - before.value for before, after in (learnt, folded))
    limit = rules.min_retention
    if gained <= ROUNDING:
        return Check("min_retention", task, 1.0, limit, True, f"{_name(task)}: the expert gained nothing to keep")
    share = kept / gained
    text = (
        f"{_name(task)}: the candidate keeps {_points(kept)} of the expert's {_points(gained)} points over the base "
        f"({share:.0%}); at least {limit:.0%} wanted"
    )
    return Check("min_retention", task, share, limit, share >= limit - ROUNDING, text)


def _contradiction(score: TaskScore, who: str) -> str:
    if not score.correct or len(score.correct) != len(score.predictions):
        return f"the {who}'s answers are missing"
    share = sum(score.correct) / len(score.correct)
    if abs(share - score.value) > 1e-6:
        return f"the {who}'s accuracy {score.value:.3f} contradicts its answers ({share:.3f})"
    return ""


def _name(task: str) -> str:
    return clean(task, 60) or "(no name)"


def _change(both: Pair) -> str:
    before, after = both[0].value, both[1].value
    return f"{before:.3f} -> {after:.3f}, {_direction(after - before)}"


def _direction(change: float) -> str:
    return f"{'up' if change >= 0 else 'down'} {_points(abs(change))} points"


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
