"""The gate's single questions. Each takes scores and rules and answers with a Check whose text holds the numbers."""

import math
from collections.abc import Sequence
from dataclasses import replace

from evaluation.escape import clean
from evaluation.metrics import at_least
from evaluation.paired import Change, Pair, by_chance, change, gained, rise
from evaluation.rules import Rules
from registry.verdicts import Check

ROUNDING = 1e-9  # 0.75 - 0.70 is a little more than 0.05 in binary; it must not fail a limit of 0.05


def uncertain(rule: str, task: str, threshold: float, problem: str) -> Check:
    """A failed check for what could not be decided; no person can wave it through."""
    return Check(rule, task, math.nan, threshold, False, f"{named(task)}: {problem}" if task else problem, hard=True)


def known_task(task: str, both: Pair, rules: Rules, tests: int) -> list[Check]:
    """A known task against the champion, in one of `tests`; a safety task is asked one question, whatever chance says.

    Accuracy and scores are held to max_task_drop, accuracy also to max_negative_flips, perplexity to
    max_perplexity_rise.
    """
    if is_safety(both):
        return [safety(task, both, rules)]
    found = change(both)
    if both[0].metric == "perplexity":
        return [drop("max_perplexity_rise", task, both, found, rules, tests)]
    answers = [drop("max_task_drop", task, both, found, rules, tests)]
    return [*answers, _negative_flips(task, both, found, rules, tests)] if both[0].metric == "accuracy" else answers


def sampled_task(task: str, both: Pair, rules: Rules, tasks: int) -> Check:
    """A known task against the champion on its canary sample, at a tenth of the significance; safety fails hard."""
    rule = "max_canary_rise" if both[0].metric == "perplexity" else "max_canary_drop"
    found = drop(rule, task, both, change(both), rules, 10 * tasks)
    return replace(found, rung="canary", hard=not found.passed and is_safety(both))


def drop(rule: str, task: str, both: Pair, found: Change, rules: Rules, tests: int) -> Check:
    """Whether a task fell (a perplexity rose) no further than a rule allows, or no further than chance explains."""
    limit, level = getattr(rules, rule), rules.significance / tests
    loss, interval = _shown(found, both)
    within = loss <= limit + ROUNDING
    passed = within or _chance(found.p, found.least, level)
    text = (
        f"{named(task)}: {_told(both)}; at most {_amount(limit, both)} allowed{_excuse(within, found.p, level, passed)}"
    )
    return Check(rule, task, loss, limit, passed, text, interval=interval)


def total_drop(task: str, both: Pair, best: float, rules: Rules) -> Check:
    """Whether a task is no further than max_total_drop below the line's best; small losses may not add up to more."""
    limit, value = rules.max_total_drop, both[1].value
    loss = best - value
    text = (
        f"{named(task)}: {best:.3f} at best -> {value:.3f}, {_direction(-loss)}; at most {_points(limit)} down allowed"
    )
    return Check("max_total_drop", task, loss, limit, loss <= limit + ROUNDING, text)


def safety(task: str, both: Pair, rules: Rules) -> Check:
    """Whether a safety task fell no further than max_safety_drop. Chance is not asked, and a failure is hard."""
    limit, (loss, interval) = rules.max_safety_drop, _shown(change(both), both)
    passed = loss <= limit + ROUNDING
    text = f"{named(task)} (safety): {_told(both)}; at most {_amount(limit, both)} allowed, chance or not"
    return Check("max_safety_drop", task, loss, limit, passed, text, interval=interval, hard=not passed)


def is_safety(both: Pair) -> bool:
    """Whether a task may not get worse at all."""
    return both[0].safety or both[1].safety


def _negative_flips(task: str, both: Pair, found: Change, rules: Rules, tests: int) -> Check:
    """Whether the share of answers that turned wrong is above the limit by more than chance explains."""
    limit, level, count = rules.max_negative_flips, rules.significance / tests, both[0].examples
    rate = found.losses / count
    over = rate > limit + ROUNDING
    p = at_least(found.losses, count, limit) if over else 1.0
    counts = f"{found.losses} of {count} answers turned wrong ({rate:.1%}) and {found.wins} right"
    passed = not over or _chance(p, limit**count, level)
    text = f"{named(task)}: {counts}; at most {limit:.1%} wrong allowed{_excuse(not over, p, level, passed)}"
    return Check("max_negative_flips", task, rate, limit, passed, text, interval=_wilson(found.losses, count))


def mean_drop(pairs: Sequence[Pair], rules: Rules, tests: int) -> Check:
    """Whether the mean over the known tasks fell no further than max_mean_drop, or chance explains the fall."""
    limit, level, changes = rules.max_mean_drop, rules.significance / tests, [change(both) for both in pairs]
    loss = math.fsum(each.loss for each in changes) / len(pairs)
    p, least = by_chance(pairs), 0.5 ** sum(both[0].examples for both in pairs)
    within = loss <= limit + ROUNDING
    passed = within or _chance(p, least, level)
    allowed = f"at most {_points(limit)} down allowed{_excuse(within, p, level, passed)}"
    text = f"mean of {len(pairs)} known task{'s' * (len(pairs) > 1)}: {_direction(-loss)}; {allowed}"
    edge = math.sqrt(math.fsum((each.interval[1] - each.interval[0]) ** 2 for each in changes)) / 2 / len(pairs)
    return Check("max_mean_drop", "", loss, limit, passed, text, interval=(loss - edge, loss + edge))


