"""Texts and images under one of a suite's labels: by the nearest anchor, or by the task's own head."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evaluation import models
from evaluation.batches import batches
from evaluation.clock import Clock
from evaluation.escape import clean
from evaluation.measures import NOT_FINITE, Measure, accuracy
from evaluation.suites import Examples, Suite
from evaluation.tokens import Tokenizer, Tokens, tokenizer_of
from registry.records import FoldinError, Refusal

Weights = Mapping[str, Tensor]
Progress = Callable[[int, int], None]  # (examples done, examples in all)
PIECE = 512  # inputs that are prepared between two looks at the clock


class Embedder(NamedTuple):
    """A text encoder."""

    tokenizer: Tokenizer
    embed: Callable[[Sequence[Tokens]], Tensor]  # n texts -> unit vectors (n, dim)


class Reader(NamedTuple):
    """A model with everything it needs to answer a suite."""

    prepare: Callable[[Sequence[Any]], Sequence[Any]]  # n inputs -> what the model takes of each, once for all batches
    size: Callable[[Any], int]  # what one of them costs, in tokens
    answer: Callable[[Sequence[Any]], Tensor]  # n of them -> logits (n, labels)


def embedder(folder: Path, weights: Weights, device: str) -> Embedder:
    """The text encoder: the mean of the last hidden states over the attention mask, scaled to length 1."""
    model = models.build(folder, weights, kind="zero-shot-text", device=device)
    tokenizer = tokenizer_of(folder)

    def embed(rows: Sequence[Tokens]) -> Tensor:
        tokens = _on(device, tokenizer.padded(rows))
        hidden = model(**tokens).last_hidden_state  # (n, tokens, dim)
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return nn.functional.normalize(mean, dim=1)

    return Embedder(tokenizer, embed)


def nearest(suite: Suite, encoder: Embedder, anchors: Tensor | None, device: str) -> Reader:
    """Who answers with the nearest anchor by cosine. Raises FoldinError (E_SUITE) when the anchors do not fit."""
    if anchors is None:
        remedy = "compute them once with evaluation.score.anchors"
        raise refuse("the anchors are missing", suite, "one row per label", "none", remedy)
    if anchors.ndim != 2 or len(anchors) != len(suite.labels):
        found, remedy = str(tuple(anchors.shape)), "compute them again for this suite"
        raise refuse("the anchors do not fit", suite, f"({len(suite.labels)}, dim)", found, remedy)
    columns = anchors.to(device).T
    return Reader(encoder.tokenizer.tokens, _length, lambda rows: encoder.embed(rows) @ columns)


def headed(folder: Path, weights: Weights, suite: Suite, head: Weights | None, device: str) -> Reader:
    """Who answers with the task's own head. Raises FoldinError as `models.build`."""
    model = models.build(folder, weights, kind=suite.kind, head=head, labels=len(suite.labels), device=device)
    if suite.kind == "image-classification":
        shape = suite.image_shape or ()

        def see(images: Sequence[list[float]]) -> Tensor:
            logits: Tensor = model(pixel_values=torch.tensor(images, device=device).view(-1, *shape)).logits
            return logits

        return Reader(lambda images: images, lambda image: 1, see)
    tokenizer = tokenizer_of(folder)
    return Reader(tokenizer.tokens, _length, lambda rows: model(**_on(device, tokenizer.padded(rows))).logits)


def measure(
    reader: Reader, examples: Examples, batch_size: int, clock: Clock, progress: Progress | None
) -> Measure | str:
    """The reader's accuracy, or why there is none. Raises TimeoutError between two batches."""
    inputs = list(chain.from_iterable(_prepared(reader, examples.inputs, clock)))
    predictions = [0] * len(inputs)
    done = 0
    for batch in batches([reader.size(each) for each in inputs], batch_size):
        clock.check()
        with torch.inference_mode():
            logits = reader.answer([inputs[row] for row in batch])
        if not logits.isfinite().all():
            return NOT_FINITE
        for row, label in zip(batch, logits.argmax(dim=1).tolist(), strict=True):
            predictions[row] = label
        done += len(batch)
        if progress:
            progress(done, len(predictions))
    clock.check()
    return accuracy(predictions, examples.labels)


def _prepared(reader: Reader, inputs: Sequence[Any], clock: Clock) -> Iterator[Sequence[Any]]:
    """The inputs as the model takes them, in pieces: turning texts into tokens takes time as well."""
    for start in range(0, len(inputs), PIECE):
        clock.check()
        yield reader.prepare(inputs[start : start + PIECE])


def refuse(what: str, suite: Suite, expected: str, found: str, remedy: str) -> FoldinError:
    """The E_SUITE error about a suite that says so."""
    where = f"suite of task {clean(suite.task)}"
    return FoldinError(Refusal("E_SUITE", what, where, expected=expected, found=found, remedy=remedy))


def _length(tokens: Tokens) -> int:
    return len(tokens["input_ids"])


def _on(device: str, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.to(device) for name, values in tokens.items()}
