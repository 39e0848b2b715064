"""May the candidate become champion? Pure: two reports and the rules in, a verdict with all its reasons out.

Whatever is uncertain has not passed: a missing score, NaN, an error, another suite, numbers that contradict each other.
"""

from evaluation import checks
from evaluation.rules import Rules, rules_from
from registry.records import Check, Outcome, Report, TaskScore, Verdict

__all__ = ["Rules", "gate", "rules_from"]


def gate(candidate: Report, champion: Report, rules: Rules) -> Verdict:
    """The verdict on `candidate` against a champion that was measured on every known task and on the new one.

    Known tasks are held to max_task_drop, max_negative_flips and max_mean_drop; the new task (candidate.new_task, ""
    when no expert was folded) to min_gain, min_expert_gain and min_retention. Never raises for what the reports hold.
    """
    answers = (*_known(candidate, champion, rules), *_new(candidate, champion, rules))
    if not answers:
        answers = (checks.uncertain("max_task_drop", "", rules.max_task_drop, "neither report holds a score"),)
    return Verdict(Outcome.PASSED if all(check.passed for check in answers) else Outcome.REJECTED, answers)


def _known(candidate: Report, champion: Report, rules: Rules) -> list[Check]:
    tasks = sorted((set(candidate.scores) | set(champion.scores)) - {candidate.new_task})
    answers: list[Check] = []
    pairs: list[checks.Pair] = []
    for task in tasks:
        both = checks.pair(champion.scores.get(task), candidate.scores.get(task), ("champion", "candidate"), task)
        if isinstance(both, str):
            answers.append(checks.uncertain("max_task_drop", task, rules.max_task_drop, both))
            continue
        answers += [checks.task_drop(task, both, rules), checks.negative_flips(task, both, rules)]
        pairs.append(both)
    return [*answers, checks.mean_drop(pairs, rules)] if pairs else answers


def _new(candidate: Report, champion: Report, rules: Rules) -> list[Check]:
    task = candidate.new_task
    if not task and not candidate.expert and not candidate.base:
        return []
    if not task:
        problem = "the report holds an expert's score but names no new task"
        return [checks.uncertain("min_gain", "", rules.min_gain, problem)]
    after = candidate.scores.get(task)
    return [
        _gain(task, champion.scores.get(task), after, rules),
        _expert_gain(task, candidate.base, candidate.expert, rules),
        _retention(task, candidate.base, candidate.expert, after, rules),
    ]


def _gain(task: str, before: TaskScore | None, after: TaskScore | None, rules: Rules) -> Check:
    both = checks.pair(before, after, ("champion", "candidate"), task)
    if isinstance(both, str):
        return checks.uncertain("min_gain", task, rules.min_gain, both)
    return checks.gain(task, both, rules)


def _expert_gain(task: str, base: TaskScore | None, expert: TaskScore | None, rules: Rules) -> Check:
    both = checks.pair(base, expert, ("base", "expert"), task)
    if isinstance(both, str):
        return checks.uncertain("min_expert_gain", task, rules.min_expert_gain, both)
    return checks.expert_gain(task, both, rules)


def _retention(
    task: str, base: TaskScore | None, expert: TaskScore | None, after: TaskScore | None, rules: Rules
) -> Check:
    learnt = checks.pair(base, expert, ("base", "expert"), task)
    kept = checks.pair(base, after, ("base", "candidate"), task)
    if isinstance(learnt, str) or isinstance(kept, str):
        problem = learnt if isinstance(learnt, str) else str(kept)
        return checks.uncertain("min_retention", task, rules.min_retention, problem)
    return checks.retention(task, learnt, kept, rules)