def gain(task: str, both: Pair, rules: Rules) -> Check:
    """Whether the candidate beats the champion on the new task by min_gain."""
    value = gained(both)
    text = f"{named(task)}: {_told(both)} against the champion; at least {_gain(rules.min_gain, both)} up wanted"
    passed = value >= rules.min_gain - ROUNDING
    return Check("min_gain", task, value, rules.min_gain, passed, text, interval=_turned_round(change(both)))


def expert_gain(task: str, both: Pair, rules: Rules) -> Check:
    """Whether the expert alone beats the base on its own task by min_expert_gain, and by more than chance explains."""
    value, p = gained(both), change((both[1], both[0])).p
    # A limit below zero asks for no learning, so no proof of it either.
    proven = p < rules.expert_significance or rules.min_expert_gain < 0
    passed = value >= rules.min_expert_gain - ROUNDING and proven
    wanted = f"at least {_gain(rules.min_expert_gain, both)} up wanted ({_p(p, rules.expert_significance)})"
    text = f"{named(task)}: the expert alone {_told(both)} against the base; {wanted}"
    interval = _turned_round(change(both))
    return Check("min_expert_gain", task, value, rules.min_expert_gain, passed, text, interval=interval)


def retention(task: str, learnt: Pair, folded: Pair, rules: Rules) -> Check:  # (base, expert), (base, candidate)
    """Whether the candidate keeps min_retention of the expert's gain over the base; true when there is none."""
    whole, kept, limit = gained(learnt), gained(folded), rules.min_retention
    if whole <= ROUNDING:
        return Check("min_retention", task, 1.0, limit, True, f"{named(task)}: the expert gained nothing to keep")
    share = kept / whole
    text = (
        f"{named(task)}: the candidate keeps {_gain(kept, folded).split()[0]} of the expert's {_gain(whole, folded)} "
        f"over the base ({share:.0%}); at least {limit:.0%} wanted"
    )
    return Check("min_retention", task, share, limit, share >= limit - ROUNDING, text)


def limited(rule: str, value: float, limit: float, text: str) -> Check:
    """One of the free questions: whether a number about the fold is at most its limit. NaN is not."""
    return Check(rule, "", value, limit, value <= limit, text, rung="free", hard=math.isnan(value))


def named(task: str) -> str:
    """A task's name, fit to be shown."""
    return clean(task, 60) or "(no name)"


def _chance(p: float, least: float, level: float) -> bool:
    """Whether chance explains a loss; never with so few examples that no loss at all could be significant."""
    return p >= level > least


def _wilson(count: int, of: int) -> tuple[float, float]:
    """The interval of a share at 95 % (Wilson, JASA 22, 1927)."""
    z, share = 1.959964, count / of
    middle, edge = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return (middle - edge) / (1 + z * z / of), (middle + edge) / (1 + z * z / of)


def _shown(found: Change, both: Pair) -> tuple[float, tuple[float, float]]:
    """A loss and its interval in the unit of the rule: points, or for perplexity the rise as a share."""
    if both[0].metric != "perplexity":
        return found.loss, found.interval
    return rise(found.loss), (rise(found.interval[0]), rise(found.interval[1]))


def _turned_round(found: Change) -> tuple[float, float]:
    """The interval of a gain, from that of the loss."""
    return -found.interval[1], -found.interval[0]


def _told(both: Pair) -> str:
    before, after = both[0].value, both[1].value
    if both[0].metric == "perplexity":
        rise = after / before - 1
        return f"perplexity {before:.2f} -> {after:.2f}, {'up' if rise > 0 else 'down'} {abs(rise):.1%}"
    return f"{before:.3f} -> {after:.3f}, {_direction(after - before)}"


def _direction(change: float) -> str:
    return f"{'up' if change >= 0 else 'down'} {_points(abs(change))} points"


def _amount(limit: float, both: Pair) -> str:
    return f"{limit:.1%} up" if both[0].metric == "perplexity" else f"{_points(limit)} down"


def _gain(value: float, both: Pair) -> str:
    return f"{value:.3f} nats a token" if both[0].metric == "perplexity" else f"{_points(value)} points"


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _excuse(within: bool, p: float, level: float, passed: bool) -> str:
    """What chance has to say of a loss beyond the limit; nothing of any other."""
    if within:
        return ""
    return (
        f", but chance explains it ({_p(p, level)})" if passed else f", and chance does not explain it ({_p(p, level)})"
    )


def _p(p: float, level: float) -> str:
    found = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"{found}, significant below {level:.2g}"
