"""How good a model is: weights and a suite in, a TaskScore with every single answer out.

Examples are answered in batches of like length, short ones first, so that little is padded, and put back in order.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evaluation import models
from evaluation.escape import clean
from evaluation.suites import Suite, read_examples
from registry.records import FoldinError, Refusal, TaskScore

Weights = Mapping[str, Tensor]
Input = str | list[float]
Progress = Callable[[int, int], None]  # (examples done, examples in all)
Answer = Callable[[Sequence[Input]], Tensor]  # n inputs -> logits (n, labels)


class Embedder(NamedTuple):
    """A text encoder."""

    embed: Callable[[Sequence[str]], Tensor]  # n texts -> unit vectors (n, dim)
    lengths: Callable[[Sequence[str]], list[int]]  # n texts -> the tokens of each


class Reader(NamedTuple):
    """A model with everything it needs to answer a suite."""

    answer: Answer
    size: Callable[[Sequence[Input]], list[int]]  # n inputs -> what each costs, in tokens


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
        raise _refuse("only zero-shot-text has anchors", suite, "zero-shot-text", suite.kind, "score it with a head")
    with torch.inference_mode():
        return _embedder(folder, base_weights, device).embed(suite.prompts)


def score(
    folder: Path,  # the base's config.json and tokenizer
    weights: Weights,
    suite: Suite,
    *,
    anchors: Tensor | None = None,  # (labels, dim), zero-shot-text only
    head: Weights | None = None,  # the other kinds
    device: str = "cpu",
    batch_size: int = 64,
    progress: Progress | None = None,
) -> TaskScore:
    """The model's answers on the suite's gate split; value NaN and `error` set when a logit is not finite.

    zero-shot-text answers with the nearest anchor by cosine. Raises FoldinError when the suite cannot be read, the
    model cannot be built, or the anchors are missing or of another shape.
    """
    embedder = _embedder(folder, weights, device) if suite.kind == "zero-shot-text" else None
    return _measure(suite, _reader(folder, weights, suite, embedder, anchors, head, device), batch_size, progress)


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
) -> dict[str, TaskScore]:
    """Every task's score; one encoder serves all zero-shot suites.

    A task that cannot be measured gets a score of NaN with `error` set, and the others are measured all the same.
    Raises FoldinError only when the encoder itself cannot be built.
    """
    zero_shot = any(suite.kind == "zero-shot-text" for suite in suites.values())
    embedder = _embedder(folder, weights, device) if zero_shot else None
    scores: dict[str, TaskScore] = {}
    for task, suite in suites.items():
        own_anchors, head = (anchors or {}).get(task), (heads or {}).get(task)
        try:
            reader = _reader(folder, weights, suite, embedder, own_anchors, head, device)
            scores[task] = _measure(suite, reader, batch_size, None)
        except FoldinError as error:
            scores[task] = unmeasured(suite, str(error))
        if progress:
            progress(len(scores), len(suites))
    return scores


def unmeasured(suite: Suite, error: str) -> TaskScore:
    """The score of a model that could not be measured, which no gate passes."""
    return TaskScore(suite.task, suite.sha256, suite.metric, math.nan, (), (), error)


def _embedder(folder: Path, weights: Weights, device: str) -> Embedder:
    model = models.build(folder, weights, kind="zero-shot-text", device=device)
    tokenizer = models.tokenizer_of(folder)

    def embed(texts: Sequence[str]) -> Tensor:
        tokens = _on(device, tokenizer.encode(texts))
        hidden = model(**tokens).last_hidden_state  # (n, tokens, dim)
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return nn.functional.normalize(mean, dim=1)

    return Embedder(embed, tokenizer.lengths)


def _reader(
    folder: Path,
    weights: Weights,
    suite: Suite,
    embedder: Embedder | None,
    anchors: Tensor | None,
    head: Weights | None,
    device: str,
) -> Reader:
    if embedder and suite.kind == "zero-shot-text":
        return _nearest(suite, embedder, anchors, device)
    model = models.build(folder, weights, kind=suite.kind, head=head, labels=len(suite.labels), device=device)
    if suite.kind == "image-classification":
        shape = suite.image_shape or ()
        return Reader(
            lambda images: model(pixel_values=torch.tensor(images, device=device).view(-1, *shape)).logits,
            lambda images: [1] * len(images),
        )
    encode, lengths = models.tokenizer_of(folder)
    return Reader(
        lambda texts: model(**_on(device, encode(_texts(texts)))).logits,
        lambda texts: lengths(_texts(texts)),
    )


def _texts(inputs: Sequence[Input]) -> list[str]:
    return [str(text) for text in inputs]


def _nearest(suite: Suite, embedder: Embedder, anchors: Tensor | None, device: str) -> Reader:
    if anchors is None:
        remedy = "compute them once with evaluation.score.anchors"
        raise _refuse("the anchors are missing", suite, "one row per label", "none", remedy)
    if anchors.ndim != 2 or len(anchors) != len(suite.labels):
        found, remedy = str(tuple(anchors.shape)), "compute them again for this suite"
        raise _refuse("the anchors do not fit", suite, f"({len(suite.labels)}, dim)", found, remedy)
    columns = anchors.to(device).T
    return Reader(
        lambda texts: embedder.embed(_texts(texts)) @ columns,
        lambda texts: embedder.lengths(_texts(texts)),
    )


def _measure(suite: Suite, reader: Reader, batch_size: int, progress: Progress | None) -> TaskScore:
    examples = read_examples(suite)
    predictions: list[int] = [0] * len(examples.labels)
    done = 0
    for batch in _batches(reader.size(examples.inputs), batch_size):
        with torch.inference_mode():
            logits = reader.answer([examples.inputs[row] for row in batch])
        if not logits.isfinite().all():
            return unmeasured(suite, "the model's outputs are not finite")
        for row, label in zip(batch, logits.argmax(dim=1).tolist(), strict=True):
            predictions[row] = label
        done += len(batch)
        if progress:
            progress(done, len(predictions))
    return _scored(suite, predictions, examples.labels)


def _batches(sizes: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Row numbers in batches of like size, the smallest first."""
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    return (order[start : start + batch] for start in range(0, len(order), batch))


def _scored(suite: Suite, predictions: Sequence[int], labels: Sequence[int]) -> TaskScore:
    correct = tuple(guess == label for guess, label in zip(predictions, labels, strict=True))
    value = sum(correct) / len(correct)
    return TaskScore(suite.task, suite.sha256, suite.metric, value, tuple(predictions), correct)


def _on(device: str, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.to(device) for name, values in tokens.items()}


def _refuse(what: str, suite: Suite, expected: str, found: str, remedy: str) -> FoldinError:
    where = f"suite of task {clean(suite.task)}"
    return FoldinError(Refusal("E_SUITE", what, where, expected=expected, found=found, remedy=remedy))
