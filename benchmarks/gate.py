"""What evaluating costs beside the model: score_all on eight suites of 500 texts, against the forward passes alone.

    python -m benchmarks.gate                       five runs of each side, about a minute
    python -m benchmarks.gate --quick --json        a few seconds: whether it works

The model is the demonstration's base and the texts are those of its tasks. Both sides answer the same batches in this
process, in turn: score_all with all it does (it reads suites and weights, builds the model, tokenises, compares with
the anchors and keeps every answer), the other side with a model that is built and batches that are made. The anchors
are given, as a line has them: they are computed once.
"""

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import spread
from benchmarks.telling import carry_out, document, options
from evaluation import models
from evaluation.batches import batches
from evaluation.score import anchors, score_all
from evaluation.suites import Suite, load_suite, read_examples, write_suite
from evaluation.tokens import tokenizer_of
from experiments.sources import SOURCES
from experiments.texts import text_task
from experiments.zoo import base_folder
from registry.weights import Checkpoint

BATCH = 64


class Bench(NamedTuple):
    """The model, and what it is measured on."""

    base: Path
    weights: Checkpoint
    suites: Mapping[str, Suite]
    anchors: Mapping[str, torch.Tensor]


class Run(NamedTuple):
    """What one call took."""

    seconds: float  # by the clock
    processor: float  # seconds of all its threads


def main() -> None:
    """Run it as the command line says."""
    parser = options("gate", "Evaluating eight suites: score_all against the forward passes alone.")
    parser.add_argument("--suites", type=int, default=8, help="how many tasks are measured")
    parser.add_argument("--examples", type=int, default=500, help="texts of each suite")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.repeats, chosen.suites, chosen.examples = 1, 2, 20
    carry_out(parser, chosen, measured)


def measured(chosen: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The whole document.

    `best` is the ratio of the fastest runs. `processor` compares processor time instead of the clock's, which other
    programs on the machine disturb far less, with one thread above all.
    """
    torch.set_num_threads(chosen.threads)
    bench = prepared(chosen, place)
    forward = forward_passes(bench)
    calls: dict[str, Callable[[], object]] = {
        "score_all": lambda: score_all(
            bench.base, bench.weights, bench.suites, anchors=bench.anchors, batch_size=BATCH
        ),
        "forward passes": forward,
    }
    forward()  # memory that torch takes once, and files that are read the first time
    runs: dict[str, list[Run]] = {name: [] for name in calls}
    for _ in range(chosen.repeats):
        for name, call in calls.items():
            runs[name].append(timed(call))
    ours, theirs = ([run.seconds for run in found] for found in runs.values())
    own, other = ([run.processor for run in found] for found in runs.values())
    ratio = {
        "seconds": spread(pairs(ours, theirs)),
        "best": round(min(ours) / min(theirs), 4),
        "processor": spread(pairs(own, other)),
    }
    return document("gate", chosen, {name: side(found) for name, found in runs.items()}, {"/".join(calls): ratio})


def prepared(chosen: argparse.Namespace, place: Path) -> Bench:
    """The suites, written and read again; no text is in two of them."""
    texts = [row.text for name in SOURCES for row in text_task(name).train]
    random.Random(chosen.seed).shuffle(texts)
    base, suites = base_folder(), {}
    labels = tuple(SOURCES["docstring"].prompts)
    prompts = tuple(SOURCES["docstring"].prompts.values())
    for number in range(chosen.suites):
        own = texts[number * chosen.examples : (number + 1) * chosen.examples]
        rows = [(text, row % len(labels), "gate") for row, text in enumerate(own)]
        folder = place / f"suite-{number}-of-{chosen.examples}-seed-{chosen.seed}"
        write_suite(folder, kind="zero-shot-text", labels=labels, prompts=prompts, rows=rows)
        suites[folder.name] = load_suite(folder, task=folder.name, where="benchmark")
    weights = Checkpoint.open(base)
    return Bench(base, weights, suites, {name: anchors(base, weights, suite) for name, suite in suites.items()})


def forward_passes(bench: Bench) -> Callable[[], None]:
    """What runs the model on every batch of every suite and does nothing with what comes out."""
    model = models.build(bench.base, bench.weights, kind="zero-shot-text")
    tokenizer = tokenizer_of(bench.base)
    made = []
    for suite in bench.suites.values():
        rows = tokenizer.tokens(read_examples(suite).inputs)
        order = batches([len(row["input_ids"]) for row in rows], BATCH)
        made += [tokenizer.padded([rows[number] for number in batch]) for batch in order]

    def run() -> None:
        with torch.inference_mode():
            for batch in made:
                model(**batch)

    return run


def timed(call: Callable[[], object]) -> Run:
    """What a call takes."""
    start, processor = time.perf_counter(), time.process_time()
    call()
    return Run(time.perf_counter() - start, time.process_time() - processor)


def pairs(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The ratios of runs that followed each other."""
    return [own / other for own, other in zip(ours, theirs, strict=True)]


def side(runs: Sequence[Run]) -> dict[str, Any]:
    """One side as the report has it; both share a process, so its memory is nobody's."""
    seconds = [run.seconds for run in runs]
    times = {**spread(seconds), "all": [round(value, 4) for value in seconds]}
    processor = spread([run.processor for run in runs])
    return {"seconds": times, "processor": processor, "peak_rss_mb": None, "baseline_rss_mb": None}


if __name__ == "__main__":
    main()
