"""May the candidate become champion? Three rungs, the cheapest first; each is pure: values in, a verdict out.

Whatever is uncertain has not passed: a missing score, NaN, an error, another suite, numbers that contradict each other.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from evaluation import checks
from evaluation.comparable import pair
from evaluation.paired import Pair
from evaluation.rules import Rules, rules_from
from registry.verdicts import Check, Outcome, Report, TaskScore, Verdict

__all__ = ["Fold", "Rules", "canary", "free", "gate", "rules_from", "together"]


class Fold(NamedTuple):
    """What is known of a fold before any model was asked anything. Norms are Frobenius norms, in weight units."""

    norm: float  # of the expert's change over the whole model
    earlier: Sequence[float]  # the same of the experts folded before
    overlap: float  # share of that norm along the total, tensor by tensor, in [0, 1]
    removed: float  # share of its square that the projection took away, in [0, 1]


def free(fold: Fold, rules: Rules) -> Verdict:
    """The first rung: what the fold itself says of the expert."""
    usual = statistics.median(fold.earlier) if fold.earlier else fold.norm
    unknown = any(map(math.isnan, fold.earlier))  # which the median may pass over
    ratio = math.nan if unknown else fold.norm / usual if usual else (math.inf if fold.norm else 1.0)
    median = f", {ratio:.2f} times the median of the {len(fold.earlier)} before" if fold.earlier else ", the first one"
    size = f"the expert's change has norm {fold.norm:.3g}{median}"
    along = f"{fold.overlap:.0%} of the expert's change lies along what was folded before"
    return _verdict(
        [
            checks.limited("max_norm_ratio", ratio, rules.max_norm_ratio, f"{size}; at most {rules.max_norm_ratio:g}"),
            checks.limited(
                "max_overlap", fold.overlap, rules.max_overlap, f"{along}; at most {rules.max_overlap:.0%} allowed"
            ),
            checks.limited(
                "max_removed",
                fold.removed,
                rules.max_removed,
                f"the projection took {fold.removed:.0%} of it away; at most {rules.max_removed:.0%} allowed",
            ),
        ]
    )


def canary(candidate: Report, champion: Report, rules: Rules) -> Verdict:
    """The second rung: what the expert learnt (on every row of its task), and a sample of each known task.

    The scores of both reports are those of the split "canary"; `candidate.expert` and `candidate.base` those of "gate".
    """
    answers = [_expert_gain(candidate, rules, "gate")] if candidate.new_task else []
    tasks = _known_tasks(candidate, champion)
    for task in tasks:
        both = pair(*_scores(champion, candidate, task), ("champion", "candidate"), task, "canary")
        if isinstance(both, str):
            answers.append(checks.uncertain("max_canary_drop", task, rules.max_canary_drop, both))
        else:
            answers.append(checks.sampled_task(task, both, rules, len(tasks)))
    if not answers:
        answers = [checks.uncertain("max_canary_drop", "", rules.max_canary_drop, "neither report holds a score")]
    return _verdict([replace(each, rung="canary") for each in answers])


def gate(candidate: Report, champion: Report, rules: Rules, split: str = "gate") -> Verdict:
    """The last rung: the candidate against a champion that was measured on every known task and on the new one.

    `candidate.new_task` is "" when no expert was folded. A search asks the same of the rows that are kept for tuning,
    with split "tune". Never raises for what the reports hold.
    """
    answers = (*_known(candidate, champion, rules, split), *_new(candidate, champion, rules, split))
    if not answers:
        answers = (checks.uncertain("max_task_drop", "", rules.max_task_drop, "neither report holds a score"),)
    return _verdict(answers)


def together(*verdicts: Verdict) -> Verdict:
    """One verdict of several, of rungs or of experts: passed when all did, with all their checks, each once."""
    refused = next((each.outcome for each in verdicts if not each.passed), Outcome.PASSED)
    return Verdict(refused, tuple(dict.fromkeys(check for each in verdicts for check in each.checks)))


def _verdict(answers: Sequence[Check]) -> Verdict:
    return Verdict(Outcome.PASSED if all(check.passed for check in answers) else Outcome.REJECTED, tuple(answers))


def _known_tasks(candidate: Report, champion: Report) -> list[str]:
    return sorted((set(candidate.scores) | set(champion.scores)) - {candidate.new_task})


def _scores(champion: Report, candidate: Report, task: str) -> tuple[TaskScore | None, TaskScore | None]:
    return champion.scores.get(task), candidate.scores.get(task)


def _known(candidate: Report, champion: Report, rules: Rules, split: str) -> list[Check]:
    tasks = _known_tasks(candidate, champion)
    answers: list[Check] = []
    pairs: list[Pair] = []
    for task in tasks:
        both = pair(*_scores(champion, candidate, task), ("champion", "candidate"), task, split)
        if isinstance(both, str):
            answers.append(checks.uncertain("max_task_drop", task, rules.max_task_drop, both))
            continue
        answers += checks.known_task(task, both, rules, len(tasks) + 1)
        if task in champion.best:
            answers.append(checks.total_drop(task, both, champion.best[task], rules))
        pairs += [both] if both[0].metric != "perplexity" else []
    return [*answers, checks.mean_drop(pairs, rules, len(tasks) + 1)] if pairs else answers


def _new(candidate: Report, champion: Report, rules: Rules, split: str) -> list[Check]:
    task = candidate.new_task
    if not task and not candidate.expert and not candidate.base:
        return []
    if not task:
        problem = "the report holds an expert's score but names no new task"
        return [checks.uncertain("min_gain", "", rules.min_gain, problem)]
    answers = [
        _gain(candidate, champion, rules, split),
        _expert_gain(candidate, rules, split),
        _retention(candidate, rules, split),
    ]
    both = pair(*_scores(champion, candidate, task), ("champion", "candidate"), task, split)
    if not isinstance(both, str) and checks.is_safety(both):  # an expert of its own does not lift the rule
        answers.append(checks.safety(task, both, rules))
    return answers


def _gain(candidate: Report, champion: Report, rules: Rules, split: str) -> Check:
    task = candidate.new_task
    both = pair(*_scores(champion, candidate, task), ("champion", "candidate"), task, split)
    if isinstance(both, str):
        return checks.uncertain("min_gain", task, rules.min_gain, both)
    return checks.gain(task, both, rules)


def _expert_gain(candidate: Report, rules: Rules, split: str) -> Check:
    task = candidate.new_task
    both = pair(candidate.base, candidate.expert, ("base", "expert"), task, split)
    if isinstance(both, str):
        return checks.uncertain("min_expert_gain", task, rules.min_expert_gain, both)
    return checks.expert_gain(task, both, rules)


def _retention(candidate: Report, rules: Rules, split: str) -> Check:
    task, base = candidate.new_task, candidate.base
    learnt = pair(base, candidate.expert, ("base", "expert"), task, split)
    kept = pair(base, candidate.scores.get(task), ("base", "candidate"), task, split)
    if isinstance(learnt, str) or isinstance(kept, str):
        problem = learnt if isinstance(learnt, str) else str(kept)
        return checks.uncertain("min_retention", task, rules.min_retention, problem)
    return checks.retention(task, learnt, kept, rules)
