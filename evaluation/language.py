"""How likely a language model finds texts: perplexity, and multiple choice by log-likelihood.

Both come down to windows: tokens that the model reads at once, of which the last ones are predicted from all before
them. A tokenizer's bos token is put before every text; without one the first token of a text is read and not predicted.
Choices are compared as EleutherAI's lm-evaluation-harness does: context and choice are tokenised together, and the
tokens that the context alone does not have are the choice's.
"""

import math
from collections.abc import Sequence
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from evaluation import models
from evaluation.batches import batches
from evaluation.classify import Progress, Weights
from evaluation.clock import Clock
from evaluation.configs import refuse
from evaluation.measures import NOT_FINITE, Measure, accuracy, perplexity
from evaluation.suites import Examples, Question, Suite
from evaluation.tokens import context_of, loaded_tokenizer

LOGITS = 2**27  # numbers in one batch's logits, at most: half a gigabyte


class Language(NamedTuple):
    """A causal language model."""

    model: models.Untyped
    tokenizer: models.Untyped
    context: int  # tokens that it reads at once
    device: str

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's tokens, without special ones and of any length."""
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return found

    @property
    def first(self) -> list[int]:
        """What stands before every text: the bos token, or nothing."""
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [bos]


class Window(NamedTuple):
    """What is read at once."""

    tokens: list[int]
    predicted: int  # how many of the last are predicted, less than there are


def language(folder: Path, weights: Weights, device: str) -> Language:
    """The causal language model of these weights.

    Raises FoldinError as `models.build`, and E_CONFIG for a model that sees the tokens that it is to predict.
    """
    model = models.build(folder, weights, kind="causal-lm", device=device)
    tokenizer = loaded_tokenizer(folder)
    known = Language(model, tokenizer, context_of(folder, tokenizer), device)
    if _looks_ahead(known):
        remedy = "use a suite of another kind"
        raise refuse("E_CONFIG", "the base sees the tokens that it is to predict", folder, remedy=remedy)
    return known


def measure(
    known: Language, suite: Suite, examples: Examples, batch_size: int, clock: Clock, progress: Progress | None
) -> Measure | str:
    """The model's perplexity or accuracy, as the suite's metric says, or why there is none.

    Raises TimeoutError between two batches.
    """
    groups = _of_texts(known, examples.inputs) if suite.metric == "perplexity" else _of_choices(known, examples.inputs)
    if isinstance(groups, str):
        return groups
    clock.check()
    sums = _likelihoods(known, list(chain.from_iterable(groups)), batch_size, clock, progress)
    if not all(map(math.isfinite, sums)):
        return NOT_FINITE
    clock.check()
    left = iter(sums)
    by_example = [list(islice(left, len(group))) for group in groups]
    if suite.metric == "perplexity":
        tokens = [sum(window.predicted for window in group) for group in groups]
        return perplexity([math.fsum(each) for each in by_example], tokens)
    scores = (
        _per_byte(each, question) if suite.per_byte else each
        for each, question in zip(by_example, examples.inputs, strict=True)
    )
    return accuracy([each.index(max(each)) for each in scores], examples.labels)


def _of_texts(known: Language, texts: Sequence[str]) -> list[list[Window]] | str:
    """The windows of each text. One begins with the token that the one before ended with."""
    groups = []
    for example, tokens in enumerate(known.tokens(texts)):
        whole = known.first + tokens
        if len(whole) < 2:
            return f"example {example} has no token that could be predicted"
        pieces = (whole[start : start + known.context] for start in range(0, len(whole) - 1, known.context - 1))
        groups.append([Window(piece, len(piece) - 1) for piece in pieces])
    return groups


def _of_choices(known: Language, questions: Sequence[Question]) -> list[list[Window]] | str:
    """One window for each choice of each question; of a long context the end is read."""
    wholes = iter(known.tokens([text + choice for text, choices in questions for choice in choices]))
    contexts = known.tokens([question.text for question in questions])
    groups = []
    for example, (question, context) in enumerate(zip(questions, contexts, strict=True)):
        group = []
        for whole in islice(wholes, len(question.choices)):
            predicted = len(whole) - _shared(whole, context)
            tokens = (known.first + whole)[-known.context :]
            if not 0 < predicted < len(tokens):
                return f"example {example} has a choice that cannot be predicted: nothing before it, or too long"
            group.append(Window(tokens, predicted))
        groups.append(group)
    return groups


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _per_byte(likelihoods: Sequence[float], question: Question) -> list[float]:
    return [each / len(choice.encode()) for each, choice in zip(likelihoods, question.choices, strict=True)]


def _likelihoods(
    known: Language, windows: Sequence[Window], batch_size: int, clock: Clock, progress: Progress | None
) -> list[float]:
    """The log-likelihood of each window's predicted tokens, in nats."""
    sums = [math.nan] * len(windows)
    cells = LOGITS // known.model.config.get_text_config().vocab_size
    done = 0
    for batch in batches([len(window.tokens) for window in windows], batch_size, cells):
        clock.check()
        logits = _logits(known, [windows[row].tokens for row in batch])
        for row, each in zip(batch, logits, strict=True):
            tokens, predicted = windows[row]
            wanted = torch.tensor(tokens[-predicted:], device=known.device)
            losses = cross_entropy(
                each[len(tokens) - predicted - 1 : len(tokens) - 1].float(), wanted, reduction="none"
            )
            sums[row] = -float(losses.double().sum())
        done += len(batch)
        if progress:
            progress(done, len(windows))
    return sums


def _logits(known: Language, rows: Sequence[Sequence[int]]) -> Tensor:
    """(rows, tokens, vocabulary); what stands behind a row's end is padding, which nothing before it sees."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=known.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=known.device)
    with torch.inference_mode():
        logits: Tensor = known.model(input_ids=tokens, attention_mask=mask).logits
    return logits


def _looks_ahead(known: Language) -> bool:
    """Whether a token's prediction depends on it: so it does where an encoder was built as a decoder."""
    first, second = _logits(known, [[0, 0], [0, 1]])[:, 0]
    return bool(first.isfinite().all() and second.isfinite().all()) and not torch.allclose(
        first, second, rtol=1e-3, atol=1e-4
    )
