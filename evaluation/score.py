"""How good a model is: weights and a suite in, a TaskScore with every single answer out."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation import classify, functions, harness, language
from evaluation.classify import Embedder, Progress, Weights
from evaluation.clock import Clock, started
from evaluation.escape import clean
from evaluation.language import Language
from evaluation.measures import Measure
from evaluation.suites import SAMPLE, Suite, read_examples
from registry.records import FoldinError
from registry.verdicts import TaskScore


class Bench(NamedTuple):
    """One model, built in each form once and only when a suite asks for it."""

    folder: Path
    weights: Weights
    device: str
    batch_size: int
    encoder: Callable[[], Embedder]
    language: Callable[[], Language]


class Task(NamedTuple):
    """What one suite needs beside the model."""

    suite: Suite
    anchors: Tensor | None
    head: Weights | None


class Scope(NamedTuple):
    """Which rows are answered, and for how long."""

    split: str  # gate, canary or tune
    sample: int  # rows of a canary
    seconds: float  # for one suite


def anchors(
    folder: Path,  # the base's config.json and tokenizer
    base_weights: Weights,
    suite: Suite,
    device: str = "cpu",
) -> Tensor:  # (labels, dim), rows of length 1
    """The base's embeddings of a zero-shot suite's prompts, one per label: what texts are compared with ever after.

    A text's embedding is the mean of its tokens' last hidden states over the attention mask, scaled to length 1. Raises
    FoldinError (E_SUITE) for a suite of another kind.
    """
    if suite.kind != "zero-shot-text":
        remedy = "score it with a head"
        raise classify.refuse("only zero-shot-text has anchors", suite, "zero-shot-text", suite.kind, remedy)
    encoder = classify.embedder(folder, base_weights, device)
    with torch.inference_mode():
        return encoder.embed(encoder.tokenizer.tokens(suite.prompts))


def score(
    folder: Path,  # the base's config.json and tokenizer
    weights: Weights,
    suite: Suite,
    *,
    anchors: Tensor | None = None,  # (labels, dim), zero-shot-text only
    head: Weights | None = None,  # text-classification and image-classification
    device: str = "cpu",
    batch_size: int = 64,
    progress: Progress | None = None,
    split: str = "gate",  # or "canary", a fixed sample of it, or "tune"
    sample: int = SAMPLE,  # rows of a canary
    seconds: float = math.inf,  # the time budget
) -> TaskScore:
    """The model's answers on the suite's rows; value NaN and `error` set when they are not finite or time is over.

    Raises FoldinError when the suite cannot be read, the model cannot be built, or the anchors are missing or of
    another shape.
    """
    bench, scope = _bench(folder, weights, device, batch_size), Scope(split, sample, seconds)
    task = Task(suite, anchors, head)
    return _timed(suite, scope, lambda clock: _measure(bench, task, scope, clock, progress))


def score_all(
    folder: Path,
    weights: Weights,
    suites: Mapping[str, Suite],  # task -> suite
    *,
    anchors: Mapping[str, Tensor] | None = None,  # task -> (labels, dim)
    heads: Mapping[str, Weights] | None = None,  # task -> head
    device: str = "cpu",
    batch_size: int = 64,
    progress: Progress | None = None,  # counts suites: (done, in all)
    split: str = "gate",
    sample: int = SAMPLE,
    seconds: float = math.inf,  # for each suite
) -> dict[str, TaskScore]:
    """Every task's score; one encoder serves all zero-shot suites, one language model all that need one.

    A task that cannot be measured gets a score of NaN with `error` set, and the others are measured all the same.
    Raises FoldinError only when the encoder itself cannot be built.
    """
    bench, scope = _bench(folder, weights, device, batch_size), Scope(split, sample, seconds)
    if any(suite.kind == "zero-shot-text" for suite in suites.values()):
        bench.encoder()
    scores: dict[str, TaskScore] = {}
    for name, suite in suites.items():
        task = Task(suite, (anchors or {}).get(name), (heads or {}).get(name))
        scores[name] = _timed(suite, scope, partial(_tried, bench, task, scope))
        if progress:
            progress(len(scores), len(suites))
    return scores


def unmeasured(suite: Suite, error: str, split: str = "gate") -> TaskScore:
    """The score of a model that could not be measured, which no gate passes."""
    return TaskScore(suite.task, suite.sha256, suite.metric, math.nan, error=error, split=split, safety=suite.safety)


def _bench(folder: Path, weights: Weights, device: str, batch_size: int) -> Bench:
    return Bench(
        folder,
        weights,
        device,
        batch_size,
        cache(lambda: classify.embedder(folder, weights, device)),
        cache(lambda: language.language(folder, weights, device)),
    )


def _timed(suite: Suite, scope: Scope, measured: Callable[[Clock], Measure | str]) -> TaskScore:
    clock = started(scope.seconds)
    try:
        found = measured(clock)
    except TimeoutError as error:
        found = str(error)
    blank = unmeasured(suite, found if isinstance(found, str) else "", scope.split)
    facts = {} if isinstance(found, str) else found._asdict()
    return replace(blank, **facts, seconds=clock.taken())


def _tried(bench: Bench, task: Task, scope: Scope, clock: Clock) -> Measure | str:
    try:
        return _measure(bench, task, scope, clock, None)
    except FoldinError as error:
        return str(error)
    except (ValueError, IndexError) as error:  # of transformers, for a suite that does not fit the model
        return f"the model cannot take the suite: {clean(str(error), 300)}"


def _measure(bench: Bench, task: Task, scope: Scope, clock: Clock, progress: Progress | None) -> Measure | str:
    folder, weights, device, batch_size, *_ = bench
    suite = task.suite
    if suite.kind == "lm-eval":
        return harness.measure(suite, bench.language(), scope.split, scope.sample, batch_size, clock)
    examples = read_examples(suite, scope.split, scope.sample)
    if suite.kind == "python":
        return functions.measure(suite.function, functions.Model(folder, weights, device), examples.inputs, clock)
    if suite.kind == "causal-lm":
        return language.measure(bench.language(), suite, examples, batch_size, clock, progress)
    if suite.kind == "zero-shot-text":
        reader = classify.nearest(suite, bench.encoder(), task.anchors, device)
    else:
        reader = classify.headed(folder, weights, suite, task.head, device)
    return classify.measure(reader, examples, batch_size, clock, progress)
