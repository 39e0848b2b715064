"""What the gate's paired tests can tell: `python -m experiments.power` prints how often they reject.

A trial is eight tasks of 500 examples on which the champion is right three times in four. Of each task some answers
turn wrong and as many right by chance (churn, a share of the examples each way); of one more turn wrong (the loss).
"""

import argparse
from collections.abc import Sequence

import numpy as np

from evaluation.gate import Rules, gate
from registry.verdicts import Report, TaskScore, Verdict

ACCURACY = 0.75  # of the champion
CHURNS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
LOSSES = (0.0, 0.02, 0.03, 0.05, 0.1)


def trial(seed: int, churn: float, loss: float, tasks: int = 8, examples: int = 500) -> Verdict:
    """The verdict on a candidate that lost `loss` of the first task's examples, and else changed by chance."""
    random = np.random.default_rng(seed)
    before, after = {}, {}
    for number in range(tasks):
        old = random.random(examples) < ACCURACY
        new = old.copy()
        new[random.permutation(np.flatnonzero(old))[: random.binomial(examples, churn)]] = False
        new[random.permutation(np.flatnonzero(~old))[: random.binomial(examples, churn)]] = True
        if number == 0:
            new[random.permutation(np.flatnonzero(old & new))[: round(loss * examples)]] = False
        before[f"task{number}"], after[f"task{number}"] = _score(number, old), _score(number, new)
    return gate(Report("candidate", after), Report("champion", before), Rules())


def graded(seed: int, tasks: int = 8, examples: int = 10) -> Verdict:
    """The verdict on a candidate whose scores differ from the champion's by chance alone."""
    random = np.random.default_rng(seed)
    sides: list[dict[str, TaskScore]] = [{}, {}]
    for number in range(tasks):
        level = random.uniform(0.2, 0.8, examples)
        for side in sides:
            points = tuple(np.clip(level + random.normal(0, 0.1, examples), 0, 1).tolist())
            name = f"task{number}"
            side[name] = TaskScore(name, f"suite of {name}", "score", sum(points) / examples, points=points)
    return gate(Report("candidate", sides[1]), Report("champion", sides[0]), Rules())


def rejections(trials: int, churn: float, loss: float, first: int = 0) -> int:
    """How many of some seeded trials the gate rejects."""
    return sum(not trial(seed, churn, loss).passed for seed in range(first, first + trials))


def _score(number: int, correct: "Sequence[bool] | np.ndarray[tuple[int], np.dtype[np.bool_]]") -> TaskScore:
    marks = tuple(map(bool, correct))
    name = f"task{number}"
    return TaskScore(name, f"suite of {name}", "accuracy", sum(marks) / len(marks), tuple(map(int, marks)), marks)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table as Markdown: churn by loss, in percent of the trials."""
    parser = argparse.ArgumentParser(prog="python -m experiments.power", description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    trials = parser.parse_args(arguments).trials
    print("| churn each way | " + " | ".join(f"loss {loss:.0%}" for loss in LOSSES) + " |")  # noqa: T201
    print("|---" * (len(LOSSES) + 1) + "|")  # noqa: T201
    for churn in CHURNS:
        shares = [rejections(trials, churn, loss) / trials for loss in LOSSES]
        print(f"| {churn:.1%} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")  # noqa: T201
    for examples in (10, 30, 100):
        wrong = sum(not graded(seed, examples=examples).passed for seed in range(trials)) / trials
        print(f"\nscores that differ by chance alone, {examples} a task: {wrong:.1%} rejected")  # noqa: T201


if __name__ == "__main__":
    main()
