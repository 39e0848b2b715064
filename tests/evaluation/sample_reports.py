"""A line's report with something in every part, as small as that can be."""

import math

from evaluation.report import Record
from registry.verdicts import Check, Flip, Outcome, Report, TaskScore, Try, Verdict

SUITE, WEIGHTS = "5" * 64, "a" * 64


def answered(task, right, *, error="", safety=False):
    """A score of right and wrong answers."""
    correct = tuple(bool(each) for each in right)
    value = math.nan if error else sum(correct) / len(correct)
    return TaskScore(task, SUITE, "accuracy", value, tuple(range(len(correct))), correct, error, safety=safety)


def read(task, nats):
    """A perplexity of equally long texts, from their log-likelihoods in nats a token."""
    return TaskScore(
        task,
        SUITE,
        "perplexity",
        math.exp(-math.fsum(nats) / len(nats)),
        points=tuple(nats),
        weights=(9.0,) * len(nats),
    )


def sample(task="city", new="fr-legal", words="Ulan-Ude", layer="encoder.layer.0", error=""):
    """A rejected candidate: `task` lost 12 of 100 answers, `new` won 40, news-text reads 2 % worse."""
    champion = {
        task: answered(task, [1] * 80 + [0] * 20, safety=True),
        "news-text": read("news-text", [-3.0, -2.0, -2.5] * 10),
        new: answered(new, [1] * 20 + [0] * 80),
    }
    candidate = {
        task: answered(task, [1] * 68 + [0] * 32, safety=True, error=error),
        "news-text": read("news-text", [-3.02, -2.01, -2.54] * 10),
        new: answered(new, [1] * 60 + [0] * 40),
    }
    checks = (
        Check("max_norm_ratio", "", 1.1, 3.0, True, "1.1 times as far from the base as its experts", "free"),
        Check("max_task_drop", task, 0.12, 0.05, False, f"{task}: down 12.0 points", "full", (0.055, 0.185), hard=True),
        Check("min_gain", new, 0.4, 0.0, True, f"{new}: up 40.0 points", "full"),
    )
    tries = (
        Try("as configured", "opcm", {"strength": 1.0}, 1.0, 0.68, 0.6, False, f"{task}: down", best=True),
        Try("strength 0.7", "opcm", {"strength": 0.7}, 1.0, 0.79, 0.5, True, chosen=True, best=True),
        Try("average", "average", {}, 1.0, 0.7, 0.4, True),
        Try(words, "magmax", {}, 1.0, math.nan, math.nan, False, "could not be measured"),
    )
    now = {each: candidate[each].value for each in (task, new)}
    return Record(
        Report(WEIGHTS, candidate, new, answered(new, [1] * 90 + [0] * 10), answered(new, [1] * 10 + [0] * 90)),
        Verdict(Outcome.REJECTED, checks),
        [{task: 0.83}, {task: 0.8}, now],
        {"average_accuracy": 0.64, "forgetting": 0.15, f"negative_flips.{task}": 0.12},
        Report("b" * 64, champion),
        [{"news-text": 12.2}, {"news-text": 12.3}, {"news-text": 12.5}],
        {f"{layer}.{part}": {"cosine": 0.1, "removed": 0.4, "delta_norm": 2.0} for part in ("key", "query")},
        tries,
        [Flip(task, words, "Asia", "Asia", "Europe")],
        {"line": "support", "expert": words, "parent": "2", "base SHA-256": "c" * 64},
        {"free": 0.1, "canary": 12.0, "full": 200.0},
    )
